"""What becomes of a profiler's trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arat_fast.bench.profile import (
    KERNELS,
    OPERATORS,
    classify,
    profile_run,
    summarize_kernels,
    summarize_operators,
)


def event(name: str, start: float, duration: float, category: str, thread: int = 1) -> Any:
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "cat": category, "tid": thread}


KINDS = {
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16>",
        "void cudnn::ops::nchwToNhwcKernel<float, float, float, false>",
    ],
    "BatchNorm": [
        "split_batch_norm_bwd_sums_kernel",
        "frozen_affine_fwd_kernel",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<...>",
        "triton_red_fused__native_batch_norm_legit_functional_convolution_3",
    ],
    "matrix product": ["nvjet_tst_64x8_64x16_4x1_v_bz_TNT"],
    "elementwise": [
        "triton_poi_fused__to_copy_convolution_backward_7",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
        "pgd_step_linf_kernel",
        "Memcpy DtoD (Device -> Device)",
    ],
    "optimiser": ["void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>"],
    "other": ["something new"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_classified(kind: str) -> None:
    assert {classify(name, KERNELS) for name in KINDS[kind]} == {kind}


def test_operators_are_classified() -> None:
    expected = {
        "aten::convolution_backward": "convolution",
        "autograd::engine::evaluate_function: ConvolutionBackward0": "convolution",
        "aten::native_batch_norm": "BatchNorm",
        "arat_kernels::split_batch_norm_fwd": "BatchNorm",
        "Optimizer.step#SGD.step": "optimiser",
        "aten::addmm": "matrix product",
        "aten::add": "elementwise",
        "aten::_to_copy": "elementwise",
    }
    assert {name: classify(name, OPERATORS) for name in expected} == expected


def test_kernels_are_summed_per_step() -> None:
    events = [
        event("xmma_fprop", 100, 40, "kernel"),
        event("split_batch_norm_fwd_kernel", 130, 30, "kernel", thread=2),
        event("multi_tensor_apply_kernel", 180, 20, "kernel"),
        event("cudaLaunchKernel", 0, 500, "cuda_runtime"),
        event("Optimizer.step", 100, 90, "gpu_user_annotation"),
        {"ph": "s", "name": "xmma_fprop", "ts": 1},
    ]
    found = summarize_kernels(events, num_steps=2)
    assert found["launches"] == 1.5 and found["microseconds"] == 50
    # From 100 to 200; nothing runs from 160 to 180.
    expected = {"convolution": 0.4, "BatchNorm": 0.3, "optimiser": 0.2, "idle": 0.2}
    assert {kind: share for kind, share in found["share"].items() if share} == pytest.approx(
        expected
    )
    assert [entry["name"] for entry in found["kernels"]][0] == "xmma_fprop"
    assert summarize_kernels([], 1)["launches"] == 0


def test_an_operators_time_goes_to_the_class_around_it() -> None:
    events = [
        event("aten::conv2d", 0, 50, "cpu_op"),
        event("aten::mkldnn_convolution", 10, 30, "cpu_op"),
        event("aten::empty", 12, 5, "cpu_op"),
        event("Optimizer.step#SGD.step", 60, 20, "user_annotation"),
        event("aten::_foreach_add_", 65, 10, "cpu_op"),
        event("aten::relu", 90, 10, "cpu_op"),
        event("python", 0, 100, "python_function"),
    ]
    found = summarize_operators(events, num_steps=1)
    assert found["launches"] == 3 and found["microseconds"] == 100
    expected = {"convolution": 0.5, "optimiser": 0.2, "elementwise": 0.1, "idle": 0.2}
    assert {kind: share for kind, share in found["share"].items() if share} == pytest.approx(
        expected
    )


def test_profile_of_a_real_call() -> None:
    conv = torch.nn.Conv2d(3, 8, 3)
    x = torch.ones(2, 3, 16, 16)
    found = profile_run(lambda: [conv(x) for _ in range(3)], torch.device("cpu"), 3)
    assert found["share"]["convolution"] > 0.3 and found["launches"] >= 1
    assert sum(found["share"].values()) == pytest.approx(1, abs=1e-6)
    assert found["seconds_per_step"] > 0
