"""One training step: attack, objective, backward, update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, check_images
from arat_fast.objectives.base import Objective


class TrainStep:
    """A callable training step; made by :func:`make_train_step`."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        attack: PGD,
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype = torch.float32,
        noisy_clean: bool = False,
        generator: torch.Generator | None = None,
        check_inputs: bool | None = None,
    ) -> None:
        if precision not in (torch.float32, torch.bfloat16):
            raise ValueError(f"precision must be torch.float32 or torch.bfloat16, got {precision}")
        self.model = model
        self.objective = objective
        self.attack = attack
        self.optimizer = optimizer
        self.precision = precision
        self.noisy_clean = noisy_clean
        self.generator = generator
        self.check_inputs = check_inputs
        self.num_calls = 0

    def __call__(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            x: images (N, C, H, W) in [0, 1], N >= 2.
            y: labels (N,), int64.
            noise: start of the attack instead of a random draw; shape of ``x``.

        Returns:
            0-d tensors on the device of ``x``, not synchronised: "loss", its terms by name, and
            "accuracy_clean" and "accuracy_adv" (on this batch, in training mode) where the
            objective computes such logits.

        Raises:
            ValueError: a value outside [0, 1] or NaN, in a batch that is checked.
        """
        check = self.check_inputs
        if check is None:
            check = x.device.type == "cpu" or self.num_calls == 0
        if check:
            check_images(x)
        self.num_calls += 1
        self.model.train()
        self.objective.train()
        if self.noisy_clean and self.objective.needs_attack:
            x = self.attack.start(x, self.generator, noise)
            noise = torch.zeros_like(x)
        with self._autocast(x.device.type):
            x_adv = x
            if self.objective.needs_attack:
                loss_fn = self.objective.attack_loss(self.model, x, y)
                x_adv = self.attack(
                    self.model, x, y, loss_fn=loss_fn, generator=self.generator, noise=noise
                )
            output = self.objective(self.model, x, x_adv, y)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        self.optimizer.step()
        metrics = {"loss": output.loss.detach()}
        metrics |= {name: term.detach() for name, term in output.terms.items()}
        for name, logits in (("clean", output.logits_clean), ("adv", output.logits_adv)):
            if logits is not None:
                metrics[f"accuracy_{name}"] = (logits.argmax(dim=1) == y).float().mean()
        return metrics

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.precision)


def make_train_step(
    model: nn.Module,
    objective: Objective,
    attack: PGD,
    optimizer: torch.optim.Optimizer,
    *,
    precision: torch.dtype = torch.float32,
    noisy_clean: bool = False,
    generator: torch.Generator | None = None,
    check_inputs: bool | None = None,
) -> TrainStep:
    """The training step for your own loop: ``metrics = step(x, y)``.

    Args:
        model: the network; for ARAT with split BatchNorm layers
            (:func:`arat_fast.models.convert_split_batch_norm`).
        objective: what is minimised; its parameters belong into ``optimizer`` too.
        attack: makes the adversarial examples.
        optimizer: any PyTorch optimiser.
        precision: torch.float32, or torch.bfloat16 for autocast; parameters, BatchNorm statistics,
            losses and images stay float32. The built-in networks keep the image in float32 until
            after their first convolution; in another network the first convolution must be a
            :class:`arat_fast.models.layers.StemConv2d`, or bfloat16 rounds away part of the
            perturbation.
        noisy_clean: the official code's in-place start: the clean branch trains on ``x`` plus the
            start noise, and the ball is centred there.
        generator: source of the attack's random starts, on the model's device; None: PyTorch's
            default one.
        check_inputs: check that the images of every batch lie in [0, 1]; None checks every batch on
            the CPU, and the first one on a GPU, which each check would synchronise.
    """
    return TrainStep(
        model,
        objective,
        attack,
        optimizer,
        precision=precision,
        noisy_clean=noisy_clean,
        generator=generator,
        check_inputs=check_inputs,
    )
