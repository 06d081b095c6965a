"""Compilation of a launch for GPUs that need not be there, and what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import triton
from kernels.aot.launches import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


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
    """What the compiler made of a launch.

    Args:
        registers: per thread.
        spills: bytes of spill loads and stores on NVIDIA, spilled registers on AMD.
        shared: bytes of shared memory per block.
        occupancy: resident warps as a share of the most possible, as registers, shared memory and
            warps limit it.
        accesses: NVIDIA: (direction, bytes per thread) of every global access, by pointer argument
            ("x->" for what a pointer loaded through x points at). AMD: all of them under "".
        ttir: Triton's own intermediate text.
        text: PTX or AMDGCN.
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    accesses: dict[str, list[tuple[str, int]]]
    ttir: str = field(repr=False)
    text: str = field(repr=False)


@lru_cache(256)
def compiled(launch: Launch, target: Target) -> Report:
    """Compile a launch, recorded for NVIDIA, for ``target``: AMD's warps are twice as wide, and
    half as many are compiled, as :func:`arat_kernels.implementation.warps` gives."""
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    num_warps = max(1, launch.num_warps * 32 // target.gpu.warp_size)
    options = {"num_warps": num_warps, "enable_fp_fusion": launch.fuses}
    if target.gpu.backend == "cuda":
        options |= {"num_stages": launch.num_stages, "maxnreg": launch.maxnreg}
    kernel = triton.compile(source, target=target.gpu, options=options)
    # A tuple is as many parameters as it has elements.
    passed: list[str] = []
    for name, kind in launch.types.items():
        passed += [name] * (len(kind) if isinstance(kind, tuple) else 1)
    shared = int(kernel.metadata.shared)
    if target.gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = _amd_field(text, "vgpr_count")
        spills = _amd_field(text, "vgpr_spill_count") + _amd_field(text, "sgpr_spill_count")
        accesses = _amd_accesses(text)
    else:
        text = kernel.asm["ptx"]
        registers, spills = _ptxas_report(text, target)
        accesses = _ptx_accesses(text, passed)
    occupancy = _occupancy(target, registers, shared, num_warps)
    return Report(registers, spills, shared, occupancy, accesses, kernel.asm["ttir"], text)


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
            move = _PTX_MOVE.match(line)
            if not move:
                continue
            to = move["to"]
            found = set().union(*(origins[r] for r in re.findall(r"%rd\d+", move["of"])))
            # A parameter, or the place of one, of which there may be a choice before it is read.
            places = map(int, re.findall(r"_param_(\d+)", move["of"]))
            found |= {arguments[place] for place in places if place < len(arguments)}
            if move["op"].startswith("ld.") and not move["op"].startswith("ld.param"):
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
