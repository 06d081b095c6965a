"""Small image files of known content."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def picture(seed: int, height: int = 40, width: int = 50) -> Image.Image:
    """Soft colours with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-9, 10, (height, width, 1))
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, suffix: str) -> bytes:
    """The content of a file of that kind."""
    kinds = {".jpg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
    buffer = io.BytesIO()
    options = {"quality": 92} if suffix == ".jpg" else {}
    image.save(buffer, kinds[suffix], **options)
    return buffer.getvalue()


def image_folder(
    root: Path, per_class: int = 5, suffix: str = ".png", splits: tuple[str, ...] = ("train", "val")
) -> Path:
    """Class folders; images of several sizes, in grey, RGBA and CMYK too."""
    seed = 0
    for split in splits:
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                seed += 1
                image = picture(seed, 30 + 7 * (seed % 4), 34 + 5 * (seed % 3))
                if index == 1:
                    image = image.convert("L")
                elif index == 2:
                    image = image.convert("CMYK" if suffix == ".jpg" else "RGBA")
                (folder / f"{label}_{index}{suffix}").write_bytes(encoded(image, suffix))
    return root


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_shard(
    path: Path, first: int, number: int, suffix: str = ".jpg", names: Sequence[str] = ()
) -> Path:
    """A WebDataset shard; the label of an image is its number modulo the classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for place in range(number):
            index = first + place
            name = names[place] if names else f"sample/{index:05}{suffix}"
            add_member(tar, name, encoded(picture(index), suffix))
            label = str(index % len(CLASSES)).encode()
            add_member(tar, f"{name.removesuffix(Path(name).suffix)}.cls", label)
    return path


class Planted:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)
