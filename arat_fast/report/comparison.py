"""A run beside others: what one method buys over another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from arat_fast.report import style
from arat_fast.report.curves import Plot, as_percent, draw_series, epoch_axis, eval_keys
from arat_fast.report.html import Child, Html, join, table, tag
from arat_fast.report.run import Accuracy, Run, dig, number
from arat_fast.report.words import (
    DASH,
    MINUS,
    duration,
    interval,
    metric_name,
    objective_name,
    percent,
    plain,
    signed_points,
)
from arat_fast.statistics import difference_interval, wilson_interval

_SAME_TEST = (
    ("dataset", ("data", "name")),
    ("attack norm", ("attack", "norm")),
    ("eps", ("attack", "eps")),
    ("network", ("model", "name")),
)
_MARGIN = 2.0
"""Points of accuracy that a plot may show beyond 0 and 100."""
_LABEL_OFFSETS = ((7, 6), (7, -13), (-14, 6), (-14, -13))


@dataclass(frozen=True)
class Contestant:
    """A run and the letter it goes by."""

    letter: str
    run: Run

    @property
    def short(self) -> str:
        """Letter, method and seed."""
        seed = plain(self.run.setting("seed"))
        return f"{self.letter} · {objective_name(self.run)}, seed {seed}"


def comparison_html(run: Run, others: Sequence[Run]) -> Html:
    """Table of differences, plots, and what to keep in mind.

    Args:
        run: the run of the report; every difference is this run minus another.
        others: at least one.
    """
    contestants = [Contestant(_letter(i), r) for i, r in enumerate((run, *others))]
    first, *rest = contestants
    warnings = [w for other in rest for w in _mismatches(first, other)]
    verdicts = [_verdict(first, other) for other in rest]
    notice = tag("div", [tag("p", w) for w in warnings], class_="notice") if warnings else None
    with style.plot_style():
        plots = [_trade_off(contestants), _overlay(contestants)]
    return tag(
        "div",
        tag("ul", verdicts, class_="prose") if any(verdicts) else None,
        notice,
        _table(first, rest),
        _seeds(contestants),
        tag(
            "p",
            "Differences are this run minus the other, in percentage points; behind them the "
            "95\u202f% interval (Newcombe) that treats both test samples as independent. Both runs "
            "are usually tested on the same images, which makes it somewhat too wide. It covers "
            "the choice of images, not the seed.",
            " Sum: clean plus AutoAttack accuracy." if _with_sum(contestants) else None,
            class_="small",
        ),
        tag("div", [plot.to_html() for plot in plots if plot], class_="panels"),
    )


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"R{index + 1}"


def _marker(index: int) -> str:
    # Where the colours come round again, the markers do not come with them.
    return style.MARKERS[(index + index // len(style.SERIES)) % len(style.MARKERS)]


def _metrics(contestants: Sequence[Contestant]) -> list[str]:
    names = dict.fromkeys(key for c in contestants for key in c.run.accuracies())
    chosen = [k for k in names if k == "clean" or k.startswith("pgd")]
    last = [k for k in names if k == "autoattack"]
    return [*sorted(chosen, key=lambda k: (k != "clean", k)), *last]


def _headings(first: str, contestants: Sequence[Contestant]) -> list[Child]:
    metrics = _metrics(contestants)
    total = ["Sum"] if _with_sum(contestants) else []
    return [first, *map(metric_name, metrics), *total, "Training"]


def _with_sum(contestants: Sequence[Contestant]) -> bool:
    """Whether there is a sum to show: AutoAttack was run."""
    return any(_sum(contestant.run) is not None for contestant in contestants)


def _sum(run: Run) -> float | None:
    final = run.accuracies()
    if "clean" not in final or "autoattack" not in final:
        return None
    return final["clean"].value + final["autoattack"].value


def _train_seconds(run: Run) -> float | None:
    return number(dig(run.summary, "wall_seconds", "train"))


def _verdict(first: Contestant, other: Contestant) -> Html | None:
    parts, clear = [], []
    ours, theirs = first.run.accuracies(), other.run.accuracies()
    for key in _metrics([first, other]):
        if key not in ours or key not in theirs:
            continue
        name = "clean" if key == "clean" else metric_name(key)
        a, b = ours[key], theirs[key]
        parts.append(f"{name} {signed_points(a.value - b.value)}")
        low, high = difference_interval((a.correct, b.correct), (a.num_samples, b.num_samples))
        if low > 0 or high < 0:
            clear.append(name)
    if not parts:
        return None
    against: list[Child] = [f"This run ({first.letter}) against ", tag("b", other.short)]
    if not _same_data(first.run, other.run):
        words = ": tested on other data, so no difference between them is given."
        return tag("li", against, words)
    total, other_total = _sum(first.run), _sum(other.run)
    if total is not None and other_total is not None:
        parts.append(f"sum {signed_points(total - other_total)}")
    beyond = (
        f"More than the choice of test images explains: {', '.join(clear)}."
        if clear
        else "None of it is more than the choice of test images may explain."
    )
    return tag(
        "li",
        against,
        f": {', '.join(parts)} points{_time_words(first.run, other.run)}. {beyond}",
    )


def _time_words(run: Run, other: Run) -> str:
    ours, theirs = _train_seconds(run), _train_seconds(other)
    if not ours or not theirs:
        return ""
    words = f", in {ours / theirs:.2f} times the training time"
    same = run.summary.get("device") == other.summary.get("device")
    return words if same else f"{words} (on another device)"


def _same_data(run: Run, other: Run) -> bool:
    """Whether both runs are of one dataset; images of one's own are known by where they lie."""
    from arat_fast.config import OWN_IMAGES

    name, root = run.setting("data", "name"), run.setting("data", "root")
    if name != other.setting("data", "name"):
        return False
    return name not in OWN_IMAGES or root == other.setting("data", "root")


