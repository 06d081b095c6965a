"""FLOPs and bytes of the networks, and the bounds made of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.roofline import measure_layer, network_layers, predict, roofline, totals
from benchmarks.workload import Workload, forward_flops

H200 = (790e12, 4.3e12)


@pytest.mark.parametrize(("model", "gmac"), [("resnet18", 0.555), ("wrn34-10", 6.66)])
def test_flops_are_counted_from_the_network(model: str, gmac: float) -> None:
    workload = Workload(model)
    flops = forward_flops(workload)
    assert flops == pytest.approx(2e9 * gmac, rel=0.01)
    assert workload.forward_equivalents == 26
    layers = network_layers(workload)
    counted = sum(layer.count * layer.forward(1, 2).flops for layer in layers)
    assert counted == flops


def test_flops_grow_with_pixels_and_width() -> None:
    base = forward_flops(Workload("resnet18"))
    assert forward_flops(Workload("resnet18", image_size=64)) == pytest.approx(4 * base, rel=0.01)
    assert forward_flops(Workload("resnet18", width=2)) == pytest.approx(4 * base, rel=0.02)


@pytest.mark.parametrize(
    ("model", "batch_statistics", "folded", "tolerance"),
    [("resnet18", 14.3e3, 22.5e3, 0.02), ("wrn34-10", 1.67e3, 2.13e3, 0.15)],
)
def test_bounds_of_an_h200(
    model: str, batch_statistics: float, folded: float, tolerance: float
) -> None:
    """Worked out by hand for that card, before this program; WRN without its additions."""
    workload = Workload(model, batch_size=512)
    rows = [
        {"predicted": predict(layer, workload, *H200, 2), "measured": {"attack": 1.0, "train": 2.0}}
        for layer in network_layers(workload)
    ]
    found = totals(rows)
    assert 512 / found["predicted"] == pytest.approx(batch_statistics, rel=tolerance)
    assert 512 / found["predicted_folded"] == pytest.approx(folded, rel=tolerance)
    assert found["measured"] == 3 * len(rows)


def test_compute_bound_layers_take_their_flops() -> None:
    workload = Workload("resnet18", batch_size=256)
    bandwidth_for_free = 1e30
    total = sum(
        sum(
            predict(layer, workload, 1e12, bandwidth_for_free, 2)[part]
            for part in ("attack", "train")
        )
        for layer in network_layers(workload)
    )
    stem = next(layer for layer in network_layers(workload) if layer.is_stem)
    # Training needs no gradient of the image.
    expected = 26 * 256 * forward_flops(workload) - stem.input_gradient(2 * 256, 2).flops
    assert total * 1e12 == pytest.approx(expected)


def test_split_batch_norm_moves_what_its_passes_read_and_write() -> None:
    layers = {layer.name: layer for layer in network_layers(Workload("resnet18"))}
    plain = layers["split BN + ReLU, 64, 32×32"]
    residual = layers["split BN + add + ReLU, 64, 32×32"]
    size = 2 * 64 * 32 * 32
    assert plain.count == 3 and residual.count == 2
    assert plain.forward(1, 2).bytes == 3 * size and residual.forward(1, 2).bytes == 4 * size
    assert plain.input_gradient(1, 2).bytes == 5 * size
    assert residual.input_gradient(1, 2).bytes == 6 * size
    assert plain.weight_gradient(1, 2).bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_is_measured(dtype: torch.dtype) -> None:
    rates = {"matmul_flops_per_second": 1e12, "copy_bytes_per_second": 1e10}
    workload = Workload("resnet8", batch_size=2, image_size=8, num_steps=3)
    found = roofline(workload, torch.device("cpu"), rates, dtype)
    assert sum(row["count"] for row in found["layers"]) == 20
    assert all(value > 0 for row in found["layers"] for value in row["measured"].values())
    sums = [
        sum(row[kind][part] for row in found["layers"])
        for kind in ("predicted", "measured")
        for part in ("attack", "train")
    ]
    assert found["predicted"] == pytest.approx(sums[0] + sums[1])
    assert found["measured"] == pytest.approx(sums[2] + sums[3])


def test_additions_of_a_wide_network_are_measured() -> None:
    layers = network_layers(Workload("wrn34-10", image_size=8, width=0.1))
    additions = [layer for layer in layers if layer.kind == "addition"]
    assert sum(layer.count for layer in additions) == 15
    attack, train = measure_layer(additions[0], 2, torch.device("cpu"), torch.float32)
    assert attack > 0 and train > 0
