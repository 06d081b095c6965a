"""Common corruptions, made on the fly: fifteen kinds in five severities.

The kinds are those of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261). The implementations
and the severities are this project's own, and scale with the image, so that 8, 32 and 224 pixels
all work. The figures are therefore not those of the CIFAR-10-C or ImageNet-C files and must not be
compared with them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

NUM_SEVERITIES = 5
CHUNK = 100
"""Images that share a random generator; results do not depend on the batch size."""

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def corrupt(x: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupted copies of images.

    Args:
        x: images (N, C, H, W), float32 in [0, 1]; C is 1 or 3 for "jpeg_compression".
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: of what is random; an image's corruption also depends on its place in ``x``.

    Returns:
        (N, C, H, W), float32 in [0, 1], on the device of ``x``.

    Raises:
        ValueError: unknown name, or severity out of range.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}, expected one of {', '.join(CORRUPTIONS)}")
    if not 1 <= severity <= NUM_SEVERITIES:
        raise ValueError(f"severity must be 1 to {NUM_SEVERITIES}, got {severity}")
    function, levels = CORRUPTIONS[name]
    corrupted = []
    for index, chunk in enumerate(torch.split(x, CHUNK)):
        key = hashlib.sha256(f"{seed} {name} {severity} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        corrupted.append(function(chunk, levels[severity - 1], generator).clamp(0, 1))
    return torch.cat(corrupted) if corrupted else x.clone()


def _normal(x: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape or x.shape, generator=generator).to(x.device)


def _uniform(x: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape or x.shape, generator=generator).to(x.device)


def _gaussian_noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return x + deviation * _normal(x, generator)


def _shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(x.cpu() * photons, generator=generator).to(x.device) / photons


def _impulse_noise(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    draw = _uniform(x, generator)
    x = torch.where(draw < share / 2, 0.0, x)
    return torch.where(draw > 1 - share / 2, 1.0, x)


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel filtered with one kernel (kH, kW) of odd sides; the border is repeated."""
    channels = x.shape[1]
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(x, (columns, columns, rows, rows), mode="replicate")
    weight = kernel.to(x)[None, None].expand(channels, 1, -1, -1)
    return F.conv2d(padded, weight, groups=channels)


def _blur(x: Tensor, deviation: float) -> Tensor:
    """Gaussian blur; ``deviation`` in pixels."""
    radius = max(1, math.ceil(3 * deviation))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / deviation) ** 2)
    weights = weights / weights.sum()
    return _filter(_filter(x, weights[:, None]), weights[None, :])


def _side(x: Tensor) -> int:
    return min(x.shape[2], x.shape[3])


