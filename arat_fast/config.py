"""Typed configuration of a run. Recipes return a :class:`Config`; the CLI overrides its fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import tyro

from arat_fast.attacks.pgd import PGD, check_length
from arat_fast.models.registry import model_spec

DatasetName = Literal[
    "digits",
    "cifar10",
    "cifar100",
    "svhn",
    "tiny-imagenet",
    "imagenette",
    "folder",
    "webdataset",
    "arrays",
]

OWN_IMAGES: tuple[DatasetName, ...] = ("folder", "webdataset", "arrays")
"""Images of one's own, which differ with the place where they lie."""
IMAGE_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "svhn": 32, "tiny-imagenet": 64}
"""Height and width of the images of published datasets of one size."""
ObjectiveName = Literal["arat", "at", "trades", "mart", "lbgat", "arrest", "natural", "custom"]

OWN_CLEAN_BRANCH = "clean-branch"
"""The guide of lbgat that is no network of its own."""
Compat = Literal["paper", "official"]


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet18"
    """resnet8 (8×8 images), resnet18, wrn34-10 (32×32), resnet50 or convnext-t (224×224; by timm,
    an extra; it has no BatchNorm to split)."""
    norm: Literal["auto", "split", "shared"] = "auto"
    """BatchNorm: "split" has a clean and an adversarial branch, "shared" one for both; "auto"
    splits for ARAT and for LBGAT guided by its own clean branch."""
    mean: tuple[float, ...] = ()
    """Per-channel mean subtracted inside the network; empty for no normalisation."""
    std: tuple[float, ...] = ()
    """Per-channel standard deviation divided by inside the network."""

    def __post_init__(self) -> None:
        model_spec(self.name)


