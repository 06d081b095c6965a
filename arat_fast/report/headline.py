"""What was trained, how good it is, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Mapping

from arat_fast.report.html import Child, Html, tag
from arat_fast.report.run import Accuracy, Run, dig, make_accuracy, number
from arat_fast.report.words import (
    DASH,
    dataset_name,
    describe,
    duration,
    grouped,
    interval,
    metric_name,
    objective_name,
    percent,
    plain,
    threat_words,
    weights_name,
)
from arat_fast.statistics import wilson_interval

_SUSPICIOUS_GAP = 0.15
_MANY_IMAGES = 1000


def title_of(run: Run) -> str:
    """Title of the report."""
    return f"{objective_name(run)} on {dataset_name(run)}"


def headline_html(run: Run) -> Html:
    """Title, one sentence on the run, and the accuracies in large."""
    return Html(
        tag("p", _eyebrow(run), class_="eyebrow")
        + tag("h1", title_of(run))
        + tag("p", describe(run), _tested(run), class_="lead")
        + _notices(run)
        + _numbers(run)
    )


def meaning_html(run: Run) -> Html:
    """What the numbers say and what they do not."""
    final = run.accuracies()
    says = [_clean_sentence(final), *_attack_sentences(run, final), _branch_sentence(final)]
    doubts = _limits(run, final)
    checks = _checks(final)
    parts: list[Child] = []
    if any(says):
        parts += [tag("h3", "What the numbers say"), tag("p", [_spaced(s) for s in says if s])]
    if checks:
        parts += [tag("div", [tag("p", check) for check in checks], class_="notice")]
    parts += [tag("h3", "What the numbers do not say"), tag("ul", [tag("li", d) for d in doubts])]
    return tag("div", parts, class_="prose")


def _eyebrow(run: Run) -> str:
    recipe = run.summary.get("recipe") or run.setting("recipe")
    parts = [f"recipe {recipe}", f"seed {plain(run.setting('seed'))}", f"run {run.name}"]
    if run.setting("compat") == "official":
        parts.insert(1, "as the official code runs")
    return " · ".join(parts)


def _tested(run: Run) -> str | None:
    final = run.accuracies()
    if not final:
        return None
    n = max(a.num_samples for a in final.values())
    split = run.summary.get("split")
    held_out = " that it has never seen" if split == "test" else ""
    weights = run.summary.get("model")
    of = f" Evaluated: {weights_name(weights)}." if weights else ""
    return f" Tested on {grouped(n)} {split or 'held-out'} images{held_out}.{of}"


def _notices(run: Run) -> Html:
    notes = [note for note in (_stopped(run), *run.notes) if note]
    return tag("div", [tag("p", note) for note in notes], class_="notice") if notes else Html("")


def _stopped(run: Run) -> str | None:
    status = run.summary.get("status")
    if status == "finished":
        return None
    planned = number(run.setting("train", "epochs"))
    of = f" of {plain(planned)}" if planned else ""
    at = number(run.train[-1].get("epoch")) if run.train else None
    where = f"; its last record is at epoch {plain(round(at, 2))}{of}" if at is not None else ""
    what = {"interrupted": "was interrupted", "failed": "stopped with an error"}.get(
        str(status), "has not finished"
    )
    reason = run.summary.get("reason") if status == "failed" else None
    because = f" ({reason})" if isinstance(reason, str) else ""
    return f"This run {what}{because}{where}. Everything below is as far as it got."


def _numbers(run: Run) -> Html:
    final = run.accuracies()
    if final:
        keys = ["clean", *(k for k in final if k.startswith("pgd")), "autoattack"]
        captions = {
            "clean": "images as they are",
            "autoattack": "four attacks in turn; the one to report",
        }
        cards = []
        for key in keys:
            caption = captions.get(key, "gradient attack; a quick check")
            reason = dig(run.summary, "left_out", key)
            missing = f"left out: {reason}" if isinstance(reason, str) else "not measured"
            cards.append(_number(metric_name(key), caption, final.get(key), missing))
        return tag("div", cards, class_="numbers")
    if not run.evals:
        return tag("p", "No accuracy has been measured yet.", class_="small")
    last = run.evals[-1]
    where = f"{last.get('split')}, epoch {plain(number(last.get('epoch')))}"
    if last.get("model") not in (None, "last"):
        where += f", {last.get('model')}"
    steps = last.get("num_steps")
    cards = [
        _number("Clean", where, make_accuracy(last.get("clean"), last.get("num_samples"))),
        _number(
            f"PGD-{steps}" if isinstance(steps, int) else "PGD",
            where,
            make_accuracy(last.get("pgd"), last.get("num_samples")),
        ),
    ]
    return Html(
        tag("p", "Last evaluation during training; final ones are missing.", class_="small")
        + tag("div", cards, class_="numbers")
    )


def _number(
    name: str, caption: str, accuracy: Accuracy | None, missing: str = "not measured"
) -> Html:
    head = tag("p", tag("b", name), tag("span", caption), class_="number-name")
    if accuracy is None:
        return tag("div", head, tag("p", DASH, class_="value"), tag("p", missing), class_="number")
    n = accuracy.num_samples
    low, high = wilson_interval(accuracy.correct, n)
    value, _, sign = percent(accuracy.value, n).partition("\u202f")
    return tag(
        "div",
        head,
        tag("p", value, tag("small", "\u202f", sign), class_="value"),
        _bar(accuracy.value, low, high),
        tag("p", f"{grouped(accuracy.correct)} of {grouped(n)} right"),
        tag("p", f"95\u202f% interval {interval(low, high, n)}"),
        class_="number",
    )


def _bar(value: float, low: float, high: float) -> Html:
    # A drawing, not styled boxes: printers leave out backgrounds.
    def rectangle(left: float, width: float, y: float, height: float, fill: str) -> Html:
        return tag(
            "rect",
            x=f"{100 * left:.2f}%",
            y=str(y),
            width=f"{100 * width:.2f}%",
            height=str(height),
            fill=fill,
        )

    return tag(
        "svg",
        rectangle(0, 1, 5, 6, "#e6e9ee"),
        rectangle(0, value, 5, 6, "#0072B2"),
        rectangle(low, max(high - low, 0.004), 7, 2, "#1c2330"),
        tag("rect", x=f"{100 * low:.2f}%", y="2", width="1.5", height="12", fill="#1c2330"),
        tag("rect", x=f"{100 * high:.2f}%", y="2", width="1.5", height="12", fill="#1c2330"),
        class_="bar",
        width="100%",
        height="16",
        role="img",
        aria_label=f"{percent(value)}, interval {interval(low, high)}, on a scale from 0 to 100",
    )


def _clean_sentence(final: Mapping[str, Accuracy]) -> str | None:
    clean = final.get("clean")
    if clean is None:
        return None
    wrong = clean.num_samples - clean.correct
    return (
        f"Shown {grouped(clean.num_samples)} images that nobody tampered with, the network gets "
        f"{grouped(clean.correct)} right and {grouped(wrong)} wrong."
    )


def _attack_sentences(run: Run, final: Mapping[str, Accuracy]) -> list[str | None]:
    threat = threat_words(run)
    sentences: list[str | None] = []
    strongest = final.get("autoattack")
    pgd = next((a for k, a in final.items() if k.startswith("pgd")), None)
    name = next((metric_name(k) for k in final if k.startswith("pgd")), "")
    if threat and (strongest or pgd):
        sentences.append(f"The attacker knows the network and {threat}.")
    if pgd:
        steps = name.removeprefix("PGD-")
        sentences.append(
            f"PGD, {steps} steps uphill on the loss, leaves {percent(pgd.value, pgd.num_samples)} "
            "of the answers right."
        )
    if strongest:
        sentences.append(
            "AutoAttack, four attacks in turn that need no tuning, leaves "
            f"{percent(strongest.value, strongest.num_samples)}; this is the number to compare "
            "with other work."
        )
    return sentences


def _branch_sentence(final: Mapping[str, Accuracy]) -> str | None:
    branch = final.get("clean_branch")
    if branch is None:
        return None
    return (
        "The clean branch, which is used in training only, gets "
        f"{percent(branch.value, branch.num_samples)} of the clean images right."
    )


def _limits(run: Run, final: Mapping[str, Accuracy]) -> list[str]:
    threat = threat_words(run)
    limits = [
        "Robust accuracy is what today’s attacks leave over: an upper bound, not a guarantee. A "
        "better attack can only lower it."
    ]
    if threat:
        limits.append(
            f"It holds for an attacker who {threat}. It says nothing about larger or other "
            "changes: rotation, blur, another camera."
        )
    sizes = [a.num_samples for a in final.values()]
    if sizes:
        n = max(sizes)
        few = "With so few images the intervals are wide: " if n < _MANY_IMAGES else ""
        one = "one image more or less is" if few else "One image is"
        limits.append(
            "The intervals (Wilson, 95\u202f%) tell how far the accuracy on all images of this "
            f"kind may lie from that on these {grouped(n)}. {few}{one} "
            f"{plain(round(100 / n, 2 if few else 4))} points."
        )
    limits.append(
        f"This is one training run, seed {plain(run.setting('seed'))}. Another seed gives another "
        "network; the intervals do not cover that. Compare methods over several seeds."
    )
    return limits


def _checks(final: Mapping[str, Accuracy]) -> list[str]:
    clean, auto = final.get("clean"), final.get("autoattack")
    pgd = next((a for k, a in final.items() if k.startswith("pgd")), None)
    found = []
    for name, attack in (("PGD", pgd), ("AutoAttack", auto)):
        same = clean and attack and clean.num_samples == attack.num_samples
        if clean and attack and same and attack.correct > clean.correct:
            found.append(
                f"Check this: accuracy under {name} is above clean accuracy, which cannot be."
            )
    if pgd and auto and pgd.num_samples == auto.num_samples:
        if auto.correct > pgd.correct:
            found.append(
                "Check this: AutoAttack left more answers right than PGD. That is rare; it can "
                "mean that an attack did not run as it should."
            )
        elif pgd.value - auto.value > _SUSPICIOUS_GAP:
            found.append(
                "PGD is far weaker than AutoAttack here. Often that means masked gradients: the "
                "network hides the way uphill from PGD without being robust. Trust AutoAttack."
            )
    rejected = sum(int(number(a.details.get("num_rejected")) or 0) for a in final.values())
    if rejected:
        found.append(
            f"Adversarial images outside the ball or the range, left out of the count: {rejected}."
        )
    return found


def _spaced(sentence: str) -> str:
    return f"{sentence} "


def seconds_of(run: Run, part: str) -> str | None:
    """Wall time of "train" or "eval" in words, None where it is not known."""
    seconds = number(dig(run.summary, "wall_seconds", part))
    return duration(seconds) if seconds is not None else None
