"""Images that grow during the training, and the recipes for ImageNet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pictures import image_folder
from rich.console import Console
from tiny import tiny_config, tiny_trainer
from torch import Tensor

from arat_fast.attacks.pgd import check_images
from arat_fast.config import DataConfig
from arat_fast.display import Display
from arat_fast.models.registry import model_spec
from arat_fast.recipes import recipe
from arat_fast.run.loop import Trainer


def test_sizes_follow_the_epochs(tmp_path: Path) -> None:
    config = tiny_config(epochs=3)
    data = DataConfig(
        "folder",
        image_folder(tmp_path / "set", per_class=4),
        batch_size=6,
        image_size=16,
        num_workers=0,
        loader="dataloader",
        progressive=(8, 12, 16),
    )
    config = dataclasses.replace(
        config,
        data=data,
        average=dataclasses.replace(config.average, kind="none"),
        train=dataclasses.replace(config.train, eval_every=0),
    )
    trainer = Trainer(config, tmp_path / "run", display=Display(Console(quiet=True)))
    step, seen = trainer.train_step, []

    def watched(x: Tensor, y: Tensor, **place: object) -> dict[str, Tensor]:
        check_images(x)
        seen.append(x.shape[-1])
        return step(x, y)

    trainer.train_step = watched  # type: ignore[assignment]
    watched.forget = step.forget  # type: ignore[attr-defined]
    watched.num_calls, watched.folded_network = 0, None  # type: ignore[attr-defined]
    trainer.run()
    per_epoch = len(trainer.data.train)
    assert seen == [8] * per_epoch + [12] * per_epoch + [16] * per_epoch


def test_a_dataset_on_the_device_keeps_its_size(tmp_path: Path) -> None:
    config = tiny_config()
    data = dataclasses.replace(config.data, progressive=(4, 8))
    with pytest.raises(ValueError, match="got a dataset that stays on the device") as error:
        tiny_trainer(tmp_path / "run", dataclasses.replace(config, data=data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [(0,), (64, 256)])
def test_sizes_out_of_range(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.progressive must be sizes in \[1, image_size"):
        DataConfig(progressive=sizes)


def test_recipes_for_imagenet() -> None:
    names = ("imagenet-resnet50", "imagenet-resnet50-fgsm", "imagenet-convnext-t")
    pgd, fgsm, convnext = (recipe(name) for name in names)
    for name, config in zip(names, (pgd, fgsm, convnext), strict=True):
        assert config.recipe == name and config.attack.eps == 4 / 255
        assert config.data.name == "folder" and config.data.image_size == 224
        assert config.peak_lr == config.optimizer.lr
        assert model_spec(config.model.name).image_size == 224
        assert config.average.kind == "ema"
    assert (pgd.attack.num_steps, fgsm.attack.num_steps) == (3, 1)
    assert fgsm.attack.random_start and fgsm.attack.alpha == pytest.approx(5 / 255)
    assert pgd.norm == "split" and convnext.norm == "shared"
    assert all(layer.startswith("layer4.") for layer in pgd.regularized_layers)
    assert convnext.optimizer.name == "adamw"
