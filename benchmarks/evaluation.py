"""``python -m benchmarks.evaluation``: AutoAttack on the fast path beside the reference code."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from arat_fast.data import load_data
from arat_fast.data.bad_images import BadImages
from arat_fast.device import full_float32
from arat_fast.display import Display, SuiteProgress, Unit
from arat_fast.evaluation.autoattack import NUM_TARGETS, private_random_state
from arat_fast.evaluation.autoattack import autoattack as run_autoattack
from arat_fast.evaluation.checkpoint import place_network
from arat_fast.evaluation.evaluate import (
    ImageSet,
    ThreatModel,
    evaluation_mode,
    predict,
)
from arat_fast.models.split_batch_norm import use_branch, use_statistics
from arat_fast.saved.network import read_saved
from arat_fast.settings import Count, Number
from benchmarks import harness
from benchmarks.harness import Bench, Record, alternate, command
from benchmarks.measure import seconds, synchronize
from benchmarks.table import grid, page


@dataclass(frozen=True)
class Options(harness.Options):
    """Time AutoAttack on the fast path beside pyautoattack as it is, and compare what survives."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Runs or checkpoints; each is attacked in its own ball."""
    _: KW_ONLY
    recipe: str | None = None
    """Recipe whose data, model and threat model are used; needed where a file is no run's own."""
    max_samples: Number = 0
    """Attack the first test images only; 0 for all."""
    batch_size: Count = 500
    """Images at once."""
    fast_only: bool = False
    """Leave the reference code out: times alone, without a comparison."""
    rounds: Count = 2
    """Evaluations of each, in turns, of which the median counts."""
    seed: int = 0
    """Seed of the attacks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints:
            raise ValueError("a run or a checkpoint is expected, got nothing")


def run(options: Options, display: Display | None = None) -> int:
    """Run the benchmark and write its record.

    Returns:
        0, or 1 where the two paths left different images standing.
    """
    bench = Bench("eval", options, table, display)
    bench.record |= {"batch_size": options.batch_size, "seed": options.seed}
    for checkpoint in options.checkpoints:
        bench.record["results"].append(_entry(bench, checkpoint))
        bench.save()
    return bench.finish()


def _entry(bench: Bench[Options], checkpoint: Path) -> Record:
    options = bench.options
    saved = read_saved(checkpoint, recipe=options.recipe, with_config=True)
    config = saved.config
    assert config is not None
    with bench.display.evaluating() as bar:
        data = load_data(
            config.data,
            device=bench.device,
            seed=config.seed,
            eval_batch_size=options.batch_size,
            bad_images=BadImages(saved.path.parent, progress=bar),
        )
    model = place_network(saved, config, data, bench.device)
    images = ImageSet.from_batches(data.test, options.max_samples)
    threat = ThreatModel(config.attack.eps, config.attack.norm)
    return {
        "checkpoint": saved.path.parent.name,
        "model": config.model.name,
        "objective": config.objective.name,
        "num_samples": len(images.y),
        "norm": threat.norm,
        "eps": threat.eps,
        **measure(bench, model, images, threat),
    }


def measure(
    bench: Bench[Options], model: nn.Module, images: ImageSet, threat: ThreatModel
) -> Record:
    """Attack one network by both paths, in turns.

    Returns:
        "fast", what :meth:`record` of the result says; "fast_round_seconds" and "fast_seconds", the
        median; "fast_round_seconds_by_attack"; and likewise "plain_…" with "plain_correct", the
        number of images "num_different" and, only if that is none, the "speedup".
    """
    options = bench.options
    with evaluation_mode(model):
        # What is loaded or compiled at first use is not measured.
        predict(model, images.x, options.batch_size)
    robust: dict[str, Tensor] = {}
    entry: Record = {"fast_round_seconds_by_attack": []}

    def fast() -> None:
        with bench.display.evaluating() as bar:
            clock = _Clock(bench.device, bar)
            result = run_autoattack(
                model,
                images,
                threat,
                batch_size=options.batch_size,
                seed=options.seed,
                progress=clock,
            )
            entry["fast_round_seconds_by_attack"].append(clock.seconds())
        entry["fast"] = result.record()
        robust["fast"] = result.correct

    def plain() -> None:
        bench.say("pyautoattack as it is; this takes longer and says nothing")
        robust["plain"] = reference_robust(model, images, threat, options.batch_size, options.seed)

    paths = {"fast": fast} if options.fast_only else {"fast": fast, "plain": plain}
    calls = {name: partial(seconds, path, bench.device) for name, path in paths.items()}
    rounds, failures = alternate(calls, options.rounds)
    for name, failed in failures.items():
        bench.problem(f"{name}: {failed['reason']}")
    for name, values in rounds.items():
        entry[f"{name}_round_seconds"] = values
        entry[f"{name}_seconds"] = statistics.median(values)
    if len(rounds) == 2:
        entry["plain_correct"] = int(robust["plain"].sum())
        entry["num_different"] = int((robust["plain"] != robust["fast"]).sum())
        if entry["num_different"]:
            bench.problem(f"{entry['num_different']} images differ: the times do not count")
        else:
            entry["speedup"] = entry["plain_seconds"] / entry["fast_seconds"]
    return entry


def table(record: Record) -> str:
    """The record for people to read."""
    head = ["network", "images", "stand", "fast, s", "pyautoattack, s", "times as fast"]
    rows = [
        [
            entry["checkpoint"],
            str(entry["num_samples"]),
            str(entry["fast"]["correct"]) if "fast" in entry else "–",
            *(
                f"{entry[name]:.{digits}f}" if name in entry else "–"
                for name, digits in (("fast_seconds", 1), ("plain_seconds", 1), ("speedup", 2))
            ),
        ]
        for entry in record["results"]
    ]
    return page("AutoAttack", record, grid(head, rows))


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
        # Says that it is in eval mode, which the reference code expects.
        network = nn.Sequential(model)
        network.training = False
        adversary = AutoAttack(
            network,
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


class _Clock:
    """Passes progress on, and notes when each attack began."""

    def __init__(self, device: torch.device, show: SuiteProgress) -> None:
        self.device = device
        self.show = show
        self.starts: dict[str, float] = {}

    def __call__(
        self, name: str, done: int, total: int, unit: Unit = "images", note: str = ""
    ) -> None:
        attack = name.partition(" ")[2].partition(" ")[0]
        if attack not in self.starts:
            synchronize(self.device)
            self.starts[attack] = time.perf_counter()
        self.show(name, done, total, unit, note)

    def seconds(self) -> dict[str, float]:
        """Seconds of each attack; the last one ends now."""
        names = list(self.starts)
        ends = [*list(self.starts.values())[1:], time.perf_counter()]
        return {name: end - self.starts[name] for name, end in zip(names, ends, strict=True)}


if __name__ == "__main__":
    sys.exit(command(Options, run, "evaluation"))
