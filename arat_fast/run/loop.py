"""The training loop: epochs and steps, what comes between them, and how a run ends."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from arat_fast.config import Config
from arat_fast.data.bad_images import BadImages
from arat_fast.data.batches import ResidentBatches
from arat_fast.data.given import Given
from arat_fast.display import Display
from arat_fast.distributed import ALONE, Ranks
from arat_fast.files import LOCK, Lock, write_json
from arat_fast.run import natural
from arat_fast.run.finish import deploy, evaluate, facts, finished_summary
from arat_fast.run.hooks import Hook, Restart
from arat_fast.run.state import Run
from arat_fast.run.unfinished import interruptible
from arat_fast.saved.network import SAFETENSORS
from arat_fast.settings import shown
from arat_fast.stop import EXIT_CODES, EvaluationStopped, InterruptedRun, stop_on_signals
from arat_fast.training.metrics import CatastrophicOverfittingError, NotFiniteError


def train_epochs(run: Run) -> None:
    """Train to the last step.

    Raises:
        InterruptedRun: a signal came; the state is saved.
        NotFiniteError: a loss or a weight became NaN.
        EvaluationStopped: a signal came in the middle of an evaluation.
    """
    progress = run.progress
    if progress.ends_epoch:
        progress.ends_epoch = False
        end_epoch(run)
    while progress.step < run.total_steps:
        epoch, batch = divmod(progress.step, run.steps_per_epoch)
        run.bar.start_epoch(epoch + 1, run.config.train.epochs)
        if batch == 0 and not progress.at_first_step:
            # Here, after the checkpoint of the epoch before, so that a resumed run does it too.
            for hook in run.hooks:
                hook.before_epoch(run, epoch)
            run.metrics.start_epoch()
            progress.epoch_seconds = 0.0
            run.objective.start_epoch(progress.clean_accuracy, partial(run.probe, epoch))
            progress.at_first_step = True
        train_epoch(run, epoch, batch)
        if run.is_epoch_over and not progress.at_first_step:
            end_epoch(run)
        if run.is_asked_to_stop:
            stop(run)
    for hook in run.hooks:
        hook.end(run)


def train_epoch(run: Run, epoch: int, start_batch: int) -> None:
    """The steps of an epoch from ``start_batch`` on, or until a signal comes."""
    progress = run.progress
    resident = isinstance(run.data.train, ResidentBatches)
    last = min((epoch + 1) * run.steps_per_epoch, run.total_steps)
    step = interruptible(run, run.step.from_indices if resident else run.step)
    logged, samples, since = progress.step, 0, time.perf_counter()
    for inputs, place in run.batches(epoch, start_batch):
        run.set_rate()
        began = time.perf_counter()
        values = step(*inputs, place=place)
        stopping = run.vote.cast(int(run.stop.signal or 0)) > 0
        if values is not None:
            run.ranks.at_step(progress.step + 1)
            run.metrics.add(progress.step, values, place.total)
            run.average.update(progress.step)
            progress.step += 1
            progress.at_first_step = False
            run.bar.advance()
            samples += place.total
        ends = progress.step == last or stopping
        if samples and (ends or progress.step - logged >= run.config.train.log_every):
            means = read_metrics(run)
            # Without a step that was broken off.
            seconds = (began if values is None else time.perf_counter()) - since
            progress.seconds += seconds
            progress.epoch_seconds += seconds
            log_training(run, means, samples / seconds)
            logged, samples, since = progress.step, 0, time.perf_counter()
        if stopping:
            return


def end_epoch(run: Run) -> None:
    """Note the clean accuracy for the next epoch, print a line, write a checkpoint."""
    progress, settings = run.progress, run.config.train
    done = progress.step // run.steps_per_epoch
    accuracy = run.metrics.epoch_mean("accuracy_clean")
    if accuracy is not None:
        progress.clean_accuracy = accuracy
    means = {name: run.metrics.epoch_mean(name) for name in run.metrics.epoch_sums}
    rate = run.metrics.epoch_samples / max(progress.epoch_seconds, 1e-9)
    # train.max_steps can end a run within an epoch.
    begun = math.ceil(progress.step / run.steps_per_epoch)
    run.bar.end_epoch(begun, settings.epochs, status(means, rate, radius(run)))
    if done % settings.checkpoint_every == 0 or progress.step == run.total_steps:
        run.save()


def read_metrics(run: Run) -> dict[str, float]:
    """Means since the last time.

    Raises:
        NotFiniteError: names the step, the term and the last checkpoint.
    """
    try:
        return run.metrics.read()
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; {run.last_checkpoint()}") from error


def log_training(run: Run, means: dict[str, float], images_per_second: float) -> None:
    """A line of the training: learning rate, means of the metrics, the objective's own numbers."""
    own = {n: float(b) for n, b in run.objective.named_buffers(recurse=False) if b.ndim == 0}
    line = {"lr": run.rate, **means, **own, "images_per_second": images_per_second}
    run.log("train", run.progress.step / run.steps_per_epoch, line)
    # An epoch's last line says the same.
    text = status(dict(means), images_per_second, radius(run))
    run.bar.show(text, silent=run.is_epoch_over)


def roll_back(run: Run, error: NotFiniteError) -> None:
    """Go back to the last checkpoint with a lower learning rate, or raise ``error``."""
    limits, progress = run.config.train, run.progress
    # Before, or the state of the checkpoint would be counted anew with every one of them.
    number = progress.num_rollbacks + 1
    factor = progress.rate_factor * limits.rollback_factor
    saved = run.newest_state() if number <= limits.rollbacks else None
    if saved is None:
        raise error
    run.restore(saved)
    progress.num_rollbacks, progress.rate_factor = number, factor
    run.bar.go_to(progress.step)
    run.display.say(
        f"{error}: back to step {progress.step} with {factor:g} times the learning rate (rollback "
        f"{number} of {limits.rollbacks})"
    )


