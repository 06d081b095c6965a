"""Learning rates, epoch by epoch, against the published and the official tables."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import tiny_config

from arat_fast.config import ScheduleConfig
from arat_fast.training.schedule import learning_rate, progressive_size

STEPS = 7


def rates(config: ScheduleConfig, epochs: int = 100) -> list[float]:
    """The rate of each epoch; every step of an epoch must have it."""
    result = []
    for epoch in range(epochs):
        values = {
            learning_rate(config, 0.1, epoch * STEPS + i, STEPS, epochs) for i in range(STEPS)
        }
        assert len(values) == 1
        result.append(values.pop())
    return result


def test_published_schedule() -> None:
    expected = [0.1] * 75 + [0.01] * 15 + [0.001] * 10
    assert rates(ScheduleConfig("steps")) == pytest.approx(expected)


def test_official_schedule_is_late_and_starts_slow() -> None:
    expected = [0.02] + [0.1] * 75 + [0.01] * 15 + [0.001] * 9
    assert rates(ScheduleConfig("official_steps")) == pytest.approx(expected)


def test_milestones_scale_with_the_epochs() -> None:
    expected = [0.1] * 15 + [0.01] * 3 + [0.001] * 2
    assert rates(ScheduleConfig("steps"), epochs=20) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_smooth_schedules(name: str) -> None:
    config = ScheduleConfig(name, warmup=0.25)  # type: ignore[arg-type]
    values = [learning_rate(config, 0.4, step, 10, 8) for step in range(80)]
    peak = values.index(max(values))
    assert min(values) > 0 and max(values) == pytest.approx(0.4, rel=0.05)
    assert values[-1] < 0.001
    if name == "cosine":
        assert peak == 0
    else:
        assert 18 <= peak <= 21
        assert values[:18] == sorted(values[:18])
    assert values[peak:] == sorted(values[peak:], reverse=True)


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


def test_learning_rate_follows_the_batch() -> None:
    config = tiny_config()
    for scaling, factor in (("none", 1), ("linear", 0.5), ("sqrt", 0.5**0.5)):
        optimizer = dataclasses.replace(config.optimizer, lr_scaling=scaling, base_batch=128)
        scaled = dataclasses.replace(config, optimizer=optimizer)
        assert scaled.peak_lr == pytest.approx(factor * config.optimizer.lr)


def test_sizes_of_equal_parts_of_the_run() -> None:
    sizes = [progressive_size((128, 160, 224), epoch, 7) for epoch in range(7)]
    assert sizes == [128, 128, 128, 160, 160, 224, 224]
    assert progressive_size((), 3, 7) is None


def test_warm_up_of_onecycle_has_its_own_name() -> None:
    with pytest.raises(ValueError, match="warms up by schedule.warmup"):
        ScheduleConfig("onecycle", warmup_epochs=1)


@pytest.mark.parametrize(
    "fields", [{"milestones": (0.0,)}, {"milestones": (1.5,)}, {"decay": 0.0}, {"warmup": 1.0}]
)
def test_values_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"schedule.{next(iter(fields))}"):
        ScheduleConfig(**fields)  # type: ignore[arg-type]
