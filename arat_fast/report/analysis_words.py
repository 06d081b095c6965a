"""The analyses of a network in words, as far as the numbers carry them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arat_fast.report.run import dig, number
from arat_fast.report.words import NARROW_SPACE, grouped, percent, plain

_CLEAR = 2.0
"""Standard errors between batches that make a difference worth a word."""


def analysis_sentences(records: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """What every part found, in order.

    Args:
        records: JSON types by part, as ``arat-fast analyze`` writes them.
    """
    makers = {
        "gradient-conflict": conflict_words,
        "mixture": mixture_words,
        "surface": surface_words,
        "masking": masking_words,
        "attacker": attacker_words,
    }
    return [sentence for part, make in makers.items() for sentence in make(records.get(part) or {})]


def conflict_words(record: Mapping[str, Any]) -> list[str]:
    """Gradient conflict: the share, the cosine, and which way they point."""
    total = dig(record, "pairs", "classification")
    share, cosine = number(dig(total, "share")), number(dig(total, "cosine"))
    unrelated = number(record.get("unrelated"))
    if share is None or cosine is None or unrelated is None:
        return []
    sentences = [
        f"Classification and invariance loss pull {percent(share)} of the "
        f"{grouped(number(record.get('entries')) or 0)} convolution and linear weights in opposite "
        f"directions; gradients of random signs would do so in {percent(unrelated)}. "
        f"The cosine of the two gradients is {signed(cosine)}."
    ]
    spread = number(dig(total, "share_std"))
    batches = number(record.get("num_batches"))
    if spread is None or batches is None:
        return sentences
    error = _CLEAR * spread / batches**0.5
    if share < unrelated - error and cosine > 0:
        sentences.append("On the whole they pull the same way.")
    elif share > unrelated + error and cosine < 0:
        sentences.append("On the whole they pull against each other: that is gradient conflict.")
    else:
        sentences.append("Over these batches that is neither clearly together nor clearly apart.")
    return sentences


def mixture_words(record: Mapping[str, Any]) -> list[str]:
    """Mixture distribution: the distance before and after normalisation, and where it is worst."""
    layers = dig(record, "layers")
    relative, output = (number(dig(record, "mean", key)) for key in ("w2_relative", "output_w2"))
    if not isinstance(layers, Mapping) or not layers or relative is None or output is None:
        return []
    worst = max(layers, key=lambda path: number(dig(layers, path, "w2_relative")) or 0.0)
    largest = number(dig(layers, worst, "w2_relative")) or 0.0
    return [
        f"What enters the {len(layers)} BatchNorm layers differs between clean and adversarial "
        f"images by {relative:.3f} standard deviations per channel (Wasserstein-2, mean over "
        f"layers), most at {worst} with {largest:.3f}; what leaves them differs by {output:.3f}."
    ]


def surface_words(record: Mapping[str, Any]) -> list[str]:
    """Loss surfaces: how far it is to the boundary each way."""
    ways = dig(record, "boundary")
    reach = number(record.get("reach"))
    if not isinstance(ways, Mapping) or reach is None:
        return []
    parts = []
    for way in ("adversarial", "random"):
        found = ways.get(way)
        if isinstance(found, list) and found:
            distances = [value for value in map(number, found) if value is not None]
            inside = sum(1 for value in distances if value <= 1)
            parts.append(
                f"{len(distances)} of {len(found)} images lose their class along the {way} "
                f"direction ({inside} of them inside the ball)"
            )
    return [f"Up to {plain(reach)} times the radius, {' and '.join(parts)}."] if parts else []


def masking_words(record: Mapping[str, Any]) -> list[str]:
    """The check for masked gradients: its verdict and every sentence of a check that failed."""
    checks = record.get("checks")
    if not isinstance(checks, list) or not checks:
        return []
    failed = [check for check in checks if not dig(check, "passed")]
    if not failed:
        return [
            f"No sign of masked gradients in {len(checks)} checks: more steps, larger balls, "
            "random points and the other attacks behave as they must."
        ]
    return [
        f"WARNING: {len(failed)} of {len(checks)} checks for masked gradients failed; do not "
        "trust the robust accuracy under PGD.",
        *(f"{dig(check, 'name')}: {dig(check, 'text')}" for check in failed),
    ]


def attacker_words(record: Mapping[str, Any]) -> list[str]:
    """What the attack did: how many answers turned, how sure the wrong ones are, and where to."""
    samples, turned = number(record.get("num_samples")), number(record.get("turned"))
    before = number(record.get("right_clean"))
    if not samples or turned is None or not before:
        return []
    sentences = [
        f"The attack turns {grouped(turned)} of the {grouped(before)} answers that were right."
    ]
    sure = number(record.get("confidence_wrong"))
    if sure is not None:
        sentences.append(
            "Where it is wrong under attack, the network is "
            f"{100 * sure:.0f}{NARROW_SPACE}% sure on average."
        )
    routes, classes = record.get("routes"), record.get("classes")
    if isinstance(routes, list) and routes and isinstance(classes, list):
        true, predicted, count = routes[0]
        if count > 1:
            sentences.append(
                f"The most frequent way: {classes[true]} taken for {classes[predicted]}, "
                f"{count} times."
            )
    return sentences


def signed(value: float) -> str:
    """A cosine with its sign, three decimals."""
    return f"{'−' if round(value, 3) < 0 else '+'}{abs(value):.3f}"
