"""``arat-fast bench eval``: AutoAttack on the fast path beside the reference code as it is."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from arat_fast.bench.machine import describe_machine, new_record, synchronize
from arat_fast.data import load_data
from arat_fast.data.bad_images import BadImages
from arat_fast.device import full_float32, resolve_device
from arat_fast.display import Display
from arat_fast.evaluation.autoattack import NUM_TARGETS, private_random_state
from arat_fast.evaluation.autoattack import autoattack as run_autoattack
from arat_fast.evaluation.checkpoint import place_network
from arat_fast.evaluation.evaluate import ImageSet, Progress, evaluation_mode, predict
from arat_fast.evaluation.threat_model import ThreatModel
from arat_fast.files import write_json
from arat_fast.models.split_batch_norm import use_branch, use_statistics
from arat_fast.saved.network import read_saved


@dataclass(frozen=True)
class EvalBenchOptions:
    """Time AutoAttack on the fast path beside pyautoattack as it is, and compare what survives."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Runs or checkpoints; each is attacked in its own ball."""
    recipe: str | None = None
    """Recipe whose data, model and threat model are used; needed where a file is no run's own."""
    max_samples: int = 0
    """Attack the first test images only; 0 for all."""
    batch_size: int = 500
    """Images at once; >= 1."""
    fast_only: bool = False
    """Leave the reference code out: times alone, without a comparison."""
    data_root: Path | None = None
    """Folder of the datasets; default the run's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    rounds: int = 2
    """Evaluations of each, in turns, of which the median counts; >= 1."""
    threads: int = 0
    """PyTorch's threads on the CPU; 0 for as many as it takes by itself."""
    seed: int = 0
    """Seed of the attacks."""
    out: Path | None = None
    """File for the record; default benchmarks/results/eval_DEVICE_DATE.json in a checkout."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("a run or a checkpoint is expected after bench eval, got nothing")
        if self.batch_size < 1 or self.max_samples < 0 or self.threads < 0:
            raise ValueError(
                "batch_size >= 1, max_samples >= 0 and threads >= 0 are expected, got "
                f"{self.batch_size}, {self.max_samples} and {self.threads}"
            )
        if self.rounds < 1:
            raise ValueError(f"--rounds must be >= 1, got {self.rounds}")


def bench_eval(options: EvalBenchOptions, display: Display | None = None) -> int:
    """Run the benchmark and write its record.

    Returns:
        0, or 1 where the two paths left different images standing.
    """
    display = display or Display()
    device = resolve_device(options.device)
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        now = datetime.datetime.now()
        path = new_record("eval", options.out, device, now)
        record: dict[str, Any] = {
            "kind": "eval",
            "date": now.isoformat(timespec="seconds"),
            "machine": describe_machine(device),
            "batch_size": options.batch_size,
            "seed": options.seed,
            "results": [],
        }
        for checkpoint in options.checkpoints:
            entry = _measure(checkpoint, options, device, display)
            record["results"].append(entry)
            write_json(path, record)
            display.say(_told(entry))
    finally:
        torch.set_num_threads(before)
    print(f"record: {path}")
    return int(any(entry.get("num_different", 0) for entry in record["results"]))


def _measure(
    checkpoint: Path, options: EvalBenchOptions, device: torch.device, display: Display
) -> dict[str, Any]:
    saved = read_saved(checkpoint, recipe=options.recipe, with_config=True)
    config = saved.config
    assert config is not None
    if options.data_root is not None:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, root=options.data_root)
        )
    with display.evaluating() as bar:
        data = load_data(
            config.data,
            device=device,
            seed=config.seed,
            eval_batch_size=options.batch_size,
            bad_images=BadImages(saved.path.parent, progress=bar),
        )
    model = place_network(saved, config, data, device)
    images = ImageSet.from_batches(data.test, options.max_samples)
    threat = ThreatModel(config.attack.eps, config.attack.norm)
    entry: dict[str, Any] = {
        "checkpoint": saved.path.parent.name,
        "model": config.model.name,
        "objective": config.objective.called,
        "num_samples": len(images.y),
        "norm": threat.norm,
        "eps": threat.eps,
    }
    with evaluation_mode(model):
        # What is loaded or compiled at first use is not measured.
        predict(model, images.x, options.batch_size)

    def run_fast() -> float:
        with display.evaluating() as bar:
            clock = _Clock(device, partial(bar, unit="passes"))
            synchronize(device)
            start = time.perf_counter()
            result = run_autoattack(
                model,
                images,
                threat,
                batch_size=options.batch_size,
                seed=options.seed,
                progress=clock,
            )
            synchronize(device)
            seconds = time.perf_counter() - start
            entry["fast_seconds_by_attack"] = clock.seconds()
        entry["fast"] = result.record()
        robust["fast"] = result.correct
        return seconds

    def run_plain() -> float:
        display.say("pyautoattack as it is; this takes longer and says nothing")
        synchronize(device)
        start = time.perf_counter()
        robust["plain"] = reference_robust(model, images, threat, options.batch_size, options.seed)
        synchronize(device)
        return time.perf_counter() - start

    robust: dict[str, Tensor] = {}
    calls = {"fast": run_fast}
    if not options.fast_only:
        calls["plain"] = run_plain
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(options.rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            seconds[name].append(calls[name]())
    for name, values in seconds.items():
        entry[f"{name}_round_seconds"] = values
        entry[f"{name}_seconds"] = statistics.median(values)
    if options.fast_only:
        return entry
    entry["plain_correct"] = int(robust["plain"].sum())
    entry["num_different"] = int((robust["plain"] != robust["fast"]).sum())
    if entry["num_different"] == 0:
        entry["speedup"] = entry["plain_seconds"] / entry["fast_seconds"]
    return entry


def reference_robust(
    model: nn.Module, images: ImageSet, threat: ThreatModel, batch_size: int, seed: int
) -> Tensor:
    """The images (N,) that stand after pyautoattack's own standard evaluation of the network.

    The network is what a script would hand over: in eval mode, its parameters as they were loaded,
    so that FAB, which runs a whole backward pass, also computes their gradients.

    Args:
        model: the network, in any mode.
        images: float32 images and labels on the model's device.
        threat: ball of the attack.
        batch_size: samples attacked at once, >= 1.
        seed: of every attack.
    """
    from pyautoattack import AutoAttack

    with (
        private_random_state(images.x.device),
        use_branch(model, "adv"),
        use_statistics(model, "running"),
        full_float32(),
    ):
        adversary = AutoAttack(
            _Eval(model),
            norm=threat.norm,
            eps=threat.eps,
            seed=seed,
            device=images.x.device,
            version="standard",
        )
        num_targets = min(NUM_TARGETS, len(images.classes) - 1)
        adversary.apgd_targeted.n_target_classes = num_targets
        adversary.fab.n_target_classes = num_targets
        x_adv, _ = adversary.run_standard_evaluation(images.x, images.y, batch_size=batch_size)
        robust = predict(model, x_adv, batch_size).argmax(dim=1) == images.y
    model.zero_grad(set_to_none=True)
    return robust


class _Eval(nn.Module):
    """A network that says it is in eval mode, which the reference code expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


