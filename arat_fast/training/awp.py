"""Adversarial weight perturbation (Wu, Xia and Wang, NeurIPS 2020) around any objective."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from arat_fast.attacks.pgd import RandomStart
from arat_fast.objectives.base import ObjectiveOutput

if TYPE_CHECKING:
    from arat_fast.training.step import TrainStep

_FLOOR = 1e-20
"""The authors': a weight without a gradient is not perturbed."""


@dataclass(frozen=True)
class AWP:
    """The objective at the weights ``w + v`` that make it worst nearby, whose gradient moves ``w``.

    Layer by layer ``v = gamma * ||w|| * g / ||g||``, where ``g`` is the gradient of the objective
    at ``w`` on the same images. Weights of convolutions and linear layers of the network are
    perturbed; running statistics are those of the perturbed pass alone. Each process, and each part
    of a batch that is taken in parts, perturbs by its own gradient.

    The authors' code lets weight decay act on ``w + v``; here it acts on ``w``, as the paper's
    equation does, which has none.

    Args:
        gamma: length of the perturbation relative to each layer's weights, >= 0.

    Source: arXiv 2004.05884, equations 7 to 10 with one step, as in the authors' code.
    """

    gamma: float

    def __call__(
        self, step: TrainStep, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        """The objective at the perturbed weights; its loss passes that gradient on.

        Args:
            step: whose network and objective are run.
            x, x_adv, y, start: as for :meth:`arat_fast.objectives.Objective.forward`.

        Returns:
            As the objective; the terms are detached.
        """
        modules = (step.model, step.objective)
        layers = (m for m in step.model.modules() if isinstance(m, (_ConvNd, nn.Linear)))
        # A weight that two layers share is perturbed once.
        weights = list({m.weight: None for m in layers if m.weight.requires_grad})
        buffers = [buffer for module in modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        loss = step.objective(step.model, x, x_adv, y, start).loss
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            own = [weight.clone() for weight in weights]
            lengths = torch._foreach_norm(own)
            torch._foreach_mul_(lengths, self.gamma)
            torch._foreach_div_(lengths, torch._foreach_add(torch._foreach_norm(gradients), _FLOOR))
            torch._foreach_add_(weights, torch._foreach_mul(gradients, lengths))
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        # Autocast and split stems hold on to what they have made of the weights before.
        torch.clear_autocast_cache()
        try:
            with step.autocast(x.device.type):
                output: ObjectiveOutput = step.objective(step.model, x, x_adv, y, start)
                found = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        finally:
            # Also where memory has run out, or a signal breaks the step off.
            with torch.no_grad():
                torch._foreach_copy_(weights, own)
            torch.clear_autocast_cache()
        known = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
        return dataclasses.replace(
            output,
            loss=_KnownGradient.apply(output.loss.detach(), list(known.values()), *known),  # type: ignore[no-untyped-call]  # torch's
            terms={name: term.detach() for name, term in output.terms.items()},
        )


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.gradients, dloss)
