"""Limits of settings, declared in their types, and what may differ when a run goes on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from tiny import changed, tiny_config, with_objective

from arat_fast.attacks import PGD
from arat_fast.config import (
    AverageConfig,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    check_same_run,
    config_from_dict,
    config_to_dict,
)
from arat_fast.settings import (
    FREE,
    Count,
    Positive,
    Range,
    Weight,
    check_settings,
    free_fields,
    meanings,
)

NAN = float("nan")


@dataclass
class Example:
    count: Count = 1
    maybe: Count | None = None
    rate: Annotated[float, Range(above=0, high=1)] = 0.5
    """How fast; > 0."""
    share: Annotated[float, Range(low=0, below=1), FREE] = 0.5
    """Of all, as far as
    it is known."""
    each: tuple[Positive, ...] = ()
    kind: Annotated[Literal["one", "two"], FREE] = "one"
    root: Annotated[Path, FREE] = Path()
    free: Weight = 0.0


@dataclass
class Derived(Example):
    rate: Annotated[float, Range(above=0, high=1)] = 0.1
    """How slow."""


def test_meanings() -> None:
    share = {"share": "Of all, as far as it is known."}
    assert meanings(Example) == {"rate": "How fast; > 0.", **share}
    assert meanings(Derived) == {"rate": "How slow.", **share}
    without_source = dataclasses.make_dataclass("Made", [("rate", float)])
    assert meanings(without_source) == {}


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("count", [1, 99], [0, -1, NAN]),
        ("maybe", [None, 1], [0]),
        ("rate", [1e-9, 1.0], [0.0, 1.1, NAN, float("inf")]),
        ("share", [0.0, 0.999], [-0.1, 1.0, NAN]),
        ("each", [(), (1.0, 2.0)], [(1.0, 0.0), (NAN,)]),
        ("kind", ["two"], ["three", ""]),
        ("free", [0.0, float("inf")], [-1e-9, NAN]),
    ],
)
def test_limits_stand_in_the_types(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_settings("x.", Example(**{field: value}))
    for value in bad:
        with pytest.raises(ValueError, match=rf"^x\.{field} must be "):
            check_settings("x.", Example(**{field: value}))


def test_ranges_are_said() -> None:
    said = [str(Range(low=1)), str(Range(above=0)), str(Range(above=0, high=1))]
    assert [*said, str(Range(low=0, below=1))] == [">= 1", "> 0", "in (0, 1]", "in [0, 1)"]


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (AverageConfig, {"start": 1.0}),
        (AverageConfig, {"every": 0}),
        (AverageConfig, {"decay": 1.0}),
        (ScheduleConfig, {"milestones": (0.0,)}),
        (ScheduleConfig, {"milestones": (0.5, 1.5)}),
        (ScheduleConfig, {"decay": 0.0}),
        (ScheduleConfig, {"warmup": 1.0}),
        (ScheduleConfig, {"warmup_epochs": 1.0, "name": "onecycle"}),
        (OptimizerConfig, {"nesterov": True, "name": "adamw"}),
        (DataConfig, {"progressive": (64, 256)}),
        (DataConfig, {"progressive": (0,)}),
        (PGD, {"eps": -0.1}),
        (PGD, {"eps": NAN}),
        (PGD, {"alpha": -1}),
        (PGD, {"num_steps": -1}),
        (PGD, {"num_restarts": 0}),
        (PGD, {"norm": "L3"}),
        (PGD, {"bn": "train"}),
    ],
)
def test_refused(settings: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        settings(**fields)


@pytest.mark.parametrize(("eps", "hint"), [(8, "8/255"), (2.5, "2.5/255"), (256, "256$")])
def test_a_radius_in_pixel_values(eps: float, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 1\] with Linf.*{hint}"):
        PGD(eps=eps)
    assert PGD(eps=eps, norm="L2").eps == eps


def test_free_fields_alone_may_differ(tmp_path: Path) -> None:
    assert free_fields(Example) == {"share", "kind", "root"}
    config = tiny_config()
    free = changed(config, "data", root=Path("elsewhere"), num_workers=0)
    free = changed(changed(free, "eval", num_steps=3), "step", graph="off")
    check_same_run(changed(free, "distributed", timeout=5.0), config, tmp_path)
    others = [
        changed(config, "objective", gamma=1.0),
        changed(config, "attack", num_steps=2),
        changed(config, "model", norm="shared"),
        with_objective(config, "trades"),
        dataclasses.replace(config, seed=4),
    ]
    for other in others:
        with pytest.raises(ValueError, match="belongs to a run with"):
            check_same_run(other, config, tmp_path)


def test_an_objective_has_its_own_settings_alone() -> None:
    config = with_objective(tiny_config(), "trades", beta=2.0)
    values = config_to_dict(config)
    assert values["objective"] == {"name": "trades", "beta": 2.0}
    assert config_from_dict(values) == config
    for objective in ({"name": "trades", "bta": 1.0}, {"name": "trades", "beta": -1.0}):
        with pytest.raises(ValueError, match="bta|beta must be >= 0"):
            config_from_dict({**values, "objective": objective})
    with pytest.raises(ValueError, match="settings of another objective"):
        dataclasses.replace(config, objective=dataclasses.replace(config.objective, name="arat"))