class _Clock:
    """Passes progress on, and notes when each attack began."""

    def __init__(self, device: torch.device, show: Progress) -> None:
        self.device = device
        self.show = show
        self.starts: dict[str, float] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        attack = name.rpartition(" ")[2]
        if attack not in self.starts:
            synchronize(self.device)
            self.starts[attack] = time.perf_counter()
        self.show(name, done, total)

    def seconds(self) -> dict[str, float]:
        """Seconds of each attack; the last one ends now."""
        names = list(self.starts)
        ends = [*list(self.starts.values())[1:], time.perf_counter()]
        return {name: end - self.starts[name] for name, end in zip(names, ends, strict=True)}


def _told(entry: dict[str, Any]) -> str:
    text = (
        f"{entry['checkpoint']}: fast path {entry['fast_seconds']:.1f} s, "
        f"{entry['fast']['correct']}/{entry['num_samples']} stand"
    )
    if "plain_seconds" not in entry:
        return text
    verdict = (
        f"{entry['speedup']:.2f} times as fast, the same images"
        if "speedup" in entry
        else f"{entry['num_different']} images differ, so that the times do not count"
    )
    return (
        f"{text}; pyautoattack {entry['plain_seconds']:.1f} s, {entry['plain_correct']} stand; "
        f"{verdict}"
    )
