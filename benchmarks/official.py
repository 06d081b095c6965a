"""The official AR-AT code as a contestant: its own functions, from a checkout, unmodified."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import (
    ALPHA,
    EPS,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Workload,
)

NEEDED = ("train_ARAT.py", "attacks.py", "loss.py", "models/load_model.py")
MODELS = {
    "resnet18": ("cifar_resnet18_split_bn", [f"layer4.{b}.bn{i}" for b in (0, 1) for i in (1, 2)]),
    "wrn34-10": (
        "cifar_wrn_34_10_split_bn",
        [*(f"block3.layer.{b}.relu{i}" for b in range(5) for i in (1, 2)), "avgpool"],
    ),
}
# Imported by its scripts, but used outside of a training step only.
UNUSED = ("pandas", "torchattacks")


def check_official(folder: Path, workload: Workload) -> None:
    """Raise unless the folder holds the official code and that has the network.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it has no such network.
    """
    for name in NEEDED:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"--official expects a checkout of the official AR-AT code "
                f"(https://github.com/futakw/AR-AT), got {folder} without {name}"
            )
    if workload.model not in MODELS:
        raise ValueError(f"the official code has {' and '.join(MODELS)}, got {workload.model}")


class OfficialStep:
    """The official ``train_one_epoch`` on given batches.

    Network, attack, loss modules and optimiser are made by its functions, with the arguments that
    its scripts give them; ``train_one_epoch`` then runs as it is, its progress bar hidden. Each
    batch is handed over as a copy, for the official attack writes into it.
    """

    def __init__(self, folder: Path, workload: Workload, device: torch.device) -> None:
        check_official(folder, workload)
        name, layers = MODELS[workload.model]
        self.device = device
        self.args = argparse.Namespace(
            bn_names=["clean", "adv"],
            attack_norm="inf",
            align_layers=layers,
            align_features_weight=workload.gamma,
            is_auto_balance_ce_loss=True,
            auto_bal_prev_acc_weight=1.0,
            is_swa=False,
        )
        silence = io.StringIO()
        with redirect_stdout(silence), redirect_stderr(silence), _imported(folder) as load:
            self.training = load("train_ARAT")
            network = self.training.load_model(
                self.args, name, NUM_CLASSES, extract_layers=layers, is_avg_pool=True, is_relu=True
            )
            self.network = network.to(device)
            self.attack = load("attacks").PGD_linf(EPS, workload.num_steps, ALPHA).to(device)
            self.losses = {
                layer: load("loss").AlignLoss(
                    self.args,
                    is_use_predictor_x=True,
                    feat_dim=width,
                    hidden_dim=width // 4,
                )
                for layer, width in self._widths(workload).items()
            }
        parameters = list(self.network.parameters())
        for module in self.losses.values():
            parameters += list(module.to(device).parameters())
        self.optimizer = torch.optim.SGD(
            parameters, LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def run(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Train on the batches; the mean loss."""
        network, data = self.network, _Copies(batches)
        with redirect_stderr(io.StringIO()):
            loss: float = self.training.train_one_epoch(
                *(self.args, 1, network, data, self.optimizer, self.attack, self.losses),
                0.5,
                self.device,
            )
        return loss

    def _widths(self, workload: Workload) -> dict[str, int]:
        self.network.model.set_bn_name("clean")
        with torch.no_grad():
            image = torch.rand(3, *workload.image_shape, device=self.device)
            _, features = self.network(image, get_feat=True)
        self.network.model.reset_bn_name()
        return {layer: feature.shape[1] for layer, feature in features.items()}


class _Copies:
    """A data loader's interface over batches that stay as they are."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            yield x.clone(), y


@contextmanager
def _imported(folder: Path) -> Iterator[Any]:
    """``importlib.import_module`` from ``folder``; its path and its modules (``utils``, ``models``,
    …) are taken out again afterwards."""
    folder = folder.resolve()
    own = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}
    for name in hidden:
        del sys.modules[name]
    stand_ins = _stand_ins()
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    writes_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield importlib.import_module
    finally:
        sys.dont_write_bytecode = writes_bytecode
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            if name.partition(".")[0] in own or name in stand_ins:
                del sys.modules[name]
        sys.modules.update(hidden)


def _stand_ins() -> dict[str, ModuleType]:
    """Modules for what is imported but not installed: empty ones, and a tqdm that shows nothing."""
    missing = {
        name: ModuleType(name)
        for name in (*UNUSED, "tqdm")
        if importlib.util.find_spec(name) is None
    }
    if "tqdm" in missing:
        missing["tqdm"].tqdm = lambda items, **options: items  # type: ignore[attr-defined]
    if importlib.util.find_spec("tensorboard") is None:
        writer = ModuleType("torch.utils.tensorboard")
        writer.SummaryWriter = object  # type: ignore[attr-defined]
        missing[writer.__name__] = writer
    return missing
