"""One training step: attack, both halves forward, loss, backward, update."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, RandomStart, check_images
from arat_fast.data.batches import Batch
from arat_fast.data.plan import Place
from arat_fast.device import resolve_precision
from arat_fast.distributed import ALONE, Ranks
from arat_fast.models.features import logits_of
from arat_fast.models.folding import FoldedNetwork
from arat_fast.models.layers import protect_stem, split_stems
from arat_fast.models.split_batch_norm import Statistics, use_branch, use_statistics
from arat_fast.objectives.base import Objective, ObjectiveOutput
from arat_fast.training.awp import AWP
from arat_fast.training.graph import Function, StepGraphs, is_capturable
from arat_fast.training.inputs import (
    check_kinds,
    check_labels,
    check_network,
    say_what_was_left_out,
)
from arat_fast.training.memory import BatchTooLargeError, advise, is_out_of_memory
from arat_fast.training.rounding import rounded_weights, whole_weights
from arat_fast.training.sharing import BatchSharing
from arat_fast.training.targets import Load, Targets
from arat_fast.training.values import Values
from arat_kernels.implementation import HAS_TRITON, Impl, choose


def method_step(step: TrainStep, load: Load, place: Place, update: bool, *inputs: Tensor) -> Values:
    """The method, once: what a CUDA graph captures.

    Args:
        step: network, objective, attack, optimiser.
        load: makes images and labels of the first two inputs, sample by sample.
        place: of this process's samples in the batch of all.
        update: whether the optimiser takes its step.
        inputs: tensors with a row for each sample; the third is a given start of the attack.
    """
    step.optimizer.zero_grad(set_to_none=True)
    values: Values | None = None
    start: RandomStart | None = None
    for part in step.sharing.parts(inputs, place):
        x, y = load(*part.inputs[:2])
        x = x.contiguous(memory_format=step.memory_format)
        if start is None:
            start = step.draw_start(x, place, *inputs[2:])
        own = start.part(part.samples)
        with step.autocast(x.device.type):
            x, x_adv = adversarial_batch(
                step.model,
                step.objective,
                step.attack,
                x,
                y,
                own,
                noisy_clean=step.noisy_clean,
                attacked=step.attacked,
                impl=step.impl,
            )
            output = step.output(x, x_adv, y, own)
        step.sharing.backward(output.loss, part)
        values = part.add(values, Values.of(output, y))
    step.sharing.end_batch(inputs, place)
    if update:
        step.optimizer.step()
    assert values is not None
    return values


def adversarial_batch(
    model: nn.Module,
    objective: Objective,
    attack: PGD,
    x: Tensor,
    y: Tensor,
    start: RandomStart,
    *,
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
        y: labels (N,), int64, or targets (N, K).
        start: of the attack, from :meth:`arat_fast.objectives.Objective.random_start`.
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
        x = attack.start(x, start, impl=impl)
        start = dataclasses.replace(start, noise=torch.zeros_like(x))
    attack = objective.own_attack(attack)
    if bn is not None:
        attack = dataclasses.replace(attack, bn=bn)
    with use_branch(model, "adv"), use_statistics(model, attack.bn):
        loss_fn = objective.attack_loss(model, x, y)
    network = model if attacked is None else attacked(attack, x)
    return x, attack(network, x, y, start, loss_fn=loss_fn, impl=impl)


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
            losses and images stay float32. None takes bfloat16 for float32 parameters where the
            device has such arithmetic: a GPU from Ampere on, a CPU with AVX512-BF16 or AMX. The
            convolutions that the image enters, found in the first step, become
            :class:`arat_fast.models.layers.StemConv2d`, which does not round the perturbation away.
            The attribute is what was taken.
        fold: with ``attack.bn="running"``, attack a copy whose BatchNorm is folded into the
            convolutions (:class:`arat_fast.models.folding.FoldedNetwork`): the same gradients up to
            rounding, less memory traffic.
        graph: "on" captures the whole step in a CUDA graph after three steps of each batch shape;
            "auto" does so on a GPU, where it can; "off" runs eagerly.
        memory_format: of weights and images; tensor cores want channels_last.
        last: samples and place of a smaller batch that will come, such as the last one of an
            epoch, captured along with the first; None: nothing is known of one.
        noisy_clean: the official code's in-place start: the clean branch trains on ``x`` plus the
            start noise, and the ball is centred there.
        generator: source of the attack's random starts, on the model's device; None: PyTorch's
            default one.
        check_inputs: check that the images of every batch lie in [0, 1] and that its labels are
            classes of the network; None checks every batch on the CPU, and the first one on a GPU,
            which each check would synchronise.
        targets: makes what is trained towards of images and labels, inside the captured step; None:
            the labels themselves.
        awp: evaluates the objective at adversarially perturbed weights; None: at the weights.
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
        compile: run the attack's passes, nearly all there are, through :func:`torch.compile`, for
            networks that the kernels do not cover; the network itself stays as it is, module paths
            included. A folded copy is not compiled.
        say: told in one sentence of what keeps the step from running as fast as it could, and in
            the first step of what the loop forgot: parameters that are not in the optimiser or no
            longer in the network, and what the objective says was left out.

    Raises:
        ValueError: a precision or a graph that this device or this optimiser cannot do, or a
            network inside of a wrapper.
    """

    model: nn.Module
    objective: Objective
    attack: PGD
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    precision: torch.dtype | None = None
    fold: bool = True
    graph: Literal["auto", "on", "off"] = "auto"
    memory_format: torch.memory_format = torch.channels_last
    last: tuple[int, Place] | None = None
    noisy_clean: bool = False
    generator: torch.Generator | None = None
    check_inputs: bool | None = None
    targets: Targets | None = None
    awp: AWP | None = None
    assemble: Callable[[Tensor, Tensor], Batch] | None = None
    accumulate: int = 1
    ranks: Ranks = ALONE
    overlap: bool | None = None
    impl: Impl | None = None
    compile: bool = False
    say: Callable[[str], object] = warnings.warn
    num_calls: int = field(default=0, init=False)
    folded_network: FoldedNetwork | None = field(default=None, init=False)
    """The network that is attacked, once a step has folded it."""
    num_folded: int = field(default=0, init=False)
    """BatchNorm layers that are folded into the convolution before them in the attack."""

    def __post_init__(self) -> None:
        check_network(self.model)
        if self.precision not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"precision must be torch.float32 or torch.bfloat16, got {self.precision}; float16 "
                "needs loss scaling, which this step does not do"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be >= 1, got {self.accumulate}")
        parameter = next(self.model.parameters())
        device = parameter.device
        if self.graph == "on" and not is_capturable(device):
            raise ValueError(
                f'a CUDA graph needs a GPU, got a model on {device}; set graph to "off" '
                "(--step.graph off)"
            )
        if self.precision is None:
            is_float32 = parameter.dtype == torch.float32
            self.precision = resolve_precision("auto", device) if is_float32 else parameter.dtype
            if device.type == "cuda" and self.precision == torch.float32:
                self.say(f"{torch.cuda.get_device_name(device)} has no bf16: training in float32")
        for module in (self.model, *self.objective.networks()):
            module.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub
        # Once, not for every operation of every step.
        self.impl = choose(self.impl, parameter)
        if device.type == "cuda" and not HAS_TRITON:
            self.say("triton is not installed: the slower reference operations are used")
        modules = [self.model, self.objective]
        self._graphs: StepGraphs | None = None
        if self.graph != "off" and is_capturable(device):
            required = self.graph == "on"
            try:
                self._graphs = StepGraphs(
                    modules, self.optimizer, device, self.generator, required, self.say, self.last
                )
            except ValueError as error:
                if required:
                    raise
                self.say(f"{error}; it goes on without one")
        overlap = device.type == "cuda" if self.overlap is None else self.overlap
        self.sharing = BatchSharing(modules, self.accumulate, self.ranks, overlap)
        # For the attack alone: the features of the training pass would change the code.
        self._unfolded = cast(nn.Module, torch.compile(self.model)) if self.compile else self.model
        self.perturb_weights(self.awp)
        self._num_classes = 0
        self._before: Values | None = None

    def __call__(
        self, x: Tensor, y: Tensor, noise: Tensor | None = None, *, place: Place | None = None
    ) -> Values:
        """Train on one batch.

        Args:
            x: images (N, C, H, W) in [0, 1], in the dtype and on the device of the network, N >= 2;
                a batch of one, as the last of an epoch can be, has no batch statistics: it is
                skipped, which is said once, and the metrics are those of the batch before.
            y: labels (N,), integers in [0, classes), or targets (N, classes) in the dtype of ``x``,
                weights >= 0 of the classes.
            noise: start of the attack instead of a random draw; shape of ``x``.
            place: of ``x`` in the batch of all ranks; None: every rank has as many samples.

        Returns:
            0-d tensors on the device of ``x``, not synchronised: "loss", its terms by name, each
            already times its weight, so that they add up to it, and
            "accuracy_clean" and "accuracy_adv" (on this batch, in training mode) where the
            objective computes such logits, and further metrics of the objective.

        Raises:
            ValueError: an empty batch, or a first one of one sample; another dtype, shape or
                device; a value outside [0, 1] or NaN, a label that is no class, or images that the
                network does not take, in a batch that is checked; a network that cannot be folded
                or captured.
            BatchTooLargeError: names the largest batch that fits; no parameter has changed.
        """
        check_kinds(self.model, x, y)
        if not y.is_floating_point():
            y = y.long()
        if self.num_calls == 0:
            parts = self.model, self.objective, self.optimizer, self.attack
            say_what_was_left_out(*parts, self.say)
        check = self.check_inputs
        if check is None:
            check = x.device.type == "cpu" or self.num_calls == 0
        if check:
            check_images(x)
            self._num_classes = self._num_classes or logits_of(self.model, x[:1]).shape[1]
            check_labels(y, self._num_classes)
        if len(x) == 1 and self.ranks.alone:
            if self._before is None:
                raise ValueError("a first batch of two samples or more is expected, got one sample")
            self.say(
                "a batch of one sample has no batch statistics: it is skipped, and its metrics are "
                "those of the batch before; DataLoader(drop_last=True) leaves it out"
            )
            return self._before
        given = (x, y) if noise is None else (x, y, noise)
        return self._run(_as_it_is, given, place)

    def from_indices(self, index: Tensor, draws: Tensor, *, place: Place | None = None) -> Values:
        """Train on the batch that ``assemble`` makes of ``index`` and ``draws``, graph included.

        Args:
            index: samples (N,), int64, on the model's device, N >= 2.
            draws: where to crop and what to mirror, (N, 3), int32.
            place: as for calling the step.

        Returns, raises: as calling the step.
        """
        assert self.assemble is not None
        return self._run(self.assemble, (index, draws), place)

    @property
    def num_replayed(self) -> int:
        """Steps that a CUDA graph has made."""
        return 0 if self._graphs is None else self._graphs.num_replayed

    def perturb_weights(self, awp: AWP | None) -> None:
        """Evaluate the objective at other weights from the next step on.

        Args:
            awp: finds them; None for the network's own.
        """
        self.awp = awp
        self.output: Callable[..., ObjectiveOutput] = (
            partial(self.objective, self.model) if awp is None else partial(awp, self)
        )

    def _towards(self, load: Load) -> Load:
        return load if self.targets is None else self.targets.after(load, self.generator)

    def forget(self) -> None:
        """Give captured graphs back: steps of other shapes follow, as many as at first."""
        if self._graphs is not None:
            # Its constants lie in the memory of a graph, which holds on to all of it.
            self.folded_network = None
            self._graphs.forget()

    def _run(self, load: Load, inputs: tuple[Tensor, ...], place: Place | None) -> Values:
        num = len(inputs[0])
        if place is None:
            place = Place(self.ranks.rank * num, self.ranks.world_size * num)
        if self.num_calls == 0 and self.precision == torch.bfloat16:
            x, _ = load(*inputs[:2])
            for network in (self.model, *self.objective.networks()):
                protect_stem(network, x, torch.bfloat16)
        if not (self.model.training and self.objective.training):
            self.model.train()
            self.objective.train()
        function = partial(method_step, self, self._towards(load))
        try:
            if self._graphs is None:
                values = function(place, True, *inputs)
            else:
                values = self._graphs.run(function, place, inputs, self._settings())
        except RuntimeError as error:
            reason = str(error).partition(". ")[0]
            if not is_out_of_memory(error):
                raise
        else:
            self.num_calls += 1
            self._before = values
            return values
        # Outside of the handler, whose traceback holds on to the memory.
        self.forget()
        advice = advise(
            partial(self._attempt, function),
            inputs,
            [self.model, self.objective],
            self.sharing,
            self.optimizer,
            self.generator,
        )
        raise BatchTooLargeError(f"{reason}, at a batch of {num}; {advice}")

    def _attempt(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """The first steps of a training on batches of this size, captures included."""
        num = len(inputs[0])
        batches = [(Place(0, num), inputs)]
        if self._graphs is None:
            for _ in range(2):
                # Memory is cut up otherwise the second time.
                function(batches[0][0], True, *inputs)
            return
        if self._graphs.last is not None and num > 2:
            # Of another batch size the last batch has another one, smaller by one at least.
            batches.append((Place(0, num - 1), tuple(tensor[:-1] for tensor in inputs)))
        try:
            self._graphs.attempt(function, batches, self._settings())
        except ValueError:
            if self._graphs.required:
                raise
        finally:
            self.forget()

    def _settings(self) -> tuple[object, ...]:
        """What a captured step holds fast beside tensors."""
        numbers = (bool, int, float, str, tuple)
        own = {k: v for k, v in vars(self.objective).items() if isinstance(v, numbers)}
        return self.attack, self.precision, self.fold, self.noisy_clean, self.awp, own

    def draw_start(self, x: Tensor, place: Place, noise: Tensor | None = None) -> RandomStart:
        """Draw the random start of a batch, once for all its parts.

        Args:
            x: images of the first part.
            place: of this process's samples in the batch of all.
            noise: start that is given instead, for all of this process's samples.
        """
        return self.objective.random_start(
            self.attack,
            x,
            self.generator,
            first=place.first,
            num_samples=place.total,
            noise=noise,
            own_noise=not self.noisy_clean,
        )

    def attacked(self, attack: PGD, x: Tensor) -> nn.Module:
        """The network whose input gradients the attack follows."""
        if attack.bn != "running" or not self.fold:
            return self._unfolded
        if self.folded_network is None:
            # It compares the two in float32 first.
            with whole_weights(self.model):
                self.folded_network = FoldedNetwork(self.model, x, self.impl)
            self.num_folded = len(self.folded_network.folded)
        else:
            self.folded_network.refresh()
        return self.folded_network

    def autocast(self, device_type: str) -> AbstractContextManager[None]:
        """The precision of the step."""
        return self._autocast(device_type) if self.precision == torch.bfloat16 else nullcontext()

    @contextmanager
    def _autocast(self, device_type: str) -> Iterator[None]:
        modules = [self.model, self.objective, *self.objective.networks()]
        if device_type != "cuda":
            modules.clear()
        with (
            torch.autocast(device_type, dtype=torch.bfloat16),
            split_stems(modules, self.impl),
            # Compiled passes see to their casts themselves.
            rounded_weights(
                [] if self.compile else modules, torch.bfloat16, by_bucket=not self.ranks.alone
            ),
        ):
            yield


def _as_it_is(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y
