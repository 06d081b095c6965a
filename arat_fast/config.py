"""Typed configuration of a run. Recipes return a :class:`Config`; the CLI overrides its fields."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

import tyro

from arat_fast import objectives
from arat_fast.attacks.pgd import PGD
from arat_fast.datasets import DATASETS
from arat_fast.models.layers import Activation
from arat_fast.models.registry import MODELS, image_size, import_model, is_known
from arat_fast.objectives import ARAT, OBJECTIVES, ForeignSettings, known_objective, objective_type
from arat_fast.settings import (
    FREE,
    Count,
    Number,
    Positive,
    Range,
    Weight,
    check_settings,
    free_fields,
)

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
else:
    DatasetName = Literal[tuple(DATASETS)]

OWN_IMAGES = tuple(name for name, dataset in DATASETS.items() if dataset.own)
"""Images of one's own, which differ with the place where they lie."""
Compat = Literal["paper", "official"]


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet18"
    """resnet8 (8×8 images), resnet8-s2 (28×28, first convolution of stride 2), resnet18,
    preact-resnet18, wrn28-10, wrn34-10, wrn70-16 (32×32), resnet50 (224×224); timm:NAME (an extra),
    torchvision:NAME, or mypackage.mymodule:make, which takes num_classes and gives a network."""
    norm: Literal["auto", "split", "shared"] = "auto"
    """BatchNorm: "split" has a clean and an adversarial branch, "shared" one for both; "auto"
    splits for ARAT and for LBGAT guided by its own clean branch."""
    mean: tuple[float, ...] = ()
    """Per-channel mean subtracted inside the network; empty for no normalisation, with timm and
    torchvision for that of the network's own configuration."""
    std: tuple[float, ...] = ()
    """Per-channel standard deviation divided by inside the network."""
    activation: Activation = "relu"
    """Of the built-in networks: relu, in one operation with BatchNorm, or silu."""

    def __post_init__(self) -> None:
        check_settings("model.", self)
        import_model(self.name)


@dataclass(frozen=True)
class ForeignModel(ModelConfig):
    """What a file says of a network of one's own that was not imported, as
    :class:`arat_fast.objectives.ForeignSettings` for an objective."""

    def __post_init__(self) -> None:
        check_settings("model.", self)


def recorded_model(name: str) -> type[ModelConfig]:
    """The class of a model's settings whose name stands in a file: it imports nobody's module."""
    return ForeignModel if ":" in name and not is_known(name) else ModelConfig


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["sgd", "adamw"] = "sgd"
    """sgd, with momentum, or adamw."""
    lr: Positive = 0.1
    """Peak learning rate, before lr_scaling; > 0."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply lr by data.batch_size / base_batch, or by the square root of that: a larger
    batch then needs no other lr. The first epochs may need a warm-up (schedule.warmup_epochs)."""
    base_batch: Count = 128
    """Batch size that lr is meant for; >= 1."""
    momentum: Annotated[float, Range(low=0, below=1)] = 0.9
    """Momentum of SGD, in [0, 1); AdamW's decay of the mean gradient."""
    weight_decay: Weight = 5e-4
    """Weight decay on every parameter; >= 0."""
    nesterov: bool = False
    """Nesterov's momentum."""
    lr_factors: tuple[str, ...] = ()
    """Learning rates of parts of the network, PATH=FACTOR by module path, for example layer1=0.1
    linear=10; of several the longest counts; >= 0."""

    def __post_init__(self) -> None:
        check_settings("optimizer.", self)
        self.factors()
        if self.name == "adamw" and self.nesterov:
            raise ValueError("optimizer.nesterov is SGD's, got optimizer.name=adamw")

    def factors(self) -> dict[str, float]:
        """``lr_factors`` by module path.

        Raises:
            ValueError: one is not PATH=FACTOR.
        """
        found = {}
        for item in self.lr_factors:
            path, _, factor = item.rpartition("=")
            try:
                found[path] = float(factor)
            except ValueError:
                found[path] = -1.0
            if not path or not 0 <= found[path] < math.inf:
                raise ValueError(f"optimizer.lr_factors expects PATH=FACTOR, got {item!r}")
        return found


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["steps", "official_steps", "cosine", "onecycle", "range"] = "steps"
    """steps: times decay at each milestone. official_steps: the same one epoch later, and a
    first epoch at a fifth of the learning rate. cosine: to zero. onecycle: linear up, cosine
    down. range: a test that finds a learning rate, from a thousandth of it up, by equal factors."""
    milestones: tuple[Annotated[float, Range(above=0, high=1)], ...] = (0.75, 0.9)
    """Share of the epochs done when the learning rate drops: 0.75 of 100 is before epoch 76."""
    decay: Annotated[float, Range(above=0, high=1)] = 0.1
    """Factor at each milestone, in (0, 1]."""
    warmup: Annotated[float, Range(above=0, below=1)] = 0.3
    """onecycle: share of the steps that go up, in (0, 1)."""
    warmup_epochs: Weight = 0.0
    """All but onecycle: epochs over which the learning rate grows linearly from 0; >= 0."""

    def __post_init__(self) -> None:
        check_settings("schedule.", self)
        if self.warmup_epochs and self.name == "onecycle":
            raise ValueError(
                f"onecycle warms up by schedule.warmup, got warmup_epochs={self.warmup_epochs}"
            )


