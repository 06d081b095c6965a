"""The step on a GPU: eager, folded, and replayed from a CUDA graph."""

from __future__ import annotations

import copy
import re
from typing import Literal

import pytest
import torch
from networks import generator, randomize
from torch import Tensor

from arat_fast.attacks import PGD
from arat_fast.data import BatchPlan, ResidentBatches, Shift
from arat_fast.device import full_float32
from arat_fast.models import MODELS, create_model, use_branch, use_statistics
from arat_fast.models.folding import FoldedNetwork
from arat_fast.objectives import ARAT, ARREST, LBGAT
from arat_fast.training.graph import NUM_WARMUP
from arat_fast.training.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Bn = Literal["batch", "running"]
BATCH = 32


def resident(num_samples: int = 5 * BATCH + 7) -> ResidentBatches:
    shape = (num_samples, 3, 32, 32)
    images = torch.randint(256, shape, generator=generator(1), dtype=torch.uint8)
    labels = torch.randint(10, (num_samples,), generator=generator(2))
    return ResidentBatches(
        images.cuda(),
        labels.cuda(),
        tuple("0123456789"),
        BatchPlan(num_samples, BATCH, shuffle=True),
        Shift(4, flip=True),
        memory_format=torch.channels_last,
    )


def make_step(
    bn: Bn = "batch",
    *,
    precision: torch.dtype = torch.bfloat16,
    num_steps: int = 3,
    lr: float = 0.02,
    **options: object,
) -> TrainStep:
    torch.manual_seed(0)
    model = create_model("resnet18", 10).cuda().to(memory_format=torch.channels_last)
    objective = ARAT(model, MODELS["resnet18"].regularized_layers, (3, 32, 32)).cuda()
    objective.start_epoch(0.5)
    parameters = [*model.parameters(), *objective.parameters()]
    return TrainStep(
        model,
        objective,
        PGD(num_steps=num_steps, bn=bn),
        torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4),
        precision=precision,
        generator=torch.Generator("cuda").manual_seed(3),
        **options,  # type: ignore[arg-type]  # forwarded
    )


def captured_sizes(step: TrainStep) -> list[int]:
    """Batch sizes that the step has captured."""
    graphs = step._graphs
    assert graphs is not None
    return sorted(len(captured.inputs[0]) for captured in graphs.captured.values())


def losses(step: TrainStep, data: ResidentBatches, num: int) -> list[float]:
    found: list[Tensor] = []
    epoch = 0
    while len(found) < num:
        for index, draws in data.epoch_indices(epoch):
            found.append(step.from_indices(index, draws)["loss"])
        epoch += 1
    return [float(loss) for loss in found[:num]]


def assert_follow(got: list[float], expected: list[float], drifted: list[float]) -> None:
    """``got`` stays with ``expected`` as ``drifted``, a run that started one rounding away, does.

    Training magnifies every rounding; the second run measures how much.
    """
    level = sum(expected) / len(expected)

    def apart(run: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(run, expected, strict=True)) / len(expected)

    assert apart(got) <= 2 * apart(drifted) + 0.01 * level


def rounded(step: TrainStep) -> TrainStep:
    """The step after its weights went through bfloat16."""
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.copy_(parameter.bfloat16())
    return step


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_bf16_and_graph_follow_float32_over_50_steps(bn: Bn) -> None:
    data = resident()

    def run(step: TrainStep) -> list[float]:
        return losses(step, data, 50)

    with full_float32():
        plain = run(make_step(bn, precision=torch.float32, assemble=data.assemble, fold=False))
        drifted = run(
            rounded(make_step(bn, precision=torch.float32, assemble=data.assemble, fold=False))
        )
    eager = run(make_step(bn, assemble=data.assemble))
    graph = run(make_step(bn, assemble=data.assemble, graph="on"))
    assert_follow(eager, plain, drifted)
    assert_follow(graph, plain, drifted)
    # The same kernels on the same numbers.
    assert graph[: NUM_WARMUP + 1] == pytest.approx(eager[: NUM_WARMUP + 1], rel=0.01)
    assert plain[-1] < plain[0]


