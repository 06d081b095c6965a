"""What a slow training says before its first step."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import changed, tiny_config, tiny_trainer

from arat_fast.run import expectation


def test_a_long_training_says_what_to_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expectation, "LONG", 0.0)
    written = io.StringIO()
    run = tiny_trainer(tmp_path, tiny_config(1), console=Console(file=written, width=1000))
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    random = torch.get_rng_state()
    hook = next(h for h in run.hooks if isinstance(h, expectation.Expectation))
    hook.begin(run)
    said = re.search(r"expect roughly (\S+ s) a step and .* of training", written.getvalue())
    assert said is not None and "recipe digits" not in written.getvalue()
    assert "; evaluations and the attacks at the end come on top\n" in written.getvalue()
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and run.model.training
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize(("threads", "load", "cure"), [(2, 1e6, 1), (2, 0.0, 0), (1, 1e6, 0)])
def test_threads_on_a_busy_machine_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, load: float, cure: int
) -> None:
    monkeypatch.setattr(expectation, "LONG", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(expectation.os, "getloadavg", lambda: (load, 0.0, 0.0))
    written = io.StringIO()
    run = tiny_trainer(tmp_path, tiny_config(1), console=Console(file=written, width=1000))
    next(h for h in run.hooks if isinstance(h, expectation.Expectation)).begin(run)
    assert written.getvalue().count("OMP_NUM_THREADS=1") == cure


def test_the_attack_s_passes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(expectation.time, "perf_counter", lambda: float(next(clock)))
    config = changed(tiny_config(1), "attack", num_steps=7, num_restarts=2)
    run = tiny_trainer(tmp_path, config)
    # A pass of four images takes a tick of the clock, a batch of 16 four of them.
    assert expectation.seconds_a_step(run) == (4 * (7 * 2 + 3), 4)


def test_a_short_pass_is_made_of_more_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass of four takes for itself, whatever its images, is no step's four times."""
    passes = {4: 0.1, 8: 0.12, 16: 0.16}
    monkeypatch.setattr(expectation, "seconds_of_pass", lambda run, samples: passes[samples])
    run = tiny_trainer(tmp_path, changed(tiny_config(1), "attack", num_steps=7))
    assert expectation.seconds_a_step(run) == (pytest.approx(0.16 * (7 + 3)), 16)
