"""Learning rates, epoch by epoch, against the published and the official tables."""

from __future__ import annotations

import pytest

from arat_fast.config import ScheduleConfig
from arat_fast.training.schedule import learning_rate

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


@pytest.mark.parametrize(
    "fields", [{"milestones": (0.0,)}, {"milestones": (1.5,)}, {"decay": 0.0}, {"warmup": 1.0}]
)
def test_values_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"schedule.{next(iter(fields))}"):
        ScheduleConfig(**fields)  # type: ignore[arg-type]
