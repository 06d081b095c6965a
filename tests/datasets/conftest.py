"""Small datasets in the files' real formats, with the published checksums replaced by their own."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from arat_fast.datasets.cifar import BINARY as CIFAR_BINARY
from arat_fast.datasets.imagenette import CLASSES as IMAGENETTE_CLASSES


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class PublishedFiles:
    """Writes dataset files below ``root`` and has torchvision expect their checksums."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch

    def cifar(
        self,
        name: str = "cifar10",
        num_train: int = 60,
        num_test: int = 12,
        edit: Callable[[dict[str, Any]], None] | None = None,
    ) -> Path:
        """CIFAR's folder; ``edit`` changes the content of the first training file."""
        dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        folder = self.root / str(dataset.base_folder)
        folder.mkdir()
        num_classes = 10 if name == "cifar10" else 100
        rng = np.random.default_rng(1)
        num_files = len(dataset.train_list)
        sizes = [num_train // num_files] * num_files
        for number, (names, counts) in enumerate(
            ((dataset.train_list, sizes), (dataset.test_list, [num_test]))
        ):
            first = 0
            for index, ((file, _), count) in enumerate(zip(names, counts, strict=True)):
                content: dict[str, Any] = {
                    "batch_label": f"batch {index + 1}",
                    "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                    "filenames": [f"image_{i}.png" for i in range(first, first + count)],
                }
                labels = [(first + i) % num_classes for i in range(count)]
                first += count
                if name == "cifar10":
                    content["labels"] = labels
                else:
                    content["fine_labels"] = labels
                    content["coarse_labels"] = [label // 5 for label in labels]
                if edit is not None and number == 0 and index == 0:
                    edit(content)
                (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        meta = {dataset.meta["key"]: [f"class {i}" for i in range(num_classes)]}
        (folder / dataset.meta["filename"]).write_bytes(pickle.dumps(meta, protocol=2))
        self.publish_cifar(name)
        return folder

    def publish_cifar(self, name: str = "cifar10") -> None:
        """Take the files that are there for the published ones."""
        dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        folder = self.root / dataset.base_folder
        for attribute in ("train_list", "test_list"):
            files = [[file, _md5(folder / file)] for file, _ in getattr(dataset, attribute)]
            self.monkeypatch.setattr(dataset, attribute, files)
        meta = {**dataset.meta, "md5": _md5(folder / dataset.meta["filename"])}
        self.monkeypatch.setattr(dataset, "meta", meta)

    def cifar_binary(self, name: str) -> Path:
        """The binary version of the Python files that are there, in a folder of its own."""
        dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        folder_name, train, test, meta, num_labels = CIFAR_BINARY[name]
        folder = self.root / "binary" / folder_name
        folder.mkdir(parents=True)
        pickles = [file for file, _ in [*dataset.train_list, *dataset.test_list]]
        for file, target in zip(pickles, [*train, *test], strict=True):
            content = pickle.loads((self.root / dataset.base_folder / file).read_bytes())
            keys = ["coarse_labels", "fine_labels"] if num_labels == 2 else ["labels"]
            columns = [np.array(content[key], np.uint8)[:, None] for key in keys]
            (folder / target).write_bytes(np.hstack([*columns, content["data"]]).tobytes())
        names = "".join(f"class {i}\n" for i in range(10 if name == "cifar10" else 100))
        (folder / meta).write_text(f"{names}\n")
        return folder

    def svhn(
        self, labels: list[int] | None = None, size: int = 32, num_test: int = 11
    ) -> dict[str, np.ndarray[Any, Any]]:
        """SVHN's two files; the pixels that were written, by split."""
        rng = np.random.default_rng(2)
        split_list = dict(datasets.SVHN.split_list)
        pixels = {}
        train_labels = labels if labels is not None else [1 + i % 10 for i in range(40)]
        for split, y in (("train", train_labels), ("test", [1 + i % 10 for i in range(num_test)])):
            url, name, _ = split_list[split]
            pixels[split] = rng.integers(0, 256, (size, size, 3, len(y)), dtype=np.uint8)
            content = {"X": pixels[split], "y": np.array(y, dtype=np.uint8)[:, None]}
            scipy.io.savemat(self.root / name, content, do_compression=True)
            split_list[split] = [url, name, _md5(self.root / name)]
        self.monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
        return pixels

    def imagenette(self, per_class: int = 2) -> Path:
        """Imagenette's folder of JPEG files, of several sizes and colour modes."""
        rng = np.random.default_rng(3)
        folder = self.root / "imagenette2-160"
        sizes = [(20, 27), (31, 16), (12, 40), (16, 16)]
        for split in ("train", "val"):
            for label, wnid in enumerate(IMAGENETTE_CLASSES):
                (folder / split / wnid).mkdir(parents=True)
                for index in range(per_class):
                    height, width = sizes[(label + index) % len(sizes)]
                    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                    image = Image.fromarray(coarse).resize(
                        (width, height), Image.Resampling.BICUBIC
                    )
                    if label == 3:
                        image = image.convert("L")
                    image.save(folder / split / wnid / f"{wnid}_{index}.JPEG", quality=90)
        return folder

    def tiny_imagenet(self, per_class: int = 3) -> Path:
        """Tiny-ImageNet's folder with four classes; every third image is grey."""
        rng = np.random.default_rng(4)
        folder = self.root / "tiny-imagenet-200"
        names = {
            "n02124075": "Egyptian cat",
            "n01443537": "goldfish, Carassius auratus",
            "n04067472": "reel",
            "n03444034": "go-kart",
        }
        (folder / "val" / "images").mkdir(parents=True)
        (folder / "test" / "images").mkdir(parents=True)

        def write(path: Path, grey: bool) -> None:
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image = coarse.resize((64, 64), Image.Resampling.BICUBIC)
            (image.convert("L") if grey else image).save(path, quality=90)

        lines = []
        for label, wnid in enumerate(names):
            images = folder / "train" / wnid / "images"
            images.mkdir(parents=True)
            for index in range(per_class):
                write(images / f"{wnid}_{index}.JPEG", index % 3 == 2)
            boxes = "".join(f"{wnid}_{i}.JPEG\t0\t10\t63\t58\n" for i in range(per_class))
            (images.parent / f"{wnid}_boxes.txt").write_text(boxes)
            write(folder / "val" / "images" / f"val_{label}.JPEG", label == 1)
            write(folder / "test" / "images" / f"test_{label}.JPEG", False)
            lines.append(f"val_{label}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        (folder / "val" / "val_annotations.txt").write_text("".join(lines))
        (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in names))
        words = {"n00001740": "entity", **names}
        (folder / "words.txt").write_text("".join(f"{k}\t{v}\n" for k, v in words.items()))
        return folder


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedFiles:
    return PublishedFiles(tmp_path, monkeypatch)
