"""Accuracies of anybody's network on anybody's images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from arat_fast.data.given import Given, images_and_labels
from arat_fast.evaluation.evaluate import ImageSet, ThreatModel
from arat_fast.evaluation.suite import SuiteResult, evaluate_all


class _Called(nn.Module):
    """A function as a network without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    data: Given,
    threat: ThreatModel,
    attacks: Sequence[str] = ("pgd", "autoattack"),
    *,
    num_steps: int = 20,
    alpha: float | None = None,
    num_restarts: int = 1,
    batch_size: int = 250,
    max_samples: int = 0,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> SuiteResult:
    """Accuracy on clean images and under attacks, in float32, of any network.

    Args:
        model: images (N, C, H, W) in [0, 1] → logits (N, classes): a module, which is put in eval
            mode meanwhile, or any differentiable function, which the caller has put there.
        data: a Dataset or DataLoader of (image, label), see :data:`arat_fast.data.given.Given`.
        threat: ball of the attacks.
        attacks: of :data:`arat_fast.evaluation.suite.ATTACKS`.
        num_steps, alpha, num_restarts: of PGD; alpha is a quarter of the radius by default.
        batch_size: samples at a time.
        max_samples: the first samples only; 0 for all.
        seed: of the attacks.
        device: where the images go; by default where the parameters of the module are.

    Returns:
        results by name; ``record()`` gives accuracies, counts and intervals as JSON types.

    Raises:
        ValueError: an attack is unknown, a label is no class, or an image is outside [0, 1].
    """
    network = model if isinstance(model, nn.Module) else _Called(model)
    if device is None:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
    x, y = (tensor.to(device) for tensor in images_and_labels(data, max_samples))
    with torch.no_grad():
        num_classes = network(x[:1]).shape[1]
    if not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes - 1}], got {int(y.min())} to {int(y.max())}"
        )
    classes = tuple(str(number) for number in range(num_classes))
    return evaluate_all(
        network,
        ImageSet(x, y, classes),
        threat,
        num_steps=num_steps,
        alpha=threat.eps / 4 if alpha is None else alpha,
        attacks=attacks,
        batch_size=batch_size,
        seed=seed,
        num_restarts=num_restarts,
    )
