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
    again.remove()
    assert not (tmp_path / "p").exists()


def test_another_evaluation_starts_afresh(tmp_path: Path) -> None:
    calls: list[float] = []
    Pieces(tmp_path / "p", "one").get("a", lambda: piece(1.0, calls), CPU)
    other = Pieces(tmp_path / "p", "two")
    assert other.get("a", lambda: piece(2.0, calls), CPU)["value"].item() == 2.0
    assert other.num_reused == 0


def test_a_cut_piece_is_computed_again(tmp_path: Path) -> None:
    calls: list[float] = []
    Pieces(tmp_path / "p", "one").get("a", lambda: piece(1.0, calls), CPU)
    path = tmp_path / "p" / "a.npz"
    path.write_bytes(path.read_bytes()[:100])
    Pieces(tmp_path / "p", "one").get("a", lambda: piece(2.0, calls), CPU)
    assert calls == [1.0, 2.0]


def test_without_a_folder_nothing_is_kept() -> None:
    calls: list[float] = []
    pieces = Pieces()
    for _ in range(2):
        pieces.get("a", lambda: piece(1.0, calls), CPU)
    assert len(calls) == 2
    pieces.remove()


@pytest.mark.parametrize("change", ["weight", "image", "setting", "nothing"])
def test_the_checksum_is_of_everything(change: str) -> None:
    model = nn.Linear(2, 2)
    x = torch.zeros(3, 2)
    before = checksum(model, {"x": x}, {"seed": 0, "eps": 0.1})
    with torch.no_grad():
        if change == "weight":
            model.weight[0, 0] += 1
        if change == "image":
            x[2, 1] = 0.5
    after = checksum(model, {"x": x}, {"eps": 0.1, "seed": 1 if change == "setting" else 0})
    assert (before == after) is (change == "nothing")
