"""The analyses of a network in words, as far as the numbers carry them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arat_fast.report.words import grouped, percent

_CLEAR = 2.0
"""Standard errors between batches that make a difference worth a word."""


def analysis_sentences(records: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """What every part found, in order.

    Args:
        records: JSON types by part, as ``arat-fast analyze`` writes them.
    """
    makers = (
        ("gradient-conflict", conflict_words),
        ("mixture", mixture_words),
        ("masking", masking_words),
    )
    return [words for part, make in makers if part in records for words in make(records[part])]


def conflict_words(record: Mapping[str, Any]) -> list[str]:
    """Gradient conflict: the share, the cosine, and which way they point."""
    total = record["pairs"]["classification"]
    share, cosine, unrelated = total["share"], total["cosine"], record["unrelated"]
    if share is None:
        return []
    sentences = [
        f"Classification and invariance loss pull {percent(share)} of the "
        f"{grouped(record['entries'])} convolution and linear weights in opposite directions; "
        f"were their signs chance, it would be {percent(unrelated)}, half of those that both "
        f"losses reach. The cosine of the two gradients is {f'{cosine:+.3f}'.replace('-', '−')}."
    ]
    if total["share_std"] is None:
        return sentences
    share_error, cosine_error = (
        _CLEAR * total[f"{key}_std"] / record["num_batches"] ** 0.5 for key in ("share", "cosine")
    )
    if share < unrelated - share_error and cosine > cosine_error:
        sentences.append("On the whole they pull the same way.")
    elif share > unrelated + share_error and cosine < -cosine_error:
        sentences.append("On the whole they pull against each other: that is gradient conflict.")
    else:
        sentences.append("Over these batches that is neither clearly together nor clearly apart.")
    return sentences


def mixture_words(record: Mapping[str, Any]) -> list[str]:
    """Mixture distribution: the distance before and after normalisation, and where it is worst."""
    layers, mean = record["layers"], record["mean"]
    worst = max(layers, key=lambda path: layers[path]["w2_relative"])
    return [
        "A BatchNorm that clean and adversarial images share normalises by the statistics of their "
        "mixture, which fits neither where the two are far apart.",
        f"What enters the {len(layers)} BatchNorm layers differs between clean and adversarial "
        f"images by {mean['w2_relative']:.3f} standard deviations per channel (Wasserstein-2, mean "
        "over layers; 0 is no difference, 1 a shift as large as the spread of the values), most "
        f"at {worst} with {layers[worst]['w2_relative']:.3f}; what leaves them differs by "
        f"{mean['output_w2']:.3f}.",
    ]


def masking_words(record: Mapping[str, Any]) -> list[str]:
    """The check for masked gradients: its verdict and every sentence of a check that failed."""
    checks = record["checks"]
    failed = [check for check in checks if not check["passed"]]
    if not failed:
        return [
            f"No sign of masked gradients in {len(checks)} checks: more steps, larger balls, "
            "random points and the other attacks behave as they must.",
            "A network whose gradients are masked looks robust because they are of no use to an "
            "attack. Passing does not prove robustness; AutoAttack remains the number to report.",
        ]
    return [
        f"WARNING: {len(failed)} of {len(checks)} checks for masked gradients failed; do not "
        "trust the robust accuracy under PGD.",
        *(f"{check['name']}: {check['text']}" for check in failed),
    ]
