"""Imagenette at 160 pixels: ten classes of ImageNet, as JPEG files."""

from __future__ import annotations

from pathlib import Path

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.folder import labelled_files
from arat_fast.datasets.members import strays
from arat_fast.datasets.published import HINT, fetch_folder, require_folder

CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""Names by class folder, in the order of the labels."""

FOLDER = "imagenette2-160"


def _read(root: Path) -> Content:
    folder = root / FOLDER
    require_folder(folder, "imagenette")
    parts, bad = {}, []
    for split, place in (("train", "train"), ("test", "val")):
        classes = [folder / place / name for name in CLASSES]
        parts[split], others = labelled_files([[each] for each in classes], HINT)
        bad += others
        bad += strays(folder / place, classes, f"the folders {', '.join(CLASSES)}")
    return Content(parts, tuple(CLASSES.values()), tuple(bad))


def _fetch(root: Path) -> None:
    from torchvision.datasets import Imagenette

    url, md5 = Imagenette._ARCHIVES["160px"]
    fetch_folder(url, root / url.rsplit("/", 1)[-1], md5, root / FOLDER)


register(
    Dataset(
        "imagenette",
        _read,
        _fetch,
        num_classes=len(CLASSES),
        crop="pad",
        places={FOLDER: "Imagenette, 160 pixels"},
        label="Imagenette",
    )
)