@dataclass(frozen=True)
class ObjectiveConfig:
    name: ObjectiveName = "arat"
    """arat, at (plain adversarial training), trades, mart, lbgat, arrest or natural (no attack).
    trades, mart and lbgat attack on running statistics from a normal start, as published. custom
    is an objective of your own, given to the trainer in Python."""
    label: str = ""
    """custom: what the summary and the report call it."""
    gamma: float = 30.0
    """Weight of the invariance loss; >= 0."""
    layers: tuple[str, ...] = ()
    """arat and arrest: module paths of the regularised layers; empty for those published for the
    model, and for arrest for the pooled feature before the classifier."""
    stop_gradient: bool = True
    """Detach the target of the invariance loss."""
    predictor: bool = True
    """Pass the source of the invariance loss through a predictor."""
    direction: Literal["adv_to_clean", "clean_to_adv", "both", "symmetric"] = "adv_to_clean"
    """Which features move towards which."""
    balance: Literal["previous_epoch", "probe", "fixed"] = "previous_epoch"
    """Weights of the classification losses: the clean branch's training accuracy over the previous
    epoch, the same measured on the first 1,024 samples before each epoch (official code), or
    fixed."""
    separate_passes: bool = False
    """arat with model.norm=shared: normalise clean and adversarial images each with their own
    statistics, in two passes (official code), instead of with those of the mixture, in one."""
    beta: float = 6.0
    """trades and mart: weight of the divergence; >= 0."""
    alpha: float = 0.0
    """lbgat: weight of TRADES' divergence, 0 or 6 as published; >= 0."""
    guide: str = ""
    """lbgat: model that guides, trained along and then dropped; empty for the trained one's own
    architecture, clean-branch for its clean branch instead of another network."""
    teacher: Path | None = None
    """arrest: a naturally trained model to start from, a run's folder or its exported weights;
    without one, the run trains it first."""
    teacher_epochs: int | None = None
    """arrest: epochs of natural training where no teacher is given, before and beside
    train.epochs; >= 1; default as many as train.epochs."""
    distillation: float = 10.0
    """arrest: weight of the distance from the natural representations; >= 0."""
    replay: float = 0.1
    """arrest: angle over pi by which a clean representation may move before its sample is replayed
    with noise instead of attacked; >= 0, 1 for no replay."""
    w_adv: float = 1.0
    """Weight of the adversarial classification loss with balance=fixed; >= 0."""
    w_clean: float = 1.0
    """Weight of the clean classification loss with balance=fixed; >= 0."""

    def __post_init__(self) -> None:
        if self.guide not in ("", OWN_CLEAN_BRANCH):
            model_spec(self.guide)
        if self.teacher_epochs is not None and self.teacher_epochs < 1:
            raise ValueError(f"objective.teacher_epochs must be >= 1, got {self.teacher_epochs}")
        if self.teacher is not None and self.teacher_epochs is not None:
            raise ValueError(
                "objective.teacher_epochs is for a run without a teacher, got both: leave one out"
            )

    @property
    def called(self) -> str:
        """What the summary and the report call the objective."""
        return self.label if self.name == "custom" and self.label else self.name


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["sgd", "adamw"] = "sgd"
    """sgd, with momentum, or adamw."""
    lr: float = 0.1
    """Peak learning rate, before lr_scaling; > 0."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply lr by data.batch_size / base_batch, or by the square root of that: a larger
    batch then needs no other lr. The first epochs may need a warm-up (schedule.warmup_epochs)."""
    base_batch: int = 128
    """Batch size that lr is meant for; >= 1."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1); AdamW's decay of the mean gradient."""
    weight_decay: float = 5e-4
    """Weight decay on every parameter; >= 0."""
    nesterov: bool = False
    """Nesterov's momentum."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr must be > 0, got {self.lr}")
        if self.base_batch < 1:
            raise ValueError(f"optimizer.base_batch must be >= 1, got {self.base_batch}")
        if self.name == "adamw" and self.nesterov:
            raise ValueError("optimizer.nesterov is SGD's, got optimizer.name=adamw")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay must be >= 0, got {self.weight_decay}")


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["steps", "official_steps", "cosine", "onecycle"] = "steps"
    """steps: times decay at each milestone. official_steps: the same one epoch later, and a
    first epoch at a fifth of the learning rate. cosine: to zero. onecycle: linear up, cosine
    down."""
    milestones: tuple[float, ...] = (0.75, 0.9)
    """Share of the epochs done when the learning rate drops: 0.75 of 100 is before epoch 76."""
    decay: float = 0.1
    """Factor at each milestone, in (0, 1]."""
    warmup: float = 0.3
    """onecycle: share of the steps that go up, in (0, 1)."""
    warmup_epochs: float = 0.0
    """All but onecycle: epochs over which the learning rate grows linearly from 0; >= 0."""

    def __post_init__(self) -> None:
        if not all(0 < m <= 1 for m in self.milestones):
            raise ValueError(f"schedule.milestones must be in (0, 1], got {self.milestones}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"schedule.decay must be in (0, 1], got {self.decay}")
        if not 0 < self.warmup < 1:
            raise ValueError(f"schedule.warmup must be in (0, 1), got {self.warmup}")
        if not self.warmup_epochs >= 0:
            raise ValueError(f"schedule.warmup_epochs must be >= 0, got {self.warmup_epochs}")
        if self.warmup_epochs and self.name == "onecycle":
            raise ValueError(
                f"onecycle warms up by schedule.warmup, got warmup_epochs={self.warmup_epochs}"
            )


@dataclass(frozen=True)
class AverageConfig:
    kind: Literal["none", "swa", "ema"] = "none"
    """swa: equal-weight mean of the parameters, BatchNorm statistics re-estimated at the end. ema:
    exponential mean of parameters and statistics."""
    start: float = 0.75
    """Share of the epochs done before averaging starts, in [0, 1): 0.75 of 100 is before
    epoch 76."""
    every: int | None = None
    """Steps between two averaged weights; >= 1; default 500 for swa, 1 for ema."""
    decay: float = 0.999
    """ema: weight of the old mean, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ValueError(f"average.start must be in [0, 1), got {self.start}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"average.every must be >= 1, got {self.every}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"average.decay must be in [0, 1), got {self.decay}")

    @property
    def interval(self) -> int:
        """Steps between two averaged weights."""
        return self.every or {"none": 1, "swa": 500, "ema": 1}[self.kind]


