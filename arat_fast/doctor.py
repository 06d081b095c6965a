"""The self-check: what the kernels compute on this card, against their references."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD
from arat_fast.device import no_algorithm_search, source_commit, versions
from arat_fast.display import Display
from arat_fast.distributed import Ranks
from arat_fast.files import write_json
from arat_fast.models.folding import FoldedNetwork
from arat_fast.models.registry import create_model
from arat_fast.models.split_batch_norm import SplitBatchNorm2d, use_branch, use_statistics
from arat_fast.models.wide_resnet import PreActBlock
from arat_fast.objectives import ARAT
from arat_fast.training.graph import NUM_WARMUP
from arat_fast.training.step import TrainStep
from arat_kernels.checks import (
    UPSTREAM,
    Norm,
    Operation,
    Tensors,
    added,
    added_affine,
    affine,
    averaged,
    both,
    classes,
    crops,
    distance,
    parts,
    randn,
    relu,
    start,
    step,
    step_of_parts,
)
from arat_kernels.implementation import Impl, replace_operations

SECONDS = 20.0
"""What the check before a run may take; what is left then is checked before the next one."""

FOLD, GRAPH = "fold", "captured step"
"""What is checked beside kernels: the folded network, and the replay of a training step."""

EVALUATED = {
    "frozen_affine",
    "relu_backward",
    "cross_entropy_grad",
    "random_start",
    "pgd_step",
    FOLD,
}
"""Functions that an evaluation calls."""

Progress = Callable[[str, int, int, Literal["operations"]], object]
Record = dict[str, Any]


def operations_of(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    num_classes: int,
    batch: int,
    attack: PGD,
    dtype: torch.dtype,
) -> dict[str, Operation]:
    """Every operation at the shapes of a training step, and in float32 those of an evaluation; a
    name is the function's, then the shape.

    Args:
        model: the network, on any device; a copy is run.
        image_shape: (C, H, W).
        num_classes: of the logits.
        batch: samples of one process in a batch.
        attack: its norm, radius, step size and statistics.
        dtype: of activations in the step.
    """
    calls: dict[tuple[Any, ...], None] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        given = dict(zip(("x", "residual", "relu"), args, strict=False)) | options
        fused = given.get("residual") is not None, bool(given.get("relu"))
        calls[(*args[0].shape[1:], *fused, isinstance(layer, SplitBatchNorm2d))] = None

    sums: dict[tuple[int, ...], None] = {}
    pairs: dict[tuple[int, ...], None] = {}

    def note_sum(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        (sums if isinstance(block, PreActBlock) else pairs)[tuple(out.shape[1:])] = None

    # Where the network is: it may hold tensors that do not move with it, or read their values.
    shadow, device = copy.deepcopy(model), next(model.parameters()).device
    for layer in shadow.modules():
        if isinstance(layer, (SplitBatchNorm2d, nn.BatchNorm2d)):
            layer.register_forward_pre_hook(note, with_kwargs=True)
        if isinstance(layer, SplitBatchNorm2d):
            layer.impl = "reference"
        ends = layer.bn2 if isinstance(layer, PreActBlock) else getattr(layer, "shortcut_bn", None)
        if isinstance(ends, SplitBatchNorm2d):
            layer.register_forward_hook(note_sum)
    drawn_on = [device] if device.type == "cuda" else []
    with torch.no_grad(), use_statistics(shadow, "running"), torch.random.fork_rng(drawn_on):
        shadow(torch.zeros(2, *image_shape, device=device))
    images, ball = (batch, *image_shape), f"{attack.norm}-{_joined(batch, *image_shape)}"
    radius: Any = {"norm": attack.norm, "eps": attack.eps, "shape": images}
    widths = tuple({call[0] for call in calls}) or (num_classes,)
    found = {
        f"crop_flip-{_joined(*images)}": crops(images, batch),
        f"image_parts-{_joined(*images)}": parts(images),
        f"cross_entropy_grad-{_joined(batch, num_classes)}": classes(batch, num_classes),
        f"cosine_invariance-{_joined(batch, *widths)}": distance(batch, widths),
        f"random_start-{ball}": start(**radius),
        f"pgd_step-{ball}": step(alpha=attack.alpha, **radius),
        f"pgd_step-{ball}-parts": step_of_parts(alpha=attack.alpha, **radius),
    }
    for channels, height, width, residual, rectified, is_split in calls:
        shape = batch, channels, height, width
        name = _joined(*shape) + "-residual" * residual + "-relu" * rectified
        found[f"frozen_affine-{name}"] = affine(rectified, shape=shape)
        if rectified and not residual:
            found[f"frozen_affine-{name}-sum"] = added_affine(shape=shape)
        found[f"relu_backward-{_joined(*shape)}"] = relu(shape=shape)
        if is_split:
            norm = Norm((batch, batch), *shape[1:], residual=residual, relu=rectified)
            found[f"split_batch_norm-{name}"] = norm.operation
    for summed in sums:
        found[f"split_batch_norm-{_joined(batch, *summed)}-sum"] = added((batch, batch), *summed)
    # What the last block makes goes to the classifier.
    for channels, height, width in list(sums)[-1:]:
        found[f"split_batch_norm-{_joined(batch, channels, height, width)}-mean"] = averaged(
            sizes=(batch, batch), channels=channels, height=height, width=width
        )
    for channels, height, width in pairs:
        found[f"split_batch_norm-{_joined(batch, channels, height, width)}-both"] = both(
            sizes=(batch, batch), channels=channels, height=height, width=width
        )
    few, size = (min(batch, 16), *image_shape), sum(p.numel() for p in model.parameters())
    found[f"{FOLD}-{type(model).__name__}-{size}-{_joined(*few)}"] = folded(model, few)
    if dtype != torch.float32:
        found |= {
            f"{name}-float32": replace(operation, make=partial(_in_float32, operation.make))
            for name, operation in evaluated(found).items()
        }
    return found


def evaluated(operations: Mapping[str, Operation]) -> dict[str, Operation]:
    """Those of :data:`EVALUATED`."""
    return {name: o for name, o in operations.items() if name.partition("-")[0] in EVALUATED}


def _in_float32(
    make: Callable[[int, torch.dtype], Tensors], seed: int, dtype: torch.dtype
) -> Tensors:
    return make(seed, torch.float32)


def _joined(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def folded(model: nn.Module, shape: tuple[int, ...]) -> Operation:
    """The network that is attacked on running statistics, whose convolutions cuDNN fuses; its
    reference is the network itself.

    Args:
        model: the network; a copy is run.
        shape: of the images.
    """

    def make(seed: int, dtype: torch.dtype) -> Tensors:
        # The low precision is the network's; images stay float32.
        return {"x": randn(shape, seed).sigmoid(), "like": torch.zeros(1, dtype=dtype)}

    def call(t: Tensors, impl: Impl | None) -> Tensor:
        x, dtype = t["x"], t["like"].dtype
        network = copy.deepcopy(model).to(x.device, x.dtype)
        with torch.autocast(x.device.type, dtype, enabled=dtype == torch.bfloat16):
            if impl == "triton":
                network = FoldedNetwork(network, x.detach())
            with use_branch(network, "adv"), use_statistics(network, "running"):
                logits: Tensor = network(x)
        return logits

    # Whole numbers of the gradient follow where either rounds to another side of a ReLU.
    return Operation(call, make, ("x",), on_card=4.0)


def check(
    operations: Mapping[str, Operation],
    dtype: torch.dtype,
    device: torch.device,
    *,
    known: Mapping[str, Record] | None = None,
    seconds: float = SECONDS,
    rate: float | None = None,
    progress: Progress | None = None,
    keep: Callable[[dict[str, Record]], object] = lambda records: None,
) -> dict[str, Record]:
    """Hold operations to their references.

    Args:
        operations: by name.
        dtype: of activations: float32 or bfloat16.
        device: where they run.
        known: records that are there already.
        seconds: after which no further one is begun.
        rate: bytes per second that a copy reads and writes; with it each operation is timed.
        progress: told what is done, how many are and of how many.
        keep: told all records after each one.

    Returns:
        By name: "error", empty where it is right; "share" of the error budget that it took; and
        "microseconds" and "share_of_copy" where it was timed. What does not fit into the memory is
        left out.

    Raises:
        ValueError: an operation has broken the process's access to the GPU; its record is kept.
    """
    records, begun = dict(known or {}), time.monotonic()
    for number, (name, operation) in enumerate(operations.items()):
        if name in records or time.monotonic() - begun > seconds:
            continue
        if progress is not None:
            progress("self-check", number, len(operations), "operations")
        record: Record = {"error": "", "share": None}
        try:
            with device:
                tensors = operation.make(0, dtype)
            record["share"] = operation.check(tensors)
            if rate is not None:
                record |= _speed(operation, tensors, rate)
        except torch.OutOfMemoryError:
            continue
        except Exception as error:  # whatever a compiler or a driver raises
            record["error"] = _described(error)
        finally:
            UPSTREAM.clear()
        records[name] = record
        keep(records)
        if record["error"] and _is_lost(device):
            raise ValueError(
                f"{name} has broken this process's access to the GPU: {record['error']}; start "
                "again, and its reference runs in its place"
            )
    return records


def _is_lost(device: torch.device) -> bool:
    """Whether nothing runs on the GPU any more in this process, as after an illegal access."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _described(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _speed(operation: Operation, tensors: Tensors, rate: float, calls: int = 20) -> Record:
    """Time of a forward call in a CUDA graph, and its bytes as a share of what a copy moves."""
    given = {name: t.detach() for name, t in tensors.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        out = operation.call(given, "triton")
        with torch.cuda.graph(graph):
            for _ in range(calls):
                operation.call(given, "triton")
    seconds = _timed(graph.replay) / calls
    tensors_moved = [*given.values(), *([out] if isinstance(out, Tensor) else out)]
    moved = sum(t.numel() * t.element_size() for t in tensors_moved)
    return {"microseconds": 1e6 * seconds, "share_of_copy": moved / seconds / rate}


def _timed(call: Callable[[], object], times: int = 9) -> float:
    """Seconds of a call on the GPU, the median of some."""
    found: list[float] = []
    for _ in range(times):
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return sorted(found)[times // 2]


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy on the GPU reads and writes."""
    size = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _timed(lambda: target.copy_(source))


def check_graph(device: torch.device, dtype: torch.dtype) -> Record:
    """A captured training step of a small network against the eager one; as of :func:`check`."""

    def losses(graph: Literal["on", "off"]) -> list[float]:
        torch.manual_seed(0)
        model = create_model("resnet8", 10).to(device)
        objective = ARAT(model, ["layer3.0.bn1"], (3, 16, 16)).to(device)
        objective.start_epoch(0.5)
        step = TrainStep(
            model,
            objective,
            PGD(num_steps=1),
            torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.01),
            precision=dtype,
            graph=graph,
            generator=torch.Generator(device).manual_seed(0),
        )
        x = torch.linspace(0, 1, 32 * 3 * 16 * 16, device=device).view(32, 3, 16, 16)
        y = torch.arange(32, device=device) % 10
        # Other images in every step, or a graph that reads its first ones would pass.
        steps = range(NUM_WARMUP + 2)
        return [float(value) for value in [step(x.roll(i, 0), y)["loss"] for i in steps]]

    try:
        with torch.random.fork_rng([device]):
            captured, eager = losses("on"), losses("off")
    except Exception as error:  # whatever a driver raises
        return {"error": _described(error), "share": None}
    if not all(map(math.isfinite, (*captured, *eager))):
        return {"error": f"losses {captured}, eagerly {eager}", "share": None}
    # The same kernels; a step that froze something is off by far more.
    apart = max(abs(a - b) / abs(b) for a, b in zip(captured, eager, strict=True))
    share = apart / 0.02
    return {"error": "" if share <= 1 else f"losses differ by {apart:.1%}", "share": share}


def wrong_functions(records: Mapping[str, Record]) -> dict[str, str]:
    """The functions of which a call was wrong, and how far off."""
    wrong: dict[str, str] = {}
    for name, record in records.items():
        if record["error"]:
            wrong.setdefault(name.partition("-")[0], f"{name}: {record['error']}")
    return wrong


def replace_wrong(wrong: Mapping[str, str], required: bool, warn: Callable[[str], object]) -> None:
    """Let references run in place of kernels that are wrong, in this process.

    Args:
        wrong: from :func:`wrong_functions`.
        required: the kernels were asked for.
        warn: told of each, and of :data:`FOLD` and :data:`GRAPH`, which the caller leaves out.

    Raises:
        ValueError: a kernel is wrong and was asked for.
    """
    for name, reason in wrong.items():
        text = f"wrong on this card: {reason}"
        if required and name not in (FOLD, GRAPH):
            raise ValueError(f"{text}; set --step.kernels auto or reference")
        warn(f"{text}; the slower way is taken: please report what arat-fast doctor prints")
    replace_operations(wrong)


def prepare(
    operations: Mapping[str, Operation],
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    display: Display,
    warn: Callable[[str], object],
    *,
    trains: bool,
    required: bool = False,
) -> dict[str, str]:
    """Let references run in place of what computes wrongly on this process's GPU, as rank 0 finds
    it on its own.

    Args:
        operations, dtype, device: as for :func:`examine`.
        ranks: the processes of the job.
        display: shows progress, and is told what is left for the next time.
        warn, required: as for :func:`replace_wrong`.
        trains: as for :func:`examine`.

    Returns:
        As :func:`wrong_functions`.

    Raises:
        ValueError: as :func:`examine` and :func:`replace_wrong`.
    """
    found: dict[str, str] = {}
    if ranks.is_main:
        with display.evaluating() as bar:
            record, _ = examine(operations, dtype, device, whole=False, trains=trains, progress=bar)
        known = record["operations"]
        if left := len(operations.keys() - known.keys()):
            display.say(
                f"self-check: {left} of {len(operations)} operations are left for the next run"
            )
        own = {*operations, GRAPH} if trains else operations.keys()
        found = wrong_functions({name: r for name, r in known.items() if name in own})
    found = json.loads(ranks.broadcast_bytes(json.dumps(found).encode()))
    replace_wrong(found, required, warn)
    return found


def card(device: torch.device) -> Record:
    """What a check's result belongs to."""
    found = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "card": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_gib": round(found.total_memory / 2**30, 1),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "commit": source_commit(),
        "versions": versions(),
    }


def cache_folder() -> Path:
    """Where results are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "arat-fast" / "self-check"


def examine(
    operations: Mapping[str, Operation],
    dtype: torch.dtype,
    device: torch.device,
    *,
    whole: bool,
    trains: bool,
    progress: Progress | None = None,
) -> tuple[Record, Path]:
    """Check a card, and keep the result.

    Args:
        operations: from :func:`operations_of`.
        dtype: of activations.
        device: the GPU.
        whole: check and time everything, however long it takes; else what is not known yet of this
            card with these versions, for :data:`SECONDS`.
        trains: the captured step is checked too, which an evaluation has none of.
        progress: as for :func:`check`.

    Returns:
        The record, "operations" of which are the records by name, and its file.

    Raises:
        ValueError: as :func:`check`.
    """
    facts: Record = {**card(device), "dtype": str(dtype).removeprefix("torch.")}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / f"{key[:16]}.json"
    known: dict[str, Record] = {}
    if not whole:
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(file.read_text())["operations"]
    rate = copy_rate(device) if whole else None
    if rate is not None:
        facts["copy_gb_per_s"] = round(rate / 1e9, 1)
    record: Record = {**facts, "operations": known}

    def keep(records: dict[str, Record]) -> None:
        record["operations"] = records
        # Not to be able to keep it is no reason not to train.
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, record)

    # A search takes longer than the check, which has one batch of each shape.
    with nullcontext() if whole else no_algorithm_search():
        found = check(
            operations,
            dtype,
            device,
            known=known,
            seconds=math.inf if whole else 0.75 * SECONDS,
            rate=rate,
            progress=progress,
            keep=keep,
        )
        if trains and GRAPH not in found:
            # Of what a run takes in their place.
            replace_operations(wrong_functions(found))
            keep({**found, GRAPH: check_graph(device, dtype)})
    torch.cuda.empty_cache()
    return record, file


def last_result() -> tuple[Record, Path] | None:
    """The newest record and its file."""
    files = sorted(cache_folder().glob("*.json"), key=lambda file: file.stat().st_mtime)
    with suppress(OSError, ValueError):
        return (json.loads(files[-1].read_text()), files[-1]) if files else None
    return None


def table(record: Record) -> str:
    """A record for people to read."""
    facts = {k: v for k, v in record.items() if k not in ("operations", "versions")}
    facts |= record["versions"]
    rows = [f"{name:20} {fact}" for name, fact in facts.items() if fact is not None]
    rows.append(f"{'operation':52} {'of budget':>9} {'µs':>9} {'of copy':>8}")
    for name, found in record["operations"].items():
        columns = [
            "" if found.get(key) is None else shown.format(found[key])
            for key, shown in (
                ("share", "{:.2f}"),
                ("microseconds", "{:.1f}"),
                ("share_of_copy", "{:.0%}"),
            )
        ]
        row = f"{name:52} {columns[0]:>9} {columns[1]:>9} {columns[2]:>8}"
        rows.append(f"{row}  WRONG: {found['error']}" if found["error"] else row)
    return "\n".join(rows)
