"""Every kernel as it is launched, compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest
import torch

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from kernels.aot.addresses import wide_addresses  # noqa: E402
from kernels.aot.compiled import TARGETS, Target, compiled  # noqa: E402
from kernels.aot.launches import Launch, maximal, recorded  # noqa: E402
from kernels.aot.operations import OPERATIONS, affine_shipped, launches, normalize  # noqa: E402

from arat_kernels.implementation import experimental  # noqa: E402
from arat_kernels.offsets import start_of  # noqa: E402
from arat_kernels.split_batch_norm import triton as split_batch_norm  # noqa: E402

# Read only where the statistics, the pooled feature or ReLU need them.
SOMETIMES_READ = {("split_batch_norm_bwd_input_kernel", name) for name in ("x_ptr", "residual_ptr")}


def problems(launch: Launch, target: Target, bulk: set[str]) -> list[str]:
    """What is wrong with what the compiler makes of a launch."""
    report = compiled(launch, target)
    found = []
    if report.spills:
        found.append(f"{report.spills} spills")
    if report.shared > target.shared_per_block or not report.occupancy:
        found.append(f"{report.shared} bytes of shared memory, {report.registers} registers")
    if target.gpu.backend == "hip":
        # AMDGCN does not tell the pointers apart. The same tile on as many threads as sm_90's takes
        # as many accesses of 16 bytes, and fewer are seen where one is narrower, unless tensors
        # that are not bulk have as many more than on sm_90.
        hopper = compiled(launch, TARGETS["sm_90"])
        wide = Counter(access for name in bulk for access in hopper.accesses.get(name, ()))
        counts = Counter(report.accesses[""])
        found += [f"less than {n} {access}" for access, n in wide.items() if counts[access] < n]
        return found
    for name in bulk:
        widths = {width for _, width in report.accesses.get(name, ())}
        if widths != {16} and (widths or (launch.kernel, name) not in SOMETIMES_READ):
            found.append(f"{name} is accessed by {widths} bytes")
    if target is TARGETS["sm_90"]:
        addresses = wide_addresses(report.ttir)
        narrow = {name for name in bulk if not addresses.get(name, True)}
        found += [f"{name} is accessed by a 32-bit offset" for name in narrow]
    return found


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TARGETS if name != "sm_90"]


def check(operation: str, target: Target, given: list[Launch]) -> None:
    bulk_of = OPERATIONS[operation].bulk_of
    found = {
        launch.label: wrong
        for launch in given
        # AMD's cards are refused one pass.
        if not (target.gpu.backend == "hip" and "one_pass" in launch.kernel)
        and (wrong := problems(launch, target, bulk_of(launch)))
    }
    assert not found


@pytest.mark.parametrize("target", ["sm_90", *SLOW])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_the_recipes_launch_compiles_well(operation: str, target: str) -> None:
    check(operation, TARGETS[target], launches(operation, False))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_is_launched_compiles_well(operation: str, target: str) -> None:
    """Each launch for one of the GPUs, the next one for the next; with EXHAUSTIVE=1 for all."""
    places = range(len(TARGETS)) if "EXHAUSTIVE" in os.environ else [[*TARGETS].index(target)]
    whole = launches(operation, True)
    check(
        operation, TARGETS[target], [launch for n in places for launch in whole[n :: len(TARGETS)]]
    )


@pytest.fixture(scope="module")
def found() -> list[Launch]:
    """The launches of a layer with ReLU and without a residual, in bf16."""
    with recorded() as launches:
        normalize(64, torch.bfloat16)
    return launches


@pytest.mark.parametrize(
    ("operation", "kernel"),
    [
        ("split_batch_norm", "split_batch_norm_statistics_kernel"),
        ("split_batch_norm", "split_batch_norm_bwd_sums_kernel"),
        ("cosine_invariance", "cosine_invariance_fwd_kernel"),
    ],
)
def test_the_last_program_sees_what_all_have_stored(operation: str, kernel: str) -> None:
    """All threads have stored before one counts, release and acquire reach the whole GPU, and
    nothing is read through the L1 afterwards."""
    if operation == "split_batch_norm":
        # As in the attack: no running statistics, which are read as usual.
        with recorded() as candidates:
            normalize(64, torch.bfloat16, parameters=False)
    else:
        candidates = launches(operation, False)
    launch = next(launch for launch in candidates if launch.kernel == kernel)
    before, after = compiled(launch, TARGETS["sm_90"]).text.split("atom.global.gpu.acq_rel.add")
    _, _, since = before.rpartition("st.global")
    assert "bar.sync" in since
    loads = re.findall(r"\b(?:ld\.global|cp\.async\.c[ag]\.)[.\w]*", after)
    assert loads and all(".cg" in load for load in loads)


@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_programs_wait_until_all_have_stored(kernel: str) -> None:
    """In one pass: as above, and who waits acquires; what is kept is read once."""
    launch = next(
        launch for launch in launches("split_batch_norm-one-pass", False) if kernel in launch.kernel
    )
    assert launch.cooperative
    report = compiled(launch, TARGETS["sm_90"])
    before, after = report.text.split("atom.global.gpu.acq_rel.add", 1)
    assert "bar.sync" in before.rpartition("st.global")[2]
    waiting, _ = after.split("atom.global.gpu.acq_rel.add")
    # An addition of 0 becomes a load.
    assert re.search(r"\bld\.global\.gpu\.acquire\b(.|\n)*\bbra\b", waiting)
    partials = [kind for kind, _ in report.accesses["partial_ptr"]].count("load")
    assert partials == len(re.findall(r"\b(?:ld\.global|cp\.async)\.cg\.", report.text)) > 0
    assert report.accesses["x_ptr"] == [("load", 16)] * launch.given["TILES"]


def test_dependent_launches_wait_before_they_read() -> None:
    with experimental("dependent_launch"), recorded() as found:
        normalize(64, torch.bfloat16)
        affine_shipped()
    assert len({launch.kernel for launch in found}) == 6
    for launch in {launch.kernel: launch for launch in found}.values():
        text = compiled(launch, TARGETS["sm_90"]).text
        before, after = text.split("griddepcontrol.wait")
        assert not re.search(r"\b(ld|st|atom)\.global|cp\.async", before)
        assert "griddepcontrol.launch_dependents" in after


def test_what_is_held_to_the_reference_bit_for_bit_fuses_no_product_with_a_sum() -> None:
    """But for the PGD step, whose product is with 1, 0 or -1, and exact."""
    kernels = ("random_start_linf_kernel", "crop_flip_kernel", "image_parts_fwd_kernel")
    seen = set()
    for operation in ("pgd_step", "crop_flip", "image_parts"):
        for launch in launches(operation, False):
            if launch.kernel in kernels:
                assert "fma" not in compiled(launch, TARGETS["sm_90"]).text, launch.label
                seen.add(launch.kernel)
    assert seen == set(kernels)


def _reductions() -> dict[str, Launch]:
    """All of them: one with fewer tensors may take more registers than the one that covers it."""
    with recorded() as found:
        OPERATIONS["split_batch_norm"].shipped()
        for options in ({}, {"residual": True}, {"pooled": True}):
            normalize(50, torch.bfloat16, **options)
    kinds = "statistics_kernel", "bwd_sums_kernel"
    return {launch.label: launch for launch in found if launch.kernel.endswith(kinds)}


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))]
)
def test_as_many_programs_are_resident_as_the_reductions_plan(start: int) -> None:
    """Or the last ones would run alone; without a spill for it."""
    target = TARGETS["sm_90"]
    for launch in [*_reductions().values()][start::6]:
        optional = {"dpooled_ptr", "dy_skip_ptr", "addend_ptr", "residual_ptr"}
        narrow = "statistics" in launch.kernel and launch.given["BLOCK_C"] == 16
        more = narrow or bool(optional & launch.types.keys())
        planned = split_batch_norm.RESIDENT - more - (not launch.given["ALIGNED"])
        report = compiled(launch, target)
        assert report.occupancy * target.warps / launch.num_warps >= planned, launch.label
        assert not report.spills, launch.label


def test_loads_are_under_way_before_the_shift_is_known() -> None:
    with recorded() as found:
        normalize(64, torch.bfloat16)
    text = compiled(found[0], TARGETS["sm_90"]).text
    assert found[0].kernel == "split_batch_norm_statistics_kernel"
    first, _ = re.split(r"\b(?:bar|shfl)\.sync", text, maxsplit=1)
    assert "cp.async.c" in first


def test_launches_are_covered_by_those_that_do_more(found: list[Launch]) -> None:
    with recorded() as more:
        normalize(64, torch.bfloat16, pooled=True)
        normalize(64, torch.bfloat16, residual=True)
        normalize(64, torch.float32)
        normalize(48, torch.bfloat16)
        normalize(50, torch.bfloat16)
    assert len({launch.label for launch in more}) > len(maximal(more))
    by_kernel = {launch.kernel: launch for launch in found}
    # The pooled forward has a tile of its own, the other one does less than with a residual.
    kernel = "split_batch_norm_fwd_kernel"
    covers = [launch.covers(by_kernel[kernel]) for launch in more if launch.kernel == kernel]
    assert covers == [False, True, False, True, False]
    # Without the bits of ReLU it is computed again, which is not less than reading them.
    kernel = "split_batch_norm_bwd_sums_kernel"
    covers = [launch.covers(by_kernel[kernel]) for launch in more if launch.kernel == kernel]
    assert covers == [True, False, False, True, False]


def test_narrow_accesses_are_seen() -> None:
    """60 channels are no multiple of 16: what is looked for above is not there."""
    with recorded() as launches:
        normalize(60, torch.bfloat16)
    report = compiled(launches[0], TARGETS["sm_90"])
    assert max(width for _, width in report.accesses["x_ptr"]) < 16
    assert {found for found, _ in report.accesses["partial_ptr"]} == {"load", "store"}
    assert problems(launches[0], TARGETS["sm_90"], {"x_ptr"})


def test_every_tensor_of_a_tuple_is_followed() -> None:
    launch = next(
        found
        for found in launches("cosine_invariance", False)
        if found.given["LAYERS"] == 11 and "bwd" in found.kernel
    )
    accesses = compiled(launch, TARGETS["sm_90"]).accesses
    for name, direction in (
        ("predictions", "load"),
        ("targets", "load"),
        ("dpredictions", "store"),
    ):
        assert {found for found, _ in accesses[name]} == {direction}


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, z_ptr, size: tl.int32):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 16)
    x = tl.load(x_ptr + tl.program_id(0) * size + at)
    y = tl.load(y_ptr + (tl.program_id(0) * size).to(tl.int64) + at)
    tl.store(z_ptr + start_of(tl.program_id(0), size) + at, x + y)


def test_narrow_offsets_are_seen() -> None:
    signature = {**dict.fromkeys(("x_ptr", "y_ptr", "z_ptr"), "*fp32"), "size": "i32"}
    launch = Launch(_narrow_kernel, signature, {}, {}, 4, 3)
    ttir = compiled(launch, TARGETS["sm_90"]).ttir
    assert wide_addresses(ttir) == {"x_ptr": False, "y_ptr": False, "z_ptr": True}
