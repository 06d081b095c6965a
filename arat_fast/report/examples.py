"""Images beside their adversarial versions."""

from __future__ import annotations

import io

import numpy as np
from matplotlib import image as matplotlib_image
from numpy.typing import NDArray

from arat_fast.report.html import Html, image, tag
from arat_fast.report.run import Examples, Run
from arat_fast.report.words import NARROW_SPACE, plain

_MAX_SHOWN = 48


def examples_html(run: Run) -> Html | None:
    """The grid of examples, None where the run kept none."""
    examples = run.examples
    if examples is None:
        return None
    shown = min(len(examples), _MAX_SHOWN)
    delta = examples.x_adv - examples.x
    largest = float(np.abs(delta).max())
    cards = [_card(examples, index, largest) for index in range(shown)]
    right_clean = int((examples.pred_clean == examples.y)[:shown].sum())
    right_adv = int((examples.pred_adv == examples.y)[:shown].sum())
    intro = (
        f"The first {shown} images of the test set, nothing was chosen: as they are, after the "
        "attack, and what the attack added. Below each stands the network’s answer and how sure it "
        f"is: {right_clean} are right as they are, {right_adv} after the attack. So few images say "
        "little about the accuracy on all of them."
    )
    scale = "The attack changed nothing here."
    if largest > 0:
        scale = (
            f"The change is magnified {_times(largest)}: mid grey is no change, black is "
            f"{plain(-round(largest, 4)).replace('-', '−')}, white is +{plain(round(largest, 4))} "
            "on the brightness scale from 0 to 1."
        )
    left_out = f" The file holds {len(examples)}."
    return Html(
        tag("p", intro, left_out if shown < len(examples) else None)
        + tag("div", cards, class_="cards")
        + tag("p", scale, class_="small")
    )


def to_png(pixels: NDArray[np.float32]) -> bytes:
    """An image (C, H, W) in [0, 1] as a PNG file; one channel is grey, three are RGB.

    Another number of channels is shown as the mean over them.
    """
    if pixels.shape[0] not in (1, 3):
        pixels = pixels.mean(axis=0, keepdims=True)
    levels = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
    rgb = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
    buffer = io.BytesIO()
    matplotlib_image.imsave(buffer, np.ascontiguousarray(rgb), format="png")
    return buffer.getvalue()


def _card(examples: Examples, index: int, largest: float) -> Html:
    label = int(examples.y[index])
    truth = examples.class_name(label)
    x, x_adv = examples.x[index], examples.x_adv[index]
    before, after = int(examples.pred_clean[index]), int(examples.pred_adv[index])
    half = 0.5 / largest if largest > 0 else 0.0
    if before != label:
        verdict, class_ = "✗ wrong as it is", "wrong"
    elif after != label:
        verdict, class_ = "✗ fooled", "wrong"
    else:
        verdict, class_ = "✓ holds", "right"
    change = tag(
        "figure",
        image(to_png(0.5 + half * (x_adv - x)), "image/png", "What the attack changed"),
        tag("figcaption", tag("span", "change", class_="kind"), tag("span", _times(largest))),
    )
    return tag(
        "article",
        tag(
            "header",
            tag("span", "is ", tag("b", truth)),
            tag("span", verdict, class_="verdict"),
        ),
        tag(
            "div",
            _picture(examples, x, "clean", before, float(examples.prob_clean[index]), label),
            _picture(examples, x_adv, "attacked", after, float(examples.prob_adv[index]), label),
            change,
            class_="triple",
        ),
        class_=f"card {class_}",
    )


def _picture(
    examples: Examples,
    pixels: NDArray[np.float32],
    kind: str,
    prediction: int,
    confidence: float,
    label: int,
) -> Html:
    name = examples.class_name(prediction)
    right = prediction == label
    sure = f"{100 * confidence:.0f}{NARROW_SPACE}%" if np.isfinite(confidence) else ""
    alt = (
        f"{kind} image of {examples.class_name(label)}, read as {name}"
        f" ({'right' if right else 'wrong'}, confidence {sure or 'unknown'})"
    )
    reading = tag(
        "span",
        "✓ " if right else "✗ ",
        tag("b", name),
        class_="reading" if right else "reading miss",
    )
    return tag(
        "figure",
        image(to_png(pixels), "image/png", alt),
        tag(
            "figcaption",
            tag("span", kind, class_="kind"),
            reading,
            tag("span", f"{sure} sure", class_="kind") if sure else None,
        ),
    )


def _times(largest: float) -> str:
    if largest <= 0:
        return "none"
    factor = 0.5 / largest
    return f"×{factor:.1f}" if factor < 10 else f"×{factor:.0f}"
