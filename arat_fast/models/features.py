"""Pooled features of named layers, as ARAT regularises them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from arat_fast.models.batch_norm import PlainBatchNorm2d
from arat_fast.models.split_batch_norm import SplitBatchNorm2d


@contextmanager
def collect_features(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the features of ``layers`` during the forward passes inside the context.

    The feature of a layer is the mean over positions of the ReLU of its output, (N, d) in float32
    (float64 for a float64 network). For a BatchNorm it is taken before the residual is added.

    Args:
        model: any network.
        layers: module paths, as in ``model.named_modules()``; outputs of shape (N, d, H, W),
            (N, tokens, d) or (N, d).

    Yields:
        A dictionary from path to feature, filled by each forward pass.

    Raises:
        ValueError: a path does not exist in the network.
    """
    modules = dict(model.named_modules())
    for path in layers:
        if path not in modules or not path:
            close = difflib.get_close_matches(path, modules, n=3)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise ValueError(f"the network has no layer {path!r}{hint}")
    features: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in layers:
            module, pool = modules[path], partial(_pool, features, path)
            if isinstance(module, SplitBatchNorm2d):
                module.pooled_sink = partial(features.__setitem__, path)
                stack.callback(setattr, module, "pooled_sink", None)
            elif isinstance(module, PlainBatchNorm2d):
                module.sink = pool
                stack.callback(setattr, module, "sink", None)
            else:
                handle = module.register_forward_hook(lambda _m, _x, y, pool=pool: pool(y))
                stack.callback(handle.remove)
        yield features


def _pool(features: dict[str, Tensor], path: str, output: Tensor) -> None:
    wide = output.double() if output.element_size() == 8 else output.float()
    wide = wide.relu()
    if wide.ndim == 4:
        wide = wide.mean(dim=(2, 3))
    elif wide.ndim == 3:
        wide = wide.mean(dim=1)
    elif wide.ndim != 2:
        raise ValueError(
            f"the output of {path} must be (N, d, H, W), (N, tokens, d) or (N, d), "
            f"got {tuple(output.shape)}"
        )
    features[path] = wide
