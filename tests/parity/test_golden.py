"""One ARAT run of three steps gives the numbers of the official code, in float64.

``official`` is what that code really runs (the start added in place), ``paper`` the same code with
the ball centred on the image. See ``tests/data/README.md`` for the numbers.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from official import (
    official_predictors_to_state_dict,
    predictors_to_official,
    state_dict_to_official,
)
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.models import (
    MODELS,
    collect_features,
    create_model,
    use_branch,
    use_statistics,
)
from arat_fast.objectives import ARAT
from arat_fast.saved.official import official_to_state_dict
from arat_fast.training.step import TrainStep

DATA = Path(__file__).parents[1] / "data"
LAYERS = MODELS["resnet18"].regularized_layers
BRANCHES = ("clean", "adv")


def _load_make_golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# About 40 s of processor time each.
pytestmark = pytest.mark.timeout(1200)

make_golden = _load_make_golden()
LAYOUT: dict[str, dict[str, list[int]]] = json.loads((DATA / "golden_keys.json").read_text())
PREDICTOR_KEYS = [f"{layer}:{key}" for layer in LAYERS for key in LAYOUT["predictors"][layer]]
KEYS = [*LAYOUT["state_dict"], *PREDICTOR_KEYS]


def weight(key: str, shape: list[int]) -> Tensor:
    """The rule that fills the weights from their names."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    normal = np.random.RandomState(zlib.crc32(key.encode()) % 2**32).standard_normal(shape)
    if key.endswith("running_mean"):
        normal = 0.1 * normal
    elif key.endswith("running_var"):
        normal = 1 + 0.1 * np.abs(normal)
    elif len(shape) == 4:
        normal = normal * np.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    elif len(shape) == 2:
        normal = normal / np.sqrt(shape[1])
    elif key.endswith("weight"):
        normal = 1 + 0.1 * normal
    else:
        normal = 0.1 * normal
    return torch.from_numpy(normal)


def network() -> nn.Module:
    # The default memory format of training; also the faster one in float64 on a CPU.
    model = create_model("resnet18", num_classes=10).double()
    model = model.to(memory_format=torch.channels_last)
    weights = {key: weight(key, shape) for key, shape in LAYOUT["state_dict"].items()}
    model.load_state_dict(official_to_state_dict(weights))
    return model


def objective_for(model: nn.Module) -> ARAT:
    objective = ARAT(model, LAYERS, (3, 32, 32), gamma=30.0).double()
    assert objective.predictors is not None
    official = [
        {key: weight(f"{layer}:{key}", shape) for key, shape in LAYOUT["predictors"][layer].items()}
        for layer in LAYERS
    ]
    objective.predictors.load_state_dict(official_predictors_to_state_dict(official))
    return objective