def _defocus_blur(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A disk whose border is shared by the pixels that it crosses; ``share`` beyond a pixel's."""
    radius = 0.5 + share * _side(x)
    half, fine = math.ceil(radius), 9
    count = (2 * half + 1) * fine
    places = (torch.arange(count) + 0.5) / fine - half - 0.5
    inside = (places[:, None] ** 2 + places[None, :] ** 2 <= radius**2).float()
    disk = F.avg_pool2d(inside[None, None], fine)[0, 0]
    return _filter(x, disk / disk.sum())


def _grid(x: Tensor) -> Tensor:
    """Sampling places of the pixels themselves, (N, H, W, 2), as ``grid_sample`` takes them."""
    identity = torch.eye(2, 3, device=x.device, dtype=x.dtype).expand(len(x), -1, -1)
    return F.affine_grid(identity, list(x.shape), align_corners=False)


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _glass_blur(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each pixel is fetched from a random place near its own; ``share`` of the side at most."""
    reach = 2 * (2 * _uniform(x, generator, len(x), *x.shape[2:], 2) - 1) * share
    return _sample(_blur(x, max(0.3, 0.01 * _side(x))), _grid(x) + reach)


def _motion_blur(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The mean along a line of random direction; ``share`` is its length over the side."""
    angle = math.pi * _uniform(x, generator, len(x), 1, 1)
    # Places run from -1 to 1, so that the side is 2 long.
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1) * 2 * share
    steps = max(3, 2 * math.ceil(share * _side(x)) + 1)
    grid = _grid(x)
    total = torch.zeros_like(x)
    for place in torch.linspace(-0.5, 0.5, steps).tolist():
        total += _sample(x, grid + place * direction)
    return total / steps


def _zoom_blur(x: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """The mean of the image and of enlarged ones, up to the factor ``most``."""
    steps = max(3, math.ceil((most - 1) * _side(x)) + 1)
    grid = _grid(x)
    total = torch.zeros_like(x)
    for factor in torch.linspace(1, most, steps).tolist():
        total += _sample(x, grid / factor)
    return total / steps


def _clouds(x: Tensor, generator: torch.Generator, roughness: float) -> Tensor:
    """Random fields (N, 1, H, W) in [0, 1], coarse and fine features summed.

    Each octave has twice the places of the one before and ``roughness`` times its height.
    """
    count, _, height, width = x.shape
    field = torch.zeros(count, 1, height, width, device=x.device)
    places, weight = 2, 1.0
    while places <= max(height, width):
        octave = _uniform(x, generator, count, 1, places, places)
        field += weight * F.interpolate(
            octave, size=(height, width), mode="bilinear", align_corners=True
        )
        places, weight = 2 * places, weight * roughness
    low, high = field.amin(dim=(2, 3), keepdim=True), field.amax(dim=(2, 3), keepdim=True)
    return (field - low) / (high - low).clamp(min=1e-6)


def _snow(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Flakes that fall along a line, on an image that is a little whiter."""
    flakes = (_uniform(x, generator, len(x), 1, *x.shape[2:]) < share).to(x.dtype)
    flakes = _motion_blur(flakes, 0.08, generator)
    flakes = flakes / flakes.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    whiter = x + share * (1 - x)
    return whiter + flakes * (1 - whiter)


def _frost(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Bright ridges, where a random field crosses its middle, over a darker image."""
    ridges = 1 - (2 * _clouds(x, generator, 0.8) - 1).abs()
    return (1 - 0.5 * strength) * x + strength * ridges**3


def _fog(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    hazy = x + strength * _clouds(x, generator, 0.6)
    return hazy * brightest / (brightest + strength)


def _brightness(x: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    return x + shift


def _contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + factor * (x - mean)


def _elastic_transform(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Smooth random displacements; ``share`` is their largest size over the side."""
    noise = _uniform(x, generator, len(x), 2, *x.shape[2:]) * 2 - 1
    field = _blur(noise, max(0.7, 0.06 * _side(x)))
    field = field / field.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return _sample(x, _grid(x) + 2 * share * field.permute(0, 2, 3, 1))


def _pixelate(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    height, width = x.shape[2:]
    small = F.adaptive_avg_pool2d(
        x, (max(1, round(height * factor)), max(1, round(width * factor)))
    )
    return F.interpolate(small, size=(height, width), mode="nearest")


def _jpeg_compression(x: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    if x.shape[1] not in (1, 3):
        raise ValueError(f"JPEG takes images of 1 or 3 channels, got {x.shape[1]}")
    mode = ImageReadMode.GRAY if x.shape[1] == 1 else ImageReadMode.RGB
    pixels = (x * 255).round().to(torch.uint8).cpu()
    decoded = [decode_jpeg(encode_jpeg(image, quality=round(quality)), mode) for image in pixels]
    return torch.stack(decoded).to(x) / 255


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "shot_noise": (_shot_noise, (250, 100, 50, 25, 12)),
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.06, 0.1, 0.17)),
    "defocus_blur": (_defocus_blur, (0.01, 0.02, 0.03, 0.04, 0.05)),
    "glass_blur": (_glass_blur, (0.02, 0.035, 0.05, 0.07, 0.1)),
    "motion_blur": (_motion_blur, (0.06, 0.1, 0.15, 0.2, 0.26)),
    "zoom_blur": (_zoom_blur, (1.08, 1.14, 1.2, 1.27, 1.34)),
    "snow": (_snow, (0.02, 0.05, 0.09, 0.14, 0.2)),
    "frost": (_frost, (0.2, 0.35, 0.5, 0.65, 0.8)),
    "fog": (_fog, (0.4, 0.8, 1.2, 1.7, 2.4)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.7, 0.5, 0.35, 0.22, 0.12)),
    "elastic_transform": (_elastic_transform, (0.02, 0.035, 0.05, 0.07, 0.1)),
    "pixelate": (_pixelate, (0.75, 0.6, 0.45, 0.35, 0.25)),
    "jpeg_compression": (_jpeg_compression, (60, 35, 20, 12, 7)),
}
"""Each corruption with its level at severities 1 to 5: a share of the image side for blurs and
displacements, a deviation, a number of photons, a share of the pixels, a factor or JPEG's quality.
"""