def _mismatches(first: Contestant, other: Contestant) -> list[str]:
    found = []
    for name, path in _SAME_TEST:
        ours, theirs = first.run.setting(*path), other.run.setting(*path)
        if ours != theirs:
            found.append(f"{name} {plain(ours)} against {plain(theirs)}")
        elif name == "dataset" and not _same_data(first.run, other.run):
            roots = [plain(r.run.setting("data", "root")) for r in (first, other)]
            found.append(f"images from {roots[0]} against {roots[1]}")
    for key, ours in first.run.accuracies().items():
        theirs = other.run.accuracies().get(key)
        if theirs and theirs.num_samples != ours.num_samples:
            found.append(
                f"{metric_name(key)} on {ours.num_samples} against {theirs.num_samples} images"
            )
    ours, theirs = (r.run.summary.get("split") for r in (first, other))
    if ours and theirs and ours != theirs:
        found.append(f"split {ours} against {theirs}")
    budgets = [r.run.setting("train", "epochs") for r in (first, other)]
    if budgets[0] != budgets[1]:
        found.append(f"{plain(budgets[0])} against {plain(budgets[1])} epochs")
    if not found:
        return []
    return [
        f"{first.letter} and {other.letter} differ in more than the method: {'; '.join(found)}."
    ]


def _table(first: Contestant, rest: Sequence[Contestant]) -> Html:
    metrics = _metrics([first, *rest])
    with_sum = _with_sum([first, *rest])
    rows: list[list[Child]] = []
    for contestant in (first, *rest):
        run = contestant.run
        final = run.accuracies()
        versus = first.run if contestant is not first else None
        if versus and not _same_data(versus, run):
            versus = None
        cells: list[Child] = [
            tag(
                "div",
                tag("span", contestant.letter, class_="letter"),
                tag(
                    "div",
                    tag("b", objective_name(run)),
                    tag("span", "this run", class_="badge") if contestant is first else None,
                    tag("span", f"seed {plain(run.setting('seed'))} · {run.name}", class_="small"),
                ),
                class_="who",
            )
        ]
        for key in metrics:
            ours = versus.accuracies().get(key) if versus else None
            cells.append(_accuracy_cell(final.get(key), ours))
        if with_sum:
            cells.append(_sum_cell(run, versus))
        cells.append(_time_cell(run, versus))
        rows.append(cells)
    return table(_headings("Run", [first, *rest]), rows, class_="runs")


