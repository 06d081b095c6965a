"""What happens beside the training itself: logs, evaluations, analyses, remarks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn

from arat_fast.analysis.snapshot import analyze_training
from arat_fast.config import OWN_IMAGES
from arat_fast.device import describe_device
from arat_fast.evaluation import ThreatModel, clean_accuracy, pgd_accuracy
from arat_fast.evaluation.evaluate import ImageSet, share_evaluation
from arat_fast.evaluation.suite import attacks_left_out
from arat_fast.files import named, open_log
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.settings import shown
from arat_fast.statistics import wilson_interval
from arat_fast.training.awp import AWP
from arat_fast.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from arat_fast.run.state import Run

MAX_SHARE_OF_FIRST = 0.05
"""Of the first weights in an exponential average, above which a run says so."""

FEW_STEPS = 500
"""Update steps of a whole run below which one on own images says how many it has. The digits, the
easiest images and the shortest of the recipes, have 529."""

FEW_FOR_STATISTICS = 64
"""Images of one process below which a run says that BatchNorm sees them alone."""

SLOWER = 4
"""Times that steps must have become slower, three log lines in turn, for a run to say so."""


class Restart(Exception):
    """Raised by a hook that has put the run back to an earlier step: it goes on from there."""


class Hook:
    """Something that is told of a run's course; every method may be left out.

    All processes of a job tell their hooks the same in the same order, so that a hook may use
    collectives; one that writes files does so where ``run.ranks.is_main``. A hook with a
    ``name`` is part of the checkpoints.
    """

    name: str = ""

    def begin(self, run: Run) -> None:
        """Before the first step, once everything is built or restored."""

    def before_epoch(self, run: Run, epoch: int) -> None:
        """``epoch`` epochs are done, and another one begins; not again where it is resumed."""

    def log(self, run: Run, line: dict[str, Any]) -> None:
        """There are numbers: ``line["kind"]`` is "train", "eval", "analysis", or a hook's own."""

    def end(self, run: Run) -> None:
        """The last step is done."""

    def sync(self) -> None:
        """Bring what was written to disk: a checkpoint follows. Called in a thread."""

    def close(self) -> None:
        """The run is over, whatever its end."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which :meth:`load_state_dict` goes on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class MetricsLog(Hook):
    """``metrics.jsonl``: one JSON object a line, appended; continued from where a checkpoint is.

    What an interrupted run has written after its checkpoint goes with the first line that is
    written, so that a run that is found to be finished loses none.

    Args:
        path: the file.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keep: int | None = 0
        self.file: BinaryIO | None = None

    def begin(self, run: Run) -> None:
        self.file = open_log(self.path)

    def log(self, run: Run, line: dict[str, Any]) -> None:
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        file = self._cut()
        with named(self.path):
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()

    def sync(self) -> None:
        if self.file is not None:
            with named(self.path):
                os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def state_dict(self) -> dict[str, Any]:
        file = self._cut()
        file.flush()
        return {"bytes": file.tell()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.keep = state["bytes"]

    def _cut(self) -> BinaryIO:
        assert self.file is not None
        if self.keep is not None:
            # Whole lines only, whatever has become of the file.
            self.file.truncate(self.path.read_bytes()[: self.keep].rfind(b"\n") + 1)
            self.file.seek(0, os.SEEK_END)
            self.keep = None
        return self.file


class Remarks(Hook):
    """Says what a run is and what it finds out on its way."""

    def __init__(self) -> None:
        self.said_folding = False
        self.fastest, self.num_slow = 0.0, 0

    def begin(self, run: Run) -> None:
        config, ranks, step = run.config, run.ranks, run.progress.step
        if run.resume and not run.is_resumed and run.progress.natural_model is None:
            run.display.say(f"nothing to resume in {run.out}: a new run")
        resumed = f" from step {step}" if step else ""
        epochs = config.train.epochs
        share = run.data.train.plan.largest_share
        tests = run.data.test.num_samples
        tests = min(tests, config.eval.max_samples or tests)
        names = {"pgd": f"PGD-{config.eval.num_steps}", "autoattack": "AutoAttack"}
        left_out = attacks_left_out(run.attacks, run.data.test.num_classes)
        attacks = " and ".join(names[name] for name in run.attacks if name not in left_out)
        together = "" if ranks.alone else f" in {ranks.world_size} processes of {share} images each"
        radius = f"{config.attack.norm} {shown(config.attack.eps)}"
        run.display.say(
            f"{config.recipe}: {config.objective.name}, {config.model.name}, {radius}, "
            f"{run.data.train.num_samples} images, {epochs} epoch{'' if epochs == 1 else 's'}, "
            f"then {attacks} on {tests} test images, "
            f"{run.precision} on {describe_device(run.device)}{together}{resumed}; run folder "
            f"{run.out}"
        )
        own = config.data.name in OWN_IMAGES
        if own and config.data.flip and run.given_data is None:
            run.display.say_once(
                "training mirrors images left to right at random: --data.no-flip where that "
                "changes the class (arrows, letters)"
            )
        own = own and config.init is None
        if own and run.total_steps < FEW_STEPS and not config.train.max_steps:
            run.display.say(
                f"only {run.total_steps} update steps in all, {run.steps_per_epoch} an epoch, in "
                "which fresh weights may learn nothing: start from weights (--init), raise "
                "--train.epochs or lower --data.batch-size (docs/tutorial-your-images.md)"
            )
        by_itself = ranks.world_size > 1 and not config.distributed.sync_bn
        norms = (SplitBatchNorm2d, nn.BatchNorm2d)
        has_norms = any(isinstance(module, norms) for module in run.model.modules())
        if by_itself and has_norms and share < FEW_FOR_STATISTICS:
            run.warn(
                f"each BatchNorm has the statistics of {share} images, this process's share of "
                f"{config.data.batch_size}: raise --data.batch-size or set --distributed.sync-bn"
            )
        layers = getattr(run.objective, "layers", ())
        if layers:
            run.display.say(
                f"regularised layers: {', '.join(layers)} (objective.layers sets others)"
            )
        if config.objective.splits_batch_norm and not has_norms:
            run.display.say(
                f"{config.model.name} has no BatchNorm to split: both kinds of images share every "
                f"layer, and {config.objective.name} is its loss alone"
            )

    def before_epoch(self, run: Run, epoch: int) -> None:
        metrics, epochs = run.metrics, run.config.train.epochs
        accuracy = metrics.epoch_mean("accuracy_clean")
        if epoch != -(-epochs // 4) or accuracy is None:
            return
        correct = round(accuracy * metrics.epoch_samples)
        if wilson_interval(correct, metrics.epoch_samples)[0] <= 1 / run.data.train.num_classes:
            run.display.say(
                f"still at chance after {epoch} of {epochs} epochs, {100 * accuracy:.1f} % of the "
                "clean training images: docs/troubleshooting.md"
            )

    def log(self, run: Run, line: dict[str, Any]) -> None:
        speed = line.get("images_per_second")
        if speed is not None and run.device.type == "cpu" and torch.get_num_threads() > 1:
            self.fastest = max(self.fastest, speed)
            self.num_slow = self.num_slow + 1 if speed < self.fastest / SLOWER else 0
            if self.num_slow == 3:
                run.display.say_once(
                    f"steps are over {SLOWER} times slower than before: beside other work on this "
                    "machine OMP_NUM_THREADS=1 is faster (docs/troubleshooting.md); stop, and go "
                    "on so with --resume"
                )
        folded = run.step.folded_network
        if folded is None or self.said_folding:
            return
        self.said_folding = True
        left = f"; left as they are: {', '.join(folded.unfolded)}" if folded.unfolded else ""
        run.display.say(
            f"attack on running statistics: {len(folded.folded)} BatchNorm layers folded into "
            f"convolutions, {len(folded.affine)} affine maps of their own{left}"
        )

    def end(self, run: Run) -> None:
        share = run.average.share_of_first
        if share > MAX_SHARE_OF_FIRST:
            run.warn(
                "young average: the training was short, and in the averaged weights, which are "
                f"evaluated, those after step {run.average.start_step + 1} still count "
                f"{100 * share:.0f} %; train longer, "
                "lower --average.decay, or --average.kind none"
            )


class EpsWarmup(Hook):
    """Gives the step's attack the radius of the epoch: ``attack.eps_warmup``."""

    def begin(self, run: Run) -> None:
        self.before_epoch(run, run.progress.step // run.steps_per_epoch)

    def before_epoch(self, run: Run, epoch: int) -> None:
        eps = run.config.attack.in_epoch(epoch).eps
        run.step.attack = dataclasses.replace(run.step.attack, eps=eps, eps_warmup=0)


class Evaluation(Hook):
    """Clean and PGD accuracy every few epochs, and the best checkpoint by validation."""

    name = "evaluation"

    def __init__(self) -> None:
        self.best: float | None = None
        self.evaluated_epoch = 0

    def before_epoch(self, run: Run, epoch: int) -> None:
        train = run.config.train
        every = train.eval_every
        if not every or not epoch or epoch % every or epoch == self.evaluated_epoch:
            return
        run.bar.show("evaluating")
        networks = {"last": run.model}
        if run.average.model is not None and run.config.average.kind == "ema":
            networks["ema"] = run.average.model
        lines = [self._evaluate(run, kind, model) for kind, model in networks.items()]
        # Not before all are there: what is broken off is made again as a whole.
        for line in lines:
            run.log("eval", epoch, line)
            name = "" if line["model"] == "last" else f", {line['model']}"
            clean, pgd = f"{line['clean']:.1%}", f"{line['pgd']:.1%}"
            # The training's own radius may still grow.
            attack = f"PGD-{line['num_steps']} at eps {shown(run.config.attack.eps)}"
            run.display.say(
                f"  epoch {epoch}  {line['num_samples']:,} {line['split']} images{name}: "
                f"clean {clean}  {attack} {pgd}"
            )
        self.evaluated_epoch = epoch
        accuracy = lines[-1]["pgd"]
        if train.keep_best and (self.best is None or accuracy > self.best):
            self.best = accuracy
            run.save(best=True)

    def _evaluate(self, run: Run, kind: str, model: nn.Module) -> dict[str, Any]:
        """Accuracies on the validation images, else on the test images."""
        config = run.config
        split, batches = ("val", run.data.val) if run.data.val else ("test", run.data.test)
        images = ImageSet.from_batches(batches, config.eval.max_samples, run.ranks.shard)
        clean = share_evaluation(
            run.ranks,
            lambda own: clean_accuracy(
                model, own, batch_size=config.eval.batch_size, check=run.check_stop
            ),
            images,
        )
        pgd = share_evaluation(
            run.ranks,
            lambda own: pgd_accuracy(
                model,
                own,
                ThreatModel(config.attack.eps, config.attack.norm),
                num_steps=config.eval.num_steps,
                alpha=config.eval.step_size(config.attack.eps),
                batch_size=config.eval.batch_size,
                seed=config.seed,
                progress=run.interruptible(),
                check=run.check_stop,
            ),
            images,
        )
        return {
            "split": split,
            "model": kind,
            "clean": clean.accuracy,
            "pgd": pgd.accuracy,
            "num_steps": config.eval.num_steps,
            "num_samples": len(pgd.correct),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "evaluated_epoch": self.evaluated_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.evaluated_epoch = state["best"], state["evaluated_epoch"]


class WeightPerturbation(Hook):
    """Adversarial weight perturbation, from the end of its warm-up on."""

    def begin(self, run: Run) -> None:
        self.before_epoch(run, run.progress.step // run.steps_per_epoch)

    def before_epoch(self, run: Run, epoch: int) -> None:
        awp = run.config.awp
        run.step.perturb_weights(AWP(awp.gamma) if awp.gamma and epoch >= awp.warmup else None)


class Analysis(Hook):
    """Gradient conflict and mixture distribution every few epochs, on rank 0's share."""

    name = "analysis"

    def __init__(self) -> None:
        self.analyzed_epoch = -1
        self.is_left_out = False

    def before_epoch(self, run: Run, epoch: int) -> None:
        every = run.config.analyze.every
        if every and not epoch % every:
            self._analyze(run, epoch)

    def end(self, run: Run) -> None:
        if run.config.analyze.every:
            self._analyze(run, run.config.train.epochs)

    def _analyze(self, run: Run, epoch: int) -> None:
        if epoch == self.analyzed_epoch:
            return
        if run.ranks.is_main:
            run.bar.show("analysing")
            run.log("analysis", epoch, self._record(run, epoch))
        self.analyzed_epoch = epoch
        # It can take longer than a collective waits.
        run.ranks.meet()

    def _record(self, run: Run, epoch: int) -> dict[str, Any]:
        # Those of the first epoch, whichever this is.
        batches = itertools.islice(run.data.train.epoch(0), run.config.analyze.num_batches)
        try:
            return analyze_training(run.config, run.model, run.objective, batches)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition(". ")[0]
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.is_left_out:
            run.display.say(
                f"the analysis of epoch {epoch}, in float32, is left out, as later ones may be: "
                f"{reason}; --analyze.every 0 leaves out all"
            )
        self.is_left_out = True
        return {"gradient_conflict": None, "mixture": None, "left_out": reason}

    def state_dict(self) -> dict[str, Any]:
        return {"analyzed_epoch": self.analyzed_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.analyzed_epoch = state["analyzed_epoch"]


def default_hooks(run: Run) -> list[Hook]:
    """Those of every run; rank 0 alone writes logs."""
    logs = [MetricsLog(run.out / "metrics.jsonl")] if run.ranks.is_main else []
    return [*logs, Remarks(), EpsWarmup(), Evaluation(), WeightPerturbation(), Analysis()]