@dataclass(frozen=True)
class AverageConfig:
    kind: Literal["none", "swa", "ema"] = "none"
    """swa: equal-weight mean of the parameters, BatchNorm statistics re-estimated at the end. ema:
    exponential mean of parameters and statistics."""
    start: Annotated[float, Range(low=0, below=1)] = 0.75
    """Share of the epochs done before averaging starts, in [0, 1): 0.75 of 100 is before
    epoch 76."""
    every: Count | None = None
    """Steps between two averaged weights; >= 1; default 500 for swa, 1 for ema."""
    decay: Annotated[float, Range(low=0, below=1)] = 0.999
    """ema: weight of the old mean, in [0, 1)."""

    def __post_init__(self) -> None:
        check_settings("average.", self)

    @property
    def interval(self) -> int:
        """Steps between two averaged weights."""
        return self.every or {"none": 1, "swa": 500, "ema": 1}[self.kind]


@dataclass(frozen=True)
class DataConfig:
    name: DatasetName = "cifar10"
    """digits is built in; the others are read from root. folder: images of your own by class;
    webdataset: tar shards; arrays: what arat-fast data prepare writes."""
    root: Annotated[Path, FREE] = Path("data")
    """Folder of the datasets, in torchvision's layout; folder, webdataset and arrays: the dataset
    itself."""
    download: Annotated[bool, FREE] = False
    """Fetch the dataset into root where it is absent."""
    follow_links: Annotated[bool, FREE] = False
    """folder: also read class folders that are links to folders elsewhere."""
    batch_size: Annotated[int, Range(low=2)] = 128
    """Samples in a training batch, over all processes; >= 2."""
    loader: Annotated[Literal["auto", "resident", "dali", "dataloader"], FREE] = "auto"
    """resident keeps the images on the device; dali and dataloader (PyTorch's) read them batch by
    batch. auto: arrays are resident where they fit; else dali where it is installed, arrays on a
    CPU by dataloader. The batches are the same."""
    crop: Literal["auto", "pad", "resized"] = "auto"
    """Image files: pad cuts out image_size pixels, resized scales a random part to them; auto is
    pad for imagenette, else resized."""
    padding: Number = 4
    """Random crop: pixels of zeros added on each side; 0 for none."""
    flip: bool = True
    """Random horizontal flip."""
    augment: bool = False
    """Image files: RandAugment of every training crop, two random operations of torchvision's, by
    the dataloader."""
    num_val: Number = 0
    """Training images held out for validation, the same ones in every run; 0 for none, or where the
    dataset has train, val and test."""
    limit: Number = 0
    """Training images used, with the class shares of all, the same ones in every run; 0 for all.
    For trials; every record says so."""
    unsup: Path | None = None
    """Generated images with pseudo-labels, mixed into every training batch: a folder that arat-fast
    data prepare has written."""
    unsup_fraction: Annotated[float, Range(above=0, below=1)] = 0.7
    """Share of the generated images in a training batch, in (0, 1)."""
    image_size: Annotated[int, Range(low=1, high=8192)] = 128
    """Image files: height and width of the crops."""
    num_workers: Annotated[Number, FREE] = 4
    """Processes (dataloader) that read and decode, 0 for the training process; or threads (dali):
    as many that read files as that decode, at least one."""
    bad_images: Literal["stop", "skip", "skip-strays"] = "stop"
    """Files that are no readable image: stop at the first, or decode all before the run and leave
    them out. skip-strays leaves out, without decoding, what the listing alone shows to be none."""

    progressive: tuple[int, ...] = ()
    """Image files: height and width in equal parts of the training, for example 128 160 192 224;
    the crops are scaled down on the device. Empty for image_size throughout."""

    def __post_init__(self) -> None:
        check_settings("data.", self)
        for size in self.progressive:
            if not 1 <= size <= self.image_size:
                raise ValueError(
                    f"data.progressive must be sizes in [1, image_size = {self.image_size}], got "
                    f"{size}"
                )


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
    graph: Annotated[Literal["auto", "on", "off"], FREE] = "auto"
    """Capture the whole step in a CUDA graph; auto does so on a GPU."""
    channels_last: bool = True
    """Memory format of weights and activations."""
    compile: bool = False
    """Run the attack's passes through torch.compile, for networks that the kernels do not cover;
    the first step then takes a minute or more."""
    noisy_clean: bool = False
    """The official code's in-place start: the clean branch trains on the image plus the start
    noise, and the ball is centred there."""

    def __post_init__(self) -> None:
        check_settings("step.", self)


