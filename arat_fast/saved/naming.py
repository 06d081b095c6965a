"""The built-in networks under the parameter names of RobustBench, torchvision and timm.

Every scheme renames; no tensor changes. A network that a library has no class for is refused rather
than written under names that load nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

Scheme = tuple[tuple[str, str], ...]
_TORCHVISION = (
    (".shortcut_bn.", ".downsample.1."),
    (".shortcut.", ".downsample.0."),
    ("linear.", "fc."),
)
_PREACT: Scheme = ((".convShortcut.", ".shortcut.0."),)
"""RobustBench's PreActResNet, whose names are not those of its WideResNet."""

SCHEMES: dict[str, Scheme] = {
    "hub": (),
    "robustbench": ((".shortcut_bn.", ".shortcut.1."), (".shortcut.weight", ".shortcut.0.weight")),
    "torchvision": _TORCHVISION,
    "timm": _TORCHVISION,
}
"""What is replaced in the names of the built-in networks; "hub" keeps them."""

NETWORKS: dict[str, tuple[str, ...]] = {
    "robustbench": ("resnet18", "wrn34-10"),
    "torchvision": ("resnet18", "resnet50"),
    "timm": ("resnet18", "resnet50"),
}
"""The built-in networks that a library has a class for."""


def to_scheme(state: Mapping[str, Tensor], model: str, scheme: str) -> dict[str, Tensor]:
    """Names of a built-in network with ordinary BatchNorm → names of another library.

    Args:
        state: ``model.state_dict()``; the tensors are not copied.
        model: name of the built-in network.
        scheme: one of :data:`SCHEMES`.

    Raises:
        ValueError: the library has no class for the network.
    """
    known = NETWORKS.get(scheme, (model,))
    if model not in known:
        raise ValueError(
            f"{scheme} has no class for {model}, only for {' and '.join(known)}: export it in the "
            "format hub, torch-export or onnx"
        )
    return _renamed(state, SCHEMES[scheme])


def to_own(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Inverse of :func:`to_scheme`, of the scheme that gives the names ``own``; unchanged if none
    does."""
    for scheme in (*SCHEMES.values(), _PREACT):
        named = _renamed(state, [(new, old) for old, new in scheme])
        if named.keys() == set(own):
            return named
    return dict(state)


def _renamed(
    state: Mapping[str, Tensor], replacements: Iterable[tuple[str, str]]
) -> dict[str, Tensor]:
    named = dict(state)
    for old, new in replacements:
        named = {name.replace(old, new): tensor for name, tensor in named.items()}
    return named
