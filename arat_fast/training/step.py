"""One training step: attack, objective, backward, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, check_images
from arat_fast.data.batches import Batch
from arat_fast.distributed import ALONE, Place, Ranks
from arat_fast.distributed.batch_norm import running_statistics
from arat_fast.distributed.gradients import GradientSum
from arat_fast.models.folding import FoldedNetwork
from arat_fast.models.layers import protect_stem
from arat_fast.models.split_batch_norm import Statistics, use_branch, use_statistics
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
    keys: Tensor | None = None,
    first: int = 0,
    noisy_clean: bool = False,
    bn: Statistics | None = None,
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
        keys: of the random starts, as for calling the attack, where ``noise`` is what else was
            drawn for a larger batch; None draws them, and the objective's own start.
        first: place of the first sample in a larger batch.
        noisy_clean: the official code's in-place start.
        bn: BatchNorm in the attack, whatever the attack or the objective says; None: as they say.
        attacked: gives the network that is attacked, from the attack and ``x``; None: ``model``.
        impl: implementation of the attack's own operations.

    Returns:
        The clean images, which are ``x`` but for ``noisy_clean``, and the adversarial ones, the
        same tensor where the objective needs no attack.
    """
    if not objective.needs_attack:
        return x, x
    if noisy_clean:
        key = None if keys is None else keys[0]
        x = attack.start(x, generator, noise, impl, key=key, first=first)
        noise = torch.zeros_like(x)
    attack = objective.own_attack(attack)
    if bn is not None:
        attack = dataclasses.replace(attack, bn=bn)
    if noise is None and keys is None:
        noise = own_start(objective, x, Place(0, len(x)), generator)
    with use_branch(model, "adv"), use_statistics(model, attack.bn):
        loss_fn = objective.attack_loss(model, x, y)
    x_adv = attack(
        model if attacked is None else attacked(attack, x),
        x,
        y,
        loss_fn=loss_fn,
        generator=generator,
        noise=noise,
        keys=keys,
        first=first,
        impl=impl,
    )
    return x, x_adv