def _seeds(contestants: Sequence[Contestant]) -> Html | None:
    """Means over runs that differ in the seed alone; None where no two do."""
    groups: dict[str, list[Contestant]] = {}
    for contestant in contestants:
        settings = {k: v for k, v in contestant.run.config.items() if k != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(contestant)
    if all(len(members) < 2 for members in groups.values()):
        return None
    metrics = _metrics(contestants)
    rows: list[list[Child]] = []
    for members in groups.values():
        runs = [member.run for member in members]
        letters = ", ".join(member.letter for member in members)
        cells: list[Child] = [
            [
                tag("b", objective_name(runs[0])),
                tag(
                    "span", f"runs {letters}" if len(runs) > 1 else f"run {letters}", class_="small"
                ),
            ]
        ]
        for key in metrics:
            finals = [run.accuracies().get(key) for run in runs]
            cells.append(_mean_cell([100 * a.value for a in finals if a], len(runs)))
        if _with_sum(contestants):
            sums = [_sum(run) for run in runs]
            cells.append(_mean_cell([100 * s for s in sums if s is not None], len(runs)))
        times = [seconds for seconds in map(_train_seconds, runs) if seconds is not None]
        cells.append(duration(sum(times) / len(times)) if times else DASH)
        rows.append(cells)
    return join(
        [
            tag("h3", "Mean over seeds, lowest to highest below it"),
            table(_headings("Runs", contestants), rows, class_="runs"),
        ]
    )


def _mean_cell(values: Sequence[float], num_runs: int) -> Child:
    if not values:
        return DASH
    mean = tag("span", f"{sum(values) / len(values):.1f}", class_="big")
    if num_runs == 1:
        return [mean, tag("span", "one run", class_="small")]
    spread = f"{min(values):.1f}{DASH}{max(values):.1f}"
    of = "" if len(values) == num_runs else f" ({len(values)} of {num_runs} runs)"
    return [mean, tag("span", f"{spread}{of}", class_="small")]


def _accuracy_cell(accuracy: Accuracy | None, ours: Accuracy | None) -> Child:
    if accuracy is None:
        return DASH
    n = accuracy.num_samples
    low, high = wilson_interval(accuracy.correct, n)
    cell: list[Child] = [
        tag("span", percent(accuracy.value, n), class_="big"),
        tag("span", interval(low, high, n), class_="small"),
    ]
    if ours is not None:
        change = ours.value - accuracy.value
        low, high = difference_interval((ours.correct, accuracy.correct), (ours.num_samples, n))
        cell.append(_difference(change, f"({_signed(low)} to {_signed(high)})"))
    return cell


def _difference(change: float, behind: str | None = None) -> Html:
    return tag(
        "span",
        tag("b", f"A {signed_points(change)}"),
        tag("span", behind, class_="small") if behind else None,
        class_="difference",
    )


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return text.replace("-", MINUS)


def _sum_cell(run: Run, versus: Run | None) -> Child:
    total = _sum(run)
    if total is None:
        return DASH
    cell: list[Child] = [tag("span", f"{100 * total:.1f}", class_="big")]
    ours = _sum(versus) if versus else None
    if ours is not None:
        cell.append(_difference(ours - total))
    return cell


def _time_cell(run: Run, versus: Run | None) -> Child:
    seconds = _train_seconds(run)
    if seconds is None:
        return DASH
    cell: list[Child] = [tag("span", duration(seconds), class_="big")]
    device = run.summary.get("device")
    if device:
        cell.append(tag("span", str(device), class_="small"))
    ours = _train_seconds(versus) if versus else None
    if ours and seconds:
        cell.append(
            tag(
                "span",
                tag("b", f"A ×{ours / seconds:.2f}"),
                class_="difference",
            )
        )
    return cell


def _trade_off(contestants: Sequence[Contestant]) -> Plot | None:
    key = "autoattack"
    if not all(key in c.run.accuracies() for c in contestants):
        found = [k for k in _metrics(contestants) if k.startswith("pgd")]
        key = found[0] if found else key
    points = []
    for index, contestant in enumerate(contestants):
        final = contestant.run.accuracies()
        if "clean" in final and key in final:
            points.append((index, contestant, final["clean"], final[key]))
    if len(points) < 2:
        return None
    figure, axes = style.new_axes(height=3.6)
    described = []
    for index, contestant, clean, robust in points:
        color = style.SERIES[index % len(style.SERIES)]
        axes.errorbar(
            [100 * robust.value],
            [100 * clean.value],
            xerr=_whiskers(robust),
            yerr=_whiskers(clean),
            color=color,
            marker=_marker(index),
            markersize=8,
            linewidth=1.1,
            capsize=3,
            label=style.plot_text(contestant.short, 40),
        )
        axes.annotate(
            contestant.letter,
            (100 * robust.value, 100 * clean.value),
            xytext=_LABEL_OFFSETS[index % len(_LABEL_OFFSETS)],
            textcoords="offset points",
            fontweight="bold",
            color=style.INK,
        )
        described.append(
            f"{contestant.short}: clean {percent(clean.value)}, {metric_name(key)} "
            f"{percent(robust.value)}"
        )
    axes.set_xlabel(f"{metric_name(key)} accuracy, %")
    axes.set_ylabel("clean accuracy, %")
    _room(axes)
    style.legend_above(axes, 1)
    return Plot(
        "The trade-off",
        style.to_svg(figure),
        f"Clean against robust accuracy. {'; '.join(described)}.",
        "Further up and further right is better. Whiskers are the 95\u202f% intervals.",
    )


def _longest(run: Run) -> tuple[str, str] | None:
    # An average of the weights is evaluated only once there is one; on a tie it comes first.
    kinds = run.eval_kinds()
    average = run.summary.get("model")
    return max(
        kinds,
        key=lambda kind: (len(run.eval_series("clean", *kind)[1]), kind[1] == average),
        default=None,
    )


def _room(axes: Axes) -> None:
    """Limits of 0 to 100 with a small margin, in which there is no tick."""
    for low, high, set_limits in (
        (*axes.get_xlim(), axes.set_xlim),
        (*axes.get_ylim(), axes.set_ylim),
    ):
        set_limits(max(low, -_MARGIN), min(high, 100 + _MARGIN))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if 0 <= v <= 100 else ""))


