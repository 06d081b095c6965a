"""The numbers of one step, in one piece of memory on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from arat_fast.objectives.base import ObjectiveOutput


class Values(Mapping[str, Tensor]):
    """0-d tensors by name, views of one tensor: read together, they cost one copy.

    Args:
        names: in order.
        packed: (len(names),), detached.
    """

    def __init__(self, names: tuple[str, ...], packed: Tensor) -> None:
        self.names = names
        self.packed = packed

    @classmethod
    def pack(cls, values: Mapping[str, Tensor]) -> Values:
        """From 0-d tensors, the first of which gives the dtype."""
        dtype = next(iter(values.values())).dtype
        return cls(tuple(values), torch.stack([v.detach().to(dtype) for v in values.values()]))

    @classmethod
    def of(cls, output: ObjectiveOutput, y: Tensor) -> Values:
        """Loss, terms, metrics and accuracies of a pass with labels or targets ``y``."""
        label = y if y.ndim == 1 else y.argmax(dim=1)
        values = {"loss": output.loss, **output.terms, **output.metrics}
        for name, logits in (("clean", output.logits_clean), ("adv", output.logits_adv)):
            if logits is not None:
                values[f"accuracy_{name}"] = (logits.argmax(dim=1) == label).float().mean()
        return cls.pack(values)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.packed[self.names.index(name)]

    def __repr__(self) -> str:
        """All of them, at the price of one copy."""
        pairs = zip(self.names, self.packed.tolist(), strict=True)
        return f"Values({', '.join(f'{name}={value:.4g}' for name, value in pairs)})"

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
