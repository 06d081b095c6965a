"""Recipes: functions that return the configuration of a published or a built-in run."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from arat_fast.attacks.pgd import PGD
from arat_fast.config import (
    AverageConfig,
    AWPConfig,
    Compat,
    Config,
    DataConfig,
    DatasetName,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StepConfig,
    TargetsConfig,
    TrainConfig,
)
from arat_fast.objectives import ARAT, TRADES, AdversarialTraining

GAMMA = {"resnet18": 30.0, "wrn34-10": 100.0}
"""Published weight of the invariance loss by network."""

EVAL_BATCH = {"resnet18": 500, "wrn34-10": 200}
"""Images of 32×32 that are attacked at once, in float32."""


def digits() -> Config:
    """scikit-learn's digits at their native 8×8, resnet8: a couple of minutes on two CPU cores."""
    return Config(
        recipe="digits",
        model=ModelConfig("resnet8"),
        attack=PGD(eps=0.12, alpha=0.03, num_steps=10),
        schedule=ScheduleConfig("onecycle"),
        average=AverageConfig("ema", start=0.3, decay=0.98),
        data=DataConfig("digits", batch_size=64, padding=0, flip=False),
        step=StepConfig(precision="float32"),
        train=TrainConfig(epochs=23, log_every=10, eval_every=4),
        eval=EvalConfig(alpha=0.02),
    )


N_FGSM = PGD(alpha=8 / 255, num_steps=1, start_radius=2.0, project=False)
"""One step of the radius from noise of twice the radius, not projected (de Jorge et al., NeurIPS
2022, arXiv 2202.01181, algorithm 1 and section 4: alpha = eps, k = 2 eps)."""


def digits_nfgsm() -> Config:
    """The digits with single-step training, N-FGSM, watched for catastrophic overfitting."""
    config = digits()
    attack = dataclasses.replace(N_FGSM, eps=config.attack.eps, alpha=config.attack.eps)
    objective = AdversarialTraining.Settings("at")
    return dataclasses.replace(config, recipe="digits-nfgsm", objective=objective, attack=attack)


def fashion_mnist(model: str) -> Config:
    """Fashion-MNIST, L∞ 0.1, PGD-5: resnet8-s2 for one CPU core, resnet18 for a GPU.

    Learning rate, weight decay and gamma of resnet8-s2 were chosen on validation images
    (docs/results.md), those of resnet18 are the published ones of CIFAR-10.
    """
    small = model == "resnet8-s2"
    return Config(
        recipe=f"fashion-mnist-{model.removesuffix('-s2')}",
        model=ModelConfig(model),
        attack=PGD(eps=0.1, alpha=0.03, num_steps=5),
        optimizer=OptimizerConfig(lr=0.4 if small else 0.1),
        schedule=ScheduleConfig("onecycle"),
        data=DataConfig("fashion-mnist", padding=2),
        step=StepConfig(precision="float32" if small else "auto"),
        train=TrainConfig(epochs=6 if small else 30, eval_every=0),
        eval=EvalConfig(max_samples=1000) if small else EvalConfig(),
    )