@dataclass(frozen=True)
class TrainConfig:
    epochs: Count = 100
    """Epochs; >= 1."""
    max_steps: Annotated[Number, FREE] = 0
    """Steps after which the run ends as if they were all, with the learning rates of the whole
    one; 0 for all. For trials; with more steps and --resume it goes on."""
    natural_epochs: Number = 0
    """Epochs of natural training first, besides those of train.epochs and with a schedule of their
    own, in the folder natural of the run; >= 0."""
    device: Annotated[str, FREE] = "auto"
    """auto, cpu, cuda or cuda:N."""
    log_every: Annotated[Count, FREE] = 20
    """Steps between two lines of metrics.jsonl; >= 1."""
    loggers: Annotated[tuple[Literal["tensorboard", "csv", "wandb"], ...], FREE] = ("tensorboard",)
    """Where the numbers go beside metrics.jsonl: TensorBoard where it is installed, metrics.csv at
    the end, Weights & Biases."""
    eval_every: Annotated[Number, FREE] = 5
    """Epochs between two evaluations (clean, PGD) during training; 0 for none."""
    checkpoint_every: Annotated[Count, FREE] = 1
    """Epochs between two checkpoints; >= 1."""
    keep_last: Annotated[Count, FREE] = 2
    """Checkpoints kept, the newest included; of two or more, a damaged one is passed over; >= 1."""
    keep_best: Annotated[bool, FREE] = False
    """Also keep the checkpoint with the best PGD accuracy on the validation images (data.num_val,
    or the dataset's own)."""
    accumulate: Count = 1
    """Parts in which each process takes its share of a batch, one after the other: the gradient of
    the whole batch with less memory, but for BatchNorm, which sees each part alone; >= 1."""
    deterministic: bool = False
    """On a GPU, the same bits from the same start, also of a resumed run and of one process under
    torchrun: deterministic algorithms, and none chosen by timing. Slower; a CPU needs it not."""
    rollbacks: Annotated[Number, FREE] = 0
    """Times that a loss which is not finite sends the run back to its last checkpoint, with a lower
    learning rate, before the run ends; >= 0."""
    rollback_factor: Annotated[float, Range(above=0, high=1), FREE] = 0.5
    """Factor on the learning rate at each of them, in (0, 1]."""

    def __post_init__(self) -> None:
        check_settings("train.", self)


@dataclass(frozen=True)
class DistributedConfig:
    sync_bn: bool = False
    """Normalise with the statistics of the batch over all processes, each BatchNorm branch by
    itself, instead of those of each process."""
    overlap: Annotated[Literal["auto", "on", "off"], FREE] = "auto"
    """Send gradients while the backward pass still runs; auto does so on a GPU."""
    timeout: Annotated[Positive, FREE] = 600.0
    """Seconds after which a process that waits for another gives up; > 0."""

    def __post_init__(self) -> None:
        check_settings("distributed.", self)


