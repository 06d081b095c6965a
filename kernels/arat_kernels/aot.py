"""Ahead-of-time compilation of every kernel for GPUs that need not be there, and its report.

``python -m arat_kernels.aot docs/kernels.md`` writes the table of all kernels.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import arat_kernels


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration that its launcher can choose.

    Launchers pass pointers that are multiples of 16 bytes, and kernels do not specialise on
    integers (a constexpr says what is assumed of them), so that the fields here are all there is.

    Args:
        name: unique, for example "pgd_step_linf_kernel[bf16]".
        kernel: the ``@triton.jit`` function.
        signature: type of every argument that is not a constexpr, in Triton's words ("*bf16",
            "i32", "i64", "fp32"); a tuple of types for a tuple.
        constexprs: value of every constexpr argument, and of every pointer argument that is None.
        num_warps: as the launcher passes them on NVIDIA; AMD's warps are twice as wide, and half as
            many are compiled, as :func:`~arat_kernels.implementation.warps` gives.
        num_stages: what a launch on NVIDIA has, where launchers leave it to Triton; on AMD Triton's
            other default is compiled.
        bulk: pointer arguments whose accesses must be 16 bytes wide per thread.
        bytes_per_element: the traffic in words, for example "2 reads of x, 1 write of y".
        note: why the block shape is what it is.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    bytes_per_element: str
    note: str
    bulk: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A GPU architecture and the limits that matter for occupancy.

    Args:
        name: "sm_90", "gfx942", …
        gpu: the target in Triton's words.
        shared_per_block, shared_per_unit: bytes a block may have, and a multiprocessor has.
        registers: 32-bit registers a thread may share out with the others of its multiprocessor.
        warps: most resident warps per multiprocessor.
    """

    name: str
    gpu: GPUTarget
    shared_per_block: int
    shared_per_unit: int
    registers: int
    warps: int


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 65536, 64),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 65536, 64),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 65536, 64),
        # Four SIMDs, each with 512 registers for a 64-wide wave and at most 8 waves.
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 4 * 512 * 64, 32),
    )
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case.

    Args:
        registers: per thread.
        spills: bytes of spill loads and stores on NVIDIA, spilled registers on AMD.
        shared: bytes of shared memory per block.
        occupancy: resident warps as a share of the most possible, as registers, shared memory and
            warps limit it.
        accesses: NVIDIA: (direction, bytes per thread) of every global access, by pointer argument
            ("x->" for what a pointer loaded through x points at). AMD: all of them under "".
        assembly: PTX or AMDGCN text.
        ttir: Triton's own intermediate text.
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    accesses: dict[str, list[tuple[str, int]]]
    assembly: str = field(repr=False)
    ttir: str = field(repr=False)


