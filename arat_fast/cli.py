"""The command ``arat-fast``: train, eval, report, bench, info."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from arat_fast import __version__
from arat_fast.config import Config
from arat_fast.recipes import RECIPES, recipe

USAGE = """\
usage: arat-fast COMMAND ...

  arat-fast train RECIPE [--out DIR] [--resume] [--compat official] [overrides]
      Train a recipe, evaluate it and write a report. Overrides name a field of the
      configuration, for example --train.epochs 30 --attack.eps 4/255; arat-fast train RECIPE
      --help lists them.
  arat-fast eval CHECKPOINT [options]
      Clean, PGD and AutoAttack accuracy of a checkpoint, a run's folder, exported weights or an
      official AR-AT checkpoint.
  arat-fast report RUN [--compare RUN ...]
      Write RUN/report.html again, beside other runs if some are given.
  arat-fast bench step|scaling [options]
      Time the training step beside plain, tuned and compiled PyTorch and the official code, or
      against batch size, image size, attack steps and width; writes JSON, a table and a plot.
  arat-fast info
      Versions, devices and arithmetic of this machine.

recipes: {recipes}
"""

Options = TypeVar("Options")


class UsageError(ValueError):
    """The command line cannot be understood."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a recipe, evaluate it and write a report."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; default runs/RECIPE-…-seedN."""
    resume: bool = False
    """Go on from the checkpoint in the folder, bit for bit; start afresh if there is none."""


@dataclass(frozen=True)
class EvalOptions:
    """Clean, PGD and AutoAttack accuracy of a checkpoint on its test images."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint.pt, a model.safetensors, or an official AR-AT checkpoint."""
    recipe: str | None = None
    """Recipe whose data, model and threat model are used; needed where the file is no run's own."""
    norm: Literal["Linf", "L2"] | None = None
    """Norm of the ball; default the run's, another one needs --eps."""
    eps: float | None = None
    """Radius of the ball; default the run's."""
    num_steps: int | None = None
    """Steps of PGD; default the run's."""
    alpha: float | None = None
    """Step size of PGD; default the run's, in another ball a quarter of the radius."""
    num_restarts: int = 1
    """Independent runs of PGD; an image counts as robust if it withstands them all; >= 1."""
    autoattack: bool = True
    """Run standard AutoAttack."""
    aa_torchattacks10: bool = False
    """Also run AutoAttack with torchattacks' 10 steps, as the paper's table did: it overstates
    robustness and is for comparison with that table only."""
    max_samples: int = 0
    """Evaluate the first samples only; 0 for all."""
    batch_size: int | None = None
    """Samples at a time; default the run's."""
    data_root: Path | None = None
    """Folder of the datasets; default the run's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the attacks."""
    out: Path | None = None
    """File for the record; default evaluation.json in the run's folder, NAME.evaluation.json beside
    a file NAME.pt or NAME.safetensors."""


