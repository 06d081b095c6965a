"""Finished pieces on disk: used again for the same evaluation, never for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arat_fast.evaluation.pieces import Pieces, checksum

CPU = torch.device("cpu")


def piece(value: float, calls: list[float]) -> dict[str, Tensor]:
    calls.append(value)
    return {"value": torch.tensor([value]), "mask": torch.tensor([True, False])}


def test_a_piece_is_computed_once(tmp_path: Path) -> None:
    calls: list[float] = []
    first = Pieces(tmp_path / "p", "one")
    first.get("a-1", lambda: piece(1.0, calls), CPU)
    again = Pieces(tmp_path / "p", "one")
    found = again.get("a-1", lambda: piece(2.0, calls), CPU)
    assert calls == [1.0] and again.num_reused == 1
    assert found["value"].item() == 1.0 and found["mask"].tolist() == [True, False]
    again.get("b", lambda: piece(3.0, calls), CPU)
    assert calls == [1.0, 3.0]
    again.get("a-1", lambda: piece(4.0, calls), CPU)
    again.remove()
    assert not (tmp_path / "p").exists()


def test_another_evaluation_starts_afresh_and_leaves_the_first_alone(tmp_path: Path) -> None:
    calls: list[float] = []
    first = Pieces(tmp_path / "p", "one")
    first.get("a", lambda: piece(1.0, calls), CPU)
    other = Pieces(tmp_path / "p", "two")
    assert other.get("a", lambda: piece(2.0, calls), CPU)["value"].item() == 2.0
    assert other.num_reused == 0
    other.remove()
    assert Pieces(tmp_path / "p", "one").get("a", lambda: piece(3.0, calls), CPU)["value"] == 1.0
    first.remove()
    assert not (tmp_path / "p").exists()


def test_two_of_the_same_evaluation_at_once(tmp_path: Path) -> None:
    """One comes to its end while the other still works; each removes what it asked for."""
    calls: list[float] = []
    long, short = (Pieces(tmp_path / "p", "one") for _ in range(2))
    long.get("hours", lambda: piece(1.0, calls), CPU)
    short.get("look", lambda: piece(2.0, calls), CPU)
    short.remove()
    resumed = Pieces(tmp_path / "p", "one")
    resumed.get("hours", lambda: piece(3.0, calls), CPU)
    assert resumed.num_reused == 1
    resumed.remove()
    # The folder is gone and the first still writes to it.
    long.get("more", lambda: piece(4.0, calls), CPU)
    assert Pieces(tmp_path / "p", "one").get("more", lambda: piece(5.0, calls), CPU)["value"] == 4
    assert calls == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("size", [0, 100])
def test_a_cut_piece_is_computed_again(tmp_path: Path, size: int) -> None:
    calls: list[float] = []
    Pieces(tmp_path / "p", "one").get("a", lambda: piece(1.0, calls), CPU)
    path = tmp_path / "p" / "one" / "a.npz"
    path.write_bytes(path.read_bytes()[:size])
    Pieces(tmp_path / "p", "one").get("a", lambda: piece(2.0, calls), CPU)
    assert calls == [1.0, 2.0]


def test_without_a_folder_nothing_is_kept() -> None:
    calls: list[float] = []
    pieces = Pieces()
    for _ in range(2):
        pieces.get("a", lambda: piece(1.0, calls), CPU)
    assert len(calls) == 2
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
