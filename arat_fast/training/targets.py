"""What a batch is trained towards: mixed images, smoothed and weighed labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from arat_fast.config import TargetsConfig

Load: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Targets:
    """Images and labels → images and a distribution over the classes for each.

    Both halves of a step are made of the images that come out, so that a mix is the same for clean
    and adversarial ones. Partners are the images in reverse order, within the part of a batch that
    a process takes at once. A target's row sums to the weight of its sample.

    Args:
        num_classes: K.
        label_smoothing: mass that is spread evenly over all classes, in [0, 1).
        mix: "none"; "mixup": ``λ x_i + (1 - λ) x_j``; "cutmix": a rectangle of ``x_j``, of area
            ``1 - λ`` where it is not cut off, at a random place of ``x_i``. One ``λ`` and one place
            a batch; targets are mixed by the share of the pixels.
        alpha: ``λ`` is drawn from Beta(alpha, alpha); > 0.
        class_weights: K numbers >= 0, factors of the samples' losses; empty for none. The loss is
            the mean over the batch, not divided by the weights.
        device: of the batches.

    Raises:
        ValueError: the class weights are not one for each class.

    Source: Szegedy et al., CVPR 2016, section 7; Zhang et al., ICLR 2018 (arXiv 1710.09412),
    equation 1; Yun et al., ICCV 2019 (arXiv 1905.04899), equations 1 and 2.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        mix: str = "none",
        alpha: float = 1.0,
        class_weights: Sequence[float] = (),
        device: torch.device | None = None,
    ) -> None:
        if class_weights and len(class_weights) != num_classes:
            raise ValueError(
                f"targets.class_weights must be one for each of the {num_classes} classes, got "
                f"{len(class_weights)}"
            )
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.alpha = alpha
        self.mix = _MIXES[mix]
        # Made here: nothing is copied from the host inside a captured step.
        self.weights = torch.tensor(class_weights or [1.0] * num_classes, device=device)

    @classmethod
    def of(cls, config: TargetsConfig, num_classes: int, device: torch.device) -> Targets | None:
        """Those of a run; None where its labels stay what they are."""
        if config == type(config)():
            return None
        return cls(
            num_classes,
            label_smoothing=config.label_smoothing,
            mix=config.mix,
            alpha=config.mix_alpha,
            class_weights=config.class_weights,
            device=device,
        )

    def after(self, load: Load, generator: torch.Generator | None) -> Load:
        """A ``load`` whose images and targets are these.

        Args:
            load: gives images (N, C, H, W) in [0, 1] and labels (N,), int64.
            generator: of the draws, on the device of the images; None: PyTorch's default one.
        """

        def mixed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            x, y = load(*inputs)
            # Not one_hot, which asks the device for the largest label.
            classes = torch.arange(self.num_classes, device=y.device)
            target = (y[:, None] == classes).to(x.dtype)
            share = _beta(self.alpha, generator, x)
            x, target = self.mix(x, target, share, generator)
            weight = target @ self.weights.to(x.dtype)
            smooth = self.label_smoothing
            return x, weight[:, None] * ((1 - smooth) * target + smooth / self.num_classes)

        return mixed


Mix: TypeAlias = Callable[[Tensor, Tensor, Tensor, torch.Generator | None], tuple[Tensor, Tensor]]


def _unmixed(
    x: Tensor, target: Tensor, share: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    return x, target


def mixup(
    x: Tensor, target: Tensor, share: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Every image and its target, and those of its partner.

    Args:
        x: images (N, C, H, W).
        target: (N, K).
        share: 0-d, of the image itself, in [0, 1].
        generator: not drawn from.
    """
    # Rounding could leave the range.
    return torch.lerp(x.flip(0), x, share).clamp(0, 1), torch.lerp(target.flip(0), target, share)


def cutmix(
    x: Tensor, target: Tensor, share: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Every image with a rectangle of its partner.

    Args: as for :func:`mixup`; ``generator`` draws the centre of the rectangle.
    """
    centre = torch.rand(2, generator=generator, device=x.device, dtype=x.dtype)
    sides = [(1 - share).sqrt() * size for size in x.shape[-2:]]
    inside = []
    for size, side, place in zip(x.shape[-2:], sides, centre, strict=True):
        half, middle = (side.floor() / 2).floor(), (place * size).floor()
        at = torch.arange(size, device=x.device)
        inside.append((at >= middle - half) & (at < middle + half))
    window = inside[0][:, None] & inside[1]
    kept = 1 - window.to(x.dtype).mean()
    return torch.where(window, x.flip(0), x), torch.lerp(target.flip(0), target, kept)


_MIXES: dict[str, Mix] = {"none": _unmixed, "mixup": mixup, "cutmix": cutmix}


def _beta(alpha: float, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """A number of Beta(alpha, alpha), 0-d, of the dtype and on the device of ``like``."""
    shape = torch.full((2,), alpha, dtype=torch.float64, device=like.device)
    # What torch.distributions calls, which takes no generator.
    drawn = torch._standard_gamma(shape, generator=generator)
    return (drawn[0] / drawn.sum()).to(like.dtype)
