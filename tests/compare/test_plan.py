"""Which runs a comparison is made of, and what each of them sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny import changed, tiny_config

from arat_fast.command_line import apply_overrides, overrides_of
from arat_fast.compare.cost import step_cost
from arat_fast.compare.methods import ABLATION, METHODS, Method, choose_methods
from arat_fast.compare.plan import (
    RECORD,
    make_plan,
    merge_with_saved,
    plan_to_dict,
    read_record,
)
from arat_fast.files import write_json
from arat_fast.objectives import TRADES
from arat_fast.recipes import recipe


@pytest.mark.parametrize(
    ("name", "compat"),
    [
        ("digits", "official"),
        ("fashion-mnist-resnet8", "paper"),
        ("cifar10-wrn34-10", "official"),
        ("imagenet-resnet50", "paper"),
    ],
)
def test_overrides_name_every_difference_from_the_recipe(name: str, compat: str) -> None:
    plain = recipe(name, compat)  # type: ignore[arg-type]
    assert overrides_of(plain)[-2:] == ["--seed", "0"]
    config = dataclasses.replace(
        plain, seed=3, objective=dataclasses.replace(plain.objective, gamma=1e-5, layers=("a", "b"))
    )
    config = changed(config, "model", norm="shared", mean=(0.5,), std=(0.25,))
    config = changed(config, "attack", eps=1 / 3, random_start=False)
    config = changed(config, "schedule", milestones=(0.5,))
    config = changed(config, "average", kind="swa", every=None)
    config = changed(config, "data", root=Path("a folder"), flip=not plain.data.flip)
    config = changed(config, "eval", alpha=None)
    other = dataclasses.replace(config, objective=TRADES.Settings("trades", beta=3.0))
    for different in (config, other):
        found = apply_overrides(recipe(name, compat), overrides_of(different))  # type: ignore[arg-type]
        assert found == different


def test_the_rows_set_what_they_say() -> None:
    """Every objective has a row; the ablation switches one part at a time."""
    assert list(METHODS)[0] == "natural" and list(METHODS)[-2:] == ["arat", "arat+swa"]
    for label, method in METHODS.items():
        config = apply_overrides(recipe("digits"), method.options)
        assert config.objective.name == label.removesuffix("+swa")
        assert (config.average.kind == "swa") == label.endswith("+swa")
    configs = {
        m.label: apply_overrides(recipe("digits"), m.options) for m in (*ABLATION, METHODS["arat"])
    }
    assert {
        label: (config.objective.stop_gradient, config.objective.predictor, config.norm)
        for label, config in configs.items()
    } == {
        "naive": (False, False, "shared"),
        "naive+stop-gradient": (True, False, "shared"),
        "naive+predictor": (False, True, "shared"),
        "naive+split-bn": (False, False, "split"),
        "arat": (True, True, "split"),
    }


def test_methods_are_chosen_in_order() -> None:
    chosen = choose_methods(["at"], ["Gamma 10: --objective.gamma 10"], ablation=True)
    assert [m.label for m in chosen[:3]] == ["at", "gamma-10", "arat"]
    assert chosen[3:] == list(ABLATION)
    assert chosen[1] == Method("gamma-10", "Gamma 10", ("--objective.gamma", "10"))
    (replaced,) = choose_methods(["arat+swa"], ["arat+swa: --average.kind swa --average.every 6"])
    assert replaced.title == "ARAT + SWA" and replaced.options[-1] == "6"


@pytest.mark.parametrize(
    ("names", "variants", "keyword"),
    [
        (["tradse"], [], "trades"),
        (["at", "at"], [], "twice"),
        (["no.such.module:Objective"], [], "no.such"),
        ([], ["no options"], "NAME"),
        ([], ["empty:"], "NAME"),
        ([], ['open: --objective.name "at'], "read"),
        ([], ["a: --train.epochs 1", "A: --train.epochs 2"], "name"),
        ([], ["../up: epochs"], "NAME"),
    ],
)
def test_what_cannot_be_chosen(names: list[str], variants: list[str], keyword: str) -> None:
    with pytest.raises(ValueError, match=keyword):
        choose_methods(names, variants)


def test_labels_are_names_of_folders() -> None:
    # The last is ü as u with an accent of its own.
    titles = ("../../etc", "a/b\\c d", ".hidden", "Ü*?", "γ 10", "u\u0308_1")
    methods = choose_methods([], [f"{title}: --x y" for title in titles])
    assert [m.label for m in methods] == ["etc", "a-b-c-d", "hidden", "ü", "γ-10", "ü-1"]


@pytest.mark.parametrize(
    ("name", "passes"),
    # k steps of PGD: k passes forward, k backward. Training on one batch 3, on two 6; TRADES looks
    # at the clean images once more in the attack and once more in the loss.
    [("natural", 3), ("at", 23), ("trades", 28), ("mart", 26), ("arat", 26),
     # LBGAT: its guide's own training; ARREST: two looks, at the natural network and at its own.
     ("lbgat", 28), ("arrest", 25), ("at --awp.gamma 0.01", 26)],
)  # fmt: skip
def test_cost_of_a_step(name: str, passes: float) -> None:
    cost = step_cost(apply_overrides(recipe("digits"), ["--objective.name", *name.split()]))
    # The stem needs no gradient of its input in training; the predictors add a little.
    assert cost == pytest.approx(passes, abs=0.05)


@pytest.mark.slow
def test_equal_work() -> None:
    base = apply_overrides(recipe("digits"), ["--train.epochs", "23"])
    methods = choose_methods(
        ["natural", "at", "trades", "lbgat", "arrest", "arat", "arat+swa"],
        [
            "short: --train.epochs 2",
            "long teacher: --objective.name arrest --objective.teacher-epochs 60",
            "given teacher: --objective.name arrest --objective.teacher natural",
        ],
    )
    plan = make_plan(base, methods, (0,), "work")
    epochs = {method.label: method.epochs for method in plan.methods}
    # The 598 passes of 23 epochs of ARAT. ARREST: 25 and as many natural epochs of 3 each.
    assert epochs == {
        "natural": 23, "at": 26, "trades": 21, "lbgat": 21, "arrest": 21, "arat": 23,
        "arat+swa": 23, "short": 2, "long-teacher": 17, "given-teacher": 24,
    }  # fmt: skip
    natural = {m.label: m.natural_epochs for m in plan.methods if m.natural_epochs}
    assert natural == {"arrest": 21, "long-teacher": 60}
    for method in plan.methods:
        if method.label not in ("natural", "short"):
            assert method.work == pytest.approx(598, rel=0.03)
    assert [cell.config.train.epochs for cell in plan.cells()] == list(epochs.values())
    equal = make_plan(base, methods, (0,), "epochs")
    assert {m.epochs for m in equal.methods if m.label != "short"} == {23}


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1, 1)])
def test_seeds_that_make_no_grid(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="--seeds"):
        make_plan(tiny_config(), choose_methods(["at"]), seeds)


@pytest.mark.parametrize(
    ("options", "keyword"),
    [
        (("--seed", "3"), "--seeds"),
        (("--compat=official",), "--compat"),
        (("--objective.gama", "3"), "gama"),
        (("--objective.layers", "nowhere"), "nowhere"),
        (("--attack.eps", "0.2"), "attack.eps"),
        (("--attack.norm=L2",), "attack.norm"),
        (("--eval.max_samples", "7"), "eval.max_samples"),
        (("--data.num-val", "0"), "data.num_val"),
    ],
)
def test_options_that_do_not_fit_are_found_before_anything_runs(
    options: tuple[str, ...], keyword: str
) -> None:
    with pytest.raises(ValueError, match=f"mine.*{keyword}"):
        make_plan(tiny_config(), [Method("mine", "mine", options)], (0,))


@pytest.mark.slow
def test_the_last_row_of_the_ablation_has_all_parts() -> None:
    methods = choose_methods([], ablation=True)
    fits = apply_overrides(tiny_config(), ["--objective.gamma", "9"])
    assert len(make_plan(fits, methods, (0,)).methods) == 5
    for switch in (["--objective.no-predictor"], ["--model.norm", "shared"]):
        with pytest.raises(ValueError, match="--variant"):
            make_plan(apply_overrides(tiny_config(), switch), methods, (0,))


@pytest.mark.slow
def test_the_grid_of_a_folder_can_grow_but_not_change(tmp_path: Path) -> None:
    base = tiny_config()
    saved = make_plan(base, choose_methods(["at"]), (0, 1), command="the first")
    more = make_plan(base, choose_methods(["natural"]), (2,), command="the second")
    write_json(tmp_path / RECORD, {"format": 1, **plan_to_dict(saved), "cells": []})
    merged = merge_with_saved(more, tmp_path / RECORD)
    assert merged.commands == ("the first", "the second")
    assert [method.label for method in merged.methods] == ["natural", "at"]
    assert merged.seeds == (2, 0, 1) and len(merged.cells()) == 6
    write_json(tmp_path / RECORD, {"format": 1, **plan_to_dict(merged), "cells": []})
    assert merge_with_saved(more, tmp_path / RECORD).commands == merged.commands

    at = choose_methods(["at"])
    faster = choose_methods([], ["at: --objective.name at --optimizer.lr 0.2"])
    for plan, keyword in (
        (make_plan(changed(base, "data", batch_size=32), at, (0,)), "data.batch_size"),
        (make_plan(base, faster, (0,)), "--optimizer.lr"),
        (make_plan(recipe("cifar10-resnet18"), at, (0,)), "recipe"),
        (make_plan(base, at, (0,), "work"), "--budget"),
    ):
        with pytest.raises(ValueError, match=f"{keyword}.*--out") as error:
            merge_with_saved(plan, tmp_path / RECORD)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": 99, "methods": [], "cells": []}', '{"format": 1, "methods": []}'],
)
def test_files_that_are_no_comparison(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ValueError, match=RECORD):
        read_record(tmp_path)