def own_start(
    objective: Objective, x: Tensor, place: Place, generator: torch.Generator | None
) -> Tensor | None:
    """The objective's own start of the attack, from one draw for the batch of all processes.

    Args:
        objective: of the step.
        x: the first of this process's images, (n, C, H, W).
        place: of the first one in that batch.
        generator: source of the draws.

    Returns:
        The start for this process's images and those after them, or None: where the attack says.
    """
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    noise = objective.attack_noise(
        (place.total, *x.shape[1:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=layout,
        generator=generator,
    )
    return None if noise is None else noise[place.first :]


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
        accumulate: parts in which a batch goes through the network, one after the other, before the
            update; >= 1. The gradient is that of the whole batch, except that BatchNorm has the
            statistics of each part, and moves its running ones once a part.
        ranks: processes that share every batch; each calls the step with its part, and all get the
            same update, that of the whole batch. BatchNorm normalises with the statistics of each
            part, unless :func:`arat_fast.distributed.batch_norm.synchronize_batch_norm` was called;
            the running ones are the same everywhere.
        overlap: send gradients while the backward pass still runs; None: on a GPU.
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
    accumulate: int = 1
    ranks: Ranks = ALONE
    overlap: bool | None = None
    impl: Impl | None = None
    num_calls: int = field(default=0, init=False)
    _place: Place = field(default=Place(0, 0), init=False, repr=False)
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
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be >= 1, got {self.accumulate}")
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
        self._sum: GradientSum | None = None
        if self.ranks.group is not None:
            # What stays in eval mode keeps its statistics.
            self.model.train()
            self.objective.train()
            parameters = [*self.model.parameters(), *self.objective.parameters()]
            self._sum = GradientSum(
                [p for p in parameters if p.requires_grad],
                running_statistics(self.model, self.objective),
                self.ranks.group,
                overlap=device.type == "cuda" if self.overlap is None else self.overlap,
            )

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None = None,
        *,
        place: Place | None = None,
    ) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            x: images (N, C, H, W) in [0, 1], N >= 2.
            y: labels (N,), int64.
            noise: start of the attack instead of a random draw; shape of ``x``.
            place: of ``x`` in the batch of all ranks; None: every rank has as many samples.

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
        return self._run(self._gradients, (x, y, *noises), place)

    def from_indices(
        self, index: Tensor, draws: Tensor, *, place: Place | None = None
    ) -> dict[str, Tensor]:
        """Train on the batch that ``assemble`` makes of ``index`` and ``draws``, graph included.

        Args:
            index: samples (N,), int64, on the model's device, N >= 2.
            draws: where to crop and what to mirror, (N, 3), int32.
            place: as for calling the step.

        Returns, raises: as calling the step.
        """
        assert self.assemble is not None
        if self.num_calls == 0 and self.precision != torch.float32:
            self._protect_stems(self.assemble(index, draws).x)
        return self._run(self._assembled_gradients, (index, draws), place)

    def _protect_stems(self, x: Tensor) -> None:
        for network in (self.model, *self.objective.networks()):
            protect_stem(network, x, self.precision)

    def forget(self) -> None:
        """Give captured graphs back: steps of other shapes follow, as many as at first."""
        if self._graphs is not None:
            self._graphs.forget()

    def _run(
        self, gradients: Function, inputs: tuple[Tensor, ...], place: Place | None
    ) -> dict[str, Tensor]:
        num = len(inputs[0])
        if place is None:
            place = Place(self.ranks.rank * num, self.ranks.world_size * num)
        self._place = place

        def step(*inputs: Tensor) -> dict[str, Tensor]:
            metrics = gradients(*inputs)
            self.optimizer.step()
            return metrics

        step.__name__ = gradients.__name__
        try:
            if self._graphs is None:
                metrics = step(*inputs)
            else:
                metrics = self._graphs.run(step, inputs, self._settings(), place)
        except BatchTooLargeError:
            raise
        except RuntimeError as error:
            reason = str(error).partition(". ")[0]
            if not is_out_of_memory(error):
                raise
        else:
            self.num_calls += 1
            return metrics
        # Outside of the handler, whose traceback holds on to the memory.
        raise BatchTooLargeError(
            f"{reason}, at a batch of {num}; {self._advice(gradients, inputs)}"
        )

    def _settings(self) -> tuple[object, ...]:
        """What a captured step holds fast beside tensors."""
        numbers = (bool, int, float, str, tuple)
        values = vars(self.objective).items()
        own = {k: v for k, v in values if isinstance(v, numbers) and k != "first"}
        return self.attack, self.precision, self.fold, self.noisy_clean, own

    def _assembled_gradients(self, index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        assert self.assemble is not None
        parts = self._parts(index, draws)
        return self._sum_of_parts(parts, lambda part: self._assemble_part(*part), None)

    def _assemble_part(self, index: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        assert self.assemble is not None
        x, y = self.assemble(index, draws)
        return x, y

    def _gradients(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Attack, objective and backward."""
        parts = self._parts(x, y)
        return self._sum_of_parts(parts, lambda part: part, noise)

    def _parts(self, first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A batch in ``accumulate`` parts of two samples or more, as many on every rank."""
        num = num_parts(self.accumulate, self._place.total // self.ranks.world_size)
        if num == 1:
            return [(first, second)]
        return list(zip(first.tensor_split(num), second.tensor_split(num), strict=True))

    def _sum_of_parts(
        self,
        parts: list[tuple[Tensor, Tensor]],
        load: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]],
        noise: Tensor | None,
    ) -> dict[str, Tensor]:
        """Gradients of the mean over the batch of all ranks, and the means over this rank's part.

        Args:
            parts: of this rank's samples, in order.
            load: makes images and labels of a part.
            noise: start of the attack, for all parts.
        """
        self.model.train()
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        place = self._place
        whole = len(parts) == 1 and self._sum is None
        num_samples = sum(len(part[0]) for part in parts)
        keys: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        first = place.first
        for number, part in enumerate(parts):
            x, y = load(part)
            num = len(x)
            if number == 0 and not whole and self.objective.needs_attack:
                # Once for the whole batch, in the order in which it would draw by itself.
                if noise is None and not self.noisy_clean:
                    noise = own_start(self.objective, x, place, self.generator)
                attack = self.objective.own_attack(self.attack)
                keys = attack.draw_keys(self.generator, x.device, first_given=noise is not None)
            start = None
            if noise is not None:
                done = first - place.first
                start = noise[done : done + num]
            loss, part_metrics = self._loss(x, y, start, keys, first)
            if not whole:
                loss = loss * (num / place.total)
            last = number == len(parts) - 1
            with self._sum.backward() if last and self._sum is not None else nullcontext():
                loss.backward()  # type: ignore[no-untyped-call]  # Tensor.backward
            for name, value in part_metrics.items():
                if len(parts) > 1:
                    value = value * (num / num_samples)
                metrics[name] = metrics[name] + value if name in metrics else value
            first += num
        if self._sum is not None:
            self._sum.average_statistics(num_samples / place.total)
        return metrics

    def _loss(
        self, x: Tensor, y: Tensor, noise: Tensor | None, keys: Tensor | None, first: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attack and objective: the mean loss of these samples, and their metrics.

        Args:
            x, y: images and labels.
            noise: start of the attack, shape of ``x``; None: as the objective says.
            keys: of the random starts; None draws them.
            first: place of the first sample in the batch of all ranks.
        """
        with self._autocast(x.device.type):
            x, x_adv = adversarial_batch(
                self.model,
                self.objective,
                self.attack,
                x,
                y,
                generator=self.generator,
                noise=noise,
                keys=keys,
                first=first,
                noisy_clean=self.noisy_clean,
                attacked=self._attacked,
                impl=self.impl,
            )
            self.objective.first = first
            output = self.objective(self.model, x, x_adv, y)
        metrics = {"loss": output.loss.detach()}
        for numbers in (output.terms, output.metrics):
            metrics |= {name: number.detach() for name, number in numbers.items()}
        for name, logits in (("clean", output.logits_clean), ("adv", output.logits_adv)):
            if logits is not None:
                metrics[f"accuracy_{name}"] = (logits.argmax(dim=1) == y).float().mean()
        return output.loss, metrics

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
        if self._sum is not None:
            # The other ranks do not take part in a search.
            return (
                "lower --data.batch-size, which all processes share, or raise --train.accumulate "
                f"above {self.accumulate}"
            )
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
        parts = self.accumulate * -(-len(inputs[0]) // fits)
        return (
            f"the largest batch that fits is {fits} (--data.batch-size {fits}, or "
            f"--train.accumulate {parts} for the same batch in parts)"
        )

    def _fits(self, gradients: Function, inputs: list[Tensor]) -> bool:
        if inputs[0].is_cuda:
            torch.cuda.empty_cache()
        buffers = [b for module in (self.model, self.objective) for b in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        self._place = Place(0, len(inputs[0]))
        try:
            gradients(*inputs)
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)


def num_parts(accumulate: int, num_samples: int) -> int:
    """In how many parts of two samples or more a batch is taken; ``accumulate`` at most."""
    return max(1, min(accumulate, num_samples // 2))


def is_channels_last(x: Tensor) -> bool:
    """Whether images lie in channels_last order, and not in the contiguous one too."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's memory did not suffice."""
    # PyTorch has no type of its own for the CPU.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


make_train_step = TrainStep
"""Makes a :class:`TrainStep`; the name to import in a training loop."""
