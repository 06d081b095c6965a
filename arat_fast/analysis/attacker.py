"""What an attacker sees: gradients, answers and margins, before and after the attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from arat_fast.analysis.surface import margin_of
from arat_fast.attacks.pgd import perturbation_norm
from arat_fast.evaluation.evaluate import ImageSet, evaluation_mode, pgd_accuracy, predict
from arat_fast.evaluation.threat_model import ThreatModel

NUM_SHOWN = 12
"""Images that are kept to be looked at."""


def attacker_view(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    num_steps: int,
    alpha: float,
    batch_size: int,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Attack images with PGD and keep what there is to see, for an ``.npz`` file.

    Args:
        model: the network, in any mode; its ``adv`` branch is attacked.
        images: float32 images and labels on the model's device, N of them.
        threat: ball of the attack.
        num_steps, alpha: of PGD.
        batch_size: samples at a time.
        seed: of the random starts.

    Returns:
        ``y`` (N,) and, with the suffixes ``_clean`` and ``_adv``: ``pred`` (N,), ``prob`` (N,), the
        confidence in that prediction, ``prob_label`` (N,), ``margin`` (N,), the logit of the label
        minus the largest other one; ``norm`` (N,), of the perturbation; ``index`` (K,), the images
        kept: of those the attack turned and of those it did not, the first ones, half and half
        where there are as many; their ``x``, ``x_adv`` and ``saliency`` (K, C, H, W), the last the
        gradient of the cross-entropy at the image; ``classes``.
    """
    attacked = pgd_accuracy(
        model,
        images,
        threat,
        num_steps=num_steps,
        alpha=alpha,
        batch_size=batch_size,
        seed=seed,
    )
    x, x_adv, y = images.x, attacked.x_adv, images.y
    kept: dict[str, Tensor] = {"y": y, "norm": perturbation_norm(x, x_adv, threat.norm)}
    with evaluation_mode(model):
        for name, inputs in (("clean", x), ("adv", x_adv)):
            logits = predict(model, inputs, batch_size).double()
            probability = logits.softmax(dim=1)
            kept[f"prob_{name}"], kept[f"pred_{name}"] = probability.max(dim=1)
            kept[f"prob_label_{name}"] = probability.gather(1, y[:, None])[:, 0]
            kept[f"margin_{name}"] = margin_of(logits, y)
        index = _chosen(kept["pred_clean"] == y, kept["pred_adv"] == y)
        shown = x[index].detach().clone().requires_grad_()
        loss = F.cross_entropy(model(shown), y[index], reduction="sum")
        (saliency,) = torch.autograd.grad(loss, shown)
    kept |= {"index": index, "x": x[index], "x_adv": x_adv[index], "saliency": saliency}
    arrays: dict[str, NDArray[Any]] = {k: v.detach().cpu().numpy() for k, v in kept.items()}
    return arrays | {"classes": np.array(images.classes)}


def attacker_numbers(view: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Counts and means of what :func:`attacker_view` kept, as JSON types.

    Returns:
        "num_samples"; "right_clean", "right_adv" and "turned" (right as it is, wrong attacked):
        counts; "confidence_wrong", the mean confidence in wrong answers under attack, None without
        any; "median_margin" of each kind; "confusion", for each true class the predictions under
        attack, as counts; "routes", the ten most frequent (true, predicted, count) among the
        turned; "classes".
    """
    y, before, after = view["y"], view["pred_clean"], view["pred_adv"]
    classes = [str(name) for name in view["classes"]]
    turned = (before == y) & (after != y)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (y, after), 1)
    routes = np.zeros_like(confusion)
    np.add.at(routes, (y[turned], after[turned]), 1)
    order = np.argsort(-routes, axis=None, kind="stable")[:10]
    pairs = [np.unravel_index(flat, routes.shape) for flat in order]
    wrong = after != y
    return {
        "num_samples": len(y),
        "right_clean": int((before == y).sum()),
        "right_adv": int((after == y).sum()),
        "turned": int(turned.sum()),
        "confidence_wrong": float(view["prob_adv"][wrong].mean()) if wrong.any() else None,
        "median_margin": {
            name: float(np.median(view[f"margin_{name}"])) for name in ("clean", "adv")
        },
        "confusion": confusion.tolist(),
        "routes": [[int(t), int(p), int(routes[t, p])] for t, p in pairs if routes[t, p]],
        "classes": classes,
    }


def _chosen(right_clean: Tensor, right_adv: Tensor) -> Tensor:
    """Which images to keep, in order: turned ones first, then others."""
    turned = (right_clean & ~right_adv).nonzero().flatten()
    others = (~(right_clean & ~right_adv)).nonzero().flatten()
    num_turned = min(len(turned), max(NUM_SHOWN // 2, NUM_SHOWN - len(others)))
    return torch.cat([turned[:num_turned], others[: NUM_SHOWN - num_turned]])
