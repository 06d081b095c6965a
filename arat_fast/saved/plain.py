"""The network that is deployed: ordinary BatchNorm, weights as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from arat_fast.files import write_bytes
from arat_fast.models.batch_norm import PlainBatchNorm2d
from arat_fast.models.split_batch_norm import ADV, CLEAN, SplitBatchNorm2d, copy_network
from arat_fast.saved.weights import check_finite, with_checksum


def export_plain(model: nn.Module, branch: Literal["clean", "adv"] = "adv") -> nn.Module:
    """A copy of a network with ordinary ``nn.BatchNorm2d`` layers, those of one branch.

    A built-in network becomes what ``create_model(..., norm="shared")`` builds. Module paths and
    training mode stay; ``model`` itself is unchanged. In eval mode its logits are those of the
    branch, bit for bit.

    Args:
        model: any network with :class:`arat_fast.models.SplitBatchNorm2d` layers.
        branch: "adv", the model that is deployed, or "clean".

    Raises:
        ValueError: unknown branch, or the network has no split layer.
    """
    if branch not in ("clean", "adv"):
        raise ValueError(f'branch must be "clean" or "adv", got {branch!r}')
    if not any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        raise ValueError("a network with split BatchNorm is expected, got one without")
    plain, row = copy_network(model), ADV if branch == "adv" else CLEAN
    # A layer of two names must stay one.
    done: dict[SplitBatchNorm2d, nn.BatchNorm2d] = {}
    for path, module in list(plain.named_modules(remove_duplicate=False)):
        if not isinstance(module, SplitBatchNorm2d):
            continue
        if module not in done:
            done[module] = _plain_layer(module, row)
        if not path:
            return done[module]
        parent, _, name = path.rpartition(".")
        setattr(plain.get_submodule(parent), name, done[module])
    return plain


def save_safetensors(
    model: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write parameters and buffers to a safetensors file, whole or not at all.

    Equal tensors and metadata make the same bytes; :func:`arat_fast.saved.weights.read_safetensors`
    compares the file with the checksum in its header.

    Args:
        model: any network, or its state dict; tensors that share memory are written one by one.
        path: the file; its folder exists.
        metadata: strings kept in the file's header.

    Raises:
        NotFiniteError: a value is NaN or infinite.
        OSError: the file cannot be written.
    """
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    check_finite(tensors, str(path))
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_bytes(Path(path), with_checksum(safetensors.torch.save(copies, dict(metadata or {}))))


class _BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm, dropout, activation: what a converted BatchNormAct2d of timm is exported to."""

    def __init__(
        self, num_features: int, drop: nn.Module, act: nn.Module, **kwargs: object
    ) -> None:
        super().__init__(num_features, **kwargs)  # type: ignore[arg-type]  # forwarded keywords
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


def _plain_layer(split: SplitBatchNorm2d, row: int) -> nn.BatchNorm2d:
    keywords: dict[str, object] = {
        "eps": split.eps,
        "momentum": split.momentum,
        "affine": split.weight is not None,
        "device": split.running_mean.device,
        "dtype": split.running_mean.dtype,
    }
    drop, act = getattr(split, "drop", None), getattr(split, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        plain: nn.BatchNorm2d = _BatchNormAct2d(split.num_features, drop, act, **keywords)
    else:
        plain = PlainBatchNorm2d(split.num_features, **keywords)  # type: ignore[arg-type]  # mixed
    own = split.state_dict()
    with torch.no_grad():
        tensors = (*plain.named_parameters(recurse=False), *plain.named_buffers(recurse=False))
        for name, tensor in tensors:
            tensor.copy_(own[name][row])
    if split.weight is not None and split.bias is not None:
        plain.weight.requires_grad_(split.weight.requires_grad)
        plain.bias.requires_grad_(split.bias.requires_grad)
    plain.training = split.training
    return plain