@dataclass(frozen=True)
class ReportOptions:
    """Write the report of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    compare: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = field(default=())
    """Folders of runs to set beside it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0; 2 for bad input, with one line on standard error that says what was got
        and what was expected; 130 or 75 for a run that Ctrl-C or SIGTERM stopped. With the
        environment variable ARAT_FAST_TRACEBACK=1, errors are raised instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "report": _report,
        "bench": _bench,
        "info": _info,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(recipes=", ".join(RECIPES)), end="")
        return 0 if arguments else 2
    try:
        if arguments[0] == "--version":
            print(f"arat-fast {__version__}")
            return 0
        if arguments[0] not in commands:
            close = difflib.get_close_matches(arguments[0], commands, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(
                f"unknown command {arguments[0]!r}, expected one of {', '.join(commands)}{hint}"
            )
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("arat-fast: interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        from arat_fast.training.graph import BatchTooLargeError

        message = " ".join(str(error).split())
        if not isinstance(error, BatchTooLargeError):
            message = (
                f"out of memory: {message.partition('. ')[0]}; lower --data.batch-size for "
                "training, --eval.batch-size for evaluation"
            )
        print(f"arat-fast: error: {message}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if os.environ.get("ARAT_FAST_TRACEBACK") == "1":
            raise
        print(f"arat-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _train(arguments: list[str]) -> int:
    name, rest = _take_recipe(arguments)
    if name is None:
        print(USAGE.format(recipes=", ".join(RECIPES)), end="")
        return 0
    base = recipe(name, _compat(rest))  # type: ignore[arg-type]  # recipe() checks the value
    options = _parse(TrainOptions, rest, f"arat-fast train {name}", TrainOptions(base))
    config = options.config
    out = options.out or Path("runs") / _run_name(config)
    from arat_fast.reporting import write_report
    from arat_fast.training.interrupt import InterruptedRun
    from arat_fast.training.loop import Trainer

    command = shlex.join(["arat-fast", "train", *arguments])
    trainer = Trainer(config, out, resume=options.resume, command=command)
    try:
        summary = trainer.run()
    except InterruptedRun as stopped:
        print(f"arat-fast: {stopped}", file=sys.stderr)
        again = [argument for argument in arguments if argument != "--resume"]
        if options.out is None:
            again += ["--out", str(out)]
        again.append("--resume")
        print(f"    {shlex.join(['arat-fast', 'train', *again])}", file=sys.stderr)
        return stopped.exit_code
    report = write_report(out)
    _print_accuracy(summary["accuracy"])
    print(f"report: {report}")
    return 0


def _eval(arguments: list[str]) -> int:
    from arat_fast.evaluation.checkpoint import evaluate_checkpoint
    from arat_fast.files import write_json

    options = _parse(EvalOptions, arguments, "arat-fast eval")
    values = dataclasses.asdict(options)
    out = values.pop("out")
    record = evaluate_checkpoint(**values)
    _print_accuracy(record["accuracy"])
    checkpoint = options.checkpoint
    if checkpoint.is_dir():
        default = checkpoint / "evaluation.json"
    else:
        default = checkpoint.with_name(f"{checkpoint.stem}.evaluation.json")
    path = out or default
    write_json(path, record)
    print(f"record: {path}")
    return 0


def _report(arguments: list[str]) -> int:
    from arat_fast.reporting import write_report

    options = _parse(ReportOptions, arguments, "arat-fast report")
    print(f"report: {write_report(options.run, options.compare)}")
    return 0


def _bench(arguments: list[str]) -> int:
    from arat_fast.bench.scaling import ScalingOptions, bench_scaling
    from arat_fast.bench.step import StepOptions, bench_step

    name, rest = (arguments[0], arguments[1:]) if arguments else ("nothing", [])
    if name in ("-h", "--help"):
        print(USAGE.format(recipes=", ".join(RECIPES)), end="")
        return 0
    if name == "step":
        return bench_step(_parse(StepOptions, rest, "arat-fast bench step"))
    if name == "scaling":
        return bench_scaling(_parse(ScalingOptions, rest, "arat-fast bench scaling"))
    raise UsageError(f"step or scaling is expected after bench, got {name}")


def _info(arguments: list[str]) -> int:
    from arat_fast.device import describe_device, has_bf16, source_commit, versions

    if arguments:
        raise UsageError(f"info takes no arguments, got {' '.join(arguments)}")
    for name, version in versions().items():
        print(f"{name:14} {version}")
    commit = source_commit()
    if commit:
        print(f"{'commit':14} {commit}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        arithmetic = "bf16" if has_bf16(device) else "no bf16"
        print(f"{device!s:14} {describe_device(device)}, {arithmetic}")
    kernels = "Triton (interpreter or GPU)" if torch.cuda.is_available() else "reference (no GPU)"
    print(f"{'kernels':14} {kernels}")
    return 0


def _take_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and arguments[0] in ("-h", "--help"):
        return None, []
    if not arguments or arguments[0].startswith("-"):
        got = arguments[0] if arguments else "nothing"
        raise UsageError(f"a recipe is expected after train, got {got}: {', '.join(RECIPES)}")
    return arguments[0], arguments[1:]


def _compat(arguments: list[str]) -> str:
    """The value of --compat: it decides the defaults that the other options override."""
    for position, argument in enumerate(arguments):
        if argument == "--compat" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--compat="):
            return argument.partition("=")[2]
    return "paper"


def _run_name(config: Config) -> str:
    parts = [config.recipe]
    if config.objective.name != "arat":
        parts.append(config.objective.name)
    if config.compat != "paper":
        parts.append(config.compat)
    return "-".join([*parts, f"seed{config.seed}"])


def _parse(
    options: type[Options], arguments: list[str], program: str, default: Options | None = None
) -> Options:
    """tyro's parser; takes fractions such as 8/255, and complains in one line."""
    arguments = [_decimal(argument) for argument in arguments]
    complaint = io.StringIO()
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Options = tyro.cli(options, prog=program, args=arguments, **keywords)
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(f"{_one_line(complaint.getvalue())}; see {program} --help") from None


def _decimal(argument: str) -> str:
    """A fraction of numbers as a decimal number, anything else unchanged."""
    fraction = re.fullmatch(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", argument)
    if fraction is None or float(fraction[2]) == 0:
        return argument
    return repr(float(fraction[1]) / float(fraction[2]))


def _one_line(complaint: str) -> str:
    """The sentence inside a box that tyro draws: between the title and the hints."""
    lines = [line.strip(" │╭╮╰╯─\t") for line in complaint.splitlines()]
    lines = [line for line in lines if line.strip("-")]
    text = " ".join(lines[1:])
    return re.split(r"\s*(?:Argument helptext:|For full helptext|Default:)", text)[0].rstrip(". ")


def _print_accuracy(accuracy: dict[str, dict[str, Any]]) -> None:
    labels = {
        "clean": "clean",
        "clean_branch": "clean (clean branch)",
        "autoattack": "AutoAttack",
        "aa-torchattacks10": "aa-torchattacks10",
    }
    for name, record in accuracy.items():
        label = labels.get(name, name.upper().replace("PGD", "PGD-"))
        counts = f"{record['correct']}/{record['num_samples']}"
        print(f"{label:22} {100 * record['value']:6.2f} %   {counts}")