def test_replay_sees_learning_rate_weights_data_and_new_starts() -> None:
    data = resident()
    step = make_step(graph="on", assemble=data.assemble, lr=0.0)
    index, draws = next(iter(data.epoch_indices(0)))
    for _ in range(NUM_WARMUP + 1):
        step.from_indices(index, draws)
    assert captured_sizes(step) == [BATCH]
    weight = step.model.get_parameter("linear.weight")
    before = weight.clone()
    first, second = (step.from_indices(index, draws) for _ in range(2))
    assert torch.equal(weight, before)
    # Nothing but the random start differs.
    assert first["loss"] != second["loss"]
    step.objective.start_epoch(0.9)
    ratio = step.from_indices(index, draws)["ce_adv"] / second["ce_adv"]
    assert float(ratio) == pytest.approx(0.9 / 0.5, rel=0.2)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.1
    step.from_indices(index, draws)
    changed = (weight - before).abs().max()
    assert changed > 0
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    before = weight.clone()
    step.from_indices(index, draws)
    assert torch.equal(weight, before)
    other = step.from_indices((index + 1) % data.num_samples, draws)
    assert other["loss"] != second["loss"]


def test_last_partial_batch_and_evaluation_in_between() -> None:
    data = resident()

    def run(graph: Literal["on", "off"]) -> tuple[list[float], TrainStep]:
        step = make_step(graph=graph, assemble=data.assemble, precision=torch.float32)
        found = []
        with full_float32():
            for epoch in range(6):
                for index, draws in data.epoch_indices(epoch):
                    found.append(float(step.from_indices(index, draws)["loss"]))
                with torch.no_grad(), use_statistics(step.model, "running"):
                    logits = step.model(data.assemble(index, draws).x)
                assert logits.isfinite().all()
        return found, step

    graph, step = run("on")
    eager, _ = run("off")
    assert captured_sizes(step) == [7, BATCH]
    assert graph[:8] == pytest.approx(eager[:8], rel=1e-3)
    assert sum(graph) / len(graph) == pytest.approx(sum(eager) / len(eager), rel=0.05)


def test_a_loaded_state_is_captured_anew() -> None:
    """Going back to a saved state and on again follows the eager step that does the same."""
    data = resident()

    def run(graph: Literal["on", "off"]) -> tuple[list[float], TrainStep]:
        step = make_step(graph=graph, assemble=data.assemble, precision=torch.float32, num_steps=0)
        with full_float32():
            losses(step, data, 5)
            saved = copy.deepcopy((step.model.state_dict(), step.optimizer.state_dict()))
            losses(step, data, 5)
            step.model.load_state_dict(saved[0])
            step.optimizer.load_state_dict(saved[1])
            return losses(step, data, 5), step

    graph, step = run("on")
    eager, _ = run("off")
    assert captured_sizes(step)
    assert graph == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize("given_noise", [False, True])
def test_batches_from_anywhere_and_another_optimiser(given_noise: bool) -> None:
    x = torch.rand(BATCH, 3, 32, 32, generator=generator(1)).cuda()
    y = torch.randint(10, (BATCH,), generator=generator(2)).cuda()
    noise = (0.02 * torch.randn(x.shape, generator=generator(3))).cuda()

    def run(graph: Literal["on", "off"]) -> list[float]:
        step = make_step(graph=graph, precision=torch.float32)
        step = TrainStep(
            step.model,
            step.objective,
            step.attack,
            torch.optim.AdamW(step.model.parameters(), lr=1e-4),
            graph=graph,
            generator=step.generator,
        )
        arguments = (x, y, noise) if given_noise else (x, y)
        with full_float32():
            found = [float(step(*arguments)["loss"]) for _ in range(8)]
        if graph == "on":
            assert captured_sizes(step) == [BATCH]
        return found

    assert run("on") == pytest.approx(run("off"), rel=0.02)


