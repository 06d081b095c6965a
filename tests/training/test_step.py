"""The training step in a loop of one's own: what it computes, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import Operations, generator
from torch import Tensor, nn

from arat_fast.attacks import PGD
from arat_fast.attacks.pgd import RandomStart
from arat_fast.data import BatchPlan, ResidentBatches, Shift
from arat_fast.device import resolve_precision
from arat_fast.models import MODELS, convert_split_batch_norm, create_model, use_statistics
from arat_fast.models.layers import StemConv2d, protect_stem, split_stems
from arat_fast.objectives import ARAT, AdversarialTraining, NaturalTraining, Objective
from arat_fast.training.graph import make_capturable
from arat_fast.training.step import TrainStep
from arat_fast.training.values import Values
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.image_parts import image_parts
from arat_kernels.pgd_step import pgd_step

BOTH_STATISTICS = pytest.mark.parametrize("bn", ["batch", "running"])
LAYERS = MODELS["resnet8"].regularized_layers


def resident(num_samples: int = 24) -> ResidentBatches:
    images = torch.randint(256, (num_samples, 3, 8, 8), generator=generator(1), dtype=torch.uint8)
    labels = torch.randint(4, (num_samples,), generator=generator(2))
    plan = BatchPlan(num_samples, 8, shuffle=True)
    return ResidentBatches(images, labels, tuple("abcd"), plan, Shift(1, flip=True))


def batches(num: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    found = [batch for epoch in range(num) for batch in resident().epoch(epoch)]
    return [(x.to(dtype), y) for x, y in found[:num]]


def batch(samples: int = 8, size: int = 8) -> tuple[Tensor, Tensor]:
    source = generator(1)
    x = torch.rand(samples, 3, size, size, generator=source)
    return x, torch.randint(0, 4, (samples,), generator=source)


def step_of(
    model: nn.Module, objective: Objective, attack: PGD, lr: float = 0.05, **options: Any
) -> TrainStep:
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    options = {"generator": generator(3), "precision": torch.float32, **options}
    return TrainStep(model, objective, attack, optimizer, **options)


def make_step(
    bn: Any = "batch",
    dtype: torch.dtype = torch.float32,
    num_steps: int = 2,
    seed: int = 0,
    **options: Any,
) -> TrainStep:
    """ARAT on resnet8."""
    torch.manual_seed(seed)
    model = create_model("resnet8", 4).to(dtype)
    objective = ARAT(model, LAYERS, (3, 8, 8)).to(dtype)
    objective.start_epoch(0.5)
    return step_of(model, objective, PGD(num_steps=num_steps, bn=bn), **options)


def assert_same(values: Values, expected: Values) -> None:
    assert list(values) == list(expected)
    assert all(torch.equal(values[name], expected[name]) for name in values)


def test_metrics_and_learning() -> None:
    step = make_step()
    x, y = batch()
    step.model.eval()
    for parameter in step.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    first = step(x, y)
    assert all(module.training for module in step.model.modules())
    assert all(p.grad is not None and p.grad.abs().max() < 1e5 for p in step.model.parameters())
    # Whatever the attack does, batch statistics move once a step, on either branch.
    assert step.model.get_buffer("bn1.num_batches_tracked").tolist() == [1, 1]
    terms = ["ce_adv", "ce_clean", *(f"invariance/{name}" for name in LAYERS)]
    assert list(first) == ["loss", *terms, "accuracy_clean", "accuracy_adv"]
    assert all(value.ndim == 0 and not value.requires_grad for value in first.values())
    torch.testing.assert_close(first["loss"], torch.stack([first[n] for n in terms]).sum())
    kept = {name: float(value) for name, value in first.items()}
    for _ in range(8):
        last = step(x, y)
    assert last["loss"] < first["loss"] and last["accuracy_clean"] >= first["accuracy_clean"]
    assert kept == {name: float(value) for name, value in first.items()}


def test_what_a_step_returns_prints_its_numbers() -> None:
    values = Values.pack({"loss": torch.tensor(2.5), "invariance/4": torch.tensor(1 / 3)})
    assert repr(values) == str(values) == "Values(loss=2.5, invariance/4=0.3333)"


@pytest.mark.parametrize(
    ("dtype", "taken"),
    [
        (torch.float32, resolve_precision("auto", torch.device("cpu"))),
        (torch.float64, torch.float64),
    ],
)
def test_a_step_prints_the_precision_that_it_took(dtype: torch.dtype, taken: torch.dtype) -> None:
    step = make_step(dtype=dtype, precision=None)
    assert step.precision == taken and f"precision={taken}" in repr(step)


def test_a_plain_step_launches_what_its_parts_do() -> None:
    """No ingredient that a run leaves out costs it an operation: none is between the parts."""
    torch.manual_seed(0)
    model = create_model("resnet8", 4, norm="shared")
    attack = PGD(num_steps=2)
    step = step_of(model, AdversarialTraining(), attack, check_inputs=False)
    x, y = batch()
    x = x.contiguous(memory_format=torch.channels_last)
    step(x, y)
    with Operations() as whole:
        step(x, y)
    with Operations() as parts:
        step.optimizer.zero_grad()
        start = RandomStart(keys=attack.draw_keys(step.generator, x.device))
        x_adv = attack(model, x, y, start)
        output = step.objective(model, x, x_adv, y, start)
        output.loss.backward()
        accuracy = (output.logits_adv.argmax(dim=1) == y).float().mean()
        Values.pack({"loss": output.loss, **output.terms, "accuracy_adv": accuracy})
        step.optimizer.step()
    assert [name for name, *_ in whole.seen] == [name for name, *_ in parts.seen]


def test_same_seed_same_numbers() -> None:
    states = []
    for seed in (5, 5, 6):
        step = make_step(generator=generator(seed))
        for _ in range(2):
            step(*batch())
        states.append(step.model.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


@BOTH_STATISTICS
def test_from_indices_is_the_step_on_the_assembled_batch(bn: str) -> None:
    data = resident()
    by_index, by_batch = make_step(bn, assemble=data.assemble), make_step(bn)
    for epoch in range(2):
        pairs = zip(data.epoch_indices(epoch), data.epoch(epoch), strict=True)
        for (index, draws), (x, y) in pairs:
            assert_same(by_index.from_indices(index, draws), by_batch(x, y))
    expected = by_batch.model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in by_index.model.state_dict().items())


def test_folding_changes_no_step() -> None:
    folded, plain = (make_step("running", torch.float64, fold=fold) for fold in (True, False))
    for x, y in batches(4, torch.float64):
        values, expected = folded(x, y), plain(x, y)
        for name, value in expected.items():
            assert abs(float(values[name] - value)) <= 1e-9 * max(1.0, abs(float(value))), name
    assert folded.folded_network is not None and plain.folded_network is None
    state = plain.model.state_dict()
    for name, tensor in folded.model.state_dict().items():
        assert torch.allclose(tensor, state[name], rtol=1e-9, atol=1e-10), name
    other = make_step("batch")
    other(*batch())
    assert other.folded_network is None


@pytest.mark.parametrize("noisy_clean", [False, True])
def test_noisy_clean_moves_the_clean_images_and_the_centre(noisy_clean: bool) -> None:
    step = make_step(noisy_clean=noisy_clean)
    x, y = batch()
    seen: list[Tensor] = []
    step.model.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach().clone()))
    step(x, y)
    clean, adv = seen[-1].chunk(2)
    eps = step.attack.eps
    assert ((clean - x).abs().max() > 0) == noisy_clean
    assert (clean - x).abs().max() <= eps * (1 + 1e-6)
    inside = (x > 2 * eps) & (x < 1 - 2 * eps)
    assert (adv - clean)[inside].abs().max() <= eps * 1.00001
    assert ((adv - x).abs().max() > eps * 1.01) == noisy_clean


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_objective_may_leave_the_start_to_the_attack(accumulate: int) -> None:
    """In the steps in which it has none of its own; it is asked once for the whole batch."""

    class Sometimes(AdversarialTraining):
        asked = 0

        def start_noise(
            self, x: Tensor, num_samples: int, generator: torch.Generator | None
        ) -> None:
            assert num_samples == 8 and x.shape[1:] == (3, 8, 8)
            self.asked += 1

    weights = []
    for objective in (AdversarialTraining(), Sometimes()):
        torch.manual_seed(1)
        model = create_model("resnet8", 4, norm="shared")
        step_of(model, objective, PGD(num_steps=1), accumulate=accumulate)(*batch())
        weights.append(model.state_dict())
    assert isinstance(objective, Sometimes) and objective.asked == 1
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_natural_training_needs_no_attack() -> None:
    model = create_model("resnet8", 4, norm="shared")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    natural = step_of(model, NaturalTraining(), PGD(num_steps=3))
    assert set(natural(*batch())) == {"loss", "ce_clean", "accuracy_clean"} and len(calls) == 1
    adversarial = step_of(model, AdversarialTraining(), PGD(num_steps=3))
    assert set(adversarial(*batch())) == {"loss", "ce_adv", "accuracy_adv"} and len(calls) == 5


def test_bf16_keeps_losses_and_images_float32() -> None:
    step = make_step(precision=torch.bfloat16)
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []
    step.model.register_forward_hook(
        lambda _m, args, out: dtypes.append((args[0].dtype, out.dtype))
    )
    values = step(*batch())
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}
    assert all(v.dtype == torch.float32 and v.isfinite() for v in values.values())
    state = step.model.state_dict().values()
    assert all(t.dtype == torch.float32 for t in state if t.is_floating_point())


@pytest.mark.slow
@BOTH_STATISTICS
def test_bf16_follows_float32(bn: str) -> None:
    """Losses over 20 steps, the same seeds, in the mean of eight networks.

    A bf16 forward pass is wrong by about 2^-9 per rounding; the loss, after some ten layers, by
    1e-2 relative. Training moves both runs apart, as two float32 runs from weights that differ by
    that rounding do: those set the budget. How far one of them moves is chance, by a factor of
    three between networks, so that the means are compared.
    """
    drift: dict[str, list[float]] = {"rounded": [], "fast": []}
    level = []
    for seed in range(8):
        steps = {
            "plain": make_step(bn, num_steps=1, seed=seed),
            "rounded": make_step(bn, num_steps=1, seed=seed),
            "fast": make_step(bn, num_steps=1, seed=seed, precision=torch.bfloat16),
        }
        with torch.no_grad():
            for parameter in steps["rounded"].model.parameters():
                parameter.copy_(parameter.bfloat16())
        losses = {
            name: torch.stack([step(x, y)["loss"] for x, y in batches(20)])
            for name, step in steps.items()
        }
        for name, drifts in drift.items():
            drifts.append(float((losses[name] - losses["plain"]).abs().mean()))
        level.append(float(losses["plain"].mean()))
        assert abs(losses["fast"][0] - losses["plain"][0]) <= 0.01 * losses["plain"][0]
        assert losses["fast"][-1] < losses["fast"][0]
    assert fmean(drift["fast"]) <= 2 * fmean(drift["rounded"]) + 0.01 * fmean(level)


@BOTH_STATISTICS
def test_weights_are_cast_once_a_step(bn: str) -> None:
    step = make_step(bn, precision=torch.bfloat16)
    step(*batch())
    with Operations() as operations:
        step(*batch())
    casts = [
        tuple(args[0].shape)
        for name, args, options in operations.seen
        if name == "_to_copy" and options.get("dtype") == torch.bfloat16
    ]
    # The folded ones are rounded as they are stored.
    casts += [
        tuple(args[0].shape)
        for name, args, options in operations.seen
        if name == "mul" and "out" in options and options["out"].dtype == torch.bfloat16
    ]
    # All but the stem's; with folding, once for the attack and once for the training pass.
    weights = [
        tuple(module.weight.shape)
        for module in step.model.modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, StemConv2d)
    ]
    assert len(weights) == 8
    for shape in set(weights):
        expected = weights.count(shape) * (2 if bn == "running" else 1)
        assert casts.count(shape) == expected, shape


def test_the_stem_of_any_network_keeps_the_perturbation() -> None:
    torch.manual_seed(0)
    model = convert_split_batch_norm(torchvision.models.mobilenet_v3_small(num_classes=4))
    keys = list(model.state_dict())
    objective = ARAT(model, ["avgpool"], (3, 32, 32))
    step = step_of(model, objective, PGD(num_steps=1), precision=torch.bfloat16)
    x = torch.rand(4, 3, 32, 32, generator=generator(1))
    step(x, torch.arange(4))
    stems = [name for name, m in model.named_modules() if isinstance(m, StemConv2d)]
    assert stems == ["features.0.0"] and list(model.state_dict()) == keys
    seen: list[Tensor] = []
    stem = model.get_submodule(stems[0])
    stem.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    step(x, torch.arange(4))
    # [x; x_adv] of the training pass: the image itself, not its rounding.
    assert seen[-1].dtype == torch.float32 and torch.equal(seen[-1][:4], x)


def test_a_stem_of_parts_sees_the_perturbation() -> None:
    """What an attack moves by 2^-12 and less is in the output and in the weight's gradient, which
    bfloat16 would round away; the weight alone is rounded."""
    torch.manual_seed(0)
    stem = StemConv2d(3, 8, 3, padding=1, bias=False)
    rounded = stem.weight.detach().bfloat16().double()
    x = 0.25 + 0.5 * torch.rand(2, 3, 6, 6, generator=generator(1)).bfloat16().float()
    moved = (x + 2.0**-13).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), split_stems([nn.Sequential(stem)]):
        with torch.autocast("cpu", enabled=False):
            weight, parts = stem.split_weight.double(), image_parts(moved).double()  # type: ignore[union-attr]
        seen = F.conv2d(parts, weight, padding=1)
        y = stem(moved)
        dx, dweight = torch.autograd.grad(y, (moved, stem.weight), torch.ones_like(y))
    assert stem.split_weight is None and y.dtype == torch.bfloat16
    exact = F.conv2d(moved.double(), rounded, padding=1)
    bound = F.conv2d(moved.double(), rounded.abs(), padding=1)
    assert ((seen - exact).abs() <= 2.0**-16 * bound).all()
    assert ((y - exact).abs() <= 2.0**-8 * bound).all()
    ones = torch.ones_like(exact)
    expected = torch.nn.grad.conv2d_input(x.shape, rounded, ones, padding=1)
    torch.testing.assert_close(dx.double(), expected, rtol=2.0**-7, atol=2.0**-7)
    expected = torch.nn.grad.conv2d_weight(moved.double(), rounded.shape, ones, padding=1)
    torch.testing.assert_close(dweight.double(), expected, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("twice", [False, True], ids=["stem", "stem-and-mean"])
def test_an_attack_moves_the_parts_with_the_image(twice: bool) -> None:
    """The bits of an attack that makes the parts anew in every step; whoever else reads the image
    is not forgotten."""

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y + x.mean((1, 2, 3))[:, None] * 5 if twice else y

    torch.manual_seed(0)
    model = Net(StemConv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    x, y = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(4)
    noise = (torch.rand(x.shape) / 16 - 1 / 32).to(memory_format=torch.channels_last)
    attack = PGD(num_steps=3)
    with torch.autocast("cpu", torch.bfloat16), split_stems([model]):
        got = attack(model, x, y, RandomStart(noise=noise))
        x_adv = x + noise
        for _ in range(3):
            x_adv.requires_grad_()
            logits = model(x_adv)
            dlogits, _ = cross_entropy_grad(logits.detach(), y)
            (grad,) = torch.autograd.grad(logits, x_adv, dlogits)
            x_adv = pgd_step(x_adv.detach(), grad, x, eps=attack.eps, alpha=attack.alpha)
    assert torch.equal(got, x_adv) and not got.requires_grad
    assert attack(model, x, y, RandomStart(noise=noise)).isfinite().all()


class OwnConv2d(nn.Conv2d):
    pass


class TwoStems(nn.Module):
    """The image enters two convolutions; what follows them does not see it."""

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.one = conv(3, 8, 3, padding=1)
        self.two = nn.Conv2d(3, 8, 1)
        self.three = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x - 0.5
        y: Tensor = self.three(self.one(x) + self.two(x))
        return y


def test_every_stem_is_protected_and_others_are_refused() -> None:
    model, x = TwoStems(), batch()[0]
    protect_stem(model, x, torch.bfloat16)
    stems = [name for name, m in model.named_modules() if isinstance(m, StemConv2d)]
    assert stems == ["one", "two"]
    with pytest.raises(ValueError, match=r"OwnConv2d.*--step\.precision float32"):
        protect_stem(TwoStems(OwnConv2d), x, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "bn", "optimizer"),
    [
        (("layer4.0.bn2", "layer4.1", "avgpool"), "batch", lambda p: torch.optim.AdamW(p, lr=1e-3)),
        (("layer4.1.bn1", "layer4.1.bn2"), "running", lambda p: torch.optim.SGD(p, lr=0.02)),
    ],
)
def test_a_torchvision_network(
    layers: tuple[str, ...], bn: Any, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    torch.manual_seed(0)
    model = convert_split_batch_norm(torchvision.models.resnet18(num_classes=4))
    objective = ARAT(model, layers, (3, 32, 32), gamma=1.0)
    parameters = [*model.parameters(), *objective.parameters()]
    step = TrainStep(
        model, objective, PGD(num_steps=1, bn=bn), optimizer(parameters), precision=torch.float32
    )
    objective.start_epoch(0.5)
    x, y = batch(size=32)
    before = copy.deepcopy(model.state_dict())
    losses = [float(step(x, y)["loss"]) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert tensor.double().isfinite().all() and not torch.equal(tensor, before[name]), name
    if bn == "running":
        assert step.folded_network is not None and len(step.folded_network.folded) == 20
    with torch.no_grad(), use_statistics(model, "running"):
        assert model(x).shape == (8, 4)


def test_dropout_and_batch_norm_1d_train_in_the_first_step_too() -> None:
    """Folding shares them with the network; a resumed run folds in its first step."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 36, 4), nn.BatchNorm1d(4))
    body = convert_split_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model = nn.Sequential(body, head)
    step = step_of(model, ARAT(model, ["0.1"], (3, 8, 8)), PGD(num_steps=1, bn="running"))
    modes: list[bool] = []
    head[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    step(*batch(4))
    assert modes[-1] and modes.count(True) == 1
    assert int(head[3].num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("value", "match"),
    [(float("nan"), "1 NaN"), (1.01, "1.01"), (-0.5, "-0.5"), (float("inf"), "inf")],
)
def test_a_bad_image_changes_nothing(value: float, match: str) -> None:
    step = make_step()
    before = copy.deepcopy(step.model.state_dict())
    x, y = batch()
    x[3, 1, 2, 2] = value
    with pytest.raises(ValueError, match=match):
        step(x, y)
    assert all(torch.equal(t, before[name]) for name, t in step.model.state_dict().items())


def test_requests_that_cannot_be_met_name_the_switch() -> None:
    with pytest.raises(ValueError, match=r"--step\.graph off"):
        make_step(graph="on")
    with pytest.raises(ValueError, match="float16"):
        make_step(precision=torch.float16)
    with pytest.raises(ValueError, match="accumulate must be >= 1"):
        make_step(accumulate=0)
    assert make_step(graph="auto")(*batch())["loss"] > 0


def test_out_of_memory_changes_no_weight() -> None:
    class Limited(AdversarialTraining):
        def forward(self, model: nn.Module, x: Tensor, *rest: Any) -> Any:
            output = super().forward(model, x, *rest)
            if len(x) > 5:
                raise torch.OutOfMemoryError("out of memory")
            return output

    model = create_model("resnet8", 4, norm="shared")
    step = step_of(model, Limited(), PGD(num_steps=2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 8; the largest .* fits is 5 "):
        step(*batch())
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    split = step_of(model, Limited(), PGD(num_steps=2), accumulate=2)
    assert split(*batch())["loss"].isfinite()


def test_learning_rates_become_tensors_where_a_graph_reads_them() -> None:
    weights = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "lr": 0.25}]
    sgd = torch.optim.SGD(groups, momentum=0.9)
    rates = make_capturable(sgd, torch.device("cpu"))
    assert [group["lr"] for group in sgd.param_groups] == rates
    for rate, value in zip(rates, (0.125, 1.0), strict=True):
        rate.fill_(value)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    sgd.step()
    assert weights[0].tolist() == [0.875] * 3 and weights[1].tolist() == [0.0] * 2
    adam = torch.optim.Adam(weights)
    make_capturable(adam, torch.device("cpu"))
    assert adam.param_groups[0]["capturable"] is True
    with pytest.raises(ValueError, match=r"LBFGS.*--step\.graph off"):
        make_capturable(torch.optim.LBFGS(weights), torch.device("cpu"))
