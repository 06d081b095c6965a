"""The training loop: epochs, checkpoints, evaluation, the files of a run."""

from __future__ import annotations

import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from arat_fast.analysis.snapshot import analyze_training, first_batches, headline_numbers
from arat_fast.build import build_model, build_objective, build_optimizer, implementation
from arat_fast.config import Config, config_from_dict, config_to_dict
from arat_fast.data import load_data
from arat_fast.data.bad_images import FILE as BAD_IMAGES
from arat_fast.data.bad_images import BadImages
from arat_fast.data.batches import Batch, ResidentBatches, stream_generator
from arat_fast.data.fingerprint import Fingerprint
from arat_fast.data.load import download_data
from arat_fast.device import (
    describe_device,
    resolve_precision,
    source_commit,
    versions,
)
from arat_fast.display import Display, TrainingBar
from arat_fast.distributed import ALONE, Ranks, place_of
from arat_fast.distributed.batch_norm import synchronize_batch_norm
from arat_fast.distributed.evaluation import share_evaluation
from arat_fast.distributed.ranks import Vote
from arat_fast.evaluation import ThreatModel, clean_accuracy, pgd_accuracy
from arat_fast.evaluation.evaluate import ImageSet, SuiteProgress, Unit, evaluation_mode, predict
from arat_fast.evaluation.suite import attacks_left_out, evaluate_all, save_examples
from arat_fast.files import write_json
from arat_fast.models.registry import MODELS
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.objectives import ARAT, ARREST, Objective
from arat_fast.run.natural import FOLDER as NATURAL_FOLDER
from arat_fast.run.natural import load_natural, natural_config
from arat_fast.saved import export_plain, save_safetensors
from arat_fast.saved.network import describe, header
from arat_fast.saved.weights import load_weights
from arat_fast.stop import (
    EXIT_CODES,
    EvaluationStopped,
    InterruptedRun,
    StopRequest,
    stop_on_signals,
)
from arat_fast.training.averaging import WeightAverage, refresh_batch_norm
from arat_fast.training.checkpoint import CHECKPOINT, CheckpointFolder, training_state
from arat_fast.training.metrics import MetricsFile, NotFiniteError, StepMetrics
from arat_fast.training.schedule import learning_rate, progressive_size
from arat_fast.training.step import is_out_of_memory, make_train_step
from arat_kernels.implementation import choose

PROBE_SAMPLES = 1000
"""The official code measures the balance on batches until it has seen this many samples."""
MAX_SHARE_OF_FIRST = 0.05
"""Of the first weights in an exponential average, above which a run says so."""

_FREE_TO_CHANGE: dict[str, tuple[str, ...]] = {
    "data": ("root", "download", "num_workers", "loader"),
    "step": ("graph",),
    "train": (
        "device",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "rollbacks",
        "rollback_factor",
    ),
    "eval": ("num_steps", "alpha", "autoattack", "batch_size", "max_samples"),
    "analyze": ("every", "num_batches"),
    "distributed": ("overlap", "timeout"),
}
"""Settings that do not change the weights, and may differ when a run is resumed."""


