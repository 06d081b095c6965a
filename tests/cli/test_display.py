"""What is printed while an evaluation runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from arat_fast import display as module
from arat_fast.display import Display, about
from arat_fast.run.loop import status


def test_what_is_counted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    written = io.StringIO()
    with Display(Console(file=written)).evaluating() as bar:
        bar("PGD-20", 0, 330)
        bar("PGD-20", 300, 330)
        for done, note in (
            (0, "33 images not yet fooled"),
            (900, "30 images not yet fooled, 0:01:05 left"),
        ):
            bar("AutoAttack fab-t (3 of 4)", done, 3600, "passes", note)
    assert written.getvalue().splitlines() == [
        "PGD-20: 330 images",
        "PGD-20: 300 of 330 images",
        "AutoAttack fab-t (3 of 4): 33 images not yet fooled",
        "AutoAttack fab-t (3 of 4): 25 %, 30 images not yet fooled, 0:01:05 left",
    ]


def test_accuracies_of_the_training_are_said_to_be_of_its_images() -> None:
    found = status({"loss": 0.5, "accuracy_clean": 0.999, "accuracy_adv": 0.987}, 600)
    assert found == "600 images/s  loss 0.500  training images: clean 99.9 %  robust 98.7 %"
    assert status({"loss": 0.5}, 600) == "600 images/s  loss 0.500"
    assert status({"accuracy_adv": 0.5}, 600, " at eps 0.01").endswith("robust at eps 0.01 50.0 %")


def test_what_stays_true_is_said_once() -> None:
    written = io.StringIO()
    display = Display(Console(file=written))
    for text in ("one", "two", "one"):
        display.say_once(text)
    assert written.getvalue() == "one\ntwo\n"


def test_a_quick_attack_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    written = io.StringIO()
    with Display(Console(file=written)).evaluating() as bar:
        for number, name in enumerate(("apgd-ce", "apgd-t")):
            for done in range(101):
                bar(f"AutoAttack {name}", done, 100, "passes", "33 images not yet fooled")
                now += number
    lines = [
        "AutoAttack apgd-ce: 33 images not yet fooled",
        "AutoAttack apgd-t: 33 images not yet fooled",
    ]
    assert written.getvalue().splitlines() == lines


def test_a_training_tells_its_pace_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on, and an epoch's end once."""
    now = 0.0
    monkeypatch.setattr(module, "QUIET_SECONDS", 40.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    written = io.StringIO()
    with Display(Console(file=written)).training(2000, 0, "arat") as bar:
        bar.start_epoch(1, 10)
        for seconds in (90, 41, 41):
            now += seconds
            bar.advance()
        bar.show("3 images/s", silent=True)
        bar.end_epoch(1, 10, "3 images/s")
        bar.go_to(1998)
        for seconds in (0.5, 0.5):
            now += seconds
            bar.advance()
        bar.end_epoch(10, 10, "128 images/s")
    assert written.getvalue().splitlines() == [
        "  epoch 1/10  step 2 of 2,000, 41 s each  23 h of arat training left",
        "  epoch 1/10  step 3 of 2,000, 41 s each  23 h of arat training left",
        "epoch 1/10  3 images/s  23 h of arat training left",
        "  epoch 1/10  step 2,000 of 2,000, 0.5 s each",
        "epoch 10/10  128 images/s",
    ]
    assert [about(s) for s in (0.35, 50, 2400, 32_400, 1e6)] == [
        *("0.35 s", "50 s", "40 min", "9 h"),
        "12 days",
    ]