@dataclass(frozen=True)
class EvalConfig:
    num_steps: Annotated[Number, FREE] = 20
    """Steps of the PGD evaluation; >= 0."""
    alpha: Annotated[float | None, FREE] = None
    """Step size of the PGD evaluation, >= 0, in Linf at most 1; None takes a quarter of the
    radius, 2/255 at 8/255 as published. Radius and norm are the attack's."""
    autoattack: Annotated[bool, FREE] = True
    """Run standard AutoAttack at the end of training."""
    batch_size: Annotated[Count, FREE] = 500
    """Samples evaluated at once; >= 1."""
    max_samples: Annotated[Number, FREE] = 0
    """Evaluate the first samples of the split only; 0 for all."""

    def __post_init__(self) -> None:
        check_settings("eval.", self)

    def step_size(self, eps: float) -> float:
        """Step size of the PGD evaluation in a ball of radius ``eps``."""
        return eps / 4 if self.alpha is None else self.alpha


@dataclass(frozen=True)
class TargetsConfig:
    label_smoothing: Annotated[float, Range(low=0, below=1)] = 0.0
    """Mass of each target that is spread evenly over all classes, in [0, 1)."""
    mix: Literal["none", "mixup", "cutmix"] = "none"
    """Pairs of training images: mixup blends them, cutmix puts a rectangle of one into the other;
    clean and adversarial images are made of the same mix."""
    mix_alpha: Positive = 1.0
    """The share of an image in its mix is drawn from Beta(mix_alpha, mix_alpha); > 0."""
    class_weights: tuple[Weight, ...] = ()
    """Factor of the classification loss for each class, in their order; empty for 1. Each >= 0."""

    def __post_init__(self) -> None:
        check_settings("targets.", self)


@dataclass(frozen=True)
class AWPConfig:
    gamma: Weight = 0.0
    """Adversarial weight perturbation: its length relative to each layer's weights; 0 for none,
    0.01 with at, 0.005 with trades as published. It costs a pass through the network and back."""
    warmup: Number = 0
    """Epochs before it begins; 10 with trades as published."""

    def __post_init__(self) -> None:
        check_settings("awp.", self)


@dataclass(frozen=True)
class WatchConfig:
    act: Literal["say", "stop", "smaller-step", "more-steps", "off"] = "say"
    """Catastrophic overfitting, watched for where the attack has one or two steps, by PGD-10 on 32
    images: say it and go on; stop; go back to the last good state with half the attack's step size,
    or with twice as many steps of half the size; or do not watch."""
    every: Number = 0
    """Training steps between two looks, rounded up to train.log_every; 0 for as many as keep their
    passes through the network within 1.5 % of the training's."""

    def __post_init__(self) -> None:
        check_settings("watch.", self)


