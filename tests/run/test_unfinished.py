"""A signal inside of a long step: nothing of the step is left, and the run goes on bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_end, changed, metric_lines, tiny_config, tiny_trainer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from arat_fast.config import Config
from arat_fast.run import unfinished
from arat_fast.stop import InterruptedRun
from arat_fast.training.checkpoint import load_checkpoint

OFFICIAL = changed(tiny_config(2), "attack", bn="batch_update")
FOLDED = changed(changed(tiny_config(2), "attack", bn="running"), "step", precision="bf16")
PERTURBED = changed(tiny_config(2), "awp", gamma=0.01, warmup=0)


def broken_off(out: Path, config: Config, step: int, share: float, backward: bool) -> None:
    """A run that gets SIGTERM in that 1-based step, after this share of the calls of its layers, or
    in the backward pass when it is there again."""
    run = tiny_trainer(out, config)
    made, calls, in_a_step, done = 0, 0, 0, False
    within = run.step.from_indices

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def after(module: nn.Module, arguments: object, output: object) -> None:
        nonlocal calls, done
        calls += 1
        if made != step or done or calls < share * in_a_step or not isinstance(output, Tensor):
            return
        done = True
        if backward:
            output.register_hook(kill)  # type: ignore[no-untyped-call]  # in torch
        else:
            kill()

    def counting(*inputs: Any, **keywords: Any) -> Any:
        nonlocal made, calls, in_a_step
        made, calls = made + 1, 0
        values = within(*inputs, **keywords)
        in_a_step = calls
        return values

    run.step.from_indices = counting  # type: ignore[method-assign]
    hook = register_module_forward_hook(after)
    try:
        with pytest.raises(InterruptedRun, match=f"at step {step - 1} of") as stopped:
            run.run()
    finally:
        hook.remove()
    assert stopped.value.exit_code == 75


@pytest.mark.parametrize(
    ("config", "step", "share", "backward"),
    [
        pytest.param(tiny_config(2), 3, 0.3, False, id="attack"),
        pytest.param(tiny_config(2), 5, 0.9, True, id="first of an epoch", marks=pytest.mark.slow),
        pytest.param(tiny_config(2), 1, 0.0, False, id="first", marks=pytest.mark.slow),
        pytest.param(OFFICIAL, 3, 0.6, False, id="official", marks=pytest.mark.slow),
        pytest.param(FOLDED, 3, 0.9, False, id="folded", marks=pytest.mark.slow),
        pytest.param(PERTURBED, 2, 0.9, False, id="perturbed", marks=pytest.mark.slow),
        pytest.param(PERTURBED, 2, 0.9, True, id="perturbed, back", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_of_a_step_that_was_broken_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    step: int,
    share: float,
    backward: bool,
) -> None:
    monkeypatch.setattr(unfinished, "LARGE_BATCH", 1)
    broken_off(tmp_path / "cut", config, step, share, backward)
    state = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")
    assert state["progress"]["step"] == step - 1
    last = [line["step"] for line in metric_lines(tmp_path / "cut", "train")][-1:]
    assert last == ([step - 1] if step > 1 else [])
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    tiny_trainer(tmp_path / "whole", config).run()
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
