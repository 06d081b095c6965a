"""The numbers of one step, in one piece of memory on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


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

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.packed[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
