"""What a comparison runs: methods × seeds, every option spelt out."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arat_fast.command_line import apply_overrides, overrides_of
from arat_fast.compare.cost import step_cost
from arat_fast.compare.methods import Method
from arat_fast.config import Config, check_same_run, config_from_dict, config_to_dict
from arat_fast.run.natural import natural_config

Budget = Literal["epochs", "work"]
RECORD = "comparison.json"
FORMAT = 1


@dataclass(frozen=True)
class PlannedMethod:
    """A method as it is really run.

    Attributes:
        method: with the number of epochs among its options.
        epochs: of training.
        passes: forward passes per image and step; see :class:`arat_fast.compare.cost.StepCost`.
        natural_epochs: of natural training that come before, 0 for none.
        natural_passes: forward passes per image and step of those.
    """

    method: Method
    epochs: int
    passes: float
    natural_epochs: int = 0
    natural_passes: float = 0.0

    @property
    def work(self) -> float:
        """Forward passes per training image over the whole run."""
        return self.epochs * self.passes + self.natural_epochs * self.natural_passes

    @property
    def cost(self) -> str:
        """Epochs times forward passes, in words: "23 × 26", "22 × 24 + 22 × 3"."""
        natural = f" + {self.natural_epochs} × {self.natural_passes:.0f}"
        return f"{self.epochs} × {self.passes:.0f}" + (natural if self.natural_epochs else "")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        label: of its method.
        seed: of the run.
        config: all of it.
    """

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
            planned.method.label: apply_overrides(self.config, planned.method.options)
            for planned in self.methods
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
        config: what all runs share.
        methods: rows of the table; one that sets ``--train.epochs`` keeps that number.
        seeds: of every method, >= 0.
        budget: see :class:`Plan`.
        command: command line to record.

    Raises:
        ValueError: no seed or a seed twice, a method's options do not fit or change what it is
            tested on, or ARAT lacks a part that the ablation says it has.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        given = " ".join(map(str, seeds)) or "none"
        raise ValueError(f"--seeds expects different numbers >= 0, got {given}")
    full = step_cost(config).passes * config.train.epochs
    planned = [_planned(config, method, full if budget == "work" else None) for method in methods]
    if any(method.ablation for method in methods):
        _check_whole(config, methods)
    return Plan(config, tuple(planned), tuple(seeds), budget, (command,) if command else ())