@dataclass(frozen=True)
class AnalyzeConfig:
    every: Annotated[Number, FREE] = 0
    """Epochs between two analyses during training (gradient conflict, mixture distribution), also
    before the first and after the last; 0 for none. The weights are the same with and without."""
    num_batches: Annotated[Count, FREE] = 4
    """Training batches that each of them averages over; >= 1."""

    def __post_init__(self) -> None:
        check_settings("analyze.", self)


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    recipe: tyro.conf.Suppress[str]
    seed: Number = 0
    """Seed of weights, order, augmentation and attacks; >= 0."""
    compat: Compat = "paper"
    """official: reproduce what the official code really runs, in every point where it differs from
    the method as published."""
    init: str | None = None
    """Weights to start from: a run, a .pt or .safetensors file, also RobustBench's or the official
    code's, or timm for those that it publishes. BatchNorm of one branch fills both; a classifier of
    another size stays fresh."""
    init_freeze_epochs: Number = 0
    """Epochs in which the classifier and the objective's own parts are trained alone; >= 0."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: objectives.Settings = field(default_factory=lambda: ARAT.Settings("arat"))
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
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    awp: AWPConfig = field(default_factory=AWPConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        check_settings("", self)
        settings: type[objectives.Settings] = ForeignSettings
        if not isinstance(self.objective, ForeignSettings):
            settings = objective_type(self.objective.name).Settings
        if not isinstance(self.objective, settings):
            raise ValueError(
                f"objective.name={self.objective.name} has the settings of another objective, got "
                f"{type(self.objective).__qualname__}"
            )
        if self.init_freeze_epochs and self.init is None:
            raise ValueError(
                f"init_freeze_epochs is for a run that starts from weights (--init), got "
                f"{self.init_freeze_epochs}"
            )
        if self.eval.alpha is not None:
            self.attack.ball.check("eval.alpha", self.eval.alpha)
        # Whether there are validation images, the trainer finds out.
        if self.train.keep_best and not self.train.eval_every:
            raise ValueError(
                "train.keep_best chooses by the evaluations between epochs: set train.eval_every, "
                "got 0"
            )

    @property
    def peak_lr(self) -> float:
        """The highest learning rate, scaled to the batch size."""
        factor = self.data.batch_size / self.optimizer.base_batch
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.optimizer.lr_scaling]
        return self.optimizer.lr if power == 0 else self.optimizer.lr * factor**power

    @property
    def norm(self) -> Literal["split", "shared"]:
        """The BatchNorm that is asked for; a network that has none is not split."""
        if self.model.norm != "auto":
            return self.model.norm
        return "split" if self.objective.splits_batch_norm else "shared"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a batch, as far as it is known before the images are."""
        dataset = DATASETS[self.data.name]
        size = dataset.image_size or (32 if dataset.own else self.data.image_size)
        return dataset.channels, size, size

    def with_model(self, name: str) -> Config:
        """This configuration with another network; images in files are cropped to the size that a
        network which is not built in is meant for."""
        model = dataclasses.replace(self.model, name=name)
        size = None if name in MODELS else image_size(name)
        if name == self.model.name or size is None or DATASETS[self.data.name].image_size:
            return dataclasses.replace(self, model=model)
        data = dataclasses.replace(self.data, image_size=size)
        return dataclasses.replace(self, model=model, data=data)

    def with_objective(self, name: str) -> Config:
        """This configuration with another objective, at that one's own defaults."""
        if name == self.objective.name:
            return self
        settings = objective_type(name).Settings(name)
        official = self.compat == "official"
        return dataclasses.replace(self, objective=settings.official() if official else settings)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types."""
    result: dict[str, Any] = _to_json(dataclasses.asdict(config))
    if isinstance(config.objective, ForeignSettings):
        result["objective"] |= {k: _to_json(v) for k, v in config.objective.values}
        del result["objective"]["values"]
    return result


def config_from_dict(values: dict[str, Any]) -> Config:
    """Inverse of :func:`config_to_dict`.

    Raises:
        ValueError: a field is unknown or its value is out of range.
    """
    try:
        arguments = dict(values)
        for name, part in get_type_hints(Config).items():
            if not dataclasses.is_dataclass(part):
                continue
            # Runs from before have no sections for what came later.
            fields = dict(values.get(name, {}))
            if name == "objective":
                part, fields = _objective_fields(fields)
            elif name == "model":
                part = recorded_model(fields["name"])
            types = get_type_hints(part)
            arguments[name] = part(**{k: _from_json(types.get(k), v) for k, v in fields.items()})
        return Config(**arguments)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a configuration of this version: {error}") from error


def check_same_run(config: Config, saved: Config, source: Path) -> None:
    """ValueError where the two configurations would not train the same weights."""
    for section in dataclasses.fields(Config):
        given, before = getattr(config, section.name), getattr(saved, section.name)
        if not dataclasses.is_dataclass(given):
            given, before = {section.name: given}, {section.name: before}
            free: frozenset[str] = frozenset()
            prefix = ""
        else:
            free = free_fields(type(given))
            prefix = f"{section.name}."
            given, before = vars(given), vars(before)
        for name, value in given.items():
            if name not in free and value != before.get(name):
                raise ValueError(
                    f"{source} belongs to a run with {prefix}{name}={before.get(name)}, got "
                    f"{prefix}{name}={value}"
                )


def _objective_fields(values: dict[str, Any]) -> tuple[type[objectives.Settings], dict[str, Any]]:
    """The class of an objective's settings, and those of its fields that a record holds."""
    known = known_objective(values["name"])
    if known is None and ":" in values["name"]:
        others = tuple((k, v) for k, v in values.items() if k != "name")
        return ForeignSettings, {"name": values["name"], "values": others}
    settings = objective_type(values["name"]).Settings
    own = {field.name for field in dataclasses.fields(settings)}
    # Records of earlier versions hold the fields of all objectives.
    foreign = {f.name for o in OBJECTIVES.values() for f in dataclasses.fields(o.Settings)}
    foreign |= {"label"}
    return settings, {k: v for k, v in values.items() if k in own or k not in foreign}


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
