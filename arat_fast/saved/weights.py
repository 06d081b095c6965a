"""Files of weights, and whether they fit a network: what is wrong is said in one line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from arat_fast.models.registry import model_spec
from arat_fast.models.split_batch_norm import ADV
from arat_fast.training.checkpoint import kind_of
from arat_fast.training.metrics import NotFiniteError

_INSIDE = re.compile(
    r"(^|\.)(?:(?:_orig_mod|_forward_module|_(?:fsdp|checkpoint)_wrapped_module)\.)+"
)
"""What torch.compile, Fabric, FSDP and checkpointing put into names, of any part of a network."""

COUNTER = "n_averaged"
"""What AveragedModel writes beside the weights."""

_CHECKSUM = "arat_fast.sha256"
"""In a safetensors header: of the rest of the header and of the tensors."""

NORMALIZATION = "normalize."
"""Prefix of the mean and std beside a network inside RobustBench's ``normalize_model``."""


def difference(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes between the tensors of a network and those offered,
    and the number of all; None where there is none."""
    problems = []
    for name, tensor in expected.items():
        found = tuple(got[name].shape) if name in got else "none"
        if found != tuple(tensor.shape):
            problems.append(f"{name} has shape {found}, expected {tuple(tensor.shape)}")
        elif got[name].is_floating_point() != tensor.is_floating_point():
            problems.append(f"{name} is of {got[name].dtype}, expected {tensor.dtype}")
    problems += [f"{name} is not expected" for name in got if name not in expected]
    if not problems:
        return None
    more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
    return problems[0] + more


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load ``tensors``, which come from ``source``, into a network, all of them and nothing else.

    Raises:
        ValueError: a name or a shape differs, or a value is not finite; the network is unchanged.
    """
    problem = difference(model.state_dict(), tensors)
    if problem is not None:
        raise ValueError(f"{source} does not fit the network: {problem}")
    check_finite(tensors, source)
    model.load_state_dict(dict(tensors))


def fill_branches(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a network with another number of BatchNorm branches: one branch goes into both,
    of two the adversarial one is taken; ``own`` are the tensors of the network."""
    fitting = dict(tensors)
    for name, tensor in tensors.items():
        shape = own[name].shape if name in own else tensor.shape
        if shape == (2, *tensor.shape):
            fitting[name] = tensor.expand(shape).clone()
        elif tensor.shape == (2, *shape):
            fitting[name] = tensor[ADV]
    return fitting


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise where a weight or a statistic is NaN or infinite.

    Raises:
        NotFiniteError: names the first such tensor, and ``source``, where they come from.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating or bool(torch.stack([t.isfinite().all() for t in floating.values()]).all()):
        return
    bad = {name: int((~tensor.isfinite()).sum()) for name, tensor in floating.items()}
    names = [name for name, count in bad.items() if count]
    more = f" (and in {len(names) - 1} more tensors)" if len(names) > 1 else ""
    raise NotFiniteError(
        f"{source}: {bad[names[0]]} of {floating[names[0]].numel()} values of {names[0]} are NaN "
        f"or infinite{more}; take weights from before they broke"
    )


def network_size(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Number of logits and of image channels of a built-in network, from its state dict.

    Raises:
        ValueError: unknown name; the first convolution or the classifier is not there.
    """
    spec = model_spec(name)
    stem = tensors.get("conv1.weight")
    classifier = tensors.get(f"{spec.classifier}.bias")
    if stem is None or stem.ndim != 4 or classifier is None or classifier.ndim != 1:
        raise ValueError(
            f"{name} has conv1.weight and {spec.classifier}.bias, got "
            f"{', '.join(list(tensors)[:3])} … ({len(tensors)} tensors)"
        )
    return len(classifier), stem.shape[1]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU.

    Args:
        path: the file; where :func:`with_checksum` has been over it, it is compared with its
            checksum, which others' files do not have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        header, data = _parts(content)
        metadata = dict(header.get("__metadata__") or {})
        if metadata.pop(_CHECKSUM, None) not in (None, _checksum(header, data)):
            raise ValueError("the content differs from its checksum")
    except (safetensors.SafetensorError, ValueError) as error:
        kind = kind_of(content)
        if content.startswith(b"PK\x03\x04"):
            kind = "a zip archive, as torch.save writes it: give it the suffix .pt"
        elif content[8:9] == b"{":
            kind = "one that was cut or damaged"
        raise ValueError(
            f"{path} ({len(content)} bytes) cannot be read: expected a whole safetensors file, got "
            f"{kind} ({error})"
        ) from error
    return tensors, metadata


def with_checksum(content: bytes) -> bytes:
    """A safetensors file with a SHA-256 in its header, whose order no longer depends on chance."""
    header, data = _parts(content)
    header["__metadata__"] = {
        **header.get("__metadata__", {}),
        _CHECKSUM: _checksum(header, data),
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    # The tensors begin at a multiple of eight bytes, as the format wants it.
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def _parts(content: bytes) -> tuple[dict[str, Any], memoryview]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), memoryview(content)[end:]


def _checksum(header: Mapping[str, Any], data: memoryview) -> str:
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != _CHECKSUM}
    rest = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    digest = hashlib.sha256(rest.encode())
    digest.update(data)
    return digest.hexdigest()


def state_dict_of(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, bare or under one key, also nested, without what was
    wrapped around its network.

    Raises:
        ValueError: there is something else in it, or several networks.
    """
    while isinstance(content, Mapping) and not _is_weight(*content.values()):
        held = [key for key, value in content.items() if _holds_network(value)]
        if len(held) > 1:
            raise ValueError(
                f"{path} holds several networks, {', '.join(map(str, held))}: keep one alone, "
                f"torch.save(torch.load({path.name!r}, weights_only=True)[{held[0]!r}], "
                "'weights.pt')"
            )
        if not held:
            break
        content = content[held[0]]
    items: Any = content.items() if isinstance(content, Mapping) else [("all", content)]
    for name, value in items:
        kind = type(value).__name__
        if isinstance(value, Tensor):
            kind = "" if value.layout == torch.strided and not value.is_meta else "sparse or empty"
        if not isinstance(name, str) or kind:
            raise ValueError(
                f"{path} is not a state dict: expected tensors by name, bare or under one key "
                f"(state_dict, model, …), got {name!r} of type {kind or 'Tensor'}"
            )
    if not items:
        raise ValueError(f"{path} is not a state dict: expected tensors by name, got no tensor")
    return without_wrappers(dict(items))


def _is_weight(*values: object) -> bool:
    """Whether one of them is of a layer's weights, rather than a number or random state."""
    return any(isinstance(value, Tensor) and value.ndim > 1 for value in values)


def _holds_network(value: object) -> bool:
    """Whether there are weights in it, at any depth; an optimiser's averages are none."""
    if not isinstance(value, Mapping) or "param_groups" in value:
        return False
    return _is_weight(*value.values()) or any(map(_holds_network, value.values()))


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without :data:`COUNTER`, and without what all names begin with (``module.``,
    ``model.``, ``ema.``, …: no network has one part alone); the normalisation beside a network
    keeps its names."""
    state = {_INSIDE.sub(r"\1", name): tensor for name, tensor in state.items()}
    while True:
        state = {name: tensor for name, tensor in state.items() if name != COUNTER}
        parts = {name.partition(".")[::2] for name in state if not name.startswith(NORMALIZATION)}
        first = {part for part, rest in parts if rest} if all(rest for _, rest in parts) else set()
        if len(first) != 1:
            return state
        prefix = f"{first.pop()}."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def is_split(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of a network with split BatchNorm, of two rows each."""
    return any(t.ndim == 2 for name, t in tensors.items() if name.endswith(".running_mean"))
