"""Projected gradient descent (Madry et al., 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.norms import NORMS, Norm
from arat_fast.models.split_batch_norm import Statistics, use_branch, use_statistics
from arat_fast.settings import Count, NormName, Number, Weight, check_settings
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.implementation import Impl, choose

AttackLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RandomStart:
    """Where the attack on a batch starts, and what else is random in its step.

    The samples of a batch may be shared by processes and taken in parts: a sample's start depends
    on the keys and on its place in the whole batch, not on how that is divided.

    Args:
        generator: source of draws, on the device of the images; None: PyTorch's default one.
        first: place of the first sample in the whole batch, >= 0.
        noise: added to the images instead of a random draw; shape of the images.
        keys: (num_restarts, 2) int64 from :meth:`PGD.draw_keys`; None draws them from
            ``generator`` as they are needed.
    """

    generator: torch.Generator | None = None
    first: int = 0
    noise: Tensor | None = None
    keys: Tensor | None = None

    def part(self, samples: slice) -> RandomStart:
        """The start of some of the samples."""
        noise = None if self.noise is None else self.noise[samples]
        return dataclasses.replace(self, first=self.first + samples.start, noise=noise)


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the ``adv`` branch; ``attack(model, x, y)`` returns ``x_adv``.

    Each of ``num_steps`` steps adds ``alpha * sign(grad)`` (L2: ``alpha * grad / ||grad||``; L1:
    the same length along few coordinates), projects on the ball of radius ``eps`` around ``x`` and
    clamps to [0, 1]. The random start is uniform in the ball (L2 and L1: a uniform direction and a
    uniform radius) and is not clamped, as published. Only gradients of the images are computed: no
    parameter gradient, no ``.grad``, and except under ``batch_update`` no BatchNorm buffer changes.

    One step of 5/4 of the radius is FGSM-RS (Wong et al., ICLR 2020, arXiv 2001.03994). With
    ``num_steps=1, alpha=eps, start_radius=2, project=False`` it is N-FGSM (de Jorge et al., NeurIPS
    2022, arXiv 2202.01181, algorithm 1): the images that are trained on lie up to three radii away.
    The authors' code of both also clamps the start to [0, 1].

    Source: Madry et al., ICLR 2018; the order of projection and clamp as in arXiv 2402.14648.
    """

    eps: float = 8 / 255
    """Radius of the ball, in units of the image range [0, 1]; >= 0, in Linf at most 1."""
    alpha: float = 2 / 255
    """Step size, in units of the image range [0, 1]; >= 0, in Linf at most 1."""
    num_steps: Number = 10
    """Gradient steps; >= 0."""
    norm: NormName = "Linf"
    """Norm of the ball."""
    random_start: bool = True
    """Start at a random point of the ball instead of the image."""
    num_restarts: Count = 1
    """Independent runs; with more than one, the strongest example of each sample is kept; >= 1."""
    bn: Statistics = "batch"
    """BatchNorm in the attack: "batch" (statistics of the attacked batch, running statistics
    untouched), "running" (eval mode) or "batch_update" (the official code: every forward pass of
    the attack moves the running statistics)."""
    eps_warmup: Number = 0
    """Epochs of a run in which the radius grows, from one to the next, to eps; 0 for none; >= 0.
    The trainer sees to it; in a loop of your own: :meth:`in_epoch`."""
    start_radius: Weight = 1.0
    """Radius of the ball that the random start is drawn from, in eps; >= 0, 2 in N-FGSM."""
    project: bool = True
    """Project on the ball after each step; N-FGSM does not, and leaves it."""

    def __post_init__(self) -> None:
        check_settings("attack.", self)
        self.ball.check("attack.eps", self.eps)
        self.ball.check("attack.alpha", self.alpha)

    @property
    def ball(self) -> Norm:
        """The norm itself."""
        return NORMS[self.norm]

    def in_epoch(self, epoch: int) -> PGD:
        """The attack in an epoch, counted from 0, with its radius (:attr:`eps_warmup`)."""
        eps = min((epoch + 1) / (self.eps_warmup + 1), 1.0) * self.eps
        return dataclasses.replace(self, eps=eps, eps_warmup=0)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        start: RandomStart = RandomStart(),
        *,
        loss_fn: AttackLoss | None = None,
        impl: Impl | None = None,
    ) -> Tensor:
        """Attack one batch.

        Args:
            model: the network; attacked through its ``adv`` branch.
            x: images (N, C, H, W), float32 or float64 in [0, 1].
            y: labels (N,), int64.
            start: of the attack.
            loss_fn: logits (N, classes) → per-sample loss (N,) to maximise; default the
                cross-entropy with ``y``.
            impl: implementation of the attack's own operations, "triton" or "reference"; None takes
                Triton for CUDA tensors. Layers of the network choose for themselves.

        Returns:
            The adversarial images, shape and dtype of ``x``, detached.
        """
        impl = impl or choose(None, x)
        with use_branch(model, "adv"), use_statistics(model, self.bn):
            best = self._run(model, x, y, loss_fn, self.start(x, start, impl=impl), impl)
            if self.num_restarts == 1:
                return best
            per_sample = loss_fn if loss_fn is not None else _cross_entropy(y)
            best_loss = _loss_without_grad(model, best, per_sample)
            for restart in range(1, self.num_restarts):
                begin = self.start(x, start, restart, impl=impl)
                x_adv = self._run(model, x, y, loss_fn, begin, impl)
                loss = _loss_without_grad(model, x_adv, per_sample)
                # A NaN is not passed over: whoever asked sees it.
                stronger = (loss > best_loss) | loss.isnan()
                best = torch.where(stronger.view(-1, 1, 1, 1), x_adv, best)
                best_loss = torch.where(stronger, loss, best_loss)
            return best

    def start(
        self, x: Tensor, start: RandomStart, restart: int = 0, *, impl: Impl | None = None
    ) -> Tensor:
        """Where the attack on ``x`` starts: a random point of the ball, or ``x`` itself.

        Args:
            x: images (N, C, H, W).
            start: what it depends on; its noise is that of the first run alone.
            restart: number of the independent run, in [0, num_restarts).
            impl: "triton" or "reference"; None takes Triton for CUDA tensors.
        """
        if restart == 0 and start.noise is not None:
            return x + start.noise
        if not self.random_start:
            return x.clone()
        key = _draw_key(start.generator, x.device) if start.keys is None else start.keys[restart]
        radius = self.start_radius * self.eps
        return self.ball.random_start(x, key, eps=radius, first=start.first, impl=impl)

    def draw_keys(
        self, generator: torch.Generator | None, device: torch.device, first_given: bool = False
    ) -> Tensor | None:
        """The keys of the random starts of one batch, (num_restarts, 2) int64, on ``device``; None
        where there is nothing to draw.

        Args:
            generator: source of the draws: as many as calling the attack takes.
            device: of the generator.
            first_given: the first start is given as noise, and needs no key.
        """
        given = int(first_given)
        if not self.random_start or given == self.num_restarts:
            return None
        unused = [torch.zeros(2, dtype=torch.int64, device=device)] * given
        drawn = [_draw_key(generator, device) for _ in range(given, self.num_restarts)]
        return torch.stack([*unused, *drawn])

    def _run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss_fn: AttackLoss | None,
        x_adv: Tensor,
        impl: Impl | None,
    ) -> Tensor:
        if not self.num_steps:
            return x_adv.clamp_(0, 1)
        ball = self.ball
        # Where it is not projected, the clamp to the range is what is left.
        radius = self.eps if self.project else ball.reach(x[0].numel())
        x_adv = x_adv.detach().requires_grad_()
        # A first layer in bfloat16 keeps what it makes of the image there.
        x_adv._parts = None  # type: ignore[attr-defined]  # any attribute of a tensor
        for _ in range(self.num_steps):
            with torch.enable_grad():
                logits = model(x_adv)
                if loss_fn is None:
                    dlogits, _ = cross_entropy_grad(logits.detach(), y, impl=impl)
                    out, dout = logits, dlogits
                else:
                    out, dout = loss_fn(logits).sum(), None
            parts: Tensor | None = x_adv._parts  # type: ignore[attr-defined]  # set above
            if parts is None:
                (grad,) = torch.autograd.grad(out, x_adv, dout)
            else:
                grad = _gradient_of_parts(out, dout, x_adv, parts)
            ball.step(x_adv, grad, x, eps=radius, alpha=self.alpha, parts=parts, impl=impl)
        return x_adv.detach()


