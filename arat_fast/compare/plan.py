"""What a comparison runs: methods × seeds, every option spelt out."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arat_fast.command_line import apply_overrides, overrides_of, unknown_name
from arat_fast.compare.cost import step_cost
from arat_fast.compare.methods import ALL_PARTS, Method
from arat_fast.config import Config, check_same_run, config_from_dict, config_to_dict
from arat_fast.files import read_json
from arat_fast.objectives import objective_type
from arat_fast.run.natural import natural_config

Budget = Literal["epochs", "work"]
RECORD = "comparison.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PlannedMethod(Method):
    """A method as it is really run, the number of epochs among its options.

    Attributes:
        epochs: of training.
        passes_per_image: forward passes in a step; see :func:`arat_fast.compare.cost.step_cost`.
        natural_epochs: of natural training that come before, 0 for none.
        natural_passes_per_image: forward passes in a step of those.
    """

    epochs: int
    passes_per_image: float
    natural_epochs: int = 0
    natural_passes_per_image: float = 0.0

    @property
    def work(self) -> float:
        """Forward passes per training image over the whole run."""
        natural = self.natural_epochs * self.natural_passes_per_image
        return self.epochs * self.passes_per_image + natural

    @property
    def cost(self) -> str:
        """Epochs times forward passes, in words: "23 × 26", "22 × 24 + 22 × 3"."""
        natural = f" + {self.natural_epochs} × {self.natural_passes_per_image:.0f}"
        own = f"{self.epochs} × {self.passes_per_image:.0f}"
        return own + (natural if self.natural_epochs else "")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison, by the label of its method; the seed is in ``config`` too."""

    label: str
    seed: int
    config: Config

    @property
    def run(self) -> str:
        """Name of its folder."""
        return f"{self.label}-seed{self.seed}"

    def arguments(self, out: Path) -> list[str]:
        """The command line after ``arat-fast`` that trains it, or goes on with it."""
        overrides = overrides_of(self.config)
        return ["train", self.config.recipe, *overrides, "--out", str(out / self.run), "--resume"]


@dataclass(frozen=True)
class Plan:
    """A grid of runs.

    Attributes:
        config: what all of them share; its seed is not used.
        methods: rows of the table, in order.
        seeds: of every method.
        budget: "epochs" (the recipe's, for all) or "work" (as many forward passes as the recipe's
            own objective makes, for every method that attacks).
        commands: command lines that were given for it, the first one first.
    """

    config: Config
    methods: tuple[PlannedMethod, ...]
    seeds: tuple[int, ...]
    budget: Budget
    commands: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """Every run, the whole first seed before the second."""
        configs = {
            method.label: apply_overrides(self.config, method.options) for method in self.methods
        }
        return [
            Cell(label, seed, dataclasses.replace(config, seed=seed))
            for seed in self.seeds
            for label, config in configs.items()
        ]