def _whiskers(accuracy: Accuracy) -> list[list[float]]:
    low, high = wilson_interval(accuracy.correct, accuracy.num_samples)
    return [[100 * (accuracy.value - low)], [100 * (high - accuracy.value)]]


def _overlay(contestants: Sequence[Contestant]) -> Plot | None:
    figure, axes = style.new_axes(height=3.6)
    described = []
    sources = set()
    for index, contestant in enumerate(contestants):
        run = contestant.run
        color = style.SERIES[index % len(style.SERIES)]
        kind = _longest(run)
        for key, train_key, name, dashes in (
            ("clean", "accuracy_clean", "clean", style.DASHES[1]),
            ("pgd", "accuracy_adv", eval_keys(run)[1], style.DASHES[0]),
        ):
            series = run.eval_series(key, *kind) if kind else run.train_series(train_key)
            if len(series[1]) == 0:
                continue
            source = f"evaluations during training ({kind[0]}, {kind[1]} weights)" if kind else ""
            sources.add(source or "training batches")
            label = f"{contestant.letter} {name}" if kind else f"{contestant.letter} {name} (train)"
            # Dashes alone do not tell two single points apart.
            marker = _marker(index) if kind or len(series[1]) == 1 else ""
            draw_series(axes, *series, label, color, dashes, marker, hollow=key == "clean")
            described.append(f"{label} ends at {percent(series[1][-1])}")
    if not described:
        return None
    as_percent(axes)
    epoch_axis(axes)
    style.legend_above(axes, len(contestants) if len(contestants) <= 4 else 3)
    return Plot(
        "Over the epochs",
        style.to_svg(figure),
        f"Accuracy over epochs. {'; '.join(described)}.",
        "Dashed, hollow marks: clean. Solid, full marks: under attack. "
        f"From {' and '.join(sorted(sources))}.",
    )
