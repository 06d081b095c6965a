"""What becomes of a profiler's events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import KERNELS, classify, kernels, operators, profile_run, summarize

NAMES = [
    ("convolution", "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128"),
    ("convolution", "cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16>"),
    ("convolution", "void cudnn::ops::nchwToNhwcKernel<float, float, float, false>"),
    ("BatchNorm", "split_batch_norm_bwd_sums_kernel"),
    ("BatchNorm", "void at::native::batch_norm_collect_statistics_channels_last_kernel<...>"),
    ("BatchNorm", "triton_red_fused__native_batch_norm_legit_functional_convolution_3"),
    ("matrix product", "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"),
    ("elementwise", "triton_poi_fused__to_copy_convolution_backward_7"),
    ("elementwise", "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>"),
    ("elementwise", "pgd_step_linf_kernel"),
    ("elementwise", "Memcpy DtoD (Device -> Device)"),
    ("optimiser", "void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>"),
    ("other", "something new"),
]


def event(name: str, start: float, duration: float, **fields: Any) -> Any:
    given = {"cpu_parent": None, "cpu_children": [], "self_cpu_time_total": duration, **fields}
    span = SimpleNamespace(start=start, end=start + duration)
    kind = SimpleNamespace(name=given.pop("device", "CUDA"))
    return SimpleNamespace(
        name=name, time_range=span, device_type=kind, is_user_annotation=False, **given
    )


def shares(found: dict[str, Any]) -> dict[str, float]:
    return {kind: share for kind, share in found["share"].items() if share}


def test_kernels_are_classified() -> None:
    assert [classify(name, KERNELS) for _, name in NAMES] == [kind for kind, _ in NAMES]


def test_kernels_are_summed_per_step() -> None:
    annotation = event("Optimizer.step", 100, 90)
    annotation.is_user_annotation = True
    events = [
        event("xmma_fprop", 100, 40),
        event("split_batch_norm_fwd_kernel", 130, 30),
        event("multi_tensor_apply_kernel", 180, 20),
        event("cudaLaunchKernel", 0, 500, device="CPU"),
        annotation,
    ]
    found = summarize(kernels(events), num_steps=2)
    assert found["launches"] == 1.5 and found["microseconds"] == 50
    # From 100 to 200; nothing runs from 160 to 180.
    expected = {"convolution": 0.4, "BatchNorm": 0.3, "optimiser": 0.2, "idle": 0.2}
    assert shares(found) == pytest.approx(expected)
    assert found["kernels"][0]["name"] == "xmma_fprop"


def test_a_profile_of_nothing_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "operators", lambda events: [])
    with pytest.raises(RuntimeError, match="CUPTI"):
        profile_run(lambda: None, torch.device("cpu"), 1)


def test_an_operators_time_goes_to_the_class_around_it() -> None:
    outer = event("aten::conv2d", 0, 50, self_cpu_time_total=20, cpu_children=[1])
    inner = event("aten::empty", 12, 30, cpu_parent=outer)
    optimiser = event("Optimizer.step#SGD.step", 60, 20, cpu_children=[1], self_cpu_time_total=10)
    update = event("aten::_foreach_add_", 65, 10, cpu_parent=optimiser)
    events = [outer, inner, optimiser, update, event("aten::relu", 90, 10)]
    found = summarize(operators(events), num_steps=1)
    assert found["launches"] == 3 and found["microseconds"] == 100
    expected = {"convolution": 0.5, "optimiser": 0.2, "elementwise": 0.1, "idle": 0.2}
    assert shares(found) == pytest.approx(expected)


def test_profile_of_a_real_call() -> None:
    conv = torch.nn.Conv2d(3, 8, 3)
    x = torch.ones(2, 3, 16, 16)
    found = profile_run(lambda: [conv(x) for _ in range(3)], torch.device("cpu"), 3)
    assert found["share"]["convolution"] > 0.3 and found["launches"] >= 1
    assert sum(found["share"].values()) == pytest.approx(1, abs=1e-6)
    assert found["seconds_per_step"] > 0
