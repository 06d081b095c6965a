"""Everything that one run is made of; each part that moves owns its state."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from arat_fast import doctor
from arat_fast.build import (
    build_network,
    build_objective,
    build_optimizer,
    implementation,
    learning_parts,
)
from arat_fast.config import Config, check_same_run, config_from_dict, config_to_dict
from arat_fast.data import load_data
from arat_fast.data.bad_images import FILE as BAD_IMAGES
from arat_fast.data.bad_images import BadImages
from arat_fast.data.batches import Batch, ResidentBatches, stream_generator
from arat_fast.data.fingerprint import Fingerprint, class_names, class_order
from arat_fast.data.given import Given, given_splits
from arat_fast.data.load import download_data
from arat_fast.data.plan import Place
from arat_fast.device import resolve_precision, set_deterministic, versions
from arat_fast.display import Display, SuiteProgress, TrainingBar, Unit
from arat_fast.distributed import ALONE, Ranks
from arat_fast.distributed.batch_norm import synchronize_batch_norm
from arat_fast.distributed.ranks import Vote
from arat_fast.evaluation.evaluate import evaluation_mode, predict
from arat_fast.evaluation.suite import attacks_left_out
from arat_fast.files import Lock, make_folder, write_json
from arat_fast.run.expectation import Expectation
from arat_fast.run.hooks import Hook, default_hooks
from arat_fast.run.loggers import loggers
from arat_fast.run.overfitting import OverfittingWatch
from arat_fast.run.start import start_from_weights
from arat_fast.stop import EvaluationStopped, StopRequest
from arat_fast.training.averaging import WeightAverage
from arat_fast.training.checkpoint import CheckpointFolder, read_tensors, training_state
from arat_fast.training.memory import is_out_of_memory
from arat_fast.training.metrics import NotFiniteError, StepMetrics
from arat_fast.training.schedule import learning_rate, progressive_size
from arat_fast.training.step import TrainStep
from arat_fast.training.targets import Targets

PROBE_SAMPLES = 1000
"""The official code measures the balance on batches until it has seen this many samples."""


class Stateful(Protocol):
    """A part of a checkpoint; both methods are called by all processes, in one order."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Progress:
    """How far a run is, in numbers.

    Args:
        steps_per_epoch: batches of an epoch.
        num_classes: chance is the clean accuracy before the first epoch.
    """

    def __init__(self, steps_per_epoch: int, num_classes: int) -> None:
        self.step = 0
        self.steps_per_epoch = steps_per_epoch
        self.seconds = 0.0
        """In steps that were finished; neither pauses nor what comes between epochs."""
        self.epoch_seconds = 0.0
        self.clean_accuracy = 1 / num_classes
        self.rate_factor = 1.0
        self.num_rollbacks = 0
        self.at_first_step = False
        """Whether an epoch has begun of which no step is finished."""
        self.natural_model: dict[str, Any] | None = None
        self.steps_left_out = 0
        """Of those that were made, by how many fewer there are in epochs of this length."""
        self.ends_epoch = False
        """Whether a checkpoint left nothing of its epoch but the end."""

    @property
    def steps_made(self) -> int:
        """Those of the optimiser, which no change of the processes numbers anew."""
        return self.step + self.steps_left_out

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "ends_epoch"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Epochs can differ by a last batch that is too small for so many processes.
        own = self.steps_per_epoch
        epoch, batch = divmod(state["step"], state["steps_per_epoch"])
        vars(self).update(state, step=epoch * own + min(batch, own), steps_per_epoch=own)
        self.steps_left_out += state["step"] - self.step
        self.ends_epoch = batch >= own