class Trainer:
    """One run: a configuration, a folder, and everything that moves while it trains.

    Args:
        config: what to train.
        out: folder of the run; made if absent.
        resume: go on from the folder's checkpoint, bit for bit; start afresh if there is none.
        command: command line to record in the summary.
        display: where progress is shown; by rank 0 alone.
        objective: makes an objective of your own from the network, where
            ``config.objective.name`` is "custom".
        ranks: the processes that train together; each makes a trainer and calls :meth:`run`. Rank 0
            alone reads and writes the files of the run; the others keep nothing in the folder but
            the finished parts of an evaluation, until it ends.
        bad_images: knows the files to leave out, of a run that this one is a part of; None looks
            for them, or takes those that a run that is resumed has found.

    Raises:
        FileExistsError: the folder holds a run already, and ``resume`` is not set.
        ValueError: the configuration does not fit the data or the checkpoint.
        FileNotFoundError: the dataset is not there.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        *,
        resume: bool = False,
        command: str = "",
        display: Display | None = None,
        objective: Callable[[nn.Module], Objective] | None = None,
        ranks: Ranks = ALONE,
        bad_images: BadImages | None = None,
    ) -> None:
        self.config = config
        self.out = out
        self.resume = resume
        self.command = command
        self.ranks = ranks
        self.display = display or Display()
        if not ranks.is_main:
            self.display = Display(Console(quiet=True))
        self.checkpoints = CheckpointFolder(out, config.train.keep_last)
        self.checkpoint_path = self.checkpoints.newest
        saved = self._load_saved(resume)
        self.device = ranks.device(config.train.device)
        # Shapes repeat, so that timing cuDNN's algorithms once pays.
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.precision = resolve_precision(config.step.precision, self.device)
        self.memory_format = (
            torch.channels_last if config.step.channels_last else torch.contiguous_format
        )
        download_data(config.data, ranks)
        with self.display.evaluating() as bar:
            # Also without a checkpoint: the natural run before may have begun with these files.
            self.bad_images = bad_images or BadImages(out if resume else None, ranks, bar)
            self.data = load_data(
                config.data,
                device=self.device,
                seed=config.seed,
                eval_batch_size=config.eval.batch_size,
                memory_format=self.memory_format,
                shard=ranks.shard,
                bad_images=self.bad_images,
            )
        if self.data.skipped:
            first = self.data.skipped[0]
            self.display.say(f"{len(self.data.skipped)} files were left out, the first: {first}")
        if config.train.keep_best and self.data.val is None:
            raise ValueError(
                "train.keep_best needs validation images, and the dataset has none of its own: set "
                f"data.num_val, got {config.data.num_val}"
            )
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.data.train).to(self.device)
        self.objective = build_objective(config, self.model, self.data.train, objective)
        if config.distributed.sync_bn and ranks.group is not None:
            synchronize_batch_norm(self.model, ranks.group)
            synchronize_batch_norm(self.objective, ranks.group)
        if not ranks.is_main:
            # The weights are the same everywhere; what dropout draws is not.
            self._seed_rank()
        self.optimizer = build_optimizer(
            config,
            [
                parameter
                for module in (self.model, self.objective)
                for parameter in module.parameters()
                if parameter.requires_grad
            ],
        )
        self.generator = stream_generator(config.seed, "attack", self.device)
        self.train_step = make_train_step(
            self.model,
            self.objective,
            config.attack,
            self.optimizer,
            precision=self.precision,
            fold=config.step.fold,
            graph=config.step.graph,
            noisy_clean=config.step.noisy_clean,
            generator=self.generator,
            assemble=self.data.train.assemble
            if isinstance(self.data.train, ResidentBatches)
            else None,
            accumulate=config.train.accumulate,
            ranks=ranks,
            overlap={"auto": None, "on": True, "off": False}[config.distributed.overlap],
            impl=implementation(config),
        )
        self.steps_per_epoch = len(self.data.train)
        self.total_steps = self.steps_per_epoch * config.train.epochs
        self.average = WeightAverage(
            config.average, int(config.average.start * config.train.epochs) * self.steps_per_epoch
        )
        if config.data.progressive and isinstance(self.data.train, ResidentBatches):
            raise ValueError(
                "data.progressive is for images that are read in batches, got a dataset that stays "
                "on the device; set --data.loader dataloader or dali"
            )
        self._attacks = ("pgd", "autoattack") if config.eval.autoattack else ("pgd",)
        for name, reason in attacks_left_out(self._attacks, self.data.test.num_classes).items():
            self.display.say(f"{name} is left out of the evaluation: {reason}")
        self.size: int | None = None
        self.metrics = StepMetrics(ranks)
        self.vote = Vote(ranks)
        self.step = 0
        self.rate = config.peak_lr
        self.rate_factor = 1.0
        self.num_rollbacks = 0
        self.best_accuracy: float | None = None
        self.evaluated_epoch = 0
        self.ends_epoch = False
        self.train_seconds = 0.0
        self.clean_accuracy = 1 / self.data.train.num_classes
        self.natural_model: dict[str, Any] | None = None
        self.analysis_left_out = False
        if saved is None and config.objective.teacher and self.objective.starts_from_natural:
            self._start_from(config.objective.teacher)
        metrics_bytes = 0 if saved is None else self._restore(saved)
        self.metrics_file: MetricsFile | None = None
        self.tensorboard: Any = None
        if ranks.is_main:
            out.mkdir(parents=True, exist_ok=True)
            self.checkpoints.remove_leftovers()
            write_json(
                out / "config.json",
                {"version": versions().get("arat-fast"), "config": config_to_dict(config)},
            )
            if self.bad_images.found:
                write_json(out / BAD_IMAGES, self.bad_images.found)
            self.metrics_file = MetricsFile(out / "metrics.jsonl", keep=metrics_bytes)
            self.tensorboard = _tensorboard_writer(out, self.step)

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, and write the summary.

        Returns:
            The content of ``summary.json``.

        Raises:
            InterruptedRun: Ctrl-C, SIGTERM or SIGUSR1 came, to any of the processes; the state is
                saved.
            FileExistsError: there is a natural model in the folder already, and ``resume`` is not
                set.
            NotFiniteError: a loss or a weight became NaN; names the step, the term and the last
                checkpoint. Raised by all processes in the same step.
            OSError: a file could not be written; the checkpoint before is whole.
        """
        # What rank 0 reads and writes at first may take longer than a collective waits.
        self.ranks.meet()
        finished = self._finished_summary()
        if finished is not None:
            self.display.say(f"{self.out} is finished already; nothing was trained or evaluated")
            return finished
        resumed = f" from step {self.step}" if self.step else ""
        epochs = self.config.train.epochs
        together = "" if self.ranks.alone else f" in {self.ranks.world_size} processes"
        self.display.say(
            f"{self.config.recipe}: {self.config.objective.called}, {self.config.model.name}, "
            f"{self.data.train.num_samples} images, {epochs} epoch{'' if epochs == 1 else 's'}, "
            f"{self.precision} on {describe_device(self.device)}{together}{resumed}; run folder "
            f"{self.out}"
        )
        spec = MODELS.get(self.config.model.name)
        if self.config.objective.name == "arat" and spec is not None and not spec.has_batch_norm:
            self.display.say(
                f"{self.config.model.name} has LayerNorm and no BatchNorm to split: ARAT is the "
                "invariance loss and its predictor, and both kinds of images share every layer"
            )
        try:
            if self.objective.starts_from_natural and self.natural_model is None:
                self._train_natural_model()
            with stop_on_signals() as stop:
                with self.display.training(self.total_steps, self.step) as bar:
                    self._train_or_roll_back(bar, stop)
                model, kind = self._deploy(stop)
                self.checkpoints.wait()
                try:
                    return self._finish(model, kind, stop)
                except EvaluationStopped:
                    self._stop(stop, save=False)
                    raise
        except (NotFiniteError, OSError) as error:
            # The disk may be what failed.
            with suppress(OSError):
                self.checkpoints.wait()
                if self.ranks.is_main:
                    summary = {**self._summary("failed"), "reason": str(error)}
                    write_json(self.out / "summary.json", summary)
            raise
        finally:
            # With collectives in them, the process group could not be closed.
            self.train_step.forget()
            with suppress(OSError):
                self.checkpoints.wait()
            if self.metrics_file is not None:
                self.metrics_file.close()
            if self.tensorboard is not None:
                self.tensorboard.close()

    def _train_natural_model(self) -> None:
        """Run the natural run that this one starts from, in a folder inside its own."""
        config = natural_config(self.config)
        folder = self.out / NATURAL_FOLDER
        self.display.say(
            f"epochs of natural training first: {config.train.epochs}; then of "
            f"{self.config.objective.called}: {self.config.train.epochs}"
        )
        devices = [self.device] if self.device.type == "cuda" else []
        # What follows must not depend on whether the natural run was made, resumed or found.
        with torch.random.fork_rng(devices):
            Trainer(
                config,
                folder,
                resume=self.resume,
                command=self.command,
                display=self.display,
                ranks=self.ranks,
                bad_images=self.bad_images,
            ).run()
        self._start_from(folder)
        assert self.natural_model is not None
        self.natural_model["source"] = NATURAL_FOLDER

    def _start_from(self, path: Path) -> None:
        """Start from the natural model of another run."""
        content = b""
        if self.ranks.is_main:
            # Only rank 0 needs to see the folder.
            content = json.dumps(load_natural(self.model, path)).encode()
        self.natural_model = json.loads(self.ranks.broadcast_bytes(content))
        for tensor in self.model.state_dict().values():
            self.ranks.broadcast_(tensor)
        self.objective.adopt(self.model)
        epochs = self.natural_model["epochs"]
        ending = "" if epochs == 1 else "s"
        length = f", trained for {epochs} epoch{ending}" if epochs is not None else ""
        self.display.say(f"starting from the natural model in {path}{length}")

    def _train_or_roll_back(self, bar: TrainingBar, stop: StopRequest) -> None:
        while True:
            try:
                self._train(bar, stop)
                return
            except NotFiniteError as error:
                self._roll_back(error, bar)

    def _roll_back(self, error: NotFiniteError, bar: TrainingBar) -> None:
        """Go back to the last checkpoint with a lower learning rate, or raise ``error``."""
        train = self.config.train
        if self.num_rollbacks >= train.rollbacks:
            raise error
        # Before, or the state of the checkpoint would be counted anew with every one of them.
        number, factor = self.num_rollbacks + 1, self.rate_factor * train.rollback_factor
        saved = self._newest_state()
        if saved is None:
            raise error
        keep = self._restore(saved)
        self.num_rollbacks, self.rate_factor = number, factor
        if self.metrics_file is not None:
            self.metrics_file.close()
            self.metrics_file = MetricsFile(self.out / "metrics.jsonl", keep=keep)
        bar.go_to(self.step)
        self.display.say(
            f"{error}: back to step {self.step} with {factor:g} times the learning rate (rollback "
            f"{number} of {train.rollbacks})"
        )

    def _train(self, bar: TrainingBar, stop: StopRequest) -> None:
        epochs = self.config.train.epochs
        if self.ends_epoch:
            self.ends_epoch = False
            self._end_epoch(self.step // self.steps_per_epoch, bar)
        while self.step < self.total_steps:
            epoch, start_batch = divmod(self.step, self.steps_per_epoch)
            bar.start_epoch(epoch + 1, epochs)
            if start_batch == 0:
                # Here, after the checkpoint of the epoch before, so that a resumed run does it too.
                try:
                    self._evaluate_if_due(epoch, bar, stop)
                except EvaluationStopped:
                    self._stop(stop)
                self._analyze_if_due(epoch, bar)
                self._start_epoch(epoch)
            self._train_epoch(epoch, start_batch, bar, stop)
            if self.step % self.steps_per_epoch == 0:
                self._end_epoch(epoch + 1, bar)
            if self._told_to_stop(stop):
                self._stop(stop)
        self._analyze_if_due(epochs, bar)

    def _told_to_stop(self, stop: StopRequest) -> bool:
        """Whether all processes know that one of them was told to stop."""
        if self.ranks.alone:
            return stop.signal is not None
        return self.vote.result > 0

    def _train_epoch(
        self, epoch: int, start_batch: int, bar: TrainingBar, stop: StopRequest
    ) -> None:
        """The steps of an epoch from ``start_batch`` on, or until a signal comes."""
        config = self.config
        logged, samples, since_log = self.step, 0, time.perf_counter()
        for metrics, num_samples in self._steps(epoch, start_batch):
            self.vote.cast(int(stop.signal or 0))
            self.checkpoints.check()
            if self.train_step.num_calls == 1:
                self._describe_folding()
            self.metrics.add(self.step, metrics, num_samples)
            self.average.update(self.model, self.step)
            self.step += 1
            self.ranks.at_step(self.step)
            samples += num_samples
            bar.advance()
            last = self.step % self.steps_per_epoch == 0
            stopping = self._told_to_stop(stop)
            if self.step - logged >= config.train.log_every or last or stopping:
                values = self._read_metrics()
                seconds = time.perf_counter() - since_log
                self.train_seconds += seconds
                self._log(bar, values, samples / seconds)
                logged, samples, since_log = self.step, 0, time.perf_counter()
            if stopping:
                return

    def _steps(self, epoch: int, start_batch: int) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Train on the batches of an epoch; the metrics of each step and its number of samples,
        over all processes."""
        data = self.data.train
        places = (place_of(data.plan, number) for number in range(start_batch, len(data)))
        step = self.train_step
        if isinstance(data, ResidentBatches):
            resident = zip(data.epoch_indices(epoch, start_batch), places, strict=True)
            for (index, draws), place in resident:
                self._set_rate()
                metrics = (
                    step.from_indices(index, draws)
                    if self.ranks.alone
                    else step.from_indices(index, draws, place=place)
                )
                yield metrics, place.total
            return
        for (x, y), place in zip(data.epoch(epoch, start_batch), places, strict=True):
            self._set_rate()
            x = self._scaled(x, epoch).contiguous(memory_format=self.memory_format)
            yield step(x, y, place=None if self.ranks.alone else place), place.total

    def _scaled(self, x: Tensor, epoch: int) -> Tensor:
        """Images in the size of the epoch: data.progressive."""
        size = progressive_size(self.config.data.progressive, epoch, self.config.train.epochs)
        if size is None or size == x.shape[-1]:
            return x
        if size != self.size:
            self.train_step.forget()
            self.size = size
        # Between 0 and 1 up to rounding, which the attack does not allow.
        return F.interpolate(x, (size, size), mode="bilinear", antialias=True).clamp(0, 1)

    def _describe_folding(self) -> None:
        folded = self.train_step.folded_network
        if folded is None:
            return
        left = f"; left as they are: {', '.join(folded.unfolded)}" if folded.unfolded else ""
        self.display.say(
            f"attack on running statistics: {len(folded.folded)} BatchNorm layers folded into "
            f"convolutions, {len(folded.affine)} affine maps of their own{left}"
        )

    def _set_rate(self) -> None:
        config = self.config
        self.rate = learning_rate(
            config.schedule,
            config.peak_lr,
            self.step,
            self.steps_per_epoch,
            config.train.epochs,
        )
        if self.rate_factor != 1:
            self.rate *= self.rate_factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def _start_epoch(self, epoch: int) -> None:
        self.metrics.start_epoch()
        if self.config.objective.balance == "probe" and self.config.objective.name == "arat":
            self.clean_accuracy = self._probe(epoch)
        self.objective.start_epoch(self.clean_accuracy)

    def _end_epoch(self, done: int, bar: TrainingBar) -> None:
        config = self.config
        accuracy = self.metrics.epoch_mean("accuracy_clean")
        if accuracy is not None:
            self.clean_accuracy = accuracy
        means = {name: self.metrics.epoch_mean(name) for name in self.metrics.epoch_sums}
        rate = self._images_seen() / max(self.train_seconds, 1e-9)
        bar.end_epoch(done, config.train.epochs, _status(means, rate))
        if done % config.train.checkpoint_every == 0 or done == config.train.epochs:
            self._save()

    def _deploy(self, stop: StopRequest) -> tuple[nn.Module, str]:
        """The weights that are evaluated and exported, the average if there is one; their name."""
        if self.average.model is None:
            return self.model, "last"
        share = self.average.share_of_first
        if share > MAX_SHARE_OF_FIRST:
            self.display.say(
                "young average: in the weights that are evaluated, those after step "
                f"{self.average.start_step + 1} still count {100 * share:.0f} %; train longer, "
                "lower --average.decay, or --average.kind none"
            )
        if not self.average.statistics_fresh:
            self.display.say("re-estimating the BatchNorm statistics of the averaged weights")
            refresh_batch_norm(
                self.average.model,
                self._refresh_batches(stop),
                self.objective,
                self.config.attack,
                stream_generator(self.config.seed, "refresh", self.device),
                ranks=self.ranks,
                plan=self.data.train.plan,
            )
            self.average.statistics_fresh = True
            self._save()
        return self.average.model, self.config.average.kind

    def _refresh_batches(self, stop: StopRequest) -> Iterator[Batch]:
        """One more epoch; the weights are saved already, and a signal leaves that checkpoint."""
        for batch in self.data.train.epoch(self.config.train.epochs):
            self.vote.cast(int(stop.signal or 0))
            if self._told_to_stop(stop):
                self._stop(stop, save=False)
            yield batch

    def _stop(self, stop: StopRequest, save: bool = True) -> None:
        self.vote.settle()
        number = max(int(stop.signal or 0), self.vote.result)
        if not self.ranks.alone:
            number = self.ranks.largest(number)
        if save:
            self._save()
        self.checkpoints.wait()
        if self.ranks.is_main:
            write_json(self.out / "summary.json", self._summary("interrupted"))
        done = self.step == self.total_steps
        doing = f"after the training, step {self.step}" if done else f"at step {self.step}"
        raise InterruptedRun(
            f"stopped {doing} of {self.total_steps}; the state is in {self.checkpoint_path}: go on "
            "with --resume",
            EXIT_CODES[signal.Signals(number)],
        )

    def _evaluate_if_due(self, done: int, bar: TrainingBar, stop: StopRequest) -> None:
        every = self.config.train.eval_every
        if not every or not done or done % every or done == self.evaluated_epoch:
            return
        bar.show("evaluating")
        lines = [self._evaluate(done, "last", self.model, stop)]
        if self.average.model is not None and self.config.average.kind == "ema":
            lines.append(self._evaluate(done, "ema", self.average.model, stop))
        # Not before all are there: what is broken off is made again as a whole.
        for line in lines:
            self._write_evaluation(line)
        self.evaluated_epoch = done
        accuracy = lines[-1]["pgd"]
        if self.config.train.keep_best and (
            self.best_accuracy is None or accuracy > self.best_accuracy
        ):
            self.best_accuracy = accuracy
            self._save()
            if self.ranks.is_main:
                self.checkpoints.keep_as_best()

    def _progress(self, stop: StopRequest, show: SuiteProgress | None = None) -> SuiteProgress:
        """Told of the progress of an evaluation, which it ends when a signal comes."""

        def progress(name: str, done: int, total: int, unit: Unit = "images") -> None:
            if stop.signal is not None and not self.ranks.asked:
                self.ranks.ask(int(stop.signal))
            if stop.signal is not None or self.ranks.asked:
                raise EvaluationStopped
            if show is not None:
                show(name, done, total, unit)

        return progress

    def _analyze_if_due(self, done: int, bar: TrainingBar) -> None:
        config = self.config
        every = config.analyze.every
        if not every or (done % every and done != config.train.epochs):
            return
        if self.metrics_file is not None:
            self._analyze(done, bar, self.metrics_file)
        # It can take longer than a collective waits.
        self.ranks.meet()

    def _analyze(self, done: int, bar: TrainingBar, metrics_file: MetricsFile) -> None:
        """On rank 0, of its share of the batches."""
        config = self.config
        # A checkpoint from after the training, as SWA's refresh writes one, comes after its line.
        if done == config.train.epochs and metrics_file.holds("analysis", done):
            return
        bar.show("analysing")
        batches = first_batches(self.data.train, config.analyze.num_batches)
        record: dict[str, Any] = {"gradient_conflict": None, "mixture": None}
        try:
            record = analyze_training(config, self.model, self.objective, batches)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            record["left_out"] = str(error).partition(". ")[0]
        if "left_out" in record:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if not self.analysis_left_out:
                self.display.say(
                    f"the analysis of epoch {done}, in float32, is left out, as later ones may be: "
                    f"{record['left_out']}; --analyze.every 0 leaves out all"
                )
            self.analysis_left_out = True
        metrics_file.write({"kind": "analysis", "step": self.step, "epoch": done, **record})
        if self.tensorboard is not None:
            for name, value in headline_numbers(record).items():
                self.tensorboard.add_scalar(f"analysis/{name}", value, self.step)

    def _probe(self, epoch: int) -> float:
        """Accuracy of the clean branch, in eval mode, on the first samples of a training epoch."""
        correct = seen = 0
        plan = self.data.probe.plan
        with evaluation_mode(self.model, "clean"):
            for number, (x, y) in enumerate(self.data.probe.epoch(epoch)):
                correct += int((predict(self.model, x, len(x)).argmax(dim=1) == y).sum())
                seen = plan.samples_before(number + 1)
                if seen >= PROBE_SAMPLES:
                    break
        return int(self.ranks.gather(torch.tensor([correct])).sum()) / seen

    def _evaluate(
        self, epoch: int, kind: str, model: nn.Module, stop: StopRequest
    ) -> dict[str, Any]:
        """A line of clean and PGD accuracy on the validation images, else on the test images."""
        config = self.config
        split, batches = ("val", self.data.val) if self.data.val else ("test", self.data.test)
        images = ImageSet.from_batches(batches, config.eval.max_samples, self.ranks.shard)
        clean = share_evaluation(
            self.ranks,
            lambda own: clean_accuracy(model, own, batch_size=config.eval.batch_size),
            images,
        )
        pgd = share_evaluation(
            self.ranks,
            lambda own: pgd_accuracy(
                model,
                own,
                ThreatModel(config.attack.eps, config.attack.norm),
                num_steps=config.eval.num_steps,
                alpha=config.eval.step_size(config.attack.eps),
                batch_size=config.eval.batch_size,
                seed=config.seed,
                progress=self._progress(stop),
            ),
            images,
        )
        return {
            "kind": "eval",
            "step": self.step,
            "epoch": epoch,
            "split": split,
            "model": kind,
            "clean": clean.accuracy,
            "pgd": pgd.accuracy,
            "num_steps": config.eval.num_steps,
            "num_samples": len(pgd.correct),
        }

    def _write_evaluation(self, line: dict[str, Any]) -> None:
        if self.metrics_file is not None:
            self.metrics_file.write(line)
        if self.tensorboard is not None:
            for name in ("clean", "pgd"):
                tag = f"{line['split']}/{line['model']}/{name}"
                self.tensorboard.add_scalar(tag, line[name], self.step)

    def _read_metrics(self) -> dict[str, float]:
        try:
            return self.metrics.read()
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}; {self._last_checkpoint()}") from error

    def _log(self, bar: TrainingBar, values: dict[str, float], images_per_second: float) -> None:
        line: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "lr": self.rate,
            **values,
        }
        for name in ("w_adv", "w_clean"):
            weight = getattr(self.objective, name, None)
            if isinstance(weight, Tensor):
                line[name] = float(weight)
        line["images_per_second"] = images_per_second
        if self.metrics_file is not None:
            self.metrics_file.write(line)
        if self.tensorboard is not None:
            for name, value in line.items():
                if name not in ("kind", "step"):
                    self.tensorboard.add_scalar(f"train/{name}", value, self.step)
        bar.show(_status(dict(values), images_per_second))

    def _save(self) -> None:
        """Write a checkpoint in the background; every process takes part, rank 0 writes."""
        self._check_weights()
        on_gpu = self.device.type == "cuda"
        rng_cpu = self.ranks.gather(torch.get_rng_state())
        rng_cuda = self.ranks.gather(torch.cuda.get_rng_state(self.device)) if on_gpu else None
        if self.metrics_file is None:
            return
        state = {
            "config": config_to_dict(self.config),
            "arithmetic": self._arithmetic(),
            "image_shape": list(self.data.train.image_shape),
            "dataset": self.data.fingerprint._asdict(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "train_seconds": self.train_seconds,
            "clean_accuracy": self.clean_accuracy,
            "natural_model": self.natural_model,
            "best_accuracy": self.best_accuracy,
            "evaluated_epoch": self.evaluated_epoch,
            "rate_factor": self.rate_factor,
            "num_rollbacks": self.num_rollbacks,
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "metrics": self.metrics.state_dict(),
            "metrics_bytes": self.metrics_file.flush(),
            "generator": self.generator.get_state(),
            "rng_cpu": rng_cpu[0],
            "rng_cuda": None if rng_cuda is None else rng_cuda[0],
            "rng_of_other_ranks": [
                {"cpu": rng_cpu[rank], "cuda": None if rng_cuda is None else rng_cuda[rank]}
                for rank in range(1, self.ranks.world_size)
            ],
        }
        self.checkpoints.save(self.step, state, self.metrics_file.sync)

    def _load_saved(self, resume: bool) -> dict[str, Any] | None:
        """The state to go on from, or None for a new run."""
        if self.ranks.is_main and self.checkpoints.exists() and not resume:
            raise FileExistsError(
                f"{self.out} holds a run already; add --resume to go on with it, or choose another "
                "folder with --out"
            )
        saved = self._newest_state() if resume else None
        if saved is not None:
            source = self.checkpoint_path
            check_same_run(self.config, config_from_dict(saved["config"]), source)
        elif resume and not (self.out / NATURAL_FOLDER / CHECKPOINT).exists():
            self.display.say(f"nothing to resume in {self.out}: a new run")
        return saved

    def _newest_state(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, on every process."""
        content: bytes | None = None
        state: dict[str, Any] | None = None
        if self.ranks.is_main:
            self.checkpoints.wait()
            found = self.checkpoints.find()
            if found is not None:
                state = found.state
                for problem in found.problems:
                    self.display.say(f"warning: {problem}")
                if found.problems:
                    self.display.say(
                        f"going on from the checkpoint before it, {found.path}, step "
                        f"{state['step']}"
                    )
            if not self.ranks.alone:
                content = b"" if found is None else found.path.read_bytes()
        if self.ranks.alone:
            return state
        # Only rank 0 needs to see the folder.
        content = self.ranks.broadcast_bytes(content)
        if state is None and content:
            raw = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            state = training_state(raw, self.checkpoint_path)
        return state

    def _seed_rank(self) -> None:
        """Random numbers of its own for this process, beside those that all share."""
        name = f"rank {self.ranks.rank} step {getattr(self, 'step', 0)}"
        torch.manual_seed(
            stream_generator(self.config.seed, name, torch.device("cpu")).initial_seed()
        )

    def _arithmetic(self) -> str:
        """What the numbers depend on beside the configuration: a run goes on with the same."""
        return f"{self.precision} on {self.device.type}".removeprefix("torch.")

    def _check_weights(self) -> None:
        """Never write over a good checkpoint with weights that are NaN.

        Raises:
            NotFiniteError: names the first tensor that is not finite.
        """
        named = {**self.model.state_dict(), **self.objective.state_dict()}
        floating = {n: v for n, v in named.items() if v.is_floating_point()}
        own = torch.stack([value.isfinite().all() for value in floating.values()])
        finite = self.ranks.gather(own.cpu().byte()).all(dim=0)
        if not finite.all():
            bad = [n for n, ok in zip(floating, finite.tolist(), strict=True) if not ok]
            raise NotFiniteError(
                f"the weights stopped being finite at step {self.step}: {bad[0]}; "
                f"{self._last_checkpoint()}"
            )

    def _last_checkpoint(self) -> str:
        """What rank 0 knows of it, on every process."""
        said = ""
        if self.ranks.is_main:
            # It may still be on its way to the disk; that it does not get there is another error.
            with suppress(OSError):
                self.checkpoints.wait()
            said = (
                f"the last good checkpoint is {self.checkpoint_path}"
                if self.checkpoint_path.exists()
                else "there is no checkpoint yet"
            )
        return self.ranks.broadcast_bytes(said.encode()).decode()

    def _restore(self, state: dict[str, Any]) -> int:
        """Take over the state of a checkpoint; the size of metrics.jsonl at that time."""
        if state["arithmetic"] != self._arithmetic():
            raise ValueError(
                f"{self.checkpoint_path} was trained in {state['arithmetic']}, got "
                f"{self._arithmetic()}: set --train.device and --step.precision to go on with it"
            )
        check_same_dataset(self.data.fingerprint, state.get("dataset"), self.checkpoint_path)
        load_weights(self.model, state["model"], str(self.checkpoint_path))
        load_weights(self.objective, state["objective"], str(self.checkpoint_path))
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"], self.model)
        self.metrics.load_state_dict(state["metrics"])
        self.train_seconds = state["train_seconds"]
        self.clean_accuracy = state["clean_accuracy"]
        self.natural_model = state.get("natural_model")
        self.best_accuracy = state.get("best_accuracy")
        self.evaluated_epoch = state.get("evaluated_epoch", 0)
        self.rate_factor = state.get("rate_factor", 1.0)
        self.num_rollbacks = state.get("num_rollbacks", 0)
        self.generator.set_state(state["generator"])
        # Epochs can differ by a last batch that is too small for so many processes.
        epoch, batch = divmod(state["step"], state.get("steps_per_epoch", self.steps_per_epoch))
        self.step = epoch * self.steps_per_epoch + min(batch, self.steps_per_epoch)
        # For its name, once another one is the newest.
        if self.checkpoints.newest_step is not None:
            self.checkpoints.newest_step = self.step
        # Then nothing is left of the epoch but its end.
        self.ends_epoch = batch >= self.steps_per_epoch
        self._restore_rng(state)
        size: int = state["metrics_bytes"]
        return size

    def _restore_rng(self, state: dict[str, Any]) -> None:
        """PyTorch's own random numbers: dropout's, each process has its own."""
        others = state.get("rng_of_other_ranks", [])
        saved = [{"cpu": state["rng_cpu"], "cuda": state["rng_cuda"]}, *others]
        if self.ranks.world_size != len(saved):
            self.display.say(
                f"a run of {len(saved)} processes goes on with {self.ranks.world_size}: "
                + (
                    "with the same batches and BatchNorm over all of them"
                    if self.config.distributed.sync_bn
                    else "with the same batches; BatchNorm normalises other parts of them"
                )
            )
        if self.ranks.rank >= len(saved):
            self._seed_rank()
            return
        own = saved[self.ranks.rank]
        torch.set_rng_state(own["cpu"])
        if own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"], self.device)

    def _finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that had come to its end, evaluated as it is asked for now."""
        if self.step < self.total_steps:
            return None
        content = b""
        if self.ranks.is_main:
            with suppress(OSError, ValueError):
                text = (self.out / "summary.json").read_bytes()
                summary: dict[str, Any] = json.loads(text)
                wanted = config_to_dict(self.config)["eval"]
                if summary.get("status") == "finished" and summary.get("evaluation") == wanted:
                    content = text
        content = self.ranks.broadcast_bytes(content)
        return json.loads(content) if content else None

    def _finish(self, model: nn.Module, kind: str, stop: StopRequest) -> dict[str, Any]:
        config = self.config
        images = ImageSet.from_batches(self.data.test, config.eval.max_samples, self.ranks.shard)
        split = any(isinstance(m, SplitBatchNorm2d) for m in model.modules())
        facts = describe(config, kind, "adv" if split else "shared", self.data.train.image_shape)
        if self.ranks.is_main:
            save_safetensors(
                export_plain(model) if split else model,
                self.out / "model.safetensors",
                header(facts),
            )
        start = time.perf_counter()
        with self.display.evaluating() as bar:
            suite = evaluate_all(
                model,
                images,
                ThreatModel(config.attack.eps, config.attack.norm),
                num_steps=config.eval.num_steps,
                alpha=config.eval.step_size(config.attack.eps),
                attacks=self._attacks,
                batch_size=config.eval.batch_size,
                seed=config.seed,
                folder=self.out / "evaluation.partial",
                progress=self._progress(stop, bar),
                ranks=self.ranks,
            )
        summary: dict[str, Any] = {}
        if self.ranks.is_main:
            save_examples(self.out / "examples.npz", model, images, suite.strongest_examples())
            summary = {
                **self._summary("finished"),
                "evaluation": config_to_dict(config)["eval"],
                "test_samples": len(suite.results["clean"].correct),
                "split": "test",
                "model": kind,
                "accuracy": suite.record(),
                **({"left_out": suite.left_out} if suite.left_out else {}),
                "wall_seconds": {"train": self.train_seconds, "eval": time.perf_counter() - start},
            }
            write_json(self.out / "summary.json", summary)
        self.ranks.meet()
        suite.pieces.remove()
        return summary

    def _summary(self, status: str) -> dict[str, Any]:
        """What is known of a run whether or not it came to its end."""
        config = self.config
        folded = self.train_step.folded_network
        return {
            "recipe": config.recipe,
            "status": status,
            "objective": config.objective.called,
            "dataset": config.data.name,
            "seed": config.seed,
            "epochs": config.train.epochs,
            "natural_model": self.natural_model,
            "steps": self.step,
            "processes": self.ranks.world_size,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "train_samples": self.data.train.num_samples,
            "wall_seconds": {"train": self.train_seconds},
            "images_per_second": self._images_seen() / max(self.train_seconds, 1e-9),
            "device": describe_device(self.device),
            "precision": str(self.precision).removeprefix("torch."),
            "versions": versions(),
            "kernels": self._implementations(),
            "folded_batch_norms": len(folded.folded) if folded is not None else 0,
            "command": self.command,
            "commit": source_commit(),
        }

    def _implementations(self) -> dict[str, str]:
        """Which implementation of each of arat_kernels' operations the steps ran."""
        chosen = choose(implementation(self.config), next(self.model.parameters()))
        used = {
            "split_batch_norm": any(isinstance(m, SplitBatchNorm2d) for m in self.model.modules())
        }
        attacked = self.objective.needs_attack
        used["pgd_step"] = attacked
        own = type(self.objective)
        starts = self.config.attack.random_start and own.attack_noise is Objective.attack_noise
        used["random_start"] = attacked and (starts or isinstance(self.objective, ARREST))
        used["cross_entropy_grad"] = attacked and own.attack_loss is Objective.attack_loss
        used["cosine_invariance"] = (
            isinstance(self.objective, ARAT) and self.objective.stop_gradient
        )
        used["crop_flip"] = isinstance(self.data.train, ResidentBatches)
        used["frozen_affine"] = self.train_step.folded_network is not None
        return {name: chosen for name, runs in used.items() if runs}

    def _images_seen(self) -> int:
        """Training images so far, repeats counted, over all processes."""
        plan = self.data.train.plan
        epochs, batches = divmod(self.step, self.steps_per_epoch)
        return epochs * plan.samples_before(len(plan)) + plan.samples_before(batches)


def check_same_run(config: Config, saved: Config, source: Path) -> None:
    """ValueError where the two configurations would not train the same weights."""
    given, old = config_to_dict(config), config_to_dict(saved)
    # Where the switch does nothing, it may differ: earlier versions never set it.
    given["objective"]["separate_passes"] = config.separate_passes
    old["objective"]["separate_passes"] = saved.separate_passes
    for section, values in given.items():
        before = old[section]
        if not isinstance(values, dict):
            if values != before:
                raise ValueError(
                    f"{source} belongs to a run with {section}={before}, got {section}={values}"
                )
            continue
        for name, value in values.items():
            if name not in _FREE_TO_CHANGE.get(section, ()) and value != before[name]:
                raise ValueError(
                    f"{source} belongs to a run with {section}.{name}={before[name]}, got "
                    f"{section}.{name}={value}"
                )


def check_same_dataset(given: Fingerprint, saved: dict[str, Any] | None, source: Path) -> None:
    """ValueError where the training images are not those that the run began with; ``saved`` is None
    in checkpoints of earlier versions, which pass."""
    if saved is None or Fingerprint(**saved) == given:
        return
    before = Fingerprint(**saved).num_samples
    got = given.num_samples if given.num_samples != before else "as many with other labels or names"
    raise ValueError(
        f"{source} belongs to a run on {before} training images, got {got}: every batch would be "
        "another; put the dataset back as it was, or start a new run with --out"
    )


def _status(values: dict[str, float | None], images_per_second: float) -> str:
    parts = [f"{images_per_second:,.0f} images/s"]
    for name, label in (
        ("loss", "loss"),
        ("accuracy_clean", "clean"),
        ("accuracy_adv", "robust"),
    ):
        value = values.get(name)
        if value is not None:
            parts.append(
                f"{label} {value:.3f}" if name == "loss" else f"{label} {100 * value:.1f} %"
            )
    return "  ".join(parts)


def _tensorboard_writer(out: Path, step: int) -> Any:
    """A writer into the run's folder if TensorBoard is installed, else None."""
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
    return None