def compile_case(case: AotCase, target: Target) -> Report:
    """Compile ``case`` for ``target``, on a machine with or without a GPU.

    Raises:
        ValueError: the interpreter is on (``TRITON_INTERPRET=1``), which replaces the kernels.
    """
    if not isinstance(case.kernel, triton.JITFunction):
        raise ValueError(
            f"{case.name}: expected a compiled kernel, got {type(case.kernel).__name__}; "
            "unset TRITON_INTERPRET"
        )
    arguments = case.kernel.arg_names
    missing = set(arguments) - set(case.signature) - set(case.constexprs)
    unknown = (set(case.signature) | set(case.constexprs)) - set(arguments)
    if missing or unknown:
        raise ValueError(
            f"{case.name}: arguments without a type {sorted(missing)}, not arguments of the kernel "
            f"{sorted(unknown)}"
        )
    signature = {name: case.signature.get(name, "constexpr") for name in arguments}
    source = ASTSource(
        case.kernel,
        signature,
        constexprs=case.constexprs,
        attrs={path: [["tt.divisibility", 16]] for path in divisible(case)},
    )
    num_warps = max(1, case.num_warps * 32 // target.gpu.warp_size)
    options = {"num_warps": num_warps}
    if target.gpu.backend == "cuda":
        options["num_stages"] = case.num_stages
    compiled = triton.compile(source, target=target.gpu, options=options)
    # A tuple is as many parameters as it has elements.
    passed: list[str] = []
    for name in arguments:
        kind = case.signature.get(name, ())
        passed += [name] * (len(kind) if isinstance(kind, tuple) else 1)
    shared = int(compiled.metadata.shared)
    if target.gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = _amd_field(text, "vgpr_count")
        spills = _amd_field(text, "vgpr_spill_count") + _amd_field(text, "sgpr_spill_count")
        accesses = _amd_accesses(text)
    else:
        text = compiled.asm["ptx"]
        registers, spills = _ptxas_report(text, target)
        accesses = _ptx_accesses(text, passed)
    occupancy = _occupancy(target, registers, shared, num_warps)
    return Report(registers, spills, shared, occupancy, accesses, text, compiled.asm["ttir"])


def divisible(case: AotCase) -> list[tuple[int, ...]]:
    """Paths of the arguments that Triton may assume to be multiples of 16: the pointers, and those
    in tuples, that the kernel specialises on."""
    paths: list[tuple[int, ...]] = []
    for index, parameter in enumerate(case.kernel.params):
        kind = case.signature.get(parameter.name, "")
        if isinstance(kind, tuple):
            paths += [(index, place) for place in range(len(kind))]
        elif kind.startswith("*") and not parameter.do_not_specialize:
            paths.append((index,))
    return paths


def all_cases() -> dict[str, list[AotCase]]:
    """The cases of every operation, by the operation's name."""
    cases: dict[str, list[AotCase]] = {}
    for module in pkgutil.iter_modules(arat_kernels.__path__):
        path = f"arat_kernels.{module.name}.triton"
        if module.ispkg and importlib.util.find_spec(path):
            cases[module.name] = importlib.import_module(path).aot_cases()
    return cases


def _ptxas_report(ptx: str, target: Target) -> tuple[int, int]:
    arch = int(target.gpu.arch)
    knobs = triton.knobs.nvidia
    ptxas = (knobs.ptxas_blackwell if arch >= 100 else knobs.ptxas).path
    gpu_name = f"sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={gpu_name}", str(source), "-o", f"{source}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers and spills, log
    return int(registers[1]), int(spills[1]) + int(spills[2])


_PTX_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
_PTX_ACCESS = re.compile(
    r"\b(?P<op>ld|st)(?:\.\w+)*?\.global(?P<rest>[.\w:]*)\s+(?P<operands>[^;]*);"
)
_PTX_ASYNC = re.compile(
    r"\bcp\.async\.\w+\.shared\.global[.\w:]*\s+\[[^\]]*\],\s*\[\s*(?P<at>%rd\d+)[^\]]*\],\s*"
    r"(?P<bytes>0x[0-9a-fA-F]+|\d+)"
)
_PTX_MOVE = re.compile(
    r"^(?:@!?%p\d+\s+)?(?P<op>[a-z][\w.:]*)\s+(?P<to>%rd\d+)\s*,\s*(?P<of>[^;]*);"
)


def _ptx_accesses(ptx: str, arguments: list[str]) -> dict[str, list[tuple[str, int]]]:
    """Follow every pointer argument through the 64-bit arithmetic to the accesses made with it."""
    origins: dict[str, set[str]] = defaultdict(set)
    accesses: dict[str, list[tuple[str, int]]] = defaultdict(list)
    lines = [line.strip() for line in ptx.splitlines()]
    # Registers are reassigned in loops, so one pass may meet a use before its definition.
    grew = True
    while grew:
        grew = False
        for line in lines:
            parameter = re.search(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]", line)
            if parameter:
                index = int(parameter[2])
                found = {arguments[index]} if index < len(arguments) else set()
                to = parameter[1]
            else:
                move = _PTX_MOVE.match(line)
                if not move:
                    continue
                to = move["to"]
                found = set().union(*(origins[r] for r in re.findall(r"%rd\d+", move["of"])))
                if move["op"].startswith("ld."):
                    found = {f"{name}->" for name in found if not name.endswith("->")}
            if not found <= origins[to]:
                origins[to] |= found
                grew = True
    for line in lines:
        access = _PTX_ACCESS.search(line)
        if access:
            address = re.search(r"\[\s*(%rd\d+)", access["operands"])
            kind = access["rest"].split(".")
            vector = next((int(part[1:]) for part in kind if re.fullmatch(r"v\d", part)), 1)
            width = re.search(r"\d+$", kind[-1])
            assert address and width, line
            item = ("load" if access["op"] == "ld" else "store", vector * _PTX_WIDTHS[width[0]])
            register = address[1]
        else:
            copied = _PTX_ASYNC.search(line)
            if not copied:
                continue
            item, register = ("load", int(copied["bytes"], 0)), copied["at"]
        for name in origins[register]:
            accesses[name].append(item)
    return dict(accesses)


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    assert found, f"no {name} in the AMDGCN metadata"
    return int(found[1])


_AMD_WIDTHS = {
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}


def _amd_accesses(text: str) -> dict[str, list[tuple[str, int]]]:
    found = re.findall(r"\b(?:global|buffer)_(load|store)_(dwordx\d|[a-z]+)", text)
    return {"": [(direction, _AMD_WIDTHS[width]) for direction, width in found]}


def _occupancy(target: Target, registers: int, shared: int, num_warps: int) -> float:
    lanes = int(target.gpu.warp_size)
    # Registers are given out per warp: 256 at a time on NVIDIA, 8 per lane on AMD.
    granule = 256 if target.gpu.backend == "cuda" else 8 * lanes
    per_warp = -(-max(registers, 1) * lanes // granule) * granule
    blocks = min(target.warps // num_warps, target.registers // (per_warp * num_warps))
    if target.gpu.backend == "cuda":
        blocks = min(blocks, 32, target.shared_per_unit // (shared + 1024))
    elif shared:
        blocks = min(blocks, target.shared_per_unit // shared)
    return blocks * num_warps / target.warps


def kernels_table(measured: Callable[[AotCase], list[str]]) -> str:
    """docs/kernels.md: every kernel with its traffic, and a cell per GPU from ``measured``."""
    names = list(TARGETS)
    lines = [
        "# The kernels, compiled ahead of time",
        "",
        "Written by `python -m arat_kernels.aot docs/kernels.md` with Triton "
        f"{triton.__version__}; no GPU takes part. Each cell under a GPU is: registers per thread "
        "/ shared memory in bytes per block / occupancy as registers, shared memory and warps "
        "limit it. The tests compile every row for every GPU here and fail on a register spill, "
        "on a bulk access narrower than 16 bytes per thread, and on shared memory over the limit. "
        "Other tests sweep the launchers over shapes, dtypes and layouts, and fail on a launch "
        "that no row covers: one row has the launch's block, warps, alignment and dtypes, and at "
        "least its optional tensors (a backward that computes ReLU again instead of reading its "
        "bits has rows of its own). Numbers of channels and widths of layers are examples. The "
        "cosine distance takes 1, 4 or 11 layers a launch: other numbers are padded, longer lists "
        "divided. float64, which is there for gradcheck, is compiled for one block shape of each "
        "kernel.",
        "",
        "Split BatchNorm reads its input once for the statistics and once to normalise it, in "
        "separate launches. A variant in one launch, with a barrier across the grid, is not "
        "written: without a GPU it cannot be shown correct. With pooled features a program has "
        "one sample and at most 64 channels, so that the mean over H x W stays inside it: few "
        "large images leave multiprocessors idle (4 of 224 x 224 with 64 channels are 4 "
        "programs), and at 4 x 4 in 16 bits half of a tile of 32 rows is masked off.",
    ]
    for operation, cases in all_cases().items():
        lines += [
            "",
            f"## {operation}",
            "",
            f"| kernel and configuration | warps | bytes moved | {' | '.join(names)} |",
            "|---|---|---|" + "---|" * len(names),
        ]
        notes: dict[str, list[str]] = defaultdict(list)
        for case in cases:
            lines.append(
                f"| `{case.name}` | {case.num_warps} | {case.bytes_per_element} | "
                f"{' | '.join(measured(case))} |"
            )
            kernel = case.name.split("[")[0]
            if case.note not in notes[kernel]:
                notes[kernel].append(case.note)
        lines += ["", "Block shapes:", ""]
        lines += [f"- `{kernel}`: {' '.join(texts)}" for kernel, texts in notes.items()]
    return "\n".join(lines) + "\n"


def _measured(case: AotCase) -> list[str]:
    reports = [compile_case(case, target) for target in TARGETS.values()]
    return [f"{r.registers} / {r.shared} / {r.occupancy:.0%}" for r in reports]


def main() -> None:
    """Write the table to the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m arat_kernels.aot", description=main.__doc__)
    parser.add_argument("path", type=Path, help="file to write, for example docs/kernels.md")
    path: Path = parser.parse_args().path
    path.write_text(kernels_table(_measured))


if __name__ == "__main__":
    main()