class RandomStates:
    """Random numbers: the attack's, and PyTorch's own (dropout's), of which each process has its
    own."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        ranks, device = self.run.ranks, self.run.device
        states = {"cpu": ranks.gather(torch.get_rng_state())}
        if device.type == "cuda":
            states["cuda"] = ranks.gather(torch.cuda.get_rng_state(device))
        return {"attack": self.run.generator.get_state(), **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        run = self.run
        run.generator.set_state(state["attack"])
        saved = len(state["cpu"])
        if run.ranks.world_size != saved:
            run.display.say(
                f"a run of {saved} processes goes on with {run.ranks.world_size}: "
                + (
                    "with the same batches and BatchNorm over all of them"
                    if run.config.distributed.sync_bn
                    else "with the same batches; BatchNorm normalises other parts of them"
                )
            )
        if run.ranks.rank >= saved:
            run.seed_rank()
            return
        # Copies: PyTorch reads such a state from the start of its memory.
        torch.set_rng_state(state["cpu"][run.ranks.rank].clone())
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"][run.ranks.rank].clone(), run.device)


class Identity:
    """What a checkpoint can be resumed with: nothing else, since the numbers would be others."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        run = self.run
        return {
            "id": run.id,
            "config": config_to_dict(run.config),
            "arithmetic": f"{run.precision} on {run.device.type}".removeprefix("torch."),
            "image_shape": list(run.data.train.image_shape),
            "classes": list(run.data.train.classes),
            "dataset": run.data.fingerprint._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own, source = self.state_dict(), self.run.checkpoints.newest
        if state["arithmetic"] != own["arithmetic"]:
            raise ValueError(
                f"{source} was trained in {state['arithmetic']}, got {own['arithmetic']}: set "
                "--train.device and --step.precision to go on with it"
            )
        # Runs from before have no names.
        known = class_names(self.run.config.data.name, state.get("classes", ()))
        if class_order(known, own["classes"], source) is not None:
            raise ValueError(
                f"{source} belongs to a run that counts the same classes in another order, got "
                f"{', '.join(own['classes'][:3])}, …: put the dataset back as it was, or start a "
                "new run with --out"
            )
        check_same_dataset(self.run.data.fingerprint, state["dataset"], source)
        before, now = (each["config"]["data"]["root"] for each in (state, own))
        if before != now:
            self.run.display.say(f"images from {now}; the run had them from {before}")
        self.run.id = state.get("id", self.run.id)


class HookStates:
    """The states of those hooks that have a name."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = {hook.name: hook for hook in hooks if hook.name}

    def state_dict(self) -> dict[str, Any]:
        return {name: hook.state_dict() for name, hook in self.hooks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in state.keys() & self.hooks.keys():
            self.hooks[name].load_state_dict(state[name])


class Run:
    """One run: a configuration, a folder, and everything that moves while it trains.

    Args:
        config: what to train.
        out: folder of the run; made if absent.
        resume: go on from the folder's checkpoint, bit for bit; start afresh if there is none.
        command: command line to record in the summary.
        display: where progress is shown; by rank 0 alone.
        hooks: your own, told after the built-in ones.
        ranks: the processes that train together; each makes a run. Rank 0 alone reads and writes
            the files of the run; the others keep nothing in the folder but the finished parts of an
            evaluation, until it ends.
        bad_images: knows the files to leave out, of a run that this one is a part of; None looks
            for them, or takes those that a run that is resumed has found.
        lock: of the folder, on rank 0; None: nobody else works in it.
        model: the caller's own network, which is trained itself; None builds the configured one.
        data: the caller's own training, test and validation images; None loads the configured ones.

    Attributes:
        id: in every file of the run, which is the same one however often it is resumed.
        measured: what the summary says of the final evaluation, as far as that has come.

    Raises:
        FileExistsError: the folder holds a run already, and ``resume`` is not set.
        ValueError: the configuration does not fit the data or the checkpoint.
        FileNotFoundError: the dataset is not there.
    """

    bar: TrainingBar
    stop: StopRequest

    def __init__(
        self,
        config: Config,
        out: Path,
        *,
        resume: bool = False,
        command: str = "",
        display: Display | None = None,
        hooks: Sequence[Hook] = (),
        ranks: Ranks = ALONE,
        bad_images: BadImages | None = None,
        lock: Lock | None = None,
        model: nn.Module | None = None,
        data: tuple[Given, Given, Given | None] | None = None,
    ) -> None:
        self.given_model, self.given_data = model, data
        self.id = uuid.uuid4().hex
        self.config = config
        self.out = out
        self.resume = resume
        self.command = command
        self.ranks = ranks
        self.display = display or Display()
        if not ranks.is_main:
            self.display = Display(Console(quiet=True))
        self.warnings: list[str] = []
        self.measured: dict[str, Any] = {}
        self.stop = StopRequest()
        self.checkpoints = CheckpointFolder(out, config.train.keep_last, lock)
        saved = self._saved_state()
        self.device = ranks.device(config.train.device)
        set_deterministic(config.train.deterministic, self.device)
        self.precision = resolve_precision(config.step.precision, self.device)
        self.memory_format = (
            torch.channels_last if config.step.channels_last else torch.contiguous_format
        )
        self._load_data(bad_images)
        self._build()
        train = self.data.train
        self.steps_per_epoch = len(train)
        whole = self.steps_per_epoch * config.train.epochs
        self.total_steps = min(config.train.max_steps or whole, whole)
        self.progress = Progress(self.steps_per_epoch, train.num_classes)
        self.average = WeightAverage(
            config.average,
            self.model,
            int(config.average.start * config.train.epochs) * self.steps_per_epoch,
        )
        self.metrics = StepMetrics(ranks)
        self.vote = Vote(ranks)
        own = [*default_hooks(self), Expectation(), OverfittingWatch()]
        self.hooks = [*own, *loggers(self), *hooks]
        self.parts: dict[str, Stateful] = {
            "run": Identity(self),
            "progress": self.progress,
            "model": self.model,
            "objective": self.objective,
            "optimizer": self.optimizer,
            "average": self.average,
            "metrics": self.metrics,
            "hooks": HookStates(self.hooks),
            "random": RandomStates(self),
        }
        self.peak_lr = self.rate = config.peak_lr
        self.size: int | None = None
        self.is_resumed = saved is not None
        if saved is not None:
            self.restore(saved)
        elif config.init is not None:
            start_from_weights(self, config.init)
        if ranks.is_main:
            make_folder(out)
            record = {"version": versions().get("arat-fast"), "config": config_to_dict(config)}
            write_json(out / "config.json", record)
            if self.bad_images.found:
                write_json(out / BAD_IMAGES, self.bad_images.found)
            if self.data.held_out:
                write_json(out / "held_out.json", self.data.held_out)

    def _load_data(self, bad_images: BadImages | None) -> None:
        config, ranks = self.config, self.ranks
        if self.given_data is not None:
            self.bad_images = BadImages()
            self.data = given_splits(
                *self.given_data,
                batch_size=config.data.batch_size,
                eval_batch_size=config.eval.batch_size,
                seed=config.seed,
                device=self.device,
                num_workers=config.data.num_workers,
                shard=ranks.shard,
                model=self.given_model,
            )
        else:
            self._read_data(bad_images)
        for note in self.data.notes:
            self.display.say(note)
        if self.data.skipped:
            first = self.data.skipped[0]
            self.display.say(f"{len(self.data.skipped)} files were left out, the first: {first}")
        if config.train.keep_best and self.data.val is None:
            raise ValueError(
                "train.keep_best chooses by validation images, not by test images, and there are "
                "none: set data.num_val, or pass val_data with images given in Python"
            )
        if config.data.progressive and isinstance(self.data.train, ResidentBatches):
            raise ValueError(
                "data.progressive is for images that are read in batches, got a dataset that stays "
                "on the device; set --data.loader dataloader or dali"
            )
        self.attacks = ("pgd", "autoattack") if config.eval.autoattack else ("pgd",)
        for name, reason in attacks_left_out(self.attacks, self.data.test.num_classes).items():
            self.display.say(f"{name} is left out of the evaluation: {reason}")

    def _read_data(self, bad_images: BadImages | None) -> None:
        config, ranks = self.config, self.ranks
        download_data(config.data, ranks)
        with self.display.evaluating() as bar:
            # Also without a checkpoint: the natural run before may have begun with these files.
            found = BadImages(self.out if self.resume else None, ranks, bar)
            self.bad_images = bad_images or found
            self.data = load_data(
                config.data,
                device=self.device,
                seed=config.seed,
                eval_batch_size=config.eval.batch_size,
                memory_format=self.memory_format,
                shard=ranks.shard,
                bad_images=self.bad_images,
                impl=implementation(config),
            )

    def _build(self) -> None:
        config, ranks, train = self.config, self.ranks, self.data.train
        torch.manual_seed(config.seed)
        shape = train.num_classes, train.image_shape
        self.model = build_network(config, *shape, given=self.given_model).to(self.device)
        wrong = self.wrong_on_card = self._check_card()
        self.objective = build_objective(config, self.model, *shape)
        if config.distributed.sync_bn and ranks.group is not None:
            synchronize_batch_norm(self.model, ranks.group)
            synchronize_batch_norm(self.objective, ranks.group)
        if not ranks.is_main:
            # The weights are the same everywhere; what dropout draws is not.
            self.seed_rank()
        self.learning_parts = learning_parts(config, self.model, self.objective, train.image_shape)
        self.optimizer = build_optimizer(config, self.learning_parts)
        self.generator = stream_generator(config.seed, "attack", self.device)
        last = len(train) - 1
        share = train.plan.share(last)
        self.step = TrainStep(
            self.model,
            self.objective,
            config.attack,
            self.optimizer,
            precision=self.precision,
            fold=config.step.fold and doctor.FOLD not in wrong,
            graph="off" if doctor.GRAPH in wrong else config.step.graph,
            memory_format=self.memory_format,
            last=(share.stop - share.start, train.plan.place(last)),
            noisy_clean=config.step.noisy_clean,
            generator=self.generator,
            targets=Targets.of(config.targets, train.num_classes, self.device),
            assemble=train.assemble if isinstance(train, ResidentBatches) else None,
            accumulate=config.train.accumulate,
            ranks=ranks,
            overlap={"auto": None, "on": True, "off": False}[config.distributed.overlap],
            impl=implementation(config),
            compile=config.step.compile,
            say=self.warn,
        )

    def _check_card(self) -> dict[str, str]:
        """What computes wrongly on this process's GPU; of kernels the references run instead."""
        config, train = self.config, self.data.train
        if self.device.type != "cuda" or config.step.kernels == "reference":
            return {}
        operations = doctor.operations_of(
            self.model,
            train.image_shape,
            train.num_classes,
            train.plan.largest_share,
            config.attack,
            self.precision,
        )
        found = doctor.prepare(
            operations,
            self.precision,
            self.device,
            self.ranks,
            self.display,
            self.warn,
            trains=True,
            required=config.step.kernels == "triton",
        )
        if doctor.GRAPH in found and config.step.graph == "on":
            reason = found[doctor.GRAPH]
            raise ValueError(f"wrong on this card: {reason}; set --step.graph auto or off")
        return found

    def warn(self, text: str) -> None:
        """Say what the user should know, here and in the summary."""
        self.warnings.append(text)
        self.display.say(f"warning: {text}")

    def seed_rank(self) -> None:
        """Random numbers of its own for this process, beside those that all share."""
        step = self.progress.step if hasattr(self, "progress") else 0
        name = f"rank {self.ranks.rank} step {step}"
        generator = stream_generator(self.config.seed, name, torch.device("cpu"))
        torch.manual_seed(generator.initial_seed())

    # What the loop asks for.

    def batches(self, epoch: int, start: int) -> Iterator[tuple[tuple[Tensor, Tensor], Place]]:
        """What the step is called with, batch by batch, and this process's place in each."""
        data = self.data.train
        stop = min(len(data), self.total_steps - epoch * self.steps_per_epoch)
        places = map(data.plan.place, range(start, stop))
        # Where the run ends within an epoch, no other batch is made.
        if isinstance(data, ResidentBatches):
            indices = islice(data.epoch_indices(epoch, start), len(range(start, stop)))
            yield from zip(indices, places, strict=True)
            return
        batches = islice(data.epoch(epoch, start), len(range(start, stop)))
        for (x, y), place in zip(batches, places, strict=True):
            yield (self._scaled(x, epoch).contiguous(memory_format=self.memory_format), y), place

    def _scaled(self, x: Tensor, epoch: int) -> Tensor:
        """Images in the size of the epoch: data.progressive."""
        size = progressive_size(self.config.data.progressive, epoch, self.config.train.epochs)
        if size is None or size == x.shape[-1]:
            return x
        if size != self.size:
            self.step.forget()
            self.size = size
        # Between 0 and 1 up to rounding, which the attack does not allow.
        return F.interpolate(x, (size, size), mode="bilinear", antialias=True).clamp(0, 1)

    @property
    def is_epoch_over(self) -> bool:
        """Whether the last step was that of an epoch, or of the run."""
        step = self.progress.step
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def set_rate(self) -> None:
        """Give the optimiser the learning rate of the step that follows."""
        self.rate = learning_rate(
            self.config.schedule,
            self.peak_lr,
            self.progress.step,
            self.steps_per_epoch,
            self.config.train.epochs,
        )
        if self.progress.rate_factor != 1:
            self.rate *= self.progress.rate_factor
        epoch = self.progress.step // self.steps_per_epoch
        for group, part in zip(self.optimizer.param_groups, self.learning_parts, strict=True):
            group["lr"] = self.rate * part.factor if epoch >= part.frozen_epochs else 0.0

    def probe(self, epoch: int) -> float:
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

    def images_seen(self) -> int:
        """Training images so far, repeats counted, over all processes."""
        plan = self.data.train.plan
        epochs, batches = divmod(self.progress.step, self.steps_per_epoch)
        return epochs * plan.samples_before(len(plan)) + plan.samples_before(batches)

    # Signals.

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether all processes know that one of them was told to stop."""
        if self.ranks.alone:
            return self.stop.signal is not None
        return self.vote.result > 0

    def check_stop(self) -> None:
        """End an evaluation when a signal has come, to this process or another.

        Raises:
            EvaluationStopped: one has.
        """
        if self.stop.signal is not None and not self.ranks.asked:
            self.ranks.ask(int(self.stop.signal))
        if self.stop.signal is not None or self.ranks.asked:
            raise EvaluationStopped

    def interruptible(self, show: SuiteProgress | None = None) -> SuiteProgress:
        """Told of the progress of an evaluation, which it ends when a signal comes.

        Raises:
            EvaluationStopped: from the function that is returned.
        """

        def progress(
            name: str, done: int, total: int, unit: Unit = "images", note: str = ""
        ) -> None:
            self.check_stop()
            if show is not None:
                show(name, done, total, unit, note)

        return progress

    def more_batches(self) -> Iterator[Batch]:
        """One more epoch, after the last; a signal ends it and leaves the checkpoint there is.

        Raises:
            EvaluationStopped: when the signal comes.
        """
        for batch in self.data.train.epoch(self.config.train.epochs):
            self.vote.cast(int(self.stop.signal or 0))
            if self.is_asked_to_stop:
                raise EvaluationStopped
            yield batch

    # Logs and checkpoints.

    def log(self, kind: str, epoch: float, values: dict[str, Any]) -> None:
        """Hand a line of numbers to every hook.

        Raises:
            OSError: a checkpoint could not be written, or another process goes on with the run.
        """
        self.checkpoints.check()
        step = self.progress.steps_made
        line = {"kind": kind, "step": step, "epoch": epoch, "run": self.id, **values}
        for hook in self.hooks:
            hook.log(self, line)

    def save(self, best: bool = False) -> None:
        """Write a checkpoint in the background; every process takes part, rank 0 writes.

        Args:
            best: it is the best of the run so far.

        Raises:
            NotFiniteError: a weight is not finite; the checkpoint before stays.
            OSError: the checkpoint before could not be written, or another process goes on with
                the run.
        """
        self.checkpoints.check()
        self._check_weights()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if self.ranks.is_main:
            self.checkpoints.save(self.progress.step, state, self._sync_hooks, best)

    def _sync_hooks(self) -> None:
        for hook in self.hooks:
            hook.sync()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint.

        Raises:
            ValueError: it is not a run's of this configuration, though it says so.
        """
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            # What each part raises for what it has not written.
            except (RuntimeError, LookupError, TypeError, AttributeError) as error:
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{self.checkpoints.newest} holds another {name} than this run's: "
                    f"{type(error).__name__}: {reason}"
                ) from error
        # The same step again takes no place of another checkpoint.
        if self.checkpoints.newest_step is not None:
            self.checkpoints.newest_step = self.progress.step

    def newest_state(self) -> dict[str, Any] | None:
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
                        f"{state['progress']['step']}"
                    )
            if not self.ranks.alone:
                content = b"" if found is None else found.path.read_bytes()
        if self.ranks.alone:
            return state
        # Only rank 0 needs to see the folder.
        content = self.ranks.broadcast_bytes(content)
        if state is None and content:
            newest = self.checkpoints.newest
            state = training_state(read_tensors(content, newest), newest)
        return state

    def last_checkpoint(self) -> str:
        """What rank 0 knows of it, on every process."""
        said = ""
        if self.ranks.is_main:
            # It may still be on its way to the disk; that it does not get there is another error.
            with suppress(OSError):
                self.checkpoints.wait()
            path = self.checkpoints.newest
            said = f"the last good checkpoint is {path}"
            if not path.exists():
                said = "there is no checkpoint yet"
        return self.ranks.broadcast_bytes(said.encode()).decode()

    def _saved_state(self) -> dict[str, Any] | None:
        """The state to go on from, or None for a new run."""
        if self.ranks.is_main and self.checkpoints.exists() and not self.resume:
            raise FileExistsError(
                f"{self.out} holds a run already; add --resume to go on with it, or choose another "
                "folder with --out"
            )
        saved = self.newest_state() if self.resume else None
        if saved is not None:
            before = config_from_dict(saved["run"]["config"])
            check_same_run(self.config, before, self.checkpoints.newest)
        return saved

    def _check_weights(self) -> None:
        """Never write over a good checkpoint with weights that are NaN."""
        named = {**self.model.state_dict(), **self.objective.state_dict()}
        floating = {n: v for n, v in named.items() if v.is_floating_point()}
        own = torch.stack([value.isfinite().all() for value in floating.values()])
        finite = self.ranks.gather(own.cpu().byte()).all(dim=0)
        if not finite.all():
            bad = [n for n, ok in zip(floating, finite.tolist(), strict=True) if not ok]
            raise NotFiniteError(
                f"the weights stopped being finite at step {self.progress.step}: {bad[0]}; "
                f"{self.last_checkpoint()}"
            )


def check_same_dataset(given: Fingerprint, saved: dict[str, Any], source: Path) -> None:
    """ValueError where the training images are not those that the run began with."""
    if Fingerprint(**saved) == given:
        return
    before = Fingerprint(**saved).num_samples
    got = given.num_samples if given.num_samples != before else "as many with other labels or names"
    raise ValueError(
        f"{source} belongs to a run on {before} training images, got {got}: every batch would be "
        "another; put the dataset back as it was, or start a new run with --out"
    )
