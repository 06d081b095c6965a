"""Which runs a comparison is made of, and what each of them sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from arat_fast.command_line import apply_overrides, overrides_of
from arat_fast.compare.cost import step_cost
from arat_fast.compare.methods import ABLATION, METHODS, Method, choose_methods
from arat_fast.compare.plan import (
    RECORD,
    Plan,
    make_plan,
    merge_with_saved,
    plan_from_record,
    plan_to_dict,
    read_record,
)
from arat_fast.compare.runner import GridRunner
from arat_fast.compare.sharing import find_source, same_training, share_training
from arat_fast.config import Config, config_to_dict
from arat_fast.files import write_json
from arat_fast.recipes import RECIPES, recipe
from arat_fast.training.averaging import WeightAverage
from arat_fast.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint


def with_objective(config: Config, name: str) -> Config:
    return apply_overrides(config, ["--objective.name", name])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("compat", ["paper", "official"])
def test_overrides_name_every_difference_from_the_recipe(name: str, compat: str) -> None:
    plain = recipe(name, compat)  # type: ignore[arg-type]
    assert overrides_of(plain)[-2:] == ["--seed", "0"]
    changed = dataclasses.replace(
        plain,
        seed=3,
        model=dataclasses.replace(plain.model, norm="shared", mean=(0.5,), std=(0.25,)),
        objective=dataclasses.replace(
            plain.objective,
            name="trades",
            gamma=1e-5,
            layers=("layer3.0.bn1", "layer3.0.bn2"),
            stop_gradient=not plain.objective.stop_gradient,
        ),
        attack=dataclasses.replace(plain.attack, eps=1 / 3, random_start=False),
        schedule=dataclasses.replace(plain.schedule, milestones=(0.5,)),
        average=dataclasses.replace(plain.average, kind="swa", every=None),
        data=dataclasses.replace(plain.data, root=Path("a folder"), flip=not plain.data.flip),
        step=dataclasses.replace(plain.step, noisy_clean=not plain.step.noisy_clean),
        eval=dataclasses.replace(plain.eval, alpha=None),
    )
    overrides = overrides_of(changed)
    assert apply_overrides(recipe(name, compat), overrides) == changed  # type: ignore[arg-type]


def test_every_objective_has_a_row_of_its_own() -> None:
    base = recipe("digits")
    for label, method in METHODS.items():
        config = apply_overrides(base, method.options)
        assert config.objective.name == label.removesuffix("+swa")
        assert (config.average.kind == "swa") == label.endswith("+swa")


def test_the_ablation_switches_one_part_at_a_time() -> None:
    base = recipe("digits")
    switches = {
        method.label: (
            config.objective.stop_gradient,
            config.objective.predictor,
            config.norm == "split",
        )
        for method in ABLATION
        for config in [apply_overrides(base, method.options)]
    }
    assert switches == {
        "naive": (False, False, False),
        "naive+stop-gradient": (True, False, False),
        "naive+predictor": (False, True, False),
        "naive+split-bn": (False, False, True),
    }
    whole = apply_overrides(base, METHODS["arat"].options)
    assert (whole.objective.stop_gradient, whole.objective.predictor) == (True, True)
    assert whole.norm == "split"


def test_methods_are_chosen_in_order() -> None:
    chosen = choose_methods(["at"], ["Gamma 10: --objective.gamma 10"], ablation=True)
    assert [m.label for m in chosen[:3]] == ["at", "gamma-10", "arat"]
    assert chosen[3:] == list(ABLATION)
    assert chosen[1] == Method("gamma-10", "Gamma 10", ("--objective.gamma", "10"))


def test_a_variant_can_replace_a_method() -> None:
    (chosen,) = choose_methods(["arat+swa"], ["arat+swa: --average.kind swa --average.every 6"])
    assert chosen.title == "ARAT + SWA"
    assert chosen.options == ("--average.kind", "swa", "--average.every", "6")


@pytest.mark.parametrize(
    ("labels", "variants", "message"),
    [
        (["tradse"], [], "did you mean trades"),
        (["at", "at"], [], "names 'at' twice"),
        ([], ["no options"], "NAME: --setting value"),
        ([], ["empty:"], "NAME: --setting value"),
        ([], ['open: --objective.name "at'], "cannot be read"),
        ([], ["a: --train.epochs 1", "A: --train.epochs 2"], "name each differently"),
        ([], ["../up: epochs"], "NAME: --setting value"),
    ],
)
def test_what_cannot_be_chosen(labels: list[str], variants: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_methods(labels, variants)


def test_labels_are_names_of_folders() -> None:
    for text, label in (
        ("../../etc: --seed 1", "etc"),
        ("a/b\\c d: --x", "a-b-c-d"),
        (".hidden: --x", "hidden"),
        ("Ü*?: --x y", "ü"),
        # The same letter, spelt as u with an accent of its own.
        ("u\u0308_1: --x", "ü-1"),
        ("γ 10: --objective.gamma 10", "γ-10"),
        ("β 10: --objective.beta 10", "β-10"),
    ):
        (method,) = choose_methods([], [text])
        assert method.label == label


@pytest.mark.parametrize(
    ("name", "passes", "attacks"),
    # k steps of PGD: k passes forward, k backward. Training on one batch 3, on two 6; TRADES looks
    # at the clean images once more in the attack and once more in the loss.
    [("natural", 3, False), ("at", 23, True), ("trades", 28, True), ("mart", 26, True),
     ("arat", 26, True),
     # LBGAT: its guide's own training; ARREST: two looks, at the natural network and at its own.
     ("lbgat", 28, True), ("arrest", 25, True)],
)  # fmt: skip
def test_cost_of_a_step(name: str, passes: float, attacks: bool) -> None:
    cost = step_cost(with_objective(recipe("digits"), name))
    # The stem needs no gradient of its input in training; the predictors add a little.
    assert cost.passes == pytest.approx(passes, abs=0.05)
    assert cost.attacks == attacks


def test_cost_grows_with_the_attack() -> None:
    config = apply_overrides(recipe("digits"), ["--attack.num-steps", "3"])
    assert step_cost(config).passes == pytest.approx(12, abs=0.05)


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
    epochs = {planned.method.label: planned.epochs for planned in plan.methods}
    # The 598 passes of 23 epochs of ARAT. ARREST: 25 and as many natural epochs of 3 each.
    assert epochs == {
        "natural": 23, "at": 26, "trades": 21, "lbgat": 21, "arrest": 21, "arat": 23,
        "arat+swa": 23, "short": 2, "long-teacher": 17, "given-teacher": 24,
    }  # fmt: skip
    natural = {p.method.label: p.natural_epochs for p in plan.methods if p.natural_epochs}
    assert natural == {"arrest": 21, "long-teacher": 60}
    for planned in plan.methods:
        if planned.method.label not in ("natural", "short"):
            assert planned.work == pytest.approx(598, rel=0.03)
    for cell, planned in zip(plan.cells(), plan.methods, strict=True):
        assert cell.config.train.epochs == planned.epochs
    equal = make_plan(base, methods, (0,), "epochs")
    assert {p.epochs for p in equal.methods if p.method.label != "short"} == {23}


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1, 1)])
def test_seeds_that_make_no_grid(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="--seeds expects different numbers >= 0"):
        make_plan(tiny_config(), choose_methods(["at"]), seeds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "3"), "seed and compat are those of the whole comparison"),
        (("--compat=official",), "seed and compat are those of the whole comparison"),
        (("--objective.gama", "3"), "^mine: .*gama"),
        (("--objective.layers", "nowhere"), "^mine: .*nowhere"),
        (("--help",), "^mine: settings are expected"),
        (
            ("--attack.eps", "0.2"),
            "^mine: attack.eps=0.12 is that of .* comparison, got 0.2",
        ),
        (("--attack.norm=L2",), "^mine: attack.norm=Linf is that of the whole comparison"),
        (("--eval.max_samples", "7"), "^mine: eval.max_samples=40 is that of .* got 7: all rows"),
        (("--data.num-val", "0"), "^mine: data.num_val=1200 is that of the whole comparison"),
    ],
)
def test_options_that_do_not_fit_are_found_before_anything_runs(
    options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(tiny_config(), [Method("mine", "mine", options)], (0,))


def test_a_plan_survives_its_record() -> None:
    plan = make_plan(tiny_config(), choose_methods(["at", "arat"]), (0, 5), "work", "a command")
    assert plan_from_record(plan_to_dict(plan)) == plan
    before = plan_to_dict(plan)
    del before["commands"]
    assert plan_from_record({**before, "command": "a command"}) == plan


@pytest.mark.parametrize(
    "switch", [["--objective.no-predictor"], ["--model.norm", "shared"], ["--objective.gamma", "9"]]
)
def test_the_last_row_of_the_ablation_has_all_parts(switch: list[str]) -> None:
    base = apply_overrides(tiny_config(), switch)
    methods = choose_methods([], ablation=True)
    if "gamma" in switch[0]:
        assert len(make_plan(base, methods, (0,)).methods) == 5
        return
    with pytest.raises(ValueError, match="is expected for arat, got (False|shared); set it in a"):
        make_plan(base, methods, (0,))


def test_the_options_of_a_method_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tiny_config(), choose_methods(["at", "natural"]), (0, 1, 2))
    calls = []
    monkeypatch.setattr(
        "arat_fast.compare.plan.apply_overrides",
        lambda config, options: calls.append(options) or apply_overrides(config, options),
    )
    assert len(plan.cells()) == 6
    assert len(calls) == 2


def test_the_grid_is_laid_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        returncode = 1

        def __init__(self, arguments: list[str], **options: object) -> None:
            pass

        def poll(self) -> int:
            return 1

    plan = make_plan(tiny_config(), choose_methods(["at", "natural"]), (0, 1))
    cells, calls = Plan.cells, []
    monkeypatch.setattr(Plan, "cells", lambda self: calls.append(1) or cells(self))
    fake = SimpleNamespace(Popen=Ended, DEVNULL=None, STDOUT=None)
    monkeypatch.setattr("arat_fast.compare.runner.subprocess", fake)
    record = GridRunner(plan, tmp_path, 1, lambda line: None).run()
    assert [cell["status"] for cell in record["cells"]] == ["failed"] * 4
    assert len(calls) == 1


def test_the_grid_of_a_folder_can_grow_but_not_change(tmp_path: Path) -> None:
    base = tiny_config()
    saved = make_plan(base, choose_methods(["at"]), (0, 1), command="the first")
    (tmp_path / "again").mkdir()
    write_json(tmp_path / RECORD, {"format": 1, **plan_to_dict(saved), "cells": []})
    more = make_plan(base, choose_methods(["natural"]), (2,), command="the second")
    merged = merge_with_saved(more, tmp_path / RECORD)
    assert merged.commands == ("the first", "the second")
    write_json(tmp_path / "again" / RECORD, {"format": 1, **plan_to_dict(merged), "cells": []})
    assert merge_with_saved(more, tmp_path / "again" / RECORD).commands == merged.commands
    assert [p.method.label for p in merged.methods] == ["natural", "at"]
    assert merged.seeds == (2, 0, 1)
    assert len(merged.cells()) == 6
    # Earlier versions never set a switch that has no effect with split BatchNorm.
    passes = dataclasses.replace(base.objective, separate_passes=True)
    official = make_plan(dataclasses.replace(base, objective=passes), choose_methods(["at"]), (0,))
    assert merge_with_saved(official, tmp_path / RECORD).config.objective.separate_passes

    other = dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=32))
    for plan, message in (
        (make_plan(other, choose_methods(["at"]), (0,)), "data.batch_size=64, got"),
        (
            make_plan(
                base, choose_methods([], ["at: --objective.name at --optimizer.lr 0.2"]), (0,)
            ),
            "has at with --objective.name at, got --objective.name at --optimizer.lr 0.2",
        ),
        (
            make_plan(recipe("cifar10-resnet18"), choose_methods(["at"]), (0,)),
            "compares on digits, got cifar10-resnet18",
        ),
        (
            make_plan(base, choose_methods(["at"]), (0,), "work"),
            "has --budget epochs, got work: give --budget epochs, or choose another folder",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            merge_with_saved(plan, tmp_path / RECORD)
        assert "choose another folder with --out" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99, "methods": []}', '{"format": 1}'])
def test_files_that_are_no_comparison(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ValueError, match=RECORD):
        read_record(tmp_path)


def test_a_folder_without_comparison(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no comparison at"):
        read_record(tmp_path)


def test_training_is_shared_only_where_it_is_the_same() -> None:
    base = apply_overrides(recipe("digits"), ["--average.kind", "none"])
    methods = choose_methods(["arat", "arat+swa", "at"])
    cells = make_plan(base, methods, (0, 1)).cells()
    sources = {cell.run: find_source(cell, cells) for cell in cells}
    found = {run: source.run for run, source in sources.items() if source is not None}
    assert found == {"arat-seed0": "arat+swa-seed0", "arat-seed1": "arat+swa-seed1"}
    swa = apply_overrides(base, ["--average.kind", "swa"])
    assert same_training(swa, base)
    assert not same_training(swa, apply_overrides(base, ["--optimizer.lr", "0.05"]))
    assert not same_training(base, swa)
    # The EMA is evaluated during training, so the files of the run would differ.
    assert not same_training(apply_overrides(base, ["--average.kind", "ema"]), base)


def test_what_is_evaluated_may_have_changed_since_the_shared_training(tmp_path: Path) -> None:
    plain = apply_overrides(tiny_config(), ["--average.kind", "none"])
    averaging = apply_overrides(tiny_config(), ["--average.kind", "swa"])
    source = tmp_path / "source"
    source.mkdir()
    (source / "metrics.jsonl").write_text("line\n")
    state = {
        "config": config_to_dict(averaging),
        "average": WeightAverage(averaging.average, 0).state_dict(),
        "metrics_bytes": 5,
    }
    save_checkpoint(source / CHECKPOINT, state)
    evaluated = apply_overrides(plain, ["--eval.max-samples", "0"])
    assert share_training(source, tmp_path / "target", evaluated)
    written = load_checkpoint(tmp_path / "target" / CHECKPOINT)
    assert written["config"] == config_to_dict(evaluated)
    trained = apply_overrides(plain, ["--optimizer.lr", "0.5"])
    with pytest.raises(ValueError, match="optimizer.lr=0.1, got optimizer.lr=0.5"):
        share_training(source, tmp_path / "other", trained)
    assert not (tmp_path / "other").exists()
