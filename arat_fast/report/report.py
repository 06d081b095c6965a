"""The report of a run."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from arat_fast import __version__
from arat_fast.command_line import typed
from arat_fast.config import config_to_dict
from arat_fast.datasets import DATASETS
from arat_fast.files import write_text, written_here
from arat_fast.objectives import known_objective
from arat_fast.recipes import recipe
from arat_fast.report import analysis_words, examples, words
from arat_fast.report.comparison import compare_runs
from arat_fast.report.curves import run_plots
from arat_fast.report.radii import by_radius
from arat_fast.report.records import analysis_plots, records_of
from arat_fast.report.run import Accuracy, Run, Summary, read_accuracies, read_run
from arat_fast.report.templates import render
from arat_fast.saved.network import read_saved
from arat_fast.settings import free_fields, meanings
from arat_fast.statistics import difference_interval
from arat_fast.training.checkpoint import BEST

_SUSPICIOUS_GAP = 0.15
_OF_ONE_ATTACK = ("num_steps", "alpha", "autoattack")
"""Settings of the evaluation that are not those of every attack; what was run has its own."""
_OFF: tuple[Any, ...] = (None, False, 0, "none", [])
"""Values of a setting that is off; there are more of them than a reader wants to see."""
_LISTS = ("model.name", "objective.name", "data.name")
"""Settings whose meaning is a list of what there is."""
_ORDINARY = "an ordinary network, to compare with"
_CHECKS = {
    "gradient": "There is a gradient",
    "steps": "More steps",
    "restarts": "More restarts",
    "radius": "Larger balls",
    "full range": "No limit",
    "random": "Random points",
    "black-box": "Without the gradient",
    "transfer": "From another network",
}


class Number(NamedTuple):
    """An accuracy in large, in which ball; ``missing`` says why there is none."""

    name: str
    caption: str
    ball: str
    accuracy: Accuracy | None
    missing: str = "not measured"


class Setting(NamedTuple):
    """A setting, what it means, and the recipe's own where that is another."""

    name: str
    value: Any
    changed: bool
    default: Any
    meaning: str


class Classes(NamedTuple):
    """Accuracies class by class, and the extremes of the last column; ``clear``: they differ by
    more than the choice of the images explains (Newcombe, 95 %); ``crossed``: AutoAttack left
    more of a class than PGD."""

    names: list[str]
    rows: dict[str, list[Accuracy]]
    weakest: str
    strongest: str
    clear: bool
    crossed: bool


