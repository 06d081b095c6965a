"""What operations do with NaN, zeros, huge numbers, unknown indices and empty batches.

Every function takes ``run``, which gives the results of an operation by the implementation and on
the device under test, as tensors of the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from arat_kernels.checks import (
    SLACK,
    Norm,
    Operation,
    Tensors,
    affine,
    assert_equal,
    classes,
    crops,
    distance,
    start,
    step,
    upstream,
)

Run = Callable[[Operation, Tensors], Tensors]
NORMS = ("Linf", "L2", "L1")


def nan_in_split_batch_norm(run: Run) -> None:
    norm = Norm(training=False)
    tensors = norm.make(0, torch.float32)
    tensors["x"][1, 2, 0, 0] = math.nan
    results = run(norm.operation, tensors)
    assert torch.equal(results["0"].isnan(), tensors["x"].isnan())
    assert results["1"].isnan().nonzero().tolist() == [[1, 2]]


def running_statistics(run: Run) -> None:
    """Those of an empty branch, and those that nobody asked to move, stay."""
    for options, moves in (({"sizes": (0, 4)}, True), ({"update": False}, False)):
        norm = Norm().changed(**options)
        tensors = norm.make(0, torch.float32)
        results = run(norm.operation, tensors)
        for name in ("running_mean", "running_var"):
            assert torch.equal(results[name][0], tensors[name][0])
            assert torch.equal(results[name][1], tensors[name][1]) is not moves


def variances(run: Run) -> None:
    """Of values far from zero, and with an outlier in the first row."""
    for offset, outlier, rtol in ((1e4, None, 1e-4), (0.0, 3e4, 1e-5)):
        norm = Norm((4, 4), 17, 15, 13, residual=False, pooled=False, momentum=1.0)
        tensors = norm.make(3, torch.float32)
        x = tensors["x"].add_(offset)
        if outlier is not None:
            x[0, :, 0, 0] = outlier
        var = run(replace(norm.operation, leaves=()), tensors)["running_var"].double()
        expected = torch.stack([part.double().var(dim=(0, 2, 3)) for part in x.split(4)])
        torch.testing.assert_close(var, expected, rtol=rtol, atol=0)


def nan_in_an_affine_map(run: Run) -> None:
    operation = affine(residual=False)
    tensors = operation.make(6, torch.float32)
    tensors["x"][1, 2, 0, 1] = math.nan
    results = run(operation, tensors)
    assert torch.equal(results["0"].isnan(), tensors["x"].isnan())
    assert results["dx"].isfinite().all() and results["dx"][1, 2, 0, 1] != 0


def short_vectors(run: Run) -> None:
    """Norms of zero and below eps have torch's gradients."""
    for width in (20, 2100):
        operation = distance(6, (width,), eps=0.1 * width**0.5)
        tensors = operation.make(2, torch.float32)
        p, t = tensors.values()
        p[0], t[1] = 0, 0
        p[2] = t[2] = 0
        p[3] *= 1e-3
        t[4] *= 1e-3
        got = run(operation, tensors)
        expected = operation.results(tensors, "reference")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert got["dp0"][0].abs().max() > 0 and got["dp0"][1].abs().max() == 0


def huge_and_tiny_vectors(run: Run) -> None:
    operation = distance(4, (24,))
    tensors = operation.make(3, torch.float32)
    for scale in (1e18, 1e-12):
        scaled = {name: t * scale for name, t in tensors.items()}
        got, expected = run(operation, scaled), operation.results(scaled, "reference")
        torch.testing.assert_close(got["0"], expected["0"])
        gradients = got["dp0"] * scale, expected["dp0"] * scale
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def nan_in_one_layer(run: Run) -> None:
    operation = distance()
    tensors = operation.make(4, torch.float32)
    tensors["p1"][2, 3] = math.nan
    assert run(operation, tensors)["0"].isnan().tolist() == [False, True, False]


def mean_over_nothing(run: Run) -> None:
    operation = distance(0, (8, 9))
    results = run(operation, operation.make(5, torch.float32))
    assert results["0"].isnan().all()
    assert (results["dp0"].shape, results["dp1"].shape) == ((0, 8), (0, 9))


def unknown_targets(run: Run) -> None:
    for num_classes in (10, 4100):
        operation = classes(4, num_classes)
        tensors = operation.make(2, torch.float32)
        tensors["target"][1], tensors["target"][2] = -1, num_classes
        results = run(operation, tensors)
        expected = torch.tensor([False, True, True, False])
        assert torch.equal(results["1"].isnan(), expected)
        assert torch.equal(results["0"].isnan(), expected[:, None].expand(4, num_classes))


