"""What every training objective offers to the step and to the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, AttackLoss


@dataclass(frozen=True)
class ObjectiveOutput:
    """Result of one training forward pass.

    Attributes:
        loss: 0-d, to be differentiated.
        terms: the parts of the loss by name, weights applied, 0-d each; they sum to the loss.
        logits_clean: (N, classes) on the clean images, or None where there was no such pass.
        logits_adv: (N, classes) on the adversarial images, or None.
        metrics: further 0-d numbers to log, by name.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits_clean: Tensor | None
    logits_adv: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """A training objective: how a batch and its adversarial examples become a loss."""

    needs_attack: bool = True
    """Whether the step makes adversarial examples."""
    starts_from_natural: bool = False
    """Whether training goes on from a naturally trained network, which ``arat-fast train`` loads or
    trains first."""
    generator: torch.Generator | None = None
    """Source of the objective's own random numbers; the step sets it to its own."""
    first: int = 0
    """Place of the first of the samples in the batch of all processes; the step sets it."""

    @abstractmethod
    def forward(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveOutput:
        """Run the network and compute the loss.

        Args:
            model: the network, in training mode.
            x: images (N, C, H, W) in [0, 1].
            x_adv: adversarial images, same shape; ``x`` itself where ``needs_attack`` is False.
            y: labels (N,), int64.
        """

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss | None:
        """The loss that the attack maximises, as a function of the logits; None: cross-entropy.

        The step asks for it where the network is as the attack will run it: on its adversarial
        branch, with the BatchNorm statistics of the attack.

        Args:
            model: the network.
            x: images (N, C, H, W) in [0, 1].
            y: labels (N,), int64.

        Returns:
            (N, classes) → (N,), or None.
        """
        return None

    def own_attack(self, attack: PGD) -> PGD:
        """The attack of this objective, with radius, steps and norm of ``attack``."""
        return attack

    def attack_noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """Where the attack starts: added to the images, neither projected nor clamped.

        Drawn once for the batch of all processes, before it is taken apart, so that it cannot
        depend on the images.

        Args:
            shape: (N, C, H, W) of the images of all processes.
            dtype, device, memory_format: of the images.
            generator: source of the draws, on ``device``; None: PyTorch's default one.

        Returns:
            A tensor like the images, or None: where the attack itself says.
        """
        return None

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        """The batches that :meth:`forward` passes through the deployed BatchNorm, in its order.

        That is the only one, or the adversarial branch of a split one; through the clean branch
        pass clean images. SWA estimates the running statistics of the averaged weights anew from
        these batches, each by itself.

        Args:
            model: the network.
            x, x_adv: images (N, C, H, W) and their adversarial versions.
        """
        return [x_adv]

    def adopt(self, model: nn.Module) -> None:
        """Told once, before the first step, that the natural weights are in the network."""

    def networks(self) -> list[nn.Module]:
        """Further networks that images enter: a guide, a teacher."""
        return []

    def start_epoch(self, clean_accuracy: float) -> None:
        """Told the training accuracy on clean images before an epoch, in [0, 1]."""


def widen(logits: Tensor) -> Tensor:
    """Half-precision logits as float32, others unchanged: losses are never computed in half."""
    return logits.float() if logits.element_size() < 4 else logits
