"""The step as a CUDA graph, emulated on the CPU: whole runs are the eager ones bit for bit, and
mistakes that a graph would hide are seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from networks import generator
from safetensors.torch import load_file
from tiny import changed, metric_lines, tiny_config, tiny_trainer, with_objective
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from training.emulation import BrokenCapture, EmulatedGraph, emulate_graphs

from arat_fast.attacks import PGD
from arat_fast.config import Config
from arat_fast.data.plan import Place
from arat_fast.models import create_model
from arat_fast.objectives import AdversarialTraining
from arat_fast.report.run import read_run
from arat_fast.stop import InterruptedRun
from arat_fast.training import graph as graph_module
from arat_fast.training.graph import NUM_WARMUP, StepGraphs
from arat_fast.training.memory import BatchTooLargeError
from arat_fast.training.step import TrainStep
from arat_fast.training.values import Values


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_graphs(monkeypatch)


def configured(config: Config, graph: str = "on") -> Config:
    return changed(config, "step", graph=graph, kernels="reference")


def eagerly(run: Callable[[], object]) -> None:
    """With the optimiser of a graph, whose fused update rounds otherwise, and no graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "NUM_WARMUP", 10**9)
        run()
    assert EmulatedGraph.replays == 0


def running(config: Config) -> Config:
    return changed(config, "attack", bn="running")


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(2, kind="none"),
        slow(running(tiny_config(2, kind="none"))),
        slow(with_objective(tiny_config(2, kind="none"), "lbgat")),
        slow(with_objective(running(tiny_config(2, kind="none")), "arrest", teacher_epochs=1)),
        slow(changed(tiny_config(2, kind="none"), "targets", mix="mixup", mix_alpha=0.3)),
        slow(
            changed(tiny_config(2, kind="none"), "targets", class_weights=(0.0, 2.0, *8 * (1.0,)))
        ),
        slow(
            changed(
                changed(tiny_config(2, kind="none"), "targets", mix="cutmix", label_smoothing=0.1),
                "awp",
                gamma=0.01,
            )
        ),
        slow(changed(tiny_config(2, kind="none"), "attack", start_radius=2.0, project=False)),
        slow(changed(tiny_config(2, kind="none"), "attack", norm="L1", eps=2.0, alpha=1.0)),
    ],
    ids=["arat", "running", "lbgat", "arrest", "mixup", "weights", "cutmix-awp", "nfgsm", "L1"],
)
def test_a_captured_run_is_the_eager_one(config: Config, tmp_path: Path) -> None:
    eagerly(tiny_trainer(tmp_path / "off", configured(config)).run)
    summary = tiny_trainer(tmp_path / "on", configured(config)).run()
    # Of eight steps: three full batches were eager, and the smaller one between them.
    assert EmulatedGraph.replays == summary["replayed_steps"] == 4
    assert_same_numbers(tmp_path)


@pytest.mark.slow
def test_a_resumed_run_is_captured_anew(tmp_path: Path) -> None:
    config = configured(tiny_config(3))
    eagerly(tiny_trainer(tmp_path / "off", config).run)
    interrupted = tiny_trainer(tmp_path / "on", config)
    interrupted.interrupt_at(6)
    with pytest.raises(InterruptedRun):
        interrupted.run()
    tiny_trainer(tmp_path / "on", config, resume=True).run()
    assert EmulatedGraph.replays == 2 + 2
    assert_same_weights(tmp_path)


def assert_same_numbers(folder: Path) -> None:
    assert_same_weights(folder)
    assert metric_lines(folder / "off", "train") == metric_lines(folder / "on", "train") != []


def assert_same_weights(folder: Path) -> None:
    off, on = (load_file(folder / name / "model.safetensors") for name in ("off", "on"))
    assert all(torch.equal(value, on[name]) for name, value in off.items())


@pytest.mark.parametrize("graph", ["auto", "on"])
def test_a_step_that_cannot_be_captured(graph: str, tmp_path: Path) -> None:
    """auto goes on as if nothing had been tried, and says it once; on is an error."""

    def train(name: str) -> dict[str, Any]:
        run = tiny_trainer(tmp_path / name, configured(tiny_config(2, kind="none"), graph))

        def waits(logits: Tensor) -> Tensor:
            return logits.sum(dim=1) * (1 if float(logits.detach().sum()) else 0)

        run.objective.attack_loss = lambda model, x, y: waits  # type: ignore[method-assign]
        return run.run()

    if graph == "on":
        with pytest.raises(ValueError, match=r"capturing: .*--step\.graph off"):
            train("on")
        return
    eagerly(partial(train, "off"))
    (warning,) = train("on")["warnings"]
    assert "local_scalar" in warning and warning in read_run(tmp_path / "on").notes
    assert read_run(tmp_path / "off").notes == ()
    assert EmulatedGraph.replays == 0
    assert_same_numbers(tmp_path)


