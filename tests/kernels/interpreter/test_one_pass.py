"""Split BatchNorm in one launch each way: programs that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernels.interpreter.turns import in_turns

import arat_kernels.split_batch_norm.one_pass as implementation
from arat_kernels.arrivals import counters
from arat_kernels.checks import Norm
from arat_kernels.implementation import experimental


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The cuts of the launches of a test, which are all in one pass."""
    found: list[Any] = []
    cut = implementation._cut
    for name in ("forward", "backward"):
        operator = getattr(implementation, name)

        def run(*given: Any, name: str = name, operator: Any = operator) -> Any:
            x, clean = (given[0], given[7]) if name == "forward" else (given[3], given[9])
            found.append(cut(x, clean, name))
            return operator(*given)

        monkeypatch.setattr(implementation, name, run)
    with experimental("one_pass"):
        yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "norm",
    [
        Norm(residual=False),
        Norm(),
        Norm(relu=False),
        Norm((0, 4), residual=False, affine=False),
        Norm((4, 0), residual=False, update=False),
    ],
    ids=str,
)
def test_as_two_passes_by_one_program(norm: Norm, dtype: torch.dtype, launches: list[Any]) -> None:
    norm = norm.changed(channels=48, pooled=False)
    norm.operation.check(norm.make(0, dtype))
    assert len(launches) == 2


def test_two_gradients_are_summed_before_they_are_rounded(launches: list[Any]) -> None:
    """The sums of both as precise as of one, in bf16."""
    norm = Norm((0, 4), 16, 8, 8, residual=False, pooled=False)
    tensors = norm.make(0, torch.bfloat16)
    x, mean, var = tensors["x"], torch.zeros(2, 16), torch.ones(2, 16)
    dy, dy_skip = (
        torch.randn(x.shape).bfloat16().to(memory_format=torch.channels_last) for _ in "ab"
    )
    _, sums, _ = implementation.backward(
        dy, dy_skip, None, x, mean, var, None, None, None, 0, 1e-5, False, False
    )
    both = dy.double() + dy_skip.double()
    expected = torch.stack([both.sum((0, 2, 3)), (both * x.double()).sum((0, 2, 3))])
    torch.testing.assert_close(sums[:, 1].double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "channels", "programs", "peers", "groups"),
    [
        # The adversarial branch needs all four programs, the clean one leaves two without rows;
        # six turns, one after the other.
        ((5, 13), 48, 5, 4, 1),
        # Two turns side by side, and again.
        ((0, 4), 256, 10, 5, 2),
        # All at once.
        ((3, 3), 32, 14, 7, 2),
    ],
)
def test_programs_wait_for_each_other(
    sizes: tuple[int, int],
    channels: int,
    programs: int,
    peers: int,
    groups: int,
    launches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(implementation, "programs_of", lambda *_: programs)
    monkeypatch.setattr(implementation, "_TILES", {"forward": (1, 4), "backward": (1, 4)})
    # Fewer partial results at once than there are.
    monkeypatch.setattr(implementation, "COMBINED_BYTES", 512)
    taken = []
    take = counters.take

    def taken_counters(*given: Any) -> torch.Tensor:
        taken.append(take(*given))
        return taken[-1]

    monkeypatch.setattr(counters, "take", taken_counters)
    norm = Norm(sizes, channels, 9, 8, pooled=False)
    tensors = norm.make(0, torch.float32)
    # The last rows of a branch are not like the first.
    for end in (sizes[0], sum(sizes)):
        tensors["x"][max(end - 2, 0) : end] += 5.0
    with in_turns():
        norm.operation.check(tensors)
    assert [(cut.peers, cut.grid[0] // cut.peers) for cut in launches] == [(peers, groups)] * 2
    assert len(taken) == 2 and not any(t.any() for t in taken)