def _gradient_of_parts(out: Tensor, dout: Tensor | None, x: Tensor, parts: Tensor) -> Tensor:
    """The gradient of the parts of ``x``; with that of ``x`` where the network reads it otherwise
    too."""
    grad, beside = torch.autograd.grad(out, (parts, x), dout, allow_unused=True)
    if beside is None:
        return grad
    wide = grad.float()
    wide[:, : x.shape[1]] += beside
    return wide


def _draw_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    # Drawn on the device: a replayed CUDA graph draws another key each time.
    return torch.randint(2**62, (2,), generator=generator, device=device)


def _cross_entropy(y: Tensor) -> AttackLoss:
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


@torch.no_grad()
def _loss_without_grad(model: nn.Module, x: Tensor, per_sample: AttackLoss) -> Tensor:
    return per_sample(model(x))


def perturbation_norm(x: Tensor, x_adv: Tensor, norm: NormName) -> Tensor:
    """Norm of ``x_adv - x`` of each sample, (N,) in float64.

    Args:
        x, x_adv: images (N, …), same shape.
        norm: "Linf", "L2" or "L1".
    """
    return NORMS[norm].size(x_adv.double() - x.double())


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
        raise ValueError(
            f"images must lie in [0, 1], got values from {low:.6g} to {high:.6g}; normalisation "
            "belongs into the network, first in its forward"
        )