@dataclass(frozen=True)
class DataConfig:
    name: DatasetName = "cifar10"
    """digits is built in; the others are read from root. folder: images of your own by class;
    webdataset: tar shards; arrays: what arat-fast data prepare writes."""
    root: Path = Path("data")
    """Folder of the datasets, in torchvision's layout; folder, webdataset and arrays: the dataset
    itself."""
    download: bool = False
    """Fetch the dataset into root where it is absent."""
    batch_size: int = 128
    """Samples in a training batch, over all processes; >= 2."""
    loader: Literal["auto", "resident", "dali", "dataloader"] = "auto"
    """resident keeps the images on the device; dali and dataloader (PyTorch's) read them batch by
    batch. auto: arrays are resident where they fit; else dali where it is installed, arrays on a
    CPU by dataloader. The batches are the same."""
    crop: Literal["auto", "pad", "resized"] = "auto"
    """Image files: pad cuts out image_size pixels, resized scales a random part to them; auto is
    pad for imagenette, else resized."""
    padding: int = 4
    """Random crop: pixels of zeros added on each side; 0 for none."""
    flip: bool = True
    """Random horizontal flip."""
    num_val: int = 0
    """Training images held out for validation, the same ones in every run; 0 for none, or where the
    dataset has train, val and test."""
    unsup: Path | None = None
    """Generated images with pseudo-labels, mixed into every training batch: a folder that arat-fast
    data prepare has written."""
    unsup_fraction: float = 0.7
    """Share of the generated images in a training batch, in (0, 1)."""
    image_size: int = 128
    """Image files: height and width of the crops."""
    num_workers: int = 4
    """Processes (dataloader) that read and decode, 0 for the training process; or threads (dali):
    as many that read files as that decode, at least one."""
    bad_images: Literal["stop", "skip"] = "stop"
    """Files that are no readable image: stop at the first, or decode all before the run and leave
    them out."""

    progressive: tuple[int, ...] = ()
    """Image files: height and width in equal parts of the training, for example 128 160 192 224;
    the crops are scaled down on the device. Empty for image_size throughout."""

    def __post_init__(self) -> None:
        for size in self.progressive:
            if not 1 <= size <= self.image_size:
                raise ValueError(
                    f"data.progressive must be sizes in [1, image_size = {self.image_size}], got "
                    f"{size}"
                )
        if self.batch_size < 2:
            raise ValueError(f"data.batch_size must be >= 2, got {self.batch_size}")
        for name in ("padding", "num_val", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.unsup_fraction < 1:
            raise ValueError(f"data.unsup_fraction must be in (0, 1), got {self.unsup_fraction}")


@dataclass(frozen=True)
class StepConfig:
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """bf16 runs under autocast; auto takes it where the device has bf16 arithmetic."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Implementation of the method's own operations; auto takes Triton on a GPU, PyTorch
    elsewhere."""
    fold: bool = True
    """With attack.bn=running, attack a copy with BatchNorm folded into the convolutions: the same
    gradients up to rounding, faster."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Capture the whole step in a CUDA graph; auto does so on a GPU."""
    channels_last: bool = True
    """Memory format of weights and activations."""
    noisy_clean: bool = False
    """The official code's in-place start: the clean branch trains on the image plus the start
    noise, and the ball is centred there."""


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 100
    """Epochs; >= 1."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl; >= 1."""
    eval_every: int = 5
    """Epochs between two evaluations (clean, PGD) during training; 0 for none."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; >= 1."""
    keep_last: int = 2
    """Checkpoints kept, the newest included; of two or more, a damaged one is passed over; >= 1."""
    keep_best: bool = False
    """Also keep the checkpoint with the best PGD accuracy on the validation images (data.num_val,
    or the dataset's own)."""
    accumulate: int = 1
    """Parts in which each process takes its share of a batch, one after the other: the gradient of
    the whole batch with less memory, but for BatchNorm, which sees each part alone; >= 1."""
    rollbacks: int = 0
    """Times that a loss which is not finite sends the run back to its last checkpoint, with a lower
    learning rate, before the run ends; >= 0."""
    rollback_factor: float = 0.5
    """Factor on the learning rate at each of them, in (0, 1]."""

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "checkpoint_every", "keep_last", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be >= 1, got {getattr(self, name)}")
        if self.rollbacks < 0:
            raise ValueError(f"train.rollbacks must be >= 0, got {self.rollbacks}")
        if not 0 < self.rollback_factor <= 1:
            raise ValueError(f"train.rollback_factor must be in (0, 1], got {self.rollback_factor}")
        if self.eval_every < 0:
            raise ValueError(f"train.eval_every must be >= 0, got {self.eval_every}")


@dataclass(frozen=True)
class DistributedConfig:
    sync_bn: bool = False
    """Normalise with the statistics of the batch over all processes, each BatchNorm branch by
    itself, instead of those of each process."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Send gradients while the backward pass still runs; auto does so on a GPU."""
    timeout: float = 600.0
    """Seconds after which a process that waits for another gives up; > 0."""

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"distributed.timeout must be > 0, got {self.timeout}")


