"""Reading run folders in every state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report.fake_run import write_fake_run

from arat_fast.report.run import read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "run", epochs=4)


def test_a_finished_run_is_read_whole(folder: Path) -> None:
    run = read_run(folder)
    assert run.notes == ()
    assert list(run.accuracies()) == ["clean", "pgd20", "autoattack", "clean_branch"]
    assert run.accuracies()["clean"].correct == 349
    assert run.accuracies()["pgd20"].details["alpha"] == 0.02
    assert len(run.train) == 12
    assert run.eval_kinds() == [("val", "ema"), ("val", "last")]
    assert run.examples is not None and len(run.examples) == 16


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_cut_last_line_is_left_out_and_said(folder: Path, cut: int) -> None:
    file = folder / "metrics.jsonl"
    before = read_run(folder)
    text = file.read_text()
    file.write_text(text[: len(text) - 1 - cut])
    run = read_run(folder)
    assert len(run.train) + len(run.evals) == len(before.train) + len(before.evals) - 1
    assert any("last line" in note for note in run.notes)


def test_broken_lines_in_the_middle_are_counted(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2][:10]
    lines[3] = "[1, 2]"
    lines[4] = '{"kind": "train", "step": "3", "epoch": 1}'
    file.write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    assert any(note.endswith("left out: 3.") for note in run.notes)


def test_the_later_of_two_lines_of_a_step_counts(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    num_lines = len(read_run(folder).train)
    with file.open("a") as stream:
        stream.write(json.dumps({**first, "loss": 123.0}) + "\n")
    run = read_run(folder)
    assert len(run.train) == num_lines
    assert run.train[0]["loss"] == 123.0
    epochs, _ = run.train_series("loss")
    assert (np.diff(epochs) > 0).all()


def test_values_that_are_not_finite_become_gaps(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 999, "epoch": 99, "loss": NaN}\n')
        stream.write(f'{{"kind": "train", "step": 1000, "epoch": 100, "loss": 1{"0" * 400}}}\n')
        stream.write('{"kind": "train", "step": 1001, "epoch": 101, "loss": "high"}\n')
    epochs, values = read_run(folder).train_series("loss")
    assert list(epochs[-2:]) == [99, 100]
    assert np.isnan(values[-2:]).all()


def test_what_is_missing_is_said(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").unlink()
    (folder / "examples.npz").unlink()
    run = read_run(folder)
    assert (run.train, run.evals, run.summary, run.examples) == ((), (), {}, None)
    assert len(run.notes) == 2


@pytest.mark.parametrize("content", ['{"accuracy": {"cle', "[]", "\x00"])
def test_an_unreadable_summary_is_said(folder: Path, content: str) -> None:
    (folder / "summary.json").write_text(content)
    run = read_run(folder)
    assert run.summary == {}
    assert any("summary.json cannot be read" in note for note in run.notes)


def test_impossible_accuracies_are_left_out(folder: Path) -> None:
    entries = {
        "clean": {"value": 0.9, "num_samples": 10},
        "pgd20": {"value": 0.5, "correct": 11, "num_samples": 10},
        "autoattack": {"value": "high", "num_samples": 10},
        "other": {"value": 0.5, "num_samples": 0},
        "list": [1, 2],
    }
    (folder / "summary.json").write_text(json.dumps({"accuracy": entries}))
    run = read_run(folder)
    assert {key: a.correct for key, a in run.accuracies().items()} == {"clean": 9}


def test_unreadable_examples_are_said(folder: Path) -> None:
    file = folder / "examples.npz"
    file.write_bytes(file.read_bytes()[:200])
    run = read_run(folder)
    assert run.examples is None
    assert any("examples.npz cannot be read" in note for note in run.notes)


def test_pickled_examples_are_not_unpickled(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "sprung"),)  # type: ignore[return-value]

    with np.load(folder / "examples.npz") as archive:
        arrays = dict(archive)
    arrays["classes"] = np.array([Trap()] * 10, dtype=object)
    np.savez(folder / "examples.npz", **arrays)
    run = read_run(folder)
    assert run.examples is None
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="without config.json") as refused:
        read_run(tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": 3}', b"\xff\xfe\x00"])
def test_an_unreadable_configuration_is_refused(folder: Path, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match="run's configuration") as refused:
        read_run(folder)
    assert "\n" not in str(refused.value)
