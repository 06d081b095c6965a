"""Configuration, measurements in full, what was evaluated later, environment, and how to run it
again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arat_fast.report.headline import seconds_of
from arat_fast.report.html import Child, Html, join, table, tag
from arat_fast.report.run import Accuracy, Run, count, dig, number, read_accuracies
from arat_fast.report.words import (
    DASH,
    duration,
    grouped,
    interval,
    metric_name,
    percent,
    plain,
    weights_name,
)

_TOP = "run"
_OF_ONE_ATTACK = ("num_steps", "alpha", "autoattack")
"""Settings of the evaluation that are not those of every attack; what was run has its own."""
_SHOWN_APART = ("attacks", "interval", "corruptions")


def measurements_html(run: Run) -> Html | None:
    """Every final accuracy with its interval and how it was measured."""
    accuracies = run.accuracies()
    if not accuracies:
        return None
    found = run.summary.get("evaluation")
    settings = found.items() if isinstance(found, Mapping) else ()
    shared = {key: value for key, value in settings if key not in _OF_ONE_ATTACK}
    words = f"Settings of the evaluation: {_listed(shared)}." if shared else None
    return join([_accuracy_table(accuracies), tag("p", words, class_="small") if words else None])


def evaluated_html(run: Run) -> Html | None:
    """What ``arat-fast eval`` found of the run's weights; None without a record.

    A record of other weights or of another dataset is named and not shown.
    """
    names = sorted(path.name for path in run.path.glob("*evaluation.json"))
    if not names:
        return None
    # Both import this package; and only here does a report need the weights.
    from arat_fast.export.measured import records_of
    from arat_fast.saved.network import read_saved

    try:
        records, others = records_of(read_saved(run.path))
    except (OSError, ValueError):
        reason = "the weights of the run cannot be read, so that its checksum says nothing"
        records, others = {}, dict.fromkeys(names, reason)
    elsewhere = "it is of another file than the run's checkpoint"
    others |= {name: elsewhere for name in names if name not in {*records, *others}}
    parts: list[Html] = []
    for name, record in records.items():
        accuracies = read_accuracies(record.get("accuracy"))
        parts.append(
            tag(
                "p",
                "What ",
                tag("code", "arat-fast eval"),
                f" found of these weights, as their checksum shows: {name}.",
            )
        )
        if accuracies:
            parts.append(_accuracy_table(accuracies))
        if "corruptions" in accuracies:
            own = (
                "The corruptions are arat_fast’s own: the figure must not be compared with those "
                "of CIFAR-10-C or ImageNet-C."
            )
            parts.append(tag("p", own, class_="small"))
        if "aa-torchattacks10" in accuracies:
            overstated = (
                "aa-torchattacks10 overstates robustness; it is for comparison with one published "
                "table only."
            )
            parts.append(tag("p", overstated, class_="small"))
        left_out = record.get("left_out")
        for attack, reason in left_out.items() if isinstance(left_out, Mapping) else ():
            parts.append(tag("p", f"{metric_name(str(attack))} was left out: {reason}."))
    parts += [tag("p", f"{name} is not shown: {reason}.") for name, reason in others.items()]
    return join(parts) if parts else None


def configuration_html(run: Run, defaults: Mapping[str, Any] | None) -> Html:
    """Every setting, by section, those that differ from the recipe marked.

    Args:
        run: the run.
        defaults: the recipe's own configuration; None where it is not known.
    """
    sections: dict[str, list[tuple[str, Any, bool, Any]]] = {_TOP: []}
    num_changed = 0
    for key, value in run.config.items():
        fields = value if isinstance(value, Mapping) else {key: value}
        section = key if isinstance(value, Mapping) else _TOP
        for name, setting in fields.items():
            default = dig(defaults, *((section, name) if section != _TOP else (name,)))
            changed = defaults is not None and setting != default
            num_changed += changed
            sections.setdefault(section, []).append((name, setting, changed, default))
    blocks = [_block(name, entries) for name, entries in sections.items() if entries]
    recipe = plain(run.setting("recipe"))
    if defaults is None:
        intro = f"The recipe {recipe} is not among those of this version; nothing is marked."
    elif num_changed:
        differ = "1 of these differs" if num_changed == 1 else f"{num_changed} of these differ"
        intro = f"{differ} from the recipe {recipe}, marked ◆."
    else:
        intro = f"Everything is as in the recipe {recipe}."
    return join([tag("p", intro), tag("div", blocks, class_="columns")])


def recipe_defaults(run: Run) -> Mapping[str, Any] | None:
    """The configuration of the run's recipe as it is without overrides, None where unknown."""
    from arat_fast.config import config_to_dict
    from arat_fast.recipes import recipe

    name, compat = run.setting("recipe"), run.setting("compat")
    try:
        return config_to_dict(recipe(name, compat=compat or "paper"))
    except (ValueError, KeyError, TypeError):
        return None