def make_plan(
    config: Config,
    methods: Sequence[Method],
    seeds: Sequence[int],
    budget: Budget = "epochs",
    command: str = "",
) -> Plan:
    """Plan a comparison: check every option, and count what a step of each method costs.

    Args:
        config, budget: as in :class:`Plan`.
        methods: rows of the table; one that sets ``--train.epochs`` keeps that number.
        seeds: of every method, >= 0.
        command: command line to record.

    Raises:
        ValueError: no seed or a seed twice, a method's options do not fit or change what it is
            tested on, or ARAT lacks a part that the ablation says it has.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        given = " ".join(map(str, seeds)) or "none"
        raise ValueError(f"--seeds expects different numbers >= 0, got {given}")
    full = step_cost(config) * config.train.epochs
    planned = [_planned(config, method, full if budget == "work" else None) for method in methods]
    if any(method.ablation for method in methods):
        _check_whole(config, methods)
    return Plan(config, tuple(planned), tuple(seeds), budget, (command,) if command else ())


def _check_whole(config: Config, methods: Sequence[Method]) -> None:
    """Refuse an ablation whose last row, ARAT with all its parts, lacks one."""
    for method in methods:
        if method.label != "arat":
            continue
        own = apply_overrides(config, method.options)
        whole = apply_overrides(own, ALL_PARTS)
        if (own.objective, own.norm) != (whole.objective, whole.norm):
            raise ValueError(
                f"the ablation ends with ARAT and all its parts, {shlex.join(ALL_PARTS)}, got "
                f"{own.objective} and model.norm={own.norm}; set others in a --variant of another "
                "name, or leave --ablation out"
            )


def _planned(config: Config, method: Method, work: float | None) -> PlannedMethod:
    """The method with its cost, and with the epochs that make ``work`` passes if it is given."""
    names = {option.partition("=")[0] for option in method.options}
    if names & {"--seed", "--compat"}:
        raise ValueError(
            f"{method.label} sets {' '.join(method.options)}: seed and compat are those of the "
            "whole comparison, set them with --seeds and --compat"
        )
    try:
        own = apply_overrides(config, method.options)
        _check_same_test(config, own)
        kind, passes = objective_type(own.objective.name), step_cost(own)
        # Settings of one that starts from a natural network, which is trained first if not given.
        trains_first = kind.starts_from_natural and getattr(own.objective, "teacher", None) is None
        natural = natural_config(own) if trains_first or own.train.natural_epochs else None
        natural_passes = step_cost(natural) if natural else 0.0
    except ValueError as error:
        raise ValueError(f"{method.label}: {error}") from error
    epochs, options = own.train.epochs, method.options
    natural_epochs = natural.train.epochs if natural else 0
    if work is not None and kind.needs_attack and "--train.epochs" not in names:
        given = getattr(own.objective, "teacher_epochs", None) or own.train.natural_epochs
        if natural and not given:
            # As many natural epochs as others.
            natural_epochs = epochs = max(1, round(work / (passes + natural_passes)))
        else:
            epochs = max(1, round((work - natural_epochs * natural_passes) / passes))
        options = (*options, "--train.epochs", str(epochs))
    return PlannedMethod(
        **{**vars(method), "options": options},
        epochs=epochs,
        passes_per_image=passes,
        natural_epochs=natural_epochs,
        natural_passes_per_image=natural_passes,
    )


def _check_same_test(config: Config, own: Config) -> None:
    """Refuse a method that is attacked, or fed, in another way than the others."""
    shared, given = config_to_dict(config), config_to_dict(own)
    for section in ("attack", "eval", "data"):
        for name, value in shared[section].items():
            free = section == "attack" and name not in ("eps", "norm")
            if not free and given[section][name] != value:
                raise ValueError(
                    f"{section}.{name}={value} is that of the whole comparison, got "
                    f"{given[section][name]}: all rows of a table have one threat model, one "
                    "evaluation and one dataset; compare others in a folder of their own"
                )


def merge_with_saved(plan: Plan, record: Path) -> Plan:
    """The plan, with the methods and seeds that its folder holds already in ``record``, if it is
    there.

    Raises:
        ValueError: the folder holds a comparison of another configuration or budget, or a method of
            it has other options now.
    """
    if not record.exists():
        return plan
    saved = plan_from_record(read_record(record))
    methods = {method.label: method for method in plan.methods}
    shared = dataclasses.replace(saved.config, seed=plan.config.seed)
    with other_folder():
        check_same_run(plan.config, shared, record)
        if saved.budget != plan.budget:
            raise ValueError(f"{record} has --budget {saved.budget}, got {plan.budget}")
        for before in saved.methods:
            now = methods.setdefault(before.label, before)
            if now.options != before.options:
                raise ValueError(
                    f"{record} has {before.label} with {shlex.join(before.options)}, got "
                    f"{shlex.join(now.options)}"
                )
    return dataclasses.replace(
        plan,
        methods=tuple(methods.values()),
        seeds=tuple(dict.fromkeys((*plan.seeds, *saved.seeds))),
        commands=tuple(dict.fromkeys((*saved.commands, *plan.commands))),
    )


@contextmanager
def other_folder() -> Iterator[None]:
    """Add the way out to the ValueError of a folder that holds something else."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; choose another folder with --out") from error


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON types."""
    return {
        "commands": list(plan.commands),
        "recipe": plan.config.recipe,
        "budget": plan.budget,
        "seeds": list(plan.seeds),
        "config": config_to_dict(plan.config),
        "methods": [dataclasses.asdict(method) for method in plan.methods],
    }


def plan_from_record(record: Mapping[str, Any]) -> Plan:
    """The plan of a saved comparison.

    Raises:
        ValueError: the record is not one of this version, or a method in it has an objective or a
            network of one's own, whose module is not imported on a file's word alone.
    """
    try:
        plan = Plan(
            config_from_dict(record["config"]),
            tuple(
                PlannedMethod(**{**m, "options": tuple(m["options"])}) for m in record["methods"]
            ),
            tuple(record["seeds"]),
            record["budget"],
            tuple(record["commands"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a comparison of this version: {error}") from error
    for method in plan.methods:
        foreign = unknown_name(method.options)
        if foreign is not None:
            raise ValueError(
                f"{method.label} names {foreign}, which is not imported on a file's word alone: "
                "give the comparison's own command again"
            )
    return plan


def read_record(path: Path) -> dict[str, Any]:
    """The content of a comparison.json, by its path or that of its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is another, or of another version's format.
    """
    file = path / RECORD if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"no comparison at {file}: expected the folder that arat-fast compare wrote, or its "
            f"{RECORD}"
        )
    record = read_json(file)
    if not {"methods", "cells"} <= record.keys() or record.get("format") != FORMAT:
        raise ValueError(f"{file} is no comparison of format {FORMAT}")
    return record