def _check_whole(config: Config, methods: Sequence[Method]) -> None:
    """Refuse an ablation whose last row, ARAT with all its parts, lacks one."""
    for method in methods:
        if method.label == "arat":
            own = apply_overrides(config, method.options)
            parts = {
                "objective.name": (own.objective.name, "arat"),
                "objective.stop_gradient": (getattr(own.objective, "stop_gradient", None), True),
                "objective.predictor": (getattr(own.objective, "predictor", None), True),
                "model.norm": (own.norm, "split"),
            }
            for name, (got, expected) in parts.items():
                if got != expected:
                    raise ValueError(
                        f"the ablation ends with ARAT and all its parts: {name}={expected} is "
                        f"expected for arat, got {got}; set it in a --variant of another name, or "
                        "leave --ablation out"
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
        cost = step_cost(own)
        natural = None
        if cost.starts_from_natural and getattr(own.objective, "teacher", None) is None:
            natural = natural_config(own)
        natural_passes = step_cost(natural).passes if natural else 0.0
    except ValueError as error:
        raise ValueError(f"{method.label}: {error}") from error
    epochs = own.train.epochs
    natural_epochs = natural.train.epochs if natural else 0
    if work is not None and cost.attacks and "--train.epochs" not in names:
        if natural is None:
            epochs = max(1, round(work / cost.passes))
        elif getattr(own.objective, "teacher_epochs", None) is None:
            # As many natural epochs as others.
            epochs = max(1, round(work / (cost.passes + natural_passes)))
            natural_epochs = epochs
        else:
            epochs = max(1, round((work - natural_epochs * natural_passes) / cost.passes))
        options = (*method.options, "--train.epochs", str(epochs))
        method = dataclasses.replace(method, options=options)
    return PlannedMethod(method, epochs, cost.passes, natural_epochs, natural_passes)


def _check_same_test(config: Config, own: Config) -> None:
    """Refuse a method that is attacked, or fed, in another way than the others."""
    shared, given = config_to_dict(config), config_to_dict(own)
    for section, names in (
        ("attack", ("eps", "norm")),
        ("eval", tuple(shared["eval"])),
        ("data", tuple(shared["data"])),
    ):
        for name in names:
            if given[section][name] != shared[section][name]:
                raise ValueError(
                    f"{section}.{name}={shared[section][name]} is that of the whole comparison, "
                    f"got {given[section][name]}: all rows of a table have one threat model, one "
                    "evaluation and one dataset; compare others in a folder of their own"
                )


def merge_with_saved(plan: Plan, record: Path) -> Plan:
    """The plan, with the methods and seeds that its folder holds already.

    Args:
        plan: what is asked for.
        record: comparison.json of the folder; may be absent.

    Raises:
        ValueError: the folder holds a comparison of another configuration or budget, or a method of
            it has other options now.
    """
    if not record.exists():
        return plan
    saved = plan_from_record(read_record(record))
    if saved.config.recipe != plan.config.recipe:
        raise ValueError(
            f"{record} compares on {saved.config.recipe}, got {plan.config.recipe}: choose another "
            "folder with --out"
        )
    same_seed = dataclasses.replace(saved.config, seed=plan.config.seed)
    try:
        check_same_run(plan.config, same_seed, record)
    except ValueError as error:
        raise ValueError(f"{error}; choose another folder with --out") from error
    if saved.budget != plan.budget:
        raise ValueError(
            f"{record} has --budget {saved.budget}, got {plan.budget}: give --budget "
            f"{saved.budget}, or choose another folder with --out"
        )
    labels = {planned.method.label: planned for planned in plan.methods}
    for before in saved.methods:
        now = labels.setdefault(before.method.label, before)
        if now.method.options != before.method.options:
            raise ValueError(
                f"{record} has {before.method.label} with {shlex.join(before.method.options)}, got "
                f"{shlex.join(now.method.options)}: choose another folder with --out"
            )
    return dataclasses.replace(
        plan,
        methods=tuple(labels.values()),
        seeds=tuple(dict.fromkeys((*plan.seeds, *saved.seeds))),
        commands=tuple(dict.fromkeys((*saved.commands, *plan.commands))),
    )


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON types."""
    return {
        "commands": list(plan.commands),
        "recipe": plan.config.recipe,
        "budget": plan.budget,
        "seeds": list(plan.seeds),
        "config": config_to_dict(plan.config),
        "methods": [
            {
                "label": planned.method.label,
                "title": planned.method.title,
                "ablation": planned.method.ablation,
                "options": list(planned.method.options),
                "epochs": planned.epochs,
                "passes_per_image": planned.passes,
                "natural_epochs": planned.natural_epochs,
                "natural_passes_per_image": planned.natural_passes,
            }
            for planned in plan.methods
        ],
    }


def plan_from_record(record: dict[str, Any]) -> Plan:
    """The plan of a saved comparison.

    Raises:
        ValueError: the record is not one of this version.
    """
    try:
        methods = [
            PlannedMethod(
                Method(
                    str(entry["label"]),
                    str(entry["title"]),
                    tuple(map(str, entry["options"])),
                    bool(entry["ablation"]),
                ),
                int(entry["epochs"]),
                float(entry["passes_per_image"]),
                int(entry["natural_epochs"]),
                float(entry["natural_passes_per_image"]),
            )
            for entry in record["methods"]
        ]
        return Plan(
            config_from_dict(record["config"]),
            tuple(methods),
            tuple(map(int, record["seeds"])),
            record["budget"],
            # Records from before have the one command that was given last.
            tuple(map(str, record["commands"] if "commands" in record else [record["command"]])),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a comparison of this version: {error} is missing") from error


def read_record(path: Path) -> dict[str, Any]:
    """The content of a comparison.json.

    Args:
        path: the file, or the folder of a comparison.

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
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or "methods" not in record:
        raise ValueError(f"{file} is no comparison of format {FORMAT}")
    return record