def published(dataset: DatasetName, model: str) -> Config:
    """The paper's run: PGD-10 at 8/255, SGD, 100 epochs of batch 128, drops at epochs 76 and 91.

    Source: arXiv 2402.14648, section 5.
    """
    # Larger images, of which fewer fit.
    divisor = {"tiny-imagenet": 4, "imagenette": 10, "folder": 10}.get(dataset, 1)
    return Config(
        recipe=f"{dataset}-{model}",
        model=ModelConfig(model),
        objective=ARAT.Settings("arat", gamma=GAMMA[model]),
        data=DataConfig(dataset),
        eval=EvalConfig(batch_size=EVAL_BATCH[model] // divisor),
    )


def cifar10_dm() -> Config:
    """WRN-28-10 with SiLU, TRADES and a million generated images: 70 % of every batch.

    The images are the authors' EDM samples, which ``arat-fast data prepare`` makes a folder of.
    Published: clean 92.44 %, AutoAttack 67.31 %, with 20 million images, a larger batch and more
    epochs; the command of its authors' README is the one written down here. Not run here.

    Source: Wang et al., ICML 2023 (arXiv 2302.04638), and the authors' code: SGD with Nesterov's
    momentum at 0.2, one cycle of 400 epochs, batch 512, beta 5, label smoothing 0.1, a mean of the
    weights of 0.995.
    """
    return Config(
        recipe="cifar10-wrn28-10-dm",
        model=ModelConfig("wrn28-10", activation="silu"),
        objective=TRADES.Settings("trades", beta=5.0),
        optimizer=OptimizerConfig(lr=0.2, nesterov=True),
        schedule=ScheduleConfig("onecycle", warmup=0.025),
        average=AverageConfig("ema", start=0.0, decay=0.995),
        data=DataConfig(batch_size=512, unsup=Path("data/cifar10-edm-1m"), unsup_fraction=0.7),
        targets=TargetsConfig(label_smoothing=0.1),
        train=TrainConfig(epochs=400),
        eval=EvalConfig(batch_size=200),
    )


def cifar10_trades_awp() -> Config:
    """Pre-activation ResNet-18 with TRADES and adversarial weight perturbation, 200 epochs.

    Published for TRADES-AWP: clean 85.36 %, AutoAttack 56.17 % with WRN-34-10; none is published
    for this network. Not run here.

    Source: Wu et al., NeurIPS 2020 (arXiv 2004.05884), and the authors' code: gamma 0.005 from
    epoch 11 on, beta 6, drops of the learning rate after half and three quarters.
    """
    return Config(
        recipe="cifar10-preact18-trades-awp",
        model=ModelConfig("preact-resnet18"),
        objective=TRADES.Settings("trades"),
        schedule=ScheduleConfig(milestones=(0.5, 0.75)),
        awp=AWPConfig(gamma=0.005, warmup=10),
        train=TrainConfig(epochs=200),
        eval=EvalConfig(batch_size=500),
    )


def cifar10_nfgsm() -> Config:
    """Pre-activation ResNet-18 in 30 epochs of single-step training.

    The paper shows its accuracies in plots; none is repeated here, and none was measured here.

    Source: de Jorge et al., NeurIPS 2022 (arXiv 2202.01181), and the authors' code: SGD, a linear
    cycle up to 0.2 and down (here the way down is a cosine), batch 128.
    """
    return Config(
        recipe="cifar10-preact18-nfgsm",
        model=ModelConfig("preact-resnet18"),
        objective=AdversarialTraining.Settings("at"),
        attack=N_FGSM,
        optimizer=OptimizerConfig(lr=0.2),
        schedule=ScheduleConfig("onecycle", warmup=0.5),
        train=TrainConfig(epochs=30),
        eval=EvalConfig(batch_size=500),
    )


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_EPS = 4 / 255
IMAGENET = DataConfig(
    "folder",
    Path("data/imagenet"),
    batch_size=512,
    padding=0,
    image_size=224,
    num_workers=12,
)


def imagenet(attack: Literal["pgd3", "fgsm"] = "pgd3") -> Config:
    """ImageNet from class folders (``data/imagenet/train`` and ``val``), L∞ 4/255, 224 pixels.

    "pgd3" is PGD with three steps of 2/3 of the radius (Salman et al., NeurIPS 2020), "fgsm" one
    step of 5/4 of the radius from a random start (Wong et al., ICLR 2020, arXiv 2001.03994).
    The schedule is ImageNet's usual one, SGD at 0.1 for batch 512, 90 epochs, drops at 30 and 60.
    Neither it nor gamma has been searched for ARAT, and neither recipe has been run to its end.
    """
    steps = {"pgd3": (3, 2 / 3), "fgsm": (1, 5 / 4)}
    num_steps, share = steps[attack]
    suffix = "-fgsm" if attack == "fgsm" else ""
    return Config(
        recipe=f"imagenet-resnet50{suffix}",
        model=ModelConfig("resnet50", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        objective=ARAT.Settings("arat", gamma=GAMMA["resnet18"]),
        attack=PGD(eps=IMAGENET_EPS, alpha=share * IMAGENET_EPS, num_steps=num_steps),
        optimizer=OptimizerConfig(lr=0.1, base_batch=512, weight_decay=1e-4),
        schedule=ScheduleConfig(milestones=(1 / 3, 2 / 3)),
        average=AverageConfig("ema", start=0.0, decay=0.9999),
        data=IMAGENET,
        train=TrainConfig(epochs=90, log_every=50, eval_every=10),
        eval=EvalConfig(batch_size=64, max_samples=5000),
    )


def imagenet_convnext() -> Config:
    """ConvNeXt-T from clean weights of ImageNet, AT with two steps, heavy augmentation, L∞ 4/255.

    Published, with another stem and 300 epochs: clean 72.7 %, AutoAttack 49.5 %. Here timm's own
    stem, PGD's two steps of the radius for APGD's, CutMix alone where they mix with MixUp too, no
    random erasing, and weight decay on every parameter. Not run here.

    Source: Singh, Croce and Hein, NeurIPS 2023 (arXiv 2303.01870), and the authors' code: AdamW at
    1e-3 with weight decay 0.05, ten epochs of warm-up and a cosine for up to 100, RandAugment,
    label smoothing 0.1, an exponential mean of the weights.
    """
    return Config(
        recipe="imagenet-convnext-t",
        init="timm",
        model=ModelConfig("timm:convnext_tiny.fb_in1k"),
        objective=AdversarialTraining.Settings("at"),
        attack=PGD(eps=IMAGENET_EPS, alpha=IMAGENET_EPS, num_steps=2),
        optimizer=OptimizerConfig("adamw", lr=1e-3, base_batch=1024, weight_decay=0.05),
        schedule=ScheduleConfig("cosine", warmup_epochs=10),
        average=AverageConfig("ema", start=0.0, decay=0.9999),
        data=dataclasses.replace(IMAGENET, batch_size=1024, augment=True),
        targets=TargetsConfig(label_smoothing=0.1, mix="cutmix"),
        train=TrainConfig(epochs=50, log_every=50, eval_every=10),
        eval=EvalConfig(batch_size=64, max_samples=5000),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "digits-nfgsm": digits_nfgsm,
    "cifar10-wrn28-10-dm": cifar10_dm,
    "cifar10-preact18-trades-awp": cifar10_trades_awp,
    "cifar10-preact18-nfgsm": cifar10_nfgsm,
    "fashion-mnist-resnet8": partial(fashion_mnist, "resnet8-s2"),
    "fashion-mnist-resnet18": partial(fashion_mnist, "resnet18"),
    "imagenet-resnet50": imagenet,
    "imagenet-resnet50-fgsm": partial(imagenet, attack="fgsm"),
    "imagenet-convnext-t": imagenet_convnext,
    **{
        f"{dataset}-{model}": partial(published, dataset, model)
        for dataset, models in {
            "cifar10": ("resnet18", "wrn34-10"),
            "cifar100": ("resnet18", "wrn34-10"),
            "svhn": ("resnet18", "wrn34-10"),
            "tiny-imagenet": ("resnet18",),
            "imagenette": ("resnet18",),
            "folder": ("resnet18",),
        }.items()
        for model in models
    },
}


def recipe(
    name: str,
    compat: Compat = "paper",
    objective: str | None = None,
    model: str | None = None,
) -> Config:
    """The configuration called ``name``.

    Args:
        name: one of ``RECIPES``.
        compat: "official" sets every switch that reproduces what the official code really runs:
            the in-place random start, BatchNorm statistics updated inside the attack, the late
            learning-rate schedule with its slow first epoch, the balance measured on 1,024 samples,
            and two training passes where one BatchNorm is shared.
        objective: another one than the recipe's, at its own defaults.
        model: another network than the recipe's; see :meth:`Config.with_model`.

    Raises:
        ValueError: unknown recipe, compat, objective or model.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown recipe {name!r}, expected one of {', '.join(RECIPES)}{hint}")
    config = RECIPES[name]()
    if objective is not None:
        config = config.with_objective(objective)
    if model is not None:
        config = config.with_model(model)
    if compat == "paper":
        return config
    if compat != "official":
        raise ValueError(f'compat must be "paper" or "official", got {compat!r}')
    return dataclasses.replace(
        config,
        compat="official",
        attack=dataclasses.replace(config.attack, bn="batch_update"),
        objective=config.objective.official(),
        schedule=dataclasses.replace(config.schedule, name="official_steps"),
        step=dataclasses.replace(config.step, noisy_clean=True),
    )