def eval_outputs(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits by branch and features by branch/layer, in eval mode."""
    model.eval()
    logits, features = {}, {}
    for branch in BRANCHES:
        with (
            torch.no_grad(),
            use_branch(model, branch),  # type: ignore[arg-type]  # one of the two names
            collect_features(model, LAYERS) as found,
        ):
            logits[branch] = model(x)
        features |= {f"{branch}/{layer}": found[layer] for layer in LAYERS}
    return logits, features


def official_tensors(model: nn.Module, objective: ARAT, grads: bool) -> dict[str, Tensor]:
    """State, or gradients where there are any, under the official names."""
    assert objective.predictors is not None

    def replaced(module: nn.Module) -> dict[str, Tensor]:
        state = dict(module.state_dict())
        if grads:
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None
                state[name] = parameter.grad
        return state

    result = state_dict_to_official(replaced(model))
    predictors = copy.deepcopy(objective.predictors)
    predictors.load_state_dict(replaced(objective.predictors))
    for layer, state in zip(LAYERS, predictors_to_official(predictors), strict=True):
        result |= {f"{layer}:{key}": tensor for key, tensor in state.items()}
    return result


@dataclass
class Run:
    """Everything that the golden files record, as computed here."""

    compat: str
    golden: Mapping[str, np.ndarray]
    eval_golden: Mapping[str, np.ndarray]
    eval_logits: dict[str, Tensor]
    eval_features: dict[str, Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    metrics: list[Mapping[str, Tensor]] = field(default_factory=list)
    tensors: list[dict[str, Tensor]] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    final_logits: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> range:
        return range(len(self.inputs))


def train(compat: str, steps: int) -> Run:
    golden = dict(np.load(DATA / f"golden_{compat}.npz"))
    # The untrained network is the same in both runs.
    eval_golden = dict(np.load(DATA / "golden_official.npz"))
    arrays = make_golden.inputs()
    x, noise = (
        [torch.from_numpy(a).to(memory_format=torch.channels_last) for a in arrays[i]]
        for i in (0, 2)
    )
    y = [torch.from_numpy(array) for array in arrays[1]]
    model = network()
    objective = objective_for(model)
    result = Run(compat, golden, eval_golden, *eval_outputs(model, x[0]))
    untrained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *objective.parameters()],
        lr=float(golden["lr"]),
        momentum=0.9,
        weight_decay=5e-4,
    )
    step = TrainStep(
        model,
        objective,
        PGD(bn="batch_update"),
        optimizer,
        memory_format=torch.contiguous_format,
        noisy_clean=compat == "official",
        check_inputs=True,
    )
    objective.start_epoch(clean_accuracy=float(golden["prev_train_acc"]))
    for k in range(steps):
        seen: list[tuple[Tensor, Tensor]] = []
        hook = model.register_forward_hook(
            lambda _module, args, output, seen=seen: seen.append((args[0], output.detach()))
        )
        result.metrics.append(step(x[k], y[k], noise[k]))
        hook.remove()
        # Ten passes of the attack, then the one of the training.
        assert [len(images) for images, _ in seen] == [8] * 10 + [16]
        result.inputs.append(seen[-1][0])
        result.logits.append(seen[-1][1])
        if k == 0:
            result.grads = official_tensors(model, objective, grads=True)
        result.tensors.append(
            {n: t.clone() for n, t in official_tensors(model, objective, grads=False).items()}
        )
    untrained.train()
    with (
        torch.no_grad(),
        use_branch(untrained, "both"),
        use_statistics(untrained, "batch"),
        collect_features(untrained, LAYERS) as found,
    ):
        untrained(result.inputs[0])
    for row, branch in enumerate(BRANCHES):
        result.features |= {f"{branch}/{n}": z.chunk(2)[row] for n, z in found.items()}
    result.final_logits = eval_outputs(model, x[0])[0]
    return result


def relative(got: Tensor, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected value of the array."""
    assert got.shape == expected.shape
    return float(np.abs(got.numpy() - expected).max() / np.abs(expected).max())


def table(golden: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {KEYS[i]: v for i, v in zip(golden[f"{name}/keys"], golden[name], strict=True)}


def check_eval_logits_and_features_before_training(run: Run) -> None:
    for branch in BRANCHES:
        expected = run.eval_golden[f"eval/logits/{branch}"]
        assert relative(run.eval_logits[branch], expected) <= 1e-8
        for layer in LAYERS:
            name = f"{branch}/{layer}"
            assert relative(run.eval_features[name], run.eval_golden[f"eval/feat/{name}"]) <= 1e-8


def check_attack(run: Run) -> None:
    x, _, noise = make_golden.inputs()
    for k in run.steps:
        centre = x[k] + noise[k] if run.compat == "official" else x[k]
        expected = make_golden.decode(run.golden[f"step{k}/x_adv_code"], centre, x[k] + noise[k])
        clean, adv = run.inputs[k].chunk(2)
        assert np.array_equal(clean.numpy(), centre)
        assert np.abs(adv.numpy() - expected).max() <= 1e-9


def check_training_logits_and_losses(run: Run) -> None:
    for k in run.steps:
        tolerance = 1e-8 if k == 0 else 1e-6
        for row, branch in enumerate(BRANCHES):
            expected = run.golden[f"step{k}/logits/{branch}"]
            assert relative(run.logits[k].chunk(2)[row], expected) <= tolerance
        losses = {"total": "loss", "ce_adv_weighted": "ce_adv", "ce_clean_weighted": "ce_clean"}
        losses |= {f"invariance_weighted/{n}": f"invariance/{n}" for n in LAYERS}
        for theirs, ours in losses.items():
            expected = run.golden[f"step{k}/loss/{theirs}"]
            assert relative(run.metrics[k][ours], expected) <= tolerance, theirs


def check_training_features(run: Run) -> None:
    for name, features in run.features.items():
        assert relative(features, run.golden[f"step0/feat/{name}"]) <= 1e-8, name


def check_gradients(run: Run) -> None:
    norms = table(run.golden, "step0/grad_norm")
    heads = table(run.golden, "step0/grad_head")
    assert len(norms) == 122 and len(heads) == 102
    for key, expected in norms.items():
        assert relative(run.grads[key].norm(), expected) <= 1e-8, key
    for key, expected in heads.items():
        assert relative(run.grads[key].flatten()[:8], expected) <= 1e-8, key


def check_parameters_and_buffers_after_each_step(run: Run) -> None:
    for k in run.steps:
        norms = table(run.golden, f"step{k}/after_norm")
        assert len(norms) == 182
        for key, expected in norms.items():
            assert relative(run.tensors[k][key].norm(), expected) <= 1e-6, (k, key)
    for key, expected in table(run.golden, "step0/after_head").items():
        assert relative(run.tensors[0][key].flatten()[:8], expected) <= 1e-6, key


def check_every_tensor_has_the_official_name_and_shape(run: Run) -> None:
    shapes = {**LAYOUT["state_dict"]}
    for layer in LAYERS:
        shapes |= {f"{layer}:{k}": shape for k, shape in LAYOUT["predictors"][layer].items()}
    assert {key: list(t.shape) for key, t in run.tensors[-1].items()} == shapes


def check_attack_moves_only_adversarial_statistics(run: Run) -> None:
    """Under batch_update: in each step ten passes of the attack and one of the training."""
    for key, tensor in run.tensors[-1].items():
        if key.endswith("num_batches_tracked"):
            assert int(tensor) == (11 if ".adv." in key else 1) * len(run.steps), key


def check_final_logits(run: Run) -> None:
    if len(run.steps) < 3:
        return
    for branch in BRANCHES:
        expected = run.golden[f"final/logits/{branch}"]
        assert relative(run.final_logits[branch], expected) <= 1e-6


CHECKS = (
    check_eval_logits_and_features_before_training,
    check_attack,
    check_training_logits_and_losses,
    check_training_features,
    check_gradients,
    check_parameters_and_buffers_after_each_step,
    check_every_tensor_has_the_official_name_and_shape,
    check_attack_moves_only_adversarial_statistics,
    check_final_logits,
)


@pytest.mark.parametrize(
    ("compat", "steps"),
    [
        ("paper", 1),
        pytest.param("official", 3, marks=pytest.mark.slow),
        pytest.param("paper", 3, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_official_code(compat: str, steps: int) -> None:
    """One test for each run, which test processes share: it is what takes the time."""
    run = train(compat, steps)
    for check in CHECKS:
        check(run)