class Regression:
    """A step that draws, reads its inputs and a tensor beside the network, and learns; its faults
    are those that a graph hides."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.generator = generator(1)
        self.table = torch.ones(3)
        self.batch = torch.zeros(2, 3)

    def __call__(self, place: Place, update: bool, x: Tensor) -> Values:
        if self.fault == "inputs":
            x = self.batch
        draws = generator(2) if self.fault == "generator" else self.generator
        noise = torch.rand(x.shape, generator=draws)
        if self.fault == "key":
            noise = noise + torch.initial_seed() % 7
        if self.fault == "waits":
            noise = noise * float(noise.sum())
        self.optimizer.zero_grad()
        loss = self.model((x + noise) * self.table).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]  # Tensor.backward
        if self.fault == "rate":
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rate)
        self.optimizer.step()
        return Values.pack({"loss": loss})

    def run(self, captured: bool) -> list[float]:
        """The losses of eight steps, and the weights."""
        parts = [self.model], self.optimizer, torch.device("cpu"), self.generator
        graphs = StepGraphs(*parts, required=True, say=warnings.warn)
        losses = []
        for number in range(NUM_WARMUP + 5):
            torch.manual_seed(number)
            self.batch, self.rate = torch.full((2, 3), float(number)), 0.001 * number
            if self.fault == "table":
                self.table = torch.full((3,), float(number))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            given = Place(0, 2), True, self.batch
            if captured:
                values = graphs.run(self, given[0], given[2:], settings=None)
            else:
                values = self(*given)
            losses.append(float(values["loss"]))
        return [*losses, *self.model.weight.flatten().tolist()]


def test_a_captured_step_is_the_eager_one() -> None:
    assert Regression().run(captured=True) == Regression().run(captured=False)
    assert EmulatedGraph.replays == 5


def test_gradients_are_clipped_by_a_hook_in_the_graph_too() -> None:
    """As docs/your-network.md says."""

    def clipped(captured: bool) -> list[float]:
        regression = Regression()

        def clip(*_: object) -> None:
            nn.utils.clip_grad_norm_([regression.model.weight], 0.1)

        regression.optimizer.register_step_pre_hook(clip)
        return regression.run(captured)

    assert clipped(captured=True) == clipped(captured=False) != Regression().run(captured=False)
    assert EmulatedGraph.replays == 5


@pytest.mark.parametrize("fault", ["table", "rate", "key", "inputs", "generator", "waits"])
def test_what_a_graph_would_hide_is_seen(fault: str) -> None:
    try:
        got = Regression(fault).run(captured=True)
    except (BrokenCapture, ValueError):
        return
    assert got != Regression(fault).run(captured=False)


def test_a_third_shape_runs_eagerly_and_is_said_once() -> None:
    step, said = Regression(), []  # type: ignore[var-annotated]  # sentences
    parts = [step.model], step.optimizer, torch.device("cpu"), step.generator
    graphs = StepGraphs(*parts, required=True, say=said.append)
    for size in (2, 3, 4, 5):
        for _ in range(NUM_WARMUP + 2):
            graphs.run(step, Place(0, size), (torch.ones(size, 3),), settings=None)
    assert len(graphs.captured) == 2 and len(said) == 1 and "shapes" in said[0]


@pytest.mark.parametrize("graph", [slow("auto"), "on"])
def test_the_batch_size_advised_was_captured(graph: Literal["auto", "on"]) -> None:
    """Eight samples do not fit (auto) or cannot be captured (on), six fit but for the capture."""
    eager, captured = {"auto": (7, 5), "on": (8, 5)}[graph]

    class Limited(AdversarialTraining):
        def forward(self, model: nn.Module, x: Tensor, *rest: Any) -> Any:
            if len(x) > (eager if _get_current_dispatch_mode() is None else captured):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().forward(model, x, *rest)

    torch.manual_seed(0)
    model = create_model("resnet8", 4, norm="shared")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(
        model,
        Limited(),
        PGD(num_steps=1),
        optimizer,
        precision=torch.float32,
        graph=graph,
        last=(3, Place(0, 3)),
    )
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    if graph == "on":
        for _ in range(NUM_WARMUP):
            step(x, y)
    held = [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]
    before = [tensor.detach().clone() for tensor in held]
    with pytest.raises(BatchTooLargeError, match=r"--data\.batch-size 5\b"):
        step(x, y)
    assert all(map(torch.equal, held, before)) and bool(optimizer.state) == (graph == "on")
    for _ in range(NUM_WARMUP + 1):
        step(x[:5], y[:5])
    assert step.num_replayed == 1
