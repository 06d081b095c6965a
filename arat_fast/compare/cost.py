"""What a training step costs, in forward passes of the network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from arat_fast.build import build_network, build_objective
from arat_fast.config import Config
from arat_fast.data.batches import Batch
from arat_fast.models.split_batch_norm import use_branch
from arat_fast.training.awp import AWP
from arat_fast.training.step import TrainStep

_BATCH = 2
# How many hardly matters: only the last layer is wider for more.
_CLASSES = 10


def step_cost(config: Config) -> float:
    """What a training step costs per image, in forward passes of one image through the network.

    A backward pass for the image alone counts one, one for the parameters too two: PGD-10 with the
    cross-entropy's training pass makes 23, with weight perturbation, after its warm-up, 26.
    Multiplications are counted on the CPU, those of convolutions and matrix products: other
    networks that the objective trains and its predictors are in, BatchNorm and the optimiser are
    not. The weights are fresh and the images black; neither changes the count. Random generators
    are left as they were.

    Raises:
        ValueError: the configuration does not fit the network.
    """
    shape = config.image_shape
    with torch.random.fork_rng(devices=[]):
        model = build_network(config, _CLASSES, shape)
        plain = copy.deepcopy(model)
        objective = build_objective(config, model, _CLASSES, shape)
        step = TrainStep(
            model,
            objective,
            config.attack,
            torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.01),
            precision=torch.float32,
            awp=AWP(config.awp.gamma) if config.awp.gamma else None,
            fold=False,
            graph="off",
            generator=torch.Generator().manual_seed(0),
            # Called with numbers of samples, a step looks at no input before it works.
            assemble=Batch,
        )
        x = torch.zeros(_BATCH, *shape)
        with _Multiplications() as whole:
            step.from_indices(x, torch.arange(_BATCH))
        with use_branch(plain, "adv"), torch.no_grad(), _Multiplications() as forward:
            plain(x)
    return float(whole.count / forward.count)


class _Multiplications(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts by PyTorch's own formulas.

    torch.utils.flop_counter.FlopCounterMode hooks into modules, and fails where the gradient of an
    image is asked for.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result