def write_report(run: Path, compare: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` into a run's folder: one file that needs nothing else.

    A run that was interrupted is reported as far as it got. The dataset is not needed; the weights
    are read only where ``arat-fast eval`` left a record in the folder.

    Args:
        run: folder of the run.
        compare: folders of other runs; the report then begins with what sets this run apart. If
            there are none, a run that began with natural training is compared with that.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: a folder is not there or is not a run's.
        ValueError: the configuration of a run is unreadable.
        OSError: the report cannot be written; an older one stays.
    """
    with written_here(run):
        of = read_run(run)
        if of.summary.natural_model and not compare:
            natural = run / of.summary.natural_model["source"]
            compare = [natural] if (natural / "config.json").is_file() else []
        page = _page(of, [read_run(path) for path in compare])
    write_text(run / "report.html", page)
    return run / "report.html"


def _page(run: Run, others: Sequence[Run]) -> str:
    config, summary = run.config, run.summary
    records, not_shown = _evaluated(run)
    final = _final(run, records)
    settings, num_changed = _settings(run)
    objective = known_objective(config.objective.name)
    radii = by_radius([final, *(record["accuracy"] for record in records.values())])
    of_class = summary.per_class.get("images", ())
    following = _next(run, final, [other.path for other in others], several_radii=bool(radii))
    return render(
        "report.html.j2",
        run=run,
        summary=summary,
        title=f"{words.objective_name(config)} on {words.dataset_name(config)}",
        dataset=words.dataset_name(config),
        method=words.objective_name(config),
        paper=objective.paper if objective else None,
        threat=words.threat_words(config),
        weights=words.weights_name(summary.model),
        numbers=_numbers(run, final),
        comparison=compare_runs([run, *others]) if others else None,
        final=final,
        pgd=next((name for name in final if name.startswith("pgd")), None),
        num_tested=max((a.num_samples for a in summary.accuracy.values()), default=None),
        suspicions=_suspicions(summary, final),
        cards=examples.cards(run.examples) if run.examples else [],
        largest_change=examples.largest_change(run.examples) if run.examples else 0.0,
        plots=run_plots(run),
        overfitting=words.overfitting(run),
        masking=run.analyses.get("masking"),
        masking_words=analysis_words.masking_words,
        check_names=_CHECKS,
        analysis_plots=analysis_plots(run.analyses, run.training_analyses),
        analysis_words=_analysis_words(run),
        shared_settings={
            k: v for k, v in summary.evaluation.items() if v and k not in _OF_ONE_ATTACK
        },
        records=records,
        radii=radii,
        classes=_classes(summary),
        not_shown=not_shown,
        settings=settings,
        num_changed=num_changed,
        facts=_facts(run),
        commonest=max(of_class) / sum(of_class) if of_class else None,
        has_ordinary=_ORDINARY in dict(following),
        next=[(why, command.replace("arat-fast", typed(), 1)) for why, command in following],
        closing=f"Report written by arat_fast {__version__}.",
    )


def _final(run: Run, records: Mapping[str, Any]) -> Mapping[str, Accuracy]:
    """The final accuracies. AutoAttack that the training left out is that of a later evaluation in
    the same ball, of as many images at least; ``record`` in its details is the file."""
    attack, final = run.config.attack, run.summary.accuracy
    for name, record in records.items():
        later = record["accuracy"].get("autoattack")
        if later is None or "clean" not in final or "autoattack" in final:
            continue
        same = (later.details["norm"], later.details["eps"]) == (attack.norm, attack.eps)
        if same and later.num_samples >= final["clean"].num_samples:
            details = {**later.details, "record": name}
            final = {**final, "autoattack": dataclasses.replace(later, details=details)}
    return final


def _numbers(run: Run, final: Mapping[str, Accuracy]) -> list[Number]:
    """The accuracies in large; those of the last evaluation where there are no final ones."""
    attack = run.config.attack
    ball = words.ball(attack.norm, attack.eps)
    if not final and run.evaluations:
        last = run.evaluations[-1]
        where = f"{last.split}, epoch {words.plain(last.epoch)}"
        if last.model != "last":
            where += f", {last.model}"
        clean, pgd = (
            Accuracy(round(share * last.num_samples), last.num_samples)
            for share in (last.clean, last.pgd)
        )
        robust = f"PGD-{last.num_steps}"
        return [Number("Clean", where, "no attack", clean), Number(robust, where, ball, pgd)]
    numbers = []
    settings = run.config.eval
    pgd_names = [key for key in final if key.startswith("pgd")] or [f"pgd{settings.num_steps}"]
    for key in ("clean", *pgd_names, "autoattack") if final else ():
        caption, where = {
            "clean": ("images as they are", "no attack"),
            "autoattack": ("four attacks in turn; the one to report", ball),
        }.get(key, ("gradient attack; a quick check", ball))
        reason = run.summary.left_out.get(key)
        missing = f"left out: {reason}" if reason else "not measured"
        if run.summary.status != "finished" and (key != "autoattack" or settings.autoattack):
            missing += ": the evaluation did not come to its end"
        found = final.get(key)
        if found and "record" in found.details:
            caption += f"; of {found.details['record']}, later"
        numbers.append(Number(words.metric_name(key), caption, where, found, missing))
    return numbers


def _classes(summary: Summary) -> Classes | None:
    """Right answers by class of the final evaluation; None where they were not counted."""
    images = summary.per_class.get("images", ())
    names = [name for name in summary.accuracy if name in summary.per_class]
    names = [name for name in names if name != "clean_branch"]
    rows = {
        label: [Accuracy(summary.per_class[name][k], number) for name in names]
        for k, (label, number) in enumerate(zip(summary.classes, images, strict=False))
        if number
    }
    if not names or len(rows) < 2:
        return None
    last = {label: accuracies[-1] for label, accuracies in rows.items()}
    low, high = (find(last.values(), key=lambda one: one.value) for find in (min, max))
    # Among the weakest the next one too, which is rarely far from it.
    order = sorted(last, key=lambda label: last[label].value)
    weakest = [label for label in last if last[label].value == low.value]
    told = weakest + order[1:2] * (len(weakest) == 1)
    weak = " and ".join(f"{label} ({100 * last[label].value:.1f} %)" for label in told)
    strong = " and ".join(label for label in last if last[label].value == high.value)
    images = high.num_samples, low.num_samples
    clear = difference_interval((high.correct, low.correct), images)[0] > 0
    crossed = names[-1] == "autoattack" and any(_above(x[-1], x[-2]) for x in rows.values())
    return Classes(names, rows, weak, strong, clear, crossed)


def _suspicions(summary: Summary, final: Mapping[str, Accuracy]) -> list[str]:
    """What of the accuracies does not fit together, or says that nothing was learned."""
    clean, auto = final.get("clean"), final.get("autoattack")
    pgd = next((a for k, a in final.items() if k.startswith("pgd")), None)
    found = [
        f"Check this: accuracy under {name} is above clean accuracy, which cannot be."
        for name, attack in (("PGD", pgd), ("AutoAttack", auto))
        if _above(attack, clean)
    ]
    if _above(auto, pgd):
        found.append(
            "Check this: AutoAttack left more answers right than PGD. That is rare; it can mean "
            "that an attack did not run as it should."
        )
    elif pgd and auto and pgd.value - auto.value > _SUSPICIOUS_GAP:
        found.append(
            "PGD is far weaker than AutoAttack here. Often that means masked gradients: the "
            "network hides the way uphill from PGD without being robust. Trust AutoAttack."
        )
    rejected = sum(a.details.get("num_rejected", 0) for a in final.values())
    remarks = (summary.collapsed, summary.randomised)
    found += [f"Check this: {remark}." for remark in remarks if remark]
    if rejected:
        found.append(
            f"Adversarial images outside the ball or the range, left out of the count: {rejected}."
        )
    return found


def _above(one: Accuracy | None, other: Accuracy | None) -> bool:
    if one is None or other is None:
        return False
    return one.num_samples == other.num_samples and one.correct > other.correct


def _analysis_words(run: Run) -> dict[str, list[str]]:
    """Gradient conflict and mixture distribution in words, of the last state that was analysed."""
    last = run.training_analyses[-1] if run.training_analyses else None
    conflict = run.analyses.get("gradient-conflict") or (last and last.gradient_conflict)
    mixture = run.analyses.get("mixture") or (last and last.mixture)
    found = {}
    if conflict:
        found["Gradient conflict"] = analysis_words.conflict_words(conflict)
    if mixture:
        found["Mixture distribution"] = analysis_words.mixture_words(mixture)
    return found


def _evaluated(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """Records of ``arat-fast eval`` of the run's weights, and why others are not shown."""
    names = sorted(path.name for path in run.path.glob("*evaluation*.json"))
    if not names:
        return {}, {}
    try:
        records, others = records_of(read_saved(run.path))
    except (OSError, ValueError):
        reason = "the weights of the run cannot be read, so that its checksum says nothing"
        return {}, dict.fromkeys(names, reason)
    elsewhere = "it is of another file than the run's checkpoint"
    others |= {name: elsewhere for name in names if name not in {*records, *others}}
    shown = {
        name: {**record, "accuracy": read_accuracies(record["accuracy"])}
        for name, record in records.items()
    }
    return shown, others


def _settings(run: Run) -> tuple[dict[str, list[Setting]], int | None]:
    """By section the settings that are on in the run or are not the recipe's; and how many are not
    the recipe's, None for an unknown recipe."""
    config = run.config
    values = config_to_dict(config)
    try:
        defaults = config_to_dict(recipe(config.recipe, compat=config.compat))
    except ValueError:
        defaults = None
    idle = _idle(run)
    nested = {name: value for name, value in values.items() if isinstance(value, dict)}
    of_run = {name: value for name, value in values.items() if name not in nested}
    sections: dict[str, list[Setting]] = {}
    for section, entries in {"run": of_run, **nested}.items():
        before = entries if defaults is None else defaults.get(section, defaults)
        kind: type = type(getattr(config, section, config))
        meaning = meanings(kind)
        for name, value in entries.items():
            off = value in _OFF or not {section, f"{section}.{name}"}.isdisjoint(idle)
            if value != before.get(name) or not off:
                recipes = before.get(name)
                # Without its limits, which are for who sets it.
                text = meaning.get(name, "").partition("; >")[0].rstrip(".")
                if f"{section}.{name}" in _LISTS or text.lower() == name:
                    text = ""
                it = Setting(name, value, value != recipes, recipes, text)
                sections.setdefault(section, []).append(it)
    num_changed = sum(setting.changed for entries in sections.values() for setting in entries)
    return sections, None if defaults is None else num_changed


def _idle(run: Run) -> set[str]:
    """Sections and settings that change nothing in this run, since another one is off."""
    config, schedule, average = run.config, run.config.schedule.name, run.config.average.kind
    attack = config.attack
    idle = {
        "run.compat": config.compat == "paper",
        "attack.start_radius": attack.start_radius == 1 or not attack.random_start,
        "attack.project": attack.project,
        "attack.num_restarts": attack.num_restarts == 1,
        "train.accumulate": config.train.accumulate == 1,
        "objective.w_adv objective.w_clean": getattr(config.objective, "balance", "") != "fixed",
        "optimizer.base_batch": config.optimizer.lr_scaling == "none",
        "schedule.milestones schedule.decay": not schedule.endswith("steps"),
        "schedule.warmup": schedule != "onecycle",
        "average": average == "none",
        "average.decay": average != "ema",
        "data.unsup_fraction": config.data.unsup is None,
        "data.crop data.image_size data.bad_images": bool(DATASETS[config.data.name].image_size),
        "step.fold": attack.bn != "running",
        "train.rollback_factor": not config.train.rollbacks,
        "targets.mix_alpha": config.targets.mix == "none",
        "awp": not config.awp.gamma,
        "watch": attack.num_steps > 2,
        "analyze": not config.analyze.every,
        "distributed": run.summary.processes == 1,
    }
    # How it was read, shown and kept is no matter of what came out.
    machinery = {
        f"{section}.{name}"
        for section in ("data", "step", "train")
        for name in free_fields(type(getattr(config, section))) - {"rollback_factor"}
    }
    return machinery | {name for names, off in idle.items() if off for name in names.split()}


def _facts(run: Run) -> dict[str, Any]:
    """Machine, versions and times; what is not known is left out."""
    summary, seconds = run.summary, run.summary.wall_seconds
    speed, steps = summary.images_per_second, summary.steps
    facts = {
        "Device": summary.device,
        "Precision": summary.precision,
        "Kernels": summary.kernels,
        "Time in training steps": words.duration(seconds["train"]) if "train" in seconds else None,
        "Images per second of that time": None if speed is None else words.grouped(speed),
        "Evaluation time": words.duration(seconds["eval"]) if "eval" in seconds else None,
        "Steps": None if steps is None else words.grouped(steps),
        "Natural training before": _natural(summary.natural_model),
        "Commit": summary.commit,
        "Written by": f"arat_fast {run.version}",
        **summary.versions,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _natural(model: Mapping[str, Any] | None) -> str | None:
    """The natural training that a run started from, as far as it is known."""
    if not model:
        return None
    epochs, seconds = model.get("epochs"), model.get("train_seconds")
    known = "length not known" if epochs is None else f"{epochs} epoch{'s' if epochs != 1 else ''}"
    if seconds is not None:
        known += f", {words.duration(seconds)}"
    return f"{known} ({model['source']})"


def _next(
    run: Run, final: Mapping[str, Accuracy], compared: Sequence[Path], several_radii: bool
) -> list[tuple[str, str]]:
    """Commands that go on from here, and what each is for."""
    summary, attack, path = run.summary, run.config.attack, shlex.quote(str(run.path))
    found = []
    # With --resume it made the last part.
    made = (summary.command or "").replace(" --resume", "")
    if made:
        of = f"arat_fast {run.version}" + (f", commit {summary.commit}" if summary.commit else "")
        found.append((f"made this run ({of})", made))
    if summary.status != "finished":
        command = made or f"arat-fast train {shlex.quote(run.config.recipe)} OPTIONS"
        out = "" if "--out" in command else f" --out {path}"
        return [*found, ("go on where it stopped", f"{command}{out} --resume")]
    if "autoattack" not in {*final, *summary.left_out}:
        found.append(("AutoAttack, to compare with other work", f"arat-fast eval {path}"))
    elsewhere = re.sub(r" --out ('[^']*'|\S+)", "", made)
    is_adversarial = run.config.objective.name != "natural"
    if made and not compared and "--objective" not in made and is_adversarial:
        found.append((_ORDINARY, f"{elsewhere} --objective.name natural --out OTHER"))
    if not several_radii:
        radii = " ".join(words.plain(factor * attack.eps) for factor in (0.5, 1.0, 1.5))
        why = "accuracy at other radii, AutoAttack in each; --attacks pgd takes far less time"
        found.append((why, f"arat-fast eval {path} --eps {radii}"))
    better = words.better_before(run)
    if better is not None:
        said, options = better
        again = f"{elsewhere or f'arat-fast train {run.config.recipe}'} {options} --out FOLDER"
        kept = f"arat-fast eval {shlex.quote(str(run.path / BEST))}"
        found.append((f"{said}; the best by validation images", again if options else kept))
    if "masking" not in run.analyses:
        found.append(("is the robustness real? a check", f"arat-fast analyze {path}"))
    again, beside = "this page again, with what these found", shlex.join(map(str, compared))
    if _ORDINARY in dict(found):
        again, beside = f"{again} and that network, if it was trained, beside this one", "OTHER"
    return [
        *found,
        (again, f"arat-fast report {path}" + (f" --compare {beside}" if beside else "")),
        ("what the network says of pictures of yours", f"arat-fast predict {path} PICTURE"),
        ("the network for other software", f"arat-fast export {path} --format hub --out FOLDER"),
    ]