@dataclass(frozen=True)
class EvalConfig:
    num_steps: int = 20
    """Steps of the PGD evaluation; >= 0."""
    alpha: float | None = None
    """Step size of the PGD evaluation, >= 0, in Linf at most 1; default a quarter of the radius,
    which is the attack's like the norm: 2/255 at 8/255, as published."""
    autoattack: bool = True
    """Run standard AutoAttack at the end of training."""
    batch_size: int = 500
    """Samples evaluated at once; >= 1."""
    max_samples: int = 0
    """Evaluate the first samples of the split only; 0 for all."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size must be >= 1, got {self.batch_size}")
        for name in ("num_steps", "max_samples"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"eval.{name} must be >= 0, got {getattr(self, name)}")

    def step_size(self, eps: float) -> float:
        """Step size of the PGD evaluation in a ball of radius ``eps``."""
        return eps / 4 if self.alpha is None else self.alpha


@dataclass(frozen=True)
class AnalyzeConfig:
    every: int = 0
    """Epochs between two analyses during training (gradient conflict, mixture distribution), also
    before the first and after the last; 0 for none. The weights are the same with and without."""
    num_batches: int = 4
    """Training batches that each of them averages over; >= 1."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"analyze.every must be >= 0, got {self.every}")
        if self.num_batches < 1:
            raise ValueError(f"analyze.num_batches must be >= 1, got {self.num_batches}")


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    recipe: tyro.conf.Suppress[str]
    seed: int = 0
    """Seed of weights, order, augmentation and attacks; >= 0."""
    compat: Compat = "paper"
    """official: reproduce what the official code really runs, in every point where it differs from
    the method as published."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    attack: PGD = field(default_factory=PGD)
    """Projected gradient descent, which makes the adversarial images."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    step: StepConfig = field(default_factory=StepConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.eval.alpha is not None:
            check_length("eval.alpha", self.eval.alpha, self.attack.norm)
        # These can have validation images of their own, as the trainer finds out.
        own = self.data.name in OWN_IMAGES
        if self.train.keep_best and not ((self.data.num_val or own) and self.train.eval_every):
            raise ValueError(
                "train.keep_best chooses by validation images, not by test images: set "
                f"data.num_val and train.eval_every, got {self.data.num_val} and "
                f"{self.train.eval_every}"
            )

    @property
    def peak_lr(self) -> float:
        """The highest learning rate, scaled to the batch size."""
        factor = self.data.batch_size / self.optimizer.base_batch
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.optimizer.lr_scaling]
        return self.optimizer.lr if power == 0 else self.optimizer.lr * factor**power

    @property
    def norm(self) -> Literal["split", "shared"]:
        """The BatchNorm that is really used."""
        if self.model.norm != "auto":
            return self.model.norm
        name, guide = self.objective.name, self.objective.guide
        splits = name == "arat" or (name == "lbgat" and guide == OWN_CLEAN_BRANCH)
        return "split" if splits and model_spec(self.model.name).has_batch_norm else "shared"

    @property
    def separate_passes(self) -> bool:
        """Whether the halves really go through the network one after the other: split BatchNorm
        separates them in one pass, and other objectives never ask."""
        arat = self.objective.name == "arat"
        return arat and self.objective.separate_passes and self.norm == "shared"

    @property
    def regularized_layers(self) -> tuple[str, ...]:
        """The layers of ARAT's or ARREST's distance: those asked for, else those published."""
        if self.objective.layers:
            return self.objective.layers
        if self.objective.name == "arrest":
            return ("avgpool",)
        return model_spec(self.model.name).regularized_layers


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types."""
    result: dict[str, Any] = _to_json(dataclasses.asdict(config))
    return result


def config_from_dict(values: dict[str, Any]) -> Config:
    """Inverse of :func:`config_to_dict`.

    Raises:
        ValueError: a field is unknown or its value is out of range.
    """
    parts: dict[str, type] = {
        "model": ModelConfig,
        "objective": ObjectiveConfig,
        "attack": PGD,
        "optimizer": OptimizerConfig,
        "schedule": ScheduleConfig,
        "average": AverageConfig,
        "data": DataConfig,
        "step": StepConfig,
        "train": TrainConfig,
        "eval": EvalConfig,
        "analyze": AnalyzeConfig,
        "distributed": DistributedConfig,
    }
    arguments: dict[str, Any] = dict(values)
    try:
        for name, part in parts.items():
            types = get_type_hints(part)
            # Runs from before have no sections for what came later.
            fields = {k: _from_json(types.get(k), v) for k, v in values.get(name, {}).items()}
            arguments[name] = part(**fields)
        return Config(**arguments)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a configuration of this version: {error}") from error


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _from_json(expected: Any, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    is_path = Path in (expected, *get_args(expected))
    return Path(value) if is_path and value is not None else value
