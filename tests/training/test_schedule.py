"""Learning rates, epoch by epoch, against the published and the official tables."""

from __future__ import annotations

import pytest
from tiny import changed, tiny_config

from arat_fast.config import ScheduleConfig
from arat_fast.training.schedule import learning_rate, progressive_size

STEPS = 7


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        ("steps", 100, [0.1] * 75 + [0.01] * 15 + [0.001] * 10),
        # Late, and slow at first.
        ("official_steps", 100, [0.02] + [0.1] * 75 + [0.01] * 15 + [0.001] * 9),
        ("steps", 20, [0.1] * 15 + [0.01] * 3 + [0.001] * 2),
    ],
)
def test_milestones(name: str, epochs: int, expected: list[float]) -> None:
    config = ScheduleConfig(name)  # type: ignore[arg-type]  # one of the names
    rates = [learning_rate(config, 0.1, step, STEPS, epochs) for step in range(STEPS * epochs)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(STEPS)])


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_smooth_schedules(name: str) -> None:
    config = ScheduleConfig(name, warmup=0.25)  # type: ignore[arg-type]
    values = [learning_rate(config, 0.4, step, 10, 8) for step in range(80)]
    peak = values.index(max(values))
    assert min(values) > 0 and max(values) == pytest.approx(0.4, rel=0.05)
    assert values[-1] < 0.001 and values[peak:] == sorted(values[peak:], reverse=True)
    assert peak == 0 if name == "cosine" else 18 <= peak <= 21
    assert values[: peak and 18] == sorted(values[: peak and 18])


@pytest.mark.parametrize("name", ["steps", "cosine"])
def test_warm_up_is_linear_and_changes_nothing_after_it(name: str) -> None:
    cold = ScheduleConfig(name)  # type: ignore[arg-type]
    warm = ScheduleConfig(name, warmup_epochs=1.5)  # type: ignore[arg-type]
    pairs = [
        [learning_rate(config, 0.4, step, 10, 8) for config in (warm, cold)] for step in range(80)
    ]
    for step, (warmed, without) in enumerate(pairs):
        assert warmed == pytest.approx(without * min(1, (step + 1) / 15))
    assert pairs[14][0] == pairs[14][1]


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 0.5), ("sqrt", 0.5**0.5)])
def test_learning_rate_follows_the_batch(scaling: str, factor: float) -> None:
    config = changed(tiny_config(), "optimizer", lr_scaling=scaling, base_batch=32)
    assert config.peak_lr == pytest.approx(factor * config.optimizer.lr)


def test_sizes_of_equal_parts_of_the_run() -> None:
    sizes = [progressive_size((128, 160, 224), epoch, 7) for epoch in range(7)]
    assert sizes == [128, 128, 128, 160, 160, 224, 224]
    assert progressive_size((), 3, 7) is None
