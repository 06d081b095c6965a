"""Images of one's own in arrays, as ``arat-fast data prepare`` writes them."""

from __future__ import annotations

from pathlib import Path

from arat_fast.datasets.base import Content, Dataset, Samples, register
from arat_fast.datasets.rows import Images, MappedRows, read_labels
from arat_fast.datasets.splits import count_classes, split_folders


def array_folder(folder: Path) -> Images:
    """Images and labels as ``arat-fast data prepare`` writes them; the images are left on disk.

    Args:
        folder: holds images.npy, (num_samples, height, width, channels) uint8, and labels.npy.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: they are something else, or not as many labels as images.
    """
    images, labels = folder / "images.npy", folder / "labels.npy"
    for path in (images, labels):
        if not path.is_file():
            raise FileNotFoundError(
                f"no file {path}; arat-fast data prepare makes such a folder of an .npz file"
            )
    rows = MappedRows(images)
    with labels.open("rb") as file:
        return Images(rows, read_labels(file, labels, rows.shape[0]), folder)


def _read(root: Path) -> Content:
    folders = {"train": root}
    if not (root / "images.npy").exists():
        folders = split_folders(root) or {"train": root / "train"}
    parts: dict[str, Samples] = {split: array_folder(path) for split, path in folders.items()}
    return Content.of_splits(parts, tuple(map(str, range(count_classes(root, parts)))))


register(Dataset("arrays", _read, own=True))
