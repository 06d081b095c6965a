"""The end of a run: the weights that are deployed, their evaluation, the summary."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from torch import nn

from arat_fast.build import implementation
from arat_fast.config import Config, config_to_dict
from arat_fast.data.batches import stream_generator
from arat_fast.device import describe_device, source_commit, versions
from arat_fast.doctor import FOLD, GRAPH
from arat_fast.evaluation import ThreatModel
from arat_fast.evaluation.evaluate import ImageSet
from arat_fast.evaluation.pieces import read_arrays
from arat_fast.evaluation.suite import evaluate_all, save_examples
from arat_fast.files import read_json, write_json
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.run.state import Run
from arat_fast.saved import export_plain, save_safetensors
from arat_fast.saved.network import SAFETENSORS, describe, header
from arat_fast.saved.weights import read_safetensors
from arat_fast.statistics import pack
from arat_fast.training.averaging import refresh_batch_norm
from arat_kernels.implementation import choose


def deploy(run: Run) -> tuple[nn.Module, str]:
    """The weights that are evaluated and exported, the average if there is one; their name.

    Raises:
        EvaluationStopped: a signal came while the statistics of the average were re-estimated.
    """
    if run.average.model is None:
        return run.model, "last"
    if not run.average.statistics_fresh:
        run.display.say("re-estimating the BatchNorm statistics of the averaged weights")
        refresh_batch_norm(
            run.average.model,
            run.more_batches(),
            run.objective,
            run.config.attack,
            stream_generator(run.config.seed, "refresh", run.device),
            ranks=run.ranks,
            plan=run.data.train.plan,
        )
        run.average.statistics_fresh = True
        run.save()
    return run.average.model, run.config.average.kind


def export(run: Run, model: nn.Module, kind: str) -> None:
    """Write the deployed weights to model.safetensors."""
    split = any(isinstance(m, SplitBatchNorm2d) for m in model.modules())
    save_safetensors(
        export_plain(model) if split else model,
        run.out / SAFETENSORS,
        header(
            describe(
                run.config,
                kind,
                "adv" if split else "shared",
                run.data.train.image_shape,
                run.data.train.classes,
            )
        ),
    )


def evaluate(run: Run, model: nn.Module, kind: str) -> dict[str, Any]:
    """Export and evaluate the deployed weights; the content of the summary, on rank 0.

    Raises:
        EvaluationStopped: a signal came; what is finished is kept, and in the facts of the run.
    """
    config = run.config
    accuracy: dict[str, Any] = {}
    run.measured = {
        "evaluation": config_to_dict(config)["eval"],
        "split": "test",
        "model": kind,
        "accuracy": accuracy,
    }
    images = ImageSet.from_batches(run.data.test, config.eval.max_samples, run.ranks.shard)
    if run.ranks.is_main:
        export(run, model, kind)
    start = time.perf_counter()
    with run.display.evaluating() as bar:
        suite = evaluate_all(
            model,
            images,
            ThreatModel(config.attack.eps, config.attack.norm),
            num_steps=config.eval.num_steps,
            alpha=config.eval.step_size(config.attack.eps),
            attacks=run.attacks,
            batch_size=config.eval.batch_size,
            seed=config.seed,
            folder=run.out / "evaluation.partial",
            progress=run.interruptible(bar),
            check=run.check_stop,
            found=lambda name, result: accuracy.update({name: result.record()}),
            ranks=run.ranks,
        )
    summary: dict[str, Any] = {}
    if run.ranks.is_main:
        run.checkpoints.check()
        examples = suite.strongest_examples()
        save_examples(run.out / "examples.npz", model, images, examples)
        summary = {
            **facts(run, "finished"),
            "test_samples": len(suite.results["clean"].correct),
            "right": {name: pack(r.correct.cpu().numpy()) for name, r in suite.results.items()},
            **suite.remarks(),
            "wall_seconds": {"train": run.progress.seconds, "eval": time.perf_counter() - start},
        }
        write_json(run.out / "summary.json", summary)
    run.ranks.meet()
    suite.pieces.remove()
    return summary


def finished_summary(run: Run) -> dict[str, Any] | None:
    """The summary of a run that had come to its end, evaluated as it is asked for now.

    Weights that are damaged or missing are written again; with damaged examples there is none, and
    the evaluation, which makes them, is made again.
    """
    if run.progress.step < run.total_steps:
        return None
    content = b""
    if run.ranks.is_main:
        with suppress(OSError, ValueError):
            summary = read_json(run.out / "summary.json")
            wanted = {"status": "finished", "evaluation": config_to_dict(run.config)["eval"]}
            # Of this run: another's may have been copied here.
            wanted["run"] = summary.get("run") and run.id
            whole = read_arrays(run.out / "examples.npz") is not None
            if whole and all(summary.get(key) == value for key, value in wanted.items()):
                content = json.dumps(summary).encode()
    content = run.ranks.broadcast_bytes(content)
    if not content:
        return None
    said = "is finished already; nothing was trained or evaluated"
    if run.ranks.is_main:
        try:
            read_safetensors(run.out / SAFETENSORS)
        except (OSError, ValueError):
            export(run, *deploy(run))
            said += f", {SAFETENSORS} was written again"
        if not (run.out / "metrics.jsonl").exists():
            said += "; metrics.jsonl is missing, and with it the curves"
    run.display.say(f"{run.out} {said}")
    return dict(json.loads(content))


def trial_limits(config: Config) -> dict[str, int]:
    """What makes a run a trial: "limit" of the training images and "max_steps", where set."""
    limits = {"limit": config.data.limit, "max_steps": config.train.max_steps}
    return {name: limit for name, limit in limits.items() if limit}


def facts(run: Run, status: str) -> dict[str, Any]:
    """What is known of a run whether or not it came to its end."""
    config, progress = run.config, run.progress
    kernels = choose(implementation(config), next(run.model.parameters()))
    replaced = ", ".join(sorted(run.wrong_on_card.keys() - {FOLD, GRAPH}))
    return {
        "recipe": config.recipe,
        "run": run.id,
        "status": status,
        "objective": config.objective.name,
        "dataset": config.data.name,
        "seed": config.seed,
        "epochs": run.total_steps / run.steps_per_epoch
        if config.train.max_steps
        else config.train.epochs,
        **trial_limits(config),
        "natural_model": progress.natural_model,
        "steps": progress.step,
        "processes": run.ranks.world_size,
        "num_parameters": sum(p.numel() for p in run.model.parameters()),
        "train_samples": run.data.train.num_samples,
        "classes": list(run.data.train.classes),
        "wall_seconds": {"train": progress.seconds},
        "images_per_second": run.images_seen() / max(progress.seconds, 1e-9),
        "device": describe_device(run.device),
        "precision": str(run.precision).removeprefix("torch."),
        "versions": versions(),
        "kernels": "; reference: ".join([kernels, *([replaced] if replaced else [])]),
        "replayed_steps": run.step.num_replayed,
        "folded_batch_norms": run.step.num_folded,
        **({"warnings": run.warnings} if run.warnings else {}),
        "command": run.command,
        "commit": source_commit(),
        **run.measured,
    }