def environment_html(run: Run) -> Html:
    """Machine, versions and times."""
    summary = run.summary
    facts: list[tuple[str, Any]] = [
        ("Status", summary.get("status") or "not finished"),
        ("Device", summary.get("device")),
        ("Precision", summary.get("precision")),
        ("Weights evaluated", weights_name(summary["model"]) if "model" in summary else None),
        ("Training time", seconds_of(run, "train")),
        ("Evaluation time", seconds_of(run, "eval")),
        ("Images per second", _grouped(number(summary.get("images_per_second")))),
        ("Epochs", number(summary.get("epochs"))),
        ("Natural training before", _natural(summary.get("natural_model"))),
        ("Steps", _grouped(count(summary.get("steps")))),
        ("Parameters", _grouped(count(summary.get("num_parameters")))),
        ("Training images", _grouped(count(summary.get("train_samples")))),
        ("Test images", _grouped(count(summary.get("test_samples")))),
        ("Commit", summary.get("commit")),
        ("Written by", f"arat_fast {run.version}" if run.version else None),
    ]
    groups = [("Run", facts)]
    for title, key in (("Versions", "versions"), ("Implementations", "kernels")):
        entries = summary.get(key)
        if isinstance(entries, Mapping) and entries:
            groups.append((title, [(str(k), v) for k, v in entries.items()]))
    return tag(
        "div",
        [
            tag("section", tag("h3", title), _pairs([(k, v) for k, v in facts if v is not None]))
            for title, facts in groups
        ],
        class_="columns",
    )


def again_html(run: Run) -> Html | None:
    """The command that makes this run again."""
    command = run.summary.get("command")
    if not isinstance(command, str) or not command:
        return None
    commit = run.summary.get("commit")
    at = f", at commit {commit}" if commit else ""
    version = f" with arat_fast {run.version}" if run.version else ""
    return join(
        [
            tag("p", f"This command made the run{version}{at}:"),
            tag("pre", tag("code", command)),
            tag(
                "p",
                "The numbers behind this page: config.json, metrics.jsonl, summary.json and "
                "examples.npz in the same folder.",
                class_="small",
            ),
        ]
    )


def _accuracy_table(accuracies: Mapping[str, Accuracy]) -> Html:
    rows: list[list[Child]] = []
    for key, accuracy in accuracies.items():
        n = accuracy.num_images
        details = {k: v for k, v in accuracy.details.items() if k not in _SHOWN_APART}
        copies = f"{accuracy.copies} corrupted copies of each of {grouped(n)} images"
        rows.append(
            [
                metric_name(key),
                tag("span", percent(accuracy.value, n), class_="big"),
                interval(*accuracy.interval, n),
                f"{grouped(accuracy.correct)} of {grouped(accuracy.num_samples)}",
                [
                    tag("span", copies) if accuracy.copies > 1 else None,
                    tag("span", _listed(details)),
                    _attack_by_attack(accuracy.details.get("attacks"), n),
                    _by_corruption(accuracy.details.get("corruptions"), n),
                ],
            ]
        )
    return table(
        ["Measured", "Accuracy", "95\u202f% interval", "Right", "How"], rows, class_="wide"
    )


def _by_corruption(levels: Any, num_images: int) -> Html | None:
    """Each corruption's mean over its severities."""
    means = []
    for name, shares in levels.items() if isinstance(levels, Mapping) else ():
        found = [number(share) for share in shares] if isinstance(shares, list) else []
        values = [share for share in found if share is not None]
        if values:
            means.append(f"{name} {percent(sum(values) / len(values), num_images)}")
    return tag("span", "Mean over severities: ", ", ".join(means)) if means else None


def _attack_by_attack(after: Any, num_samples: int) -> Html | None:
    shares = after.items() if isinstance(after, Mapping) else ()
    left = [
        f"{attack} {percent(share, num_samples)}"
        for attack, share in ((a, number(v)) for a, v in shares)
        if share is not None
    ]
    return (
        tag("span", "Still right after each attack in turn: ", " → ".join(left)) if left else None
    )


def _block(name: str, entries: list[tuple[str, Any, bool, Any]]) -> Html:
    rows = []
    for key, value, changed, default in entries:
        note = tag("span", f"recipe: {plain(default)}", class_="small") if changed else None
        rows.append(
            tag(
                "tr",
                tag("th", "◆ " if changed else None, key, scope="row"),
                tag("td", plain(value), note),
                class_="changed" if changed else None,
            )
        )
    return tag("section", tag("h3", name), tag("table", tag("tbody", rows), class_="pairs"))


def _pairs(entries: list[tuple[str, Any]]) -> Html:
    rows = [tag("tr", tag("th", key, scope="row"), tag("td", plain(v))) for key, v in entries]
    return tag("table", tag("tbody", rows), class_="pairs")


def _listed(details: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {plain(value)}" for key, value in details.items()) or DASH


def _natural(model: Any) -> str | None:
    """The natural training that a run started from, as far as it is known; None where none was."""
    if not isinstance(model, Mapping):
        return None
    epochs, seconds = count(model.get("epochs")), number(model.get("train_seconds"))
    known = ["length not known"]
    if epochs is not None:
        known = [f"{epochs} epoch{'' if epochs == 1 else 's'}"]
    if seconds is not None:
        known.append(duration(seconds))
    return f"{', '.join(known)} ({model.get('source')})"


def _grouped(value: float | None) -> str | None:
    return grouped(value) if value is not None else None