def test_another_attack_is_captured_anew() -> None:
    data = resident()
    step = make_step(graph="on", assemble=data.assemble, lr=0.0)
    index, draws = next(iter(data.epoch_indices(0)))
    weak = [step.from_indices(index, draws)["ce_adv"] for _ in range(NUM_WARMUP + 2)][-1]
    step.attack = PGD(eps=32 / 255, alpha=8 / 255, num_steps=10)
    strong = [step.from_indices(index, draws)["ce_adv"] for _ in range(NUM_WARMUP + 2)][-1]
    assert strong > weak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_network_on_the_gpu(dtype: torch.dtype) -> None:
    """cuDNN's fused convolution and the backward, against the unfolded network in float64."""
    model = randomize(create_model("resnet18", 10)).cuda().to(memory_format=torch.channels_last)
    x = torch.rand(8, 3, 32, 32, generator=generator(1)).cuda()
    x = x.contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(8, 10, generator=generator(2)).cuda()

    def gradient(network: torch.nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
        image = image.clone().requires_grad_()
        with use_branch(network, "adv"), use_statistics(network, "running"):
            logits = network(image)
        (grad,) = torch.autograd.grad(logits, image, upstream.to(logits.dtype))
        return logits.detach().double(), grad.double()

    truth = gradient(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), full_float32():
        plain = gradient(model, x)
        folded = gradient(FoldedNetwork(model, x), x)
    for got, own, expected in zip(folded, plain, truth, strict=True):
        error, allowed = (got - expected).square().mean(), (own - expected).square().mean()
        scale = expected.square().mean() * (torch.finfo(dtype).eps / 2) ** 2
        assert error.sqrt() <= 2 * (allowed.sqrt() + scale.sqrt())


@pytest.mark.parametrize("graph", ["on", "auto"])
def test_a_step_that_cannot_be_captured_says_so(graph: Literal["on", "auto"]) -> None:
    said: list[str] = []
    step = make_step(graph=graph, say=said.append)

    def reads(logits: Tensor) -> Tensor:
        assert float(logits.sum()) == float(logits.sum())
        return logits.sum(dim=1)

    step.objective.attack_loss = lambda model, x, y: reads  # type: ignore[method-assign]
    x = torch.rand(BATCH, 3, 32, 32, device="cuda")
    y = torch.randint(10, (BATCH,), device="cuda")
    for _ in range(NUM_WARMUP):
        step(x, y)
    cause = r"cannot be captured in a CUDA graph.*--step\.graph off"
    if graph == "on":
        with pytest.raises(ValueError, match=cause):
            step(x, y)
    else:
        assert all(step(x, y)["loss"].isfinite() for _ in range(2))
        (warning,) = said
        assert re.search(cause, warning)
    # Nothing is left behind.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(1, device="cuda") != torch.rand(1, device="cuda", generator=step.generator)
    freed = torch.cuda.memory_reserved()
    del step
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < freed


@pytest.mark.parametrize("name", ["lbgat", "arrest"])
def test_a_second_network_in_the_graph(name: Literal["lbgat", "arrest"]) -> None:
    data = resident()

    def network() -> torch.nn.Module:
        model = create_model("resnet18", 10, norm="shared")
        return model.cuda().to(memory_format=torch.channels_last)

    def make(graph: Literal["on", "off"]) -> TrainStep:
        torch.manual_seed(0)
        model, attack = network(), PGD(num_steps=2)
        objective = LBGAT(network(), 6.0) if name == "lbgat" else ARREST(model, attack, replay=0.01)
        trained = [p for m in (model, objective) for p in m.parameters() if p.requires_grad]
        return TrainStep(
            model,
            objective,
            attack,
            torch.optim.SGD(trained, lr=0.02, momentum=0.9),
            precision=torch.bfloat16,
            generator=torch.Generator("cuda").manual_seed(3),
            graph=graph,
            assemble=data.assemble,
        )

    graph = make("on")
    (second,) = graph.objective.networks()
    start = copy.deepcopy(second.state_dict())
    got = losses(graph, data, 12)
    assert captured_sizes(graph)
    expected = losses(make("off"), data, NUM_WARMUP + 1)
    assert got[: NUM_WARMUP + 1] == pytest.approx(expected, rel=0.02)
    assert torch.tensor(got).isfinite().all()
    state = second.state_dict()
    same = [torch.equal(state[key], value) for key, value in start.items()]
    assert not any(same) if name == "lbgat" else all(same)
