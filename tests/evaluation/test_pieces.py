"""Finished pieces on disk: used again for the same evaluation, never for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arat_fast.evaluation.pieces import Pieces, checksum


class Folder:
    """Asks for pieces whose value is the number of the question, and knows which were computed."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.calls: list[int] = []

    def evaluation(self, checksum: str = "one") -> Pieces:
        return Pieces(self.path, checksum)

    def ask(self, pieces: Pieces, name: str, number: int) -> float:
        def compute() -> dict[str, Tensor]:
            self.calls.append(number)
            return {"value": torch.tensor([float(number)]), "mask": torch.tensor([True, False])}

        found = pieces.get(name, compute, torch.device("cpu"))
        assert found["mask"].tolist() == [True, False]
        return found["value"].item()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "p")


def test_a_piece_is_computed_once_in_an_evaluation(folder: Folder) -> None:
    assert folder.ask(folder.evaluation(), "a", 1) == 1
    again = folder.evaluation()
    assert [folder.ask(again, "a", 2), folder.ask(again, "b", 3)] == [1, 3]
    # Another one starts afresh and leaves the first alone.
    other = folder.evaluation("two")
    assert folder.ask(other, "a", 4) == 4
    other.remove()
    assert folder.ask(folder.evaluation(), "a", 5) == 1
    assert folder.calls == [1, 3, 4]
    again.remove()
    assert folder.path is not None and not folder.path.exists()


def test_two_of_the_same_evaluation_at_once(folder: Folder) -> None:
    """One comes to its end while the other still works; each removes what it asked for."""
    long, short = folder.evaluation(), folder.evaluation()
    folder.ask(long, "hours", 1)
    folder.ask(short, "look", 2)
    short.remove()
    resumed = folder.evaluation()
    assert folder.ask(resumed, "hours", 3) == 1
    resumed.remove()
    # The folder is gone and the first still writes to it.
    folder.ask(long, "more", 4)
    assert folder.ask(folder.evaluation(), "more", 5) == 4
    assert folder.calls == [1, 2, 4]


@pytest.mark.parametrize("size", [0, 100])
def test_a_cut_piece_is_computed_again(folder: Folder, tmp_path: Path, size: int) -> None:
    folder.ask(folder.evaluation(), "a", 1)
    path = tmp_path / "p" / "one" / "a.npz"
    path.write_bytes(path.read_bytes()[:size])
    assert folder.ask(folder.evaluation(), "a", 2) == 2


def test_without_a_folder_nothing_is_kept() -> None:
    folder = Folder(None)
    pieces = folder.evaluation()
    assert [folder.ask(pieces, "a", number) for number in (1, 2)] == [1, 2]
    pieces.remove()


@pytest.mark.parametrize("change", ["weight", "buffer", "image", "setting", "nothing"])
def test_the_checksum_is_of_everything(change: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mean", torch.zeros(2), persistent=False)
    x = torch.zeros(3, 2)
    before = checksum(model, {"x": x}, {"seed": 0, "eps": 0.1})
    with torch.no_grad():
        if change == "weight":
            model.weight[0, 0] += 1
        if change == "buffer":
            model.get_buffer("mean")[1] = 0.5
        if change == "image":
            x[2, 1] = 0.5
    after = checksum(model, {"x": x}, {"eps": 0.1, "seed": 1 if change == "setting" else 0})
    assert (before == after) is (change == "nothing")
