"""Whether weights fit a network, said in one line."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def difference(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes and the number of all; None where there is none.

    Args:
        expected: the tensors of the network, as in ``model.state_dict()``.
        got: the tensors offered.
    """
    problems = []
    for name, tensor in expected.items():
        if name not in got:
            problems.append(f"{name} is missing, expected shape {tuple(tensor.shape)}")
        elif got[name].shape != tensor.shape:
            problems.append(
                f"{name} has shape {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
            )
    problems += [f"{name} is not expected" for name in got if name not in expected]
    if not problems:
        return None
    more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
    return problems[0] + more


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load ``tensors`` into ``model``, all of them and nothing else.

    Args:
        model: the network.
        tensors: as in ``model.state_dict()``.
        source: where they come from, for the error.

    Raises:
        ValueError: a name or a shape differs; the network is unchanged.
    """
    problem = difference(model.state_dict(), tensors)
    if problem is not None:
        raise ValueError(f"{source} does not fit the network: {problem}")
    model.load_state_dict(dict(tensors))
