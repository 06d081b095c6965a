"""What every training objective offers to the step, the loop and the command line."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, AttackLoss, RandomStart
from arat_fast.settings import check_settings
from arat_kernels.implementation import Impl


class Paper(NamedTuple):
    """A publication, in the fields of RobustBench's ``model_info``."""

    link: str
    name: str
    authors: str
    venue: str
    key: str


@dataclass(frozen=True)
class Settings:
    """Settings of an objective; each class of objectives derives its own, as ``Settings``.

    Limits stand in the types, see :mod:`arat_fast.settings`. The command line shows every field
    with the docstring below it, as ``--objective.FIELD``.
    """

    name: str
    """One of those that arat-fast info lists, or mypackage.mymodule:MyObjective, a class of your
    own."""

    def __post_init__(self) -> None:
        check_settings("objective.", self)

    @property
    def splits_batch_norm(self) -> bool:
        """Whether model.norm=auto gives the network two BatchNorm branches."""
        return False

    def regularized_layers(self, published: tuple[str, ...]) -> tuple[str, ...]:
        """Module paths of the layers whose features the loss compares; none by default.

        Args:
            published: those of ARAT's paper for the network.
        """
        return ()

    def official(self) -> Settings:
        """These settings with every point set in which the official AR-AT code departs."""
        return self


