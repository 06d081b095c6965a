"""Reading run folders in every state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from report.fake_run import write_fake_run

from arat_fast.report.run import Summary, read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "run", epochs=4)


def test_a_finished_run_is_read_whole(folder: Path) -> None:
    run = read_run(folder)
    assert run.notes == ()
    assert list(run.summary.accuracy) == ["clean", "pgd20", "autoattack", "clean_branch"]
    assert run.summary.accuracy["clean"].correct == 349
    assert run.summary.accuracy["pgd20"].details["alpha"] == 0.02
    assert len(run.metrics["loss"].values) == 12
    assert (np.diff(run.metrics["loss"].epochs) > 0).all()
    assert list(run.evaluated()) == [("val", "ema"), ("val", "last")]
    assert run.examples is not None and len(run.examples) == 16
    assert run.config.recipe == "digits" and run.epochs == 4


def test_a_cut_last_line_is_left_out_and_said(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    before = read_run(folder)
    file.write_text(file.read_text()[:-8])
    run = read_run(folder)
    assert len(run.evaluations) == len(before.evaluations) - 1
    assert len(run.notes) == 1 and "metrics.jsonl" in run.notes[0]


def test_values_that_are_not_finite_become_gaps(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 999, "epoch": 99, "loss": NaN}\n')
        stream.write('{"kind": "of a hook", "step": 999, "epoch": 99, "loss": 1}\n')
    epochs, values = read_run(folder).metrics["loss"]
    assert epochs[-1] == 99 and np.isnan(values[-1])


def test_what_is_missing_is_said(folder: Path) -> None:
    for name in ("summary.json", "metrics.jsonl", "examples.npz"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.metrics, run.evaluations, run.examples) == ({}, (), None)
    assert run.summary == Summary() and run.epochs is None
    assert len(run.notes) == 2


@pytest.mark.parametrize("name", ["summary.json", "examples.npz"])
@pytest.mark.parametrize("content", ['{"accuracy": {"cle', "[]", "\x00"])
def test_an_unreadable_file_is_said(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    run = read_run(folder)
    assert [note for note in run.notes if name in note]
    assert run.summary == Summary() if name == "summary.json" else run.examples is None


def test_pickled_examples_are_not_unpickled(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "sprung"),)  # type: ignore[return-value]

    with np.load(folder / "examples.npz") as archive:
        arrays = dict(archive)
    arrays["classes"] = np.array([Trap()] * 10, dtype=object)
    np.savez(folder / "examples.npz", **arrays)
    assert read_run(folder).examples is None
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=folder.name):
            read_run(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"config": 3}', b"\xff\xfe\x00"])
def test_an_unreadable_configuration_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="configuration"):
        read_run(folder)
