"""Projected gradient descent in L-infinity and L2 balls (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.models.split_batch_norm import Statistics, use_branch, use_statistics
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.implementation import Impl
from arat_kernels.pgd_step import pgd_step, random_start

AttackLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the ``adv`` branch; ``attack(model, x, y)`` returns ``x_adv``.

    Each of ``num_steps`` steps adds ``alpha * sign(grad)`` (L2: ``alpha * grad / ||grad||``),
    projects on the ball of radius ``eps`` around ``x`` and clamps to [0, 1]. The random start is
    uniform in the ball (L2: a uniform direction and a uniform radius) and is not clamped, as
    published. Only gradients of the images are computed: no parameter gradient, no ``.grad``, and
    except under ``batch_update`` no BatchNorm buffer changes.

    Source: Madry et al., ICLR 2018; the order of projection and clamp as in arXiv 2402.14648.
    """

    eps: float = 8 / 255
    """Radius of the ball, in units of the image range [0, 1]; >= 0, in Linf at most 1."""
    alpha: float = 2 / 255
    """Step size, same units and limits."""
    num_steps: int = 10
    """Gradient steps; >= 0."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of the ball."""
    random_start: bool = True
    """Start at a random point of the ball instead of the image."""
    num_restarts: int = 1
    """Independent runs; with more than one, the strongest example of each sample is kept; >= 1."""
    bn: Statistics = "batch"
    """BatchNorm in the attack: "batch" (statistics of the attacked batch, running statistics
    untouched), "running" (eval mode) or "batch_update" (the official code: every forward pass of
    the attack moves the running statistics)."""

    def __post_init__(self) -> None:
        check_length("attack.eps", self.eps, self.norm)
        check_length("attack.alpha", self.alpha, self.norm)
        if not self.num_steps >= 0:
            raise ValueError(f"attack.num_steps must be >= 0, got {self.num_steps}")
        if self.num_restarts < 1:
            raise ValueError(f"attack.num_restarts must be >= 1, got {self.num_restarts}")
        if self.norm not in ("Linf", "L2"):
            raise ValueError(f'attack.norm must be "Linf" or "L2", got {self.norm!r}')
        if self.bn not in ("batch", "running", "batch_update"):
            raise ValueError(
                f'attack.bn must be "batch", "running" or "batch_update", got {self.bn!r}'
            )

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss_fn: AttackLoss | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        keys: Tensor | None = None,
        first: int = 0,
        impl: Impl | None = None,
    ) -> Tensor:
        """Attack one batch.

        Args:
            model: the network; attacked through its ``adv`` branch.
            x: images (N, C, H, W), float32 or float64 in [0, 1].
            y: labels (N,), int64.
            loss_fn: logits (N, classes) → per-sample loss (N,) to maximise; default the
                cross-entropy with ``y``.
            generator: source of the random start, on the device of ``x``.
            noise: the start itself, added to ``x`` instead of a random draw; shape of ``x``.
            keys: (num_restarts, 2) int64, from :meth:`draw_keys`, instead of draws from
                ``generator``.
            first: the place of ``x``'s first sample in a larger batch, >= 0: the parts of a batch,
                with the same keys, start as the whole.
            impl: implementation of the attack's own operations, "triton" or "reference"; None takes
                Triton for CUDA tensors. Layers of the network choose for themselves.

        Returns:
            The adversarial images, shape and dtype of ``x``, detached.
        """
        key = [None] * self.num_restarts if keys is None else list(keys)
        with use_branch(model, "adv"), use_statistics(model, self.bn):
            start = self.start(x, generator, noise, impl, key=key[0], first=first)
            best = self._run(model, x, y, loss_fn, start, impl)
            if self.num_restarts == 1:
                return best
            per_sample = loss_fn if loss_fn is not None else _cross_entropy(y)
            best_loss = _loss_without_grad(model, best, per_sample)
            for another in key[1:]:
                start = self.start(x, generator, impl=impl, key=another, first=first)
                x_adv = self._run(model, x, y, loss_fn, start, impl)
                loss = _loss_without_grad(model, x_adv, per_sample)
                stronger = loss > best_loss
                best = torch.where(stronger.view(-1, 1, 1, 1), x_adv, best)
                best_loss = torch.where(stronger, loss, best_loss)
            return best

    def start(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        impl: Impl | None = None,
        *,
        key: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """Where the attack on ``x`` starts: a random point of the ball, or ``x`` itself.

        Args:
            x: images (N, C, H, W).
            generator: source of the random start, on the device of ``x``.
            noise: added to ``x`` instead of a random draw; shape of ``x``.
            impl: "triton" or "reference"; None takes Triton for CUDA tensors.
            key: (2,) int64 instead of a draw from ``generator``.
            first: the place of ``x``'s first sample in a larger batch, >= 0.
        """
        if noise is not None:
            return x + noise
        if not self.random_start:
            return x.clone()
        if key is None:
            key = _draw_key(generator, x.device)
        return random_start(x, key, eps=self.eps, norm=self.norm, first=first, impl=impl)

    def draw_keys(
        self, generator: torch.Generator | None, device: torch.device, first_given: bool = False
    ) -> Tensor:
        """The keys of the random starts of one batch, (num_restarts, 2) int64, on ``device``.

        Args:
            generator: source of the draws: as many as calling the attack takes.
            device: of the generator.
            first_given: the first start is given as noise, and needs no key.
        """
        unused = torch.zeros(2, dtype=torch.int64, device=device)
        return torch.stack(
            [
                unused
                if not self.random_start or (first_given and number == 0)
                else _draw_key(generator, device)
                for number in range(self.num_restarts)
            ]
        )

    def _run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss_fn: AttackLoss | None,
        x_adv: Tensor,
        impl: Impl | None,
    ) -> Tensor:
        for _ in range(self.num_steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                logits = model(x_adv)
                if loss_fn is None:
                    dlogits, _ = cross_entropy_grad(logits.detach(), y, impl=impl)
                    (grad,) = torch.autograd.grad(logits, x_adv, dlogits)
                else:
                    (grad,) = torch.autograd.grad(loss_fn(logits).sum(), x_adv)
            x_adv = x_adv.detach()
            pgd_step(x_adv, grad, x, eps=self.eps, alpha=self.alpha, norm=self.norm, impl=impl)
        return x_adv if self.num_steps else x_adv.clamp_(0, 1)


def _draw_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    # Drawn on the device: a replayed CUDA graph draws another key each time.
    return torch.randint(2**62, (2,), generator=generator, device=device)


def _cross_entropy(y: Tensor) -> AttackLoss:
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


@torch.no_grad()
def _loss_without_grad(model: nn.Module, x: Tensor, per_sample: AttackLoss) -> Tensor:
    return per_sample(model(x))


def perturbation_norm(x: Tensor, x_adv: Tensor, norm: Literal["Linf", "L2"]) -> Tensor:
    """Norm of ``x_adv - x`` of each sample, (N,) in float64.

    Args:
        x, x_adv: images (N, …), same shape.
        norm: "Linf" or "L2".
    """
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.abs().amax(dim=1) if norm == "Linf" else delta.norm(dim=1)


def check_length(name: str, value: float, norm: str) -> None:
    """Raise ValueError unless a radius or a step size is one for images in [0, 1].

    Args:
        name: of the setting, for the message.
        value: >= 0; in L∞ at most 1, which reaches every image.
        norm: "Linf" or "L2".
    """
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    if norm == "Linf" and value > 1:
        hint = f"; did you mean {value:g}/255?" if value <= 255 else ""
        raise ValueError(
            f"{name} must be in [0, 1] with Linf, since images lie in [0, 1], got {value:g}{hint}"
        )


def check_images(x: Tensor) -> None:
    """Raise ValueError unless every value of the batch is a number in [0, 1].

    Args:
        x: images of any shape.
    """
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    # A NaN fails both comparisons.
    if not (low >= 0 and high <= 1):
        if x.isnan().any():
            raise ValueError(f"images must be numbers in [0, 1], got {int(x.isnan().sum())} NaN")
        raise ValueError(f"images must lie in [0, 1], got values from {low:.6g} to {high:.6g}")
