"""One training step: attack, objective, backward, update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, check_images
from arat_fast.data.batches import Batch
from arat_fast.models.folding import FoldedNetwork
from arat_fast.models.layers import protect_stem
from arat_fast.objectives.base import Objective
from arat_fast.training.graph import BatchTooLargeError, Function, StepGraphs
from arat_kernels.implementation import Impl


def adversarial_batch(
    model: nn.Module,
    objective: Objective,
    attack: PGD,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    noisy_clean: bool = False,
    attacked: Callable[[PGD, Tensor], nn.Module] | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """The two sets of images that a step trains on.

    Args:
        model: the network, in training mode.
        objective: has the last word on the attack.
        attack: as configured.
        x: images (N, C, H, W) in [0, 1].
        y: labels (N,), int64.
        generator: source of the random start, on the device of ``x``; None: PyTorch's default one.
        noise: start of the attack instead of a random draw; shape of ``x``.
        noisy_clean: the official code's in-place start.
        attacked: gives the network that is attacked, from the attack and ``x``; None: ``model``.
        impl: implementation of the attack's own operations.

    Returns:
        The clean images, which are ``x`` but for ``noisy_clean``, and the adversarial ones, the
        same tensor where the objective needs no attack.
    """
    if not objective.needs_attack:
        return x, x
    if noisy_clean:
        x = attack.start(x, generator, noise, impl)
        noise = torch.zeros_like(x)
    attack = objective.own_attack(attack)
    if noise is None:
        noise = objective.attack_noise(x, generator)
    x_adv = attack(
        model if attacked is None else attacked(attack, x),
        x,
        y,
        loss_fn=objective.attack_loss(model, x, y),
        generator=generator,
        noise=noise,
        impl=impl,
    )
    return x, x_adv


@dataclass(eq=False)
class TrainStep:
    """The training step for your own loop: ``metrics = step(x, y)``.

    Args:
        model: the network; for ARAT with split BatchNorm layers
            (:func:`arat_fast.models.convert_split_batch_norm`).
        objective: what is minimised; its parameters belong into ``optimizer`` too.
        attack: makes the adversarial examples.
        optimizer: any PyTorch optimiser.
        precision: torch.float32, or torch.bfloat16 for autocast; parameters, BatchNorm statistics,
            losses and images stay float32. The convolutions that the image enters, found in the
            first step, become :class:`arat_fast.models.layers.StemConv2d`, which does not round
            the perturbation away.
        fold: with ``attack.bn="running"``, attack a copy whose BatchNorm is folded into the
            convolutions (:class:`arat_fast.models.folding.FoldedNetwork`): the same gradients up to
            rounding, less memory traffic.
        graph: "on" captures the whole step in a CUDA graph after three steps of each batch shape;
            "auto" does so on a GPU; "off" runs eagerly.
        noisy_clean: the official code's in-place start: the clean branch trains on ``x`` plus the
            start noise, and the ball is centred there.
        generator: source of the attack's random starts, on the model's device; None: PyTorch's
            default one.
        check_inputs: check that the images of every batch lie in [0, 1]; None checks every batch on
            the CPU, and the first one on a GPU, which each check would synchronise.
        assemble: how :meth:`from_indices` makes a batch from sample indices and draws.
        impl: implementation of the attack's own operations, "triton" or "reference"; None takes
            Triton for CUDA tensors.

    Raises:
        ValueError: a precision or a graph that this device or this optimiser cannot do.
    """

    model: nn.Module
    objective: Objective
    attack: PGD
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    precision: torch.dtype = torch.float32
    fold: bool = True
    graph: Literal["auto", "on", "off"] = "off"
    noisy_clean: bool = False
    generator: torch.Generator | None = None
    check_inputs: bool | None = None
    assemble: Callable[[Tensor, Tensor], Batch] | None = None
    impl: Impl | None = None
    num_calls: int = field(default=0, init=False)
    folded_network: FoldedNetwork | None = field(default=None, init=False)
    """The network that is attacked, once the first step has folded it."""

    def __post_init__(self) -> None:
        if self.precision == torch.float16:
            raise ValueError(
                "float16 needs loss scaling, which this step does not do, got torch.float16; set "
                "precision to torch.bfloat16 (--step.precision bf16)"
            )
        if self.precision not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"precision must be torch.float32 or torch.bfloat16, got {self.precision}"
            )
        if self.graph not in ("auto", "on", "off"):
            raise ValueError(f'graph must be "auto", "on" or "off", got {self.graph!r}')
        device = next(self.model.parameters()).device
        if self.graph == "on" and device.type != "cuda":
            raise ValueError(
                f'a CUDA graph needs a GPU, got a model on {device}; set graph to "off" '
                "(--step.graph off)"
            )
        self.objective.generator = self.generator
        self._graphs: StepGraphs | None = None
        if self.graph != "off" and device.type == "cuda":
            self._graphs = StepGraphs(
                [self.model, self.objective], self.optimizer, device, self.generator
            )

    def __call__(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            x: images (N, C, H, W) in [0, 1], N >= 2.
            y: labels (N,), int64.
            noise: start of the attack instead of a random draw; shape of ``x``.

        Returns:
            0-d tensors on the device of ``x``, not synchronised: "loss", its terms by name, and
            "accuracy_clean" and "accuracy_adv" (on this batch, in training mode) where the
            objective computes such logits, and further metrics of the objective.

        Raises:
            ValueError: a value outside [0, 1] or NaN, in a batch that is checked; a network that
                cannot be folded or captured.
            BatchTooLargeError: names the largest batch that fits; no parameter has changed.
        """
        check = self.check_inputs
        if check is None:
            check = x.device.type == "cpu" or self.num_calls == 0
        if check:
            check_images(x)
        if self.num_calls == 0 and self.precision != torch.float32:
            self._protect_stems(x)
        noises = [] if noise is None else [noise]
        return self._run(self._gradients, (x, y, *noises))

    def from_indices(self, index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """Train on the batch that ``assemble`` makes of ``index`` and ``draws``, graph included.

        Args:
            index: samples (N,), int64, on the model's device, N >= 2.
            draws: where to crop and what to mirror, (N, 3), int32.

        Returns, raises: as calling the step.
        """
        assert self.assemble is not None
        if self.num_calls == 0 and self.precision != torch.float32:
            self._protect_stems(self.assemble(index, draws).x)
        return self._run(self._assembled_gradients, (index, draws))

    def _protect_stems(self, x: Tensor) -> None:
        for network in (self.model, *self.objective.networks()):
            protect_stem(network, x, self.precision)

    def _run(self, gradients: Function, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        def step(*inputs: Tensor) -> dict[str, Tensor]:
            metrics = gradients(*inputs)
            self.optimizer.step()
            return metrics

        step.__name__ = gradients.__name__
        try:
            if self._graphs is None:
                metrics = step(*inputs)
            else:
                metrics = self._graphs.run(step, inputs, self._settings())
        except BatchTooLargeError:
            raise
        except RuntimeError as error:
            reason = str(error).partition(". ")[0]
            if not _is_out_of_memory(error):
                raise
        else:
            self.num_calls += 1
            return metrics
        # Outside of the handler, whose traceback holds on to the memory.
        raise BatchTooLargeError(
            f"{reason}, at a batch of {len(inputs[0])}; {self._advice(gradients, inputs)}"
        )

    def _settings(self) -> tuple[object, ...]:
        """What a captured step holds fast beside tensors."""
        numbers = (bool, int, float, str, tuple)
        own = {k: v for k, v in vars(self.objective).items() if isinstance(v, numbers)}
        return self.attack, self.precision, self.fold, self.noisy_clean, own

    def _assembled_gradients(self, index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        assert self.assemble is not None
        return self._gradients(*self.assemble(index, draws))

    def _gradients(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Attack, objective and backward."""
        self.model.train()
        self.objective.train()
        with self._autocast(x.device.type):
            x, x_adv = adversarial_batch(
                self.model,
                self.objective,
                self.attack,
                x,
                y,
                generator=self.generator,
                noise=noise,
                noisy_clean=self.noisy_clean,
                attacked=self._attacked,
                impl=self.impl,
            )
            output = self.objective(self.model, x, x_adv, y)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        metrics = {"loss": output.loss.detach()}
        for numbers in (output.terms, output.metrics):
            metrics |= {name: number.detach() for name, number in numbers.items()}
        for name, logits in (("clean", output.logits_clean), ("adv", output.logits_adv)):
            if logits is not None:
                metrics[f"accuracy_{name}"] = (logits.argmax(dim=1) == y).float().mean()
        return metrics

    def _attacked(self, attack: PGD, x: Tensor) -> nn.Module:
        """The network whose input gradients the attack follows."""
        if attack.bn != "running" or not self.fold:
            return self.model
        if self.folded_network is None:
            self.folded_network = FoldedNetwork(self.model, x, self.impl)
        else:
            self.folded_network.refresh()
        return self.folded_network

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.precision)

    def _advice(self, gradients: Function, inputs: tuple[Tensor, ...]) -> str:
        """The largest batch whose gradients fit, found by bisection; no parameter is touched."""
        if self._graphs is not None:
            self._graphs.forget()
        # BatchNorm cannot train on one sample.
        fits, fails = 1, len(inputs[0])
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self._fits(gradients, [tensor[:middle] for tensor in inputs]):
                fits = middle
            else:
                fails = middle
        if fits == 1:
            return "no smaller batch fits either: a smaller network or image is needed"
        return f"the largest batch that fits is {fits} (--data.batch-size {fits})"

    def _fits(self, gradients: Function, inputs: list[Tensor]) -> bool:
        if inputs[0].is_cuda:
            torch.cuda.empty_cache()
        buffers = [b for module in (self.model, self.objective) for b in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            gradients(*inputs)
            return True
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # PyTorch has no type of its own for the CPU.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


make_train_step = TrainStep
"""Makes a :class:`TrainStep`; the name to import in a training loop."""