def extreme_logits(run: Run) -> None:
    for num_classes in (10, 4100):
        operation = classes(5, num_classes)
        tensors = operation.make(3, torch.float32)
        logits, target = tensors.values()
        logits[0] *= 1e30
        logits[1, target[1]] = 1e4
        logits[2, target[2]] = -1e4
        logits[3, (target[3] + 1) % num_classes] = -math.inf
        logits[4, 0] = math.nan
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf, target, reduction="none")
        (dlogits,) = torch.autograd.grad(loss.sum(), leaf)
        results = run(operation, tensors)
        torch.testing.assert_close(results["1"], loss.detach(), equal_nan=True)
        torch.testing.assert_close(results["0"], dlogits, equal_nan=True, rtol=1e-5, atol=1e-6)


def gradient_of_the_losses(run: Run) -> None:
    operation = classes()
    results = run(operation, operation.make(5, torch.float32))
    expected = results["0"] * upstream(results["1"], 1000)[:, None]
    torch.testing.assert_close(results["dlogits"], expected)


def nan_gradient(run: Run) -> None:
    for norm in NORMS:
        tensors = step(norm).make(3, torch.float32)
        tensors["grad"][1, 0, 2, 1] = math.nan
        expected = tensors["grad"].isnan()
        expected[1] |= norm != "Linf"
        assert torch.equal(run(step(norm), tensors)["0"].isnan(), expected)


def zero_gradient(run: Run) -> None:
    for norm in NORMS:
        tensors = step(norm).make(4, torch.float32)
        tensors["x_adv"] = (tensors["x"] + 1e-3).clamp(0, 1)
        tensors["grad"].zero_()
        got = run(step(norm, 1.0), tensors)["0"]
        torch.testing.assert_close(got, tensors["x_adv"], rtol=0, atol=SLACK)


def equal_and_few_gradients(run: Run) -> None:
    """In L1 all that are as large as the last one that moves, and none that are zero."""
    operation = step("L1", 1.0, 0.5)
    tensors = operation.make(5, torch.float32)
    tensors["grad"].round_()
    tensors["grad"][1, 1:] = 0
    tensors["grad"][2].zero_()[0, 1, 2] = -1e-30
    got, expected = run(operation, tensors)["0"], operation.results(tensors, "reference")["0"]
    torch.testing.assert_close(got, expected, rtol=0, atol=8 * SLACK)


def parts_of_a_batch_start_as_the_whole(run: Run) -> None:
    for norm in NORMS:
        for shape in ((5, 3, 4, 4), (5, 1, 5, 5), (5, 1, 1, 1)):
            tensors = start(shape=shape, layout=torch.channels_last).make(9, torch.float32)

            def drawn(
                part: slice, first: int, tensors: Tensors = tensors, norm: str = norm
            ) -> torch.Tensor:
                return run(start(norm, first=first), {**tensors, "x": tensors["x"][part]})["0"]

            whole = drawn(slice(None), 0)
            for first, stop in ((0, 2), (2, 5), (3, 4)):
                assert torch.equal(drawn(slice(first, stop), first), whole[first:stop])
            far = drawn(slice(None), 2**31 + 1)
            expected = start(norm, first=2**31 + 1).results(tensors, "reference")["0"]
            atol = SLACK if norm == "Linf" else 4 * SLACK
            torch.testing.assert_close(far, expected, rtol=0, atol=atol)


def starts_follow_seed_and_offset(run: Run) -> None:
    for norm in NORMS:
        operation = start(norm, shape=(4, 3, 8, 8))
        tensors = operation.make(8, torch.float32)
        draws = [
            run(operation, {**tensors, "rng": torch.tensor(rng)})["0"]
            for rng in ([1, 0], [1, 1], [2, 0], [1, 2**32], [1 + 2**32, 0], [1, 0])
        ]
        assert torch.equal(draws[0], draws[5])
        for i in range(5):
            for j in range(i):
                assert (draws[i] != draws[j]).float().mean() > 0.9, (i, j)


def unknown_index(run: Run) -> None:
    for output in ({}, {"dtype": torch.bfloat16}):
        operation = crops((4, 3, 5, 5), 4, **output)
        tensors = operation.make(2, torch.float32)
        tensors["index"] = torch.tensor([0, 4, -1, 3])
        bad = run(operation, tensors)["0"][:, :3].isnan()
        assert bad[[1, 2]].all() and not bad[[0, 3]].any()


def offsets_beyond_the_padding(run: Run) -> None:
    operation = crops((2, 3, 4, 4), 2, padding=1, flip=False, rng=None)
    tensors = operation.make(3, torch.float32)
    tensors["offsets"] = torch.tensor([[100, 0, 0], [1, -50, 1]], dtype=torch.int32)
    assert_equal(run(operation, tensors), {"0": torch.zeros(2, 3, 4, 4)})


EDGES = [
    nan_in_split_batch_norm,
    running_statistics,
    variances,
    nan_in_an_affine_map,
    short_vectors,
    huge_and_tiny_vectors,
    nan_in_one_layer,
    mean_over_nothing,
    unknown_targets,
    extreme_logits,
    gradient_of_the_losses,
    nan_gradient,
    zero_gradient,
    equal_and_few_gradients,
    parts_of_a_batch_start_as_the_whole,
    starts_follow_seed_and_offset,
    unknown_index,
    offsets_beyond_the_padding,
]