@dataclass(frozen=True)
class ForeignSettings(Settings):
    """What a file says of the settings of an objective that was not imported.

    A file may name any module, and importing it runs it: only what is typed on the command line or
    imported by the caller is imported.
    """

    values: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """What an objective is built for.

    Attributes:
        model: the network that is trained.
        image_shape: (C, H, W) of the images.
        attack: of the training step.
        norm: "split" or "shared": the network's BatchNorm.
        layers: module paths of the regularised layers: those set, else those published.
        make_network: another network for the same images and classes, with one BatchNorm, from a
            built-in name; "" for the architecture of ``model``.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    attack: PGD
    norm: str
    layers: tuple[str, ...]
    make_network: Callable[[str], nn.Module]


@dataclass(frozen=True)
class ObjectiveOutput:
    """Result of one training forward pass.

    Attributes:
        loss: 0-d, to be differentiated.
        terms: the parts of the loss by name, weights applied, 0-d each; they sum to the loss.
        logits_clean: (N, classes) on the clean images, or None where there was no such pass.
        logits_adv: (N, classes) on the adversarial images, or None.
        metrics: further 0-d numbers to log, by name.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits_clean: Tensor | None
    logits_adv: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """A training objective: how a batch and its adversarial examples become a loss.

    A class is all there is to a method: its settings, its name in tables and its paper stand here,
    and the command line, comparisons, reports and model cards read them. One that is not built in
    is named by its import path, ``--objective.name mypackage.mymodule:MyObjective``.
    """

    name: ClassVar[str] = ""
    """On the command line and in records; empty for an objective that is not built in."""
    label: ClassVar[str] = ""
    """In tables and plots; the name of the class where none is given."""
    paper: ClassVar[Paper | None] = None
    Settings: ClassVar[type[Settings]] = Settings
    note: ClassVar[str] = ""
    """A reservation that is said under every table that holds a result of it."""
    ties: ClassVar[tuple[str, ...]] = ()
    """How the names of those terms begin that compare clean and adversarial images; the others
    classify. The analysis of gradient conflict sets one against the other."""

    needs_attack: bool = True
    """Whether the step makes adversarial examples."""
    starts_from_natural: bool = False
    """Whether training goes on from a naturally trained network, which ``arat-fast train`` loads or
    trains first."""
    impl: Impl | None = None
    """Implementation of the objective's own operations, "triton" or "reference"; None takes Triton
    for CUDA tensors."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "label" not in cls.__dict__:
            cls.label = cls.__name__

    @classmethod
    def build(cls, settings: Any, surroundings: Surroundings) -> Objective:
        """The objective of a run; by default the class called with the fields of its settings.

        Args:
            settings: instance of the class's ``Settings``.
            surroundings: what it is for.

        Raises:
            ValueError: a switch or a layer does not fit.
        """
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        del values["name"]
        return cls(**values)

    @abstractmethod
    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        """Run the network and compute the loss.

        Args:
            model: the network, in training mode.
            x: images (N, C, H, W) in [0, 1].
            x_adv: adversarial images, same shape; ``x`` itself where ``needs_attack`` is False.
            y: classes (N,), int64, or targets (N, K), weights of the classes in the dtype of
                ``x``, as ``torch.nn.functional.cross_entropy`` takes them.
            start: of the attack; source of further random numbers.
        """

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss | None:
        """The loss that the attack maximises, as a function of the logits; None: cross-entropy.

        The step asks for it where the network is as the attack will run it: on its adversarial
        branch, with the BatchNorm statistics of the attack.

        Args:
            model: the network.
            x: images (N, C, H, W) in [0, 1].
            y: classes (N,) or targets (N, K), as for :meth:`forward`.

        Returns:
            (N, classes) → (N,), or None.
        """
        return None

    def own_attack(self, attack: PGD) -> PGD:
        """The attack of this objective, with radius, steps and norm of ``attack``."""
        return attack

    def start_noise(
        self, x: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> Tensor | None:
        """Where the attack starts: added to the images, neither projected nor clamped.

        Drawn once for the batch of all processes, before it is taken apart, so that it cannot
        depend on the images.

        Args:
            x: some of the images (n, C, H, W), for shape, dtype, device and memory format.
            num_samples: N, of the whole batch.
            generator: source of the draws, on the device of ``x``; None: PyTorch's default one.

        Returns:
            (N, C, H, W), or None: where the attack itself says.
        """
        return None

    def random_start(
        self,
        attack: PGD,
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        first: int = 0,
        num_samples: int | None = None,
        noise: Tensor | None = None,
        own_noise: bool = True,
    ) -> RandomStart:
        """Draw the random start of a whole batch, in the order in which it is used.

        Args:
            attack: of the training step.
            x: some of the images (n, C, H, W).
            generator: source of the draws; None: PyTorch's default one.
            first: place of the first of ``x`` in the batch, >= 0.
            num_samples: of the whole batch; None for those of ``x``.
            noise: start that is given instead, from ``first`` on.
            own_noise: whether the objective's own start counts (:meth:`start_noise`).
        """
        if not self.needs_attack:
            return RandomStart(generator, first)
        if noise is None and own_noise:
            noise = self.start_noise(x, len(x) if num_samples is None else num_samples, generator)
            noise = None if noise is None else noise[first:]
        attack = self.own_attack(attack)
        keys = attack.draw_keys(generator, x.device, first_given=noise is not None)
        return RandomStart(generator, first, noise, keys)

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        """The batches that :meth:`forward` passes through the deployed BatchNorm, in its order.

        That is the only one, or the adversarial branch of a split one; through the clean branch
        pass clean images. SWA estimates the running statistics of the averaged weights anew from
        these batches, each by itself.

        Args:
            model: the network.
            x, x_adv: images (N, C, H, W) and their adversarial versions.
        """
        return [x_adv]

    def adopt(self, model: nn.Module) -> None:
        """Told once, before the first step, that the natural weights are in the network."""

    def networks(self) -> list[nn.Module]:
        """Further networks that images enter: a guide, a teacher."""
        return []

    def left_out(self) -> str:
        """What a loop should have done before the first step and has not, in words; empty for
        nothing."""
        return ""

    def start_epoch(self, clean_accuracy: float, probe: Callable[[], float] | None = None) -> None:
        """Told the training accuracy on clean images before an epoch.

        Args:
            clean_accuracy: of the batches of the epoch before, in [0, 1]; chance before the first.
            probe: measures it in eval mode on the first training images instead.
        """


def widen(logits: Tensor) -> Tensor:
    """Half-precision logits as float32, others unchanged: losses are never computed in half."""
    return logits.float() if logits.element_size() < 4 else logits