def stop(run: Run, save: bool = True) -> None:
    """End the run where it is, on all processes.

    Raises:
        InterruptedRun: always.
    """
    run.vote.settle()
    number = run.ranks.largest(max(int(run.stop.signal or 0), run.vote.result))
    if save:
        run.save()
    run.checkpoints.wait()
    if run.ranks.is_main:
        write_json(run.out / "summary.json", facts(run, "interrupted"))
    step, weights, again = run.progress.step, "", ""
    doing = f"after the training, step {step}" if step == run.total_steps else f"at step {step}"
    if not save and run.average.statistics_fresh:
        weights = f"; the final weights are in {run.out / SAFETENSORS}"
        again = ", which begins the attack anew that was broken off"
    raise InterruptedRun(
        f"stopped {doing} of {run.total_steps}{weights}; the state is in {run.checkpoints.newest}: "
        f"report what there is, or go on with --resume{again}",
        EXIT_CODES[signal.Signals(number)],
    )


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    display: Display | None = None,
    hooks: Sequence[Hook] = (),
    ranks: Ranks = ALONE,
    bad_images: BadImages | None = None,
    model: nn.Module | None = None,
    data: tuple[Given, Given, Given | None] | None = None,
) -> dict[str, Any]:
    """Train to the end, evaluate, and write the summary.

    Args, and what is raised before the first step: as for :class:`arat_fast.run.state.Run`.

    Returns:
        The content of ``summary.json``.

    Raises:
        BlockingIOError: another job is at work in the folder.
        OvertakenError: another job has taken the folder over, where it could not be locked.
        InterruptedRun: Ctrl-C or one of the signals of :mod:`arat_fast.stop` came, to any of the
            processes; the state is saved.
        NotFiniteError: a loss or a weight became NaN; names the step, the term and the last
            checkpoint. Raised by all processes in the same step.
        CatastrophicOverfittingError: as ``config.watch`` asks.
        OSError: a file could not be written; the checkpoint before is whole.
    """
    with _locked(out, ranks) as lock:
        run = Run(
            config,
            out,
            resume=resume,
            command=command,
            display=display,
            hooks=hooks,
            ranks=ranks,
            bad_images=bad_images,
            lock=lock if ranks.is_main else None,
            model=model,
            data=data,
        )
        return train_run(run)


@contextmanager
def _locked(out: Path, ranks: Ranks) -> Iterator[Lock]:
    """Let no other job write into the folder until the last process of this one has gone."""
    path, holder = out / LOCK, b""
    with ExitStack() as stack:
        if ranks.is_main:
            lock = stack.enter_context(Lock(path))
            holder = lock.holder.encode()
            if not ranks.alone:
                lock.share()
        holder = ranks.broadcast_bytes(holder)
        if not ranks.is_main:
            lock = stack.enter_context(Lock(path, holder=holder.decode()))
        yield lock


def train_run(this: Run) -> dict[str, Any]:
    """Train a run that is built, evaluate, and write the summary; as :func:`train`."""
    try:
        return _run(this)
    except (NotFiniteError, CatastrophicOverfittingError, OSError) as error:
        # The disk may be what failed, or the folder be another's now, which is raised again.
        with suppress(OSError):
            this.checkpoints.wait()
            if this.ranks.is_main:
                write_json(
                    this.out / "summary.json", {**facts(this, "failed"), "reason": str(error)}
                )
        raise
    finally:
        # With collectives in them, the process group could not be closed.
        this.step.forget()
        with suppress(OSError):
            this.checkpoints.wait()
        for hook in this.hooks:
            hook.close()


def _run(this: Run) -> dict[str, Any]:
    # What rank 0 reads and writes at first may take longer than a collective waits.
    this.ranks.meet()
    finished = finished_summary(this)
    if finished is not None:
        return finished
    natural.prepare(this, train)
    for hook in this.hooks:
        hook.begin(this)
    with stop_on_signals() as this.stop:
        kind = this.config.objective.name
        with this.display.training(this.total_steps, this.progress.step, kind) as this.bar:
            while True:
                try:
                    train_epochs(this)
                    break
                except NotFiniteError as error:
                    roll_back(this, error)
                except Restart:
                    continue
                except EvaluationStopped:
                    stop(this)
        try:
            # The memory of captured steps is for the evaluation.
            this.step.forget()
            model, kind = deploy(this)
            this.checkpoints.wait()
            return evaluate(this, model, kind)
        except EvaluationStopped:
            stop(this, save=False)
            raise


def radius(run: Run) -> str:
    """The radius of the attack as long as it is not the run's (``attack.eps_warmup``), in the form
    in which that is shown."""
    eps, final = run.step.attack.eps, run.config.attack.eps
    if eps == final:
        return ""
    return f" at eps {255 * eps:.1f}/255" if "/" in shown(final) else f" at eps {eps:.2g}"


def status(values: dict[str, float | None], images_per_second: float, radius: str = "") -> str:
    """Speed, loss and accuracies on the training images, for the bar."""
    parts = [f"{images_per_second:,.0f} images/s"]
    if values.get("loss") is not None:
        parts.append(f"loss {values['loss']:.3f}")
    of = "training images: "
    for name, label in (("accuracy_clean", "clean"), ("accuracy_adv", f"robust{radius}")):
        value = values.get(name)
        if value is not None:
            parts.append(f"{of}{label} {100 * value:.1f} %")
            of = ""
    return "  ".join(parts)
