"""Square attack (Andriushchenko et al., 2020) in the L∞ ball, without its repeated queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from arat_fast.settings import NormName

P_INIT = 0.8
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_LOOK_AHEAD = 256
_BATCH_STEP = 16


class SquareLinf:
    """Random search with squares of ±2·eps; answers what it has already asked from memory.

    The proposals are drawn before the first of them is tried: they depend on the seed alone. Where
    a proposal leaves an image as it is, or has been refused since that image last changed, the
    network would give the same answer again, so it is not asked. Image by image, the accepted
    proposals and the result are those of the reference code with the same seed; images go through
    their proposals independently of each other, so that every batch is full.

    Args:
        eps: radius in units of the image range, >= 0.
        num_queries: proposals, >= 0.
        seed: of the start and of the proposals.
        batch_size: images at once, >= 1.
        rescale_schedule: shrink the squares as fast as 10,000 proposals would, whatever their
            number.

    Source: Andriushchenko et al., ECCV 2020 (arXiv 1912.00049), algorithms 1 and 2, in the version
    that AutoAttack runs: margin loss, one restart.
    """

    norm: ClassVar[NormName] = "Linf"

    def __init__(
        self,
        eps: float,
        *,
        num_queries: int = 5000,
        seed: int = 0,
        batch_size: int = 256,
        rescale_schedule: bool = False,
    ) -> None:
        if not eps >= 0 or num_queries < 0 or batch_size < 1:
            raise ValueError(
                "eps >= 0, num_queries >= 0 and batch_size >= 1 are expected, got "
                f"{eps}, {num_queries} and {batch_size}"
            )
        self.eps = eps
        self.num_queries = num_queries
        self.seed = seed
        self.batch_size = batch_size
        self.rescale_schedule = rescale_schedule

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        share: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Attack images that the model classifies correctly.

        Args:
            model: deterministic, in eval mode; each image's logits depend on that image alone.
            x: images (N, C, H, W), float32 in [0, 1].
            y: labels (N,), int64.
            share: calls its first argument on parts of the others, of N rows each, perhaps in
                several threads at once, and concatenates what it returns.

        Returns:
            (N, C, H, W): misclassified images, or ``x`` itself where the attack failed.
        """
        if len(x) == 0:
            return x.clone()
        channels, height, width = x.shape[1:]
        generator = torch.Generator().manual_seed(self.seed)
        start = _signs(torch.rand((len(x), channels, 1, width), generator=generator))
        proposals = _Proposals(self, (channels, height, width), generator, x.device)

        def search(x: Tensor, y: Tensor, start: Tensor) -> Tensor:
            return self._search(model, proposals, x, y, start)

        start = start.to(x.device)
        return search(x, y, start) if share is None else share(search, x, y, start)

    @torch.no_grad()  # which each thread sets for itself
    def _search(
        self, model: nn.Module, proposals: _Proposals, x: Tensor, y: Tensor, start: Tensor
    ) -> Tensor:
        best = torch.clamp(x + self.eps * start, 0.0, 1.0)
        margin = self._margins(model, best, y)
        refused = torch.zeros((len(x), proposals.num_kinds), dtype=torch.bool, device=x.device)
        position = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        while True:
            searching = ((margin > 0) & (position < self.num_queries)).nonzero().flatten()
            if len(searching) == 0:
                break
            waiting, changed, candidates = searching, [], []
            while len(waiting):
                waiting = proposals.next_unknown(waiting, position, refused)
                candidate = proposals.apply(position[waiting], x[waiting], best[waiting])
                differs = (candidate != best[waiting]).flatten(1).any(dim=1)
                changed.append(waiting[differs])
                candidates.append(candidate[differs])
                waiting = waiting[~differs]
                refused[waiting, proposals.kind[position[waiting]]] = True
            asked = torch.cat(changed)
            if len(asked) == 0:
                continue
            tried = torch.cat(candidates)
            found = self._margins(model, tried, y[asked])
            better = found < margin[asked]
            accepted, rejected = asked[better], asked[~better]
            best[accepted] = tried[better]
            margin[accepted] = found[better]
            refused[accepted] = False
            refused[rejected, proposals.kind[position[rejected]]] = True
            position[asked] += 1
        return torch.where((margin <= 0).view(-1, 1, 1, 1), best, x)

    def _margins(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """True logit less the largest other one, (N,)."""
        margins = []
        pairs = zip(torch.split(x, self.batch_size), torch.split(y, self.batch_size), strict=True)
        for images, labels in pairs:
            count = len(images)
            # Few different batch sizes: a library prepares itself for each of them.
            missing = -count % min(_BATCH_STEP, self.batch_size)
            logits = model(torch.cat([images, images[:1].expand(missing, -1, -1, -1)]))[:count]
            true = logits.gather(1, labels[:, None]).flatten()
            others = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
            margins.append(true - others)
        # A NaN is no right answer.
        return torch.cat(margins).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


class _Proposals:
    """The sequence of squares: where, how large, and the sign of each channel.

    Attributes:
        kind: (num_queries,): equal for equal proposals, in [0, num_kinds).
    """

    def __init__(
        self,
        attack: SquareLinf,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        channels, height, width = shape
        self.eps = attack.eps
        count = attack.num_queries
        draws = torch.rand((count, 2 + channels), generator=generator)
        sides = [_side(i, shape, attack) for i in range(count)]
        side = torch.tensor(sides, dtype=torch.int64)
        # In float32, as the reference code rounds.
        top = ((height - side) * draws[:, 0]).long()
        left = ((width - side) * draws[:, 1]).long()
        signs = _signs(draws[:, 2:])
        rows = torch.cat([torch.stack([side, top, left], dim=1), signs.long()], dim=1)
        unique, kind = torch.unique(rows, dim=0, return_inverse=True) if count else (rows, side)
        self.num_kinds = len(unique)
        self.side, self.top, self.left = side.to(device), top.to(device), left.to(device)
        self.signs, self.kind = signs.to(device), kind.to(device)
        self.rows = torch.arange(height, device=device)
        self.columns = torch.arange(width, device=device)
        self.ahead = torch.arange(_LOOK_AHEAD, device=device)

    def next_unknown(self, images: Tensor, position: Tensor, refused: Tensor) -> Tensor:
        """Move each image to its next proposal that it has not refused.

        Args:
            images: (n,) indices.
            position: (N,), changed in place; the number of proposals where none is left.
            refused: (N, num_kinds) bool.

        Returns:
            Indices of the images that have a proposal.
        """
        count = len(self.kind)
        ready = []
        while len(images):
            places = position[images, None] + self.ahead
            kinds = self.kind[places.clamp(max=count - 1)]
            unknown = ~refused[images].gather(1, kinds) & (places < count)
            found = unknown.any(dim=1)
            skipped = torch.where(found, unknown.int().argmax(dim=1), len(self.ahead))
            position[images] = (position[images] + skipped).clamp(max=count)
            ready.append(images[found])
            images = images[~found]
            images = images[position[images] < count]
        return torch.cat(ready) if ready else images

    def apply(self, position: Tensor, x: Tensor, best: Tensor) -> Tensor:
        """The candidates (n, C, H, W) of proposals (n,) on the images ``best`` around ``x``."""
        side, top, left = self.side[position], self.top[position], self.left[position]
        in_rows = (self.rows >= top[:, None]) & (self.rows < (top + side)[:, None])
        in_columns = (self.columns >= left[:, None]) & (self.columns < (left + side)[:, None])
        window = (in_rows[:, None, :, None] & in_columns[:, None, None, :]).to(x.dtype)
        delta = window * (2.0 * self.eps * self.signs[position])[:, :, None, None]
        candidate = torch.min(torch.max(best + delta, x - self.eps), x + self.eps)
        return candidate.clamp(0.0, 1.0)


def _signs(uniform: Tensor) -> Tensor:
    return torch.sign(2 * uniform - 1)


def _side(query: int, shape: tuple[int, int, int], attack: SquareLinf) -> int:
    """Side of the square of one proposal, in pixels."""
    channels, height, width = shape
    if attack.rescale_schedule:
        query = int(query / attack.num_queries * 10_000)
    share = P_INIT / 2 ** sum(query > limit for limit in _HALVINGS)
    # As the reference code computes it, so that ties round alike.
    pixels = share * (channels * height * width) / channels
    return min(max(round(math.sqrt(pixels)), 1), height, width)
