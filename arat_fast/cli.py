"""The command ``arat-fast``: train, eval, compare, analyze, report, export, bench, info."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from arat_fast import __version__
from arat_fast.command_line import UsageError, parse, value_of
from arat_fast.config import Config
from arat_fast.device import keep_freed_memory
from arat_fast.distributed.ranks import LeftBehindError
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
  arat-fast compare RECIPE [--objectives NAME ...] [--seeds N ...] [--ablation] [overrides]
  arat-fast compare --from DIR
      Methods over several seeds: table, LaTeX, plane. Goes on where it stopped; --from prints the
      table of a saved comparison, or with --out runs it again.
  arat-fast analyze RUN_OR_CHECKPOINT [...] [options]
      Gradient conflict, mixture distribution, loss surfaces, a check for masked gradients, and
      what an attacker sees, as numbers and plots beside the run. Several networks attack each
      other with the examples made for one of them.
  arat-fast report RUN [--compare RUN ...]
      Write RUN/report.html again, beside other runs if some are given.
  arat-fast export RUN_OR_CHECKPOINT --format FORMAT --out DIR [options]
      The network for other software: hub (safetensors and model card), robustbench, torchvision,
      timm, torch-export or onnx.
  arat-fast data inspect PATH
  arat-fast data prepare PATH [OUT]
      What a dataset is: classes, counts, sizes, mean and std, a sheet of images. prepare converts
      an .npz file of generated images to arrays in the folder OUT, and decodes every image of a
      folder or of tar shards to name those that cannot be.
  arat-fast bench eval RUN ... [options]
      Time AutoAttack's fast path beside pyautoattack as it is, and compare what survives.
  arat-fast bench step|scaling|data [options]
      Time the training step beside plain, tuned and compiled PyTorch and the official code, or
      against batch size, image size, attack steps and width; or the loaders. Writes JSON, a table
      and a plot.
  arat-fast info
      Versions, devices and arithmetic of this machine.

recipes: {recipes}
"""

LISTS_OPTIONS = {
    "train": "arat-fast train digits --help",
    "compare": "arat-fast compare digits --help",
    "data": "arat-fast data inspect --help, arat-fast data prepare --help",
    "bench": "arat-fast bench step --help; likewise eval, scaling, data",
}
"""What lists every option of a command that is more than one."""


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
    attacks: tuple[
        Literal["pgd", "autoattack", "apgd-ce", "square", "aa-torchattacks10", "corruptions"], ...
    ] = ("pgd", "autoattack")
    """What to run beside the clean images. apgd-ce and square are AutoAttack's first and last
    attack alone; corruptions are fifteen common ones in five severities, made on the fly;
    aa-torchattacks10 is AutoAttack with torchattacks' 10 steps, as the paper's table had it: it
    overstates robustness and is for comparison with that table only."""
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
    """File for the record, NAME.json; default evaluation.json in the run's folder,
    NAME.evaluation.json beside a file NAME.pt or NAME.safetensors. Attacks are added to a record of
    the same weights, images and settings. Results image by image go beside it as .npz; an
    interrupted evaluation goes on where it was when the same command is given again."""


@dataclass(frozen=True)
class InspectOptions:
    """Say what a dataset is, and draw a sheet of its images."""

    path: tyro.conf.Positional[Path]
    """Folder of a dataset or of images, an .npz file, or a tar shard."""
    sheet: Path | None = None
    """PNG file for the sheet; default NAME-sheet.png in the current folder, or beside the dataset
    where that folder is in it."""
    max_samples: int = 2000
    """Images decoded for sizes, mean and std, evenly spread; >= 1."""


@dataclass(frozen=True)
class PrepareOptions:
    """Convert a dataset for fast reading, or verify that every image can be decoded."""

    path: tyro.conf.Positional[Path]
    """An .npz file with image and label, a folder of images by class, or tar shards."""
    out: tyro.conf.Positional[Path | None] = None
    """Folder to make of an .npz file."""


@dataclass(frozen=True)
class ReportOptions:
    """Write the report of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    compare: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = field(default=())
    """Folders of runs to set beside it."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained network for other software."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint.pt, a model.safetensors, or an official AR-AT checkpoint."""
    format: Literal["hub", "robustbench", "torchvision", "timm", "torch-export", "onnx"]
    """hub: safetensors, model card and example. robustbench: weights and model_info for its
    classes. torchvision, timm: their parameter names. torch-export: a .pt2 program. onnx: needs the
    extra onnx, pip install -e '.[onnx]' in the checkout."""
    out: Path
    """Folder to write; absent or empty."""
    branch: Literal["adv", "clean"] | None = None
    """BatchNorm branch of a network with two; default adv, the robust one."""
    weights: Literal["deployed", "last"] = "deployed"
    """deployed: the average where the run has one. last: the weights of the last step."""
    recipe: str | None = None
    """Recipe whose data and threat model are used where the file does not name them."""
    name: str | None = None
    """Name of the model on its card or in RobustBench."""
    license: str = "unknown"
    """hub: identifier of the weights' licence, for example apache-2.0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0; 2 for bad input, with one line on standard error that says what was got
        and what was expected; 130 or 75 for a run that Ctrl-C or SIGTERM stopped; 1, without
        returning, where another process of the job was lost. With the environment variable
        ARAT_FAST_TRACEBACK=1, errors are raised instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "compare": _compare,
        "analyze": _analyze,
        "report": _report,
        "export": _export,
        "data": _data,
        "bench": _bench,
        "info": _info,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
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
        keep_freed_memory()
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("arat-fast: interrupted", file=sys.stderr)
        return 130
    except LeftBehindError as error:
        if str(error):
            print(f"arat-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # The libraries' own clean-up would wait for the process that is lost.
        os._exit(error.exit_code)
    except UsageError as error:
        # Every process has the same command line.
        if os.environ.get("RANK", "0") == "0":
            print(f"arat-fast: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        from arat_fast.training.memory import BatchTooLargeError

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


def _usage(command: str = "") -> str:
    """The usage: all of it, or the lines of one command of :data:`LISTS_OPTIONS`."""
    text = USAGE.format(recipes=", ".join(RECIPES))
    if not command:
        return text
    lines = re.findall(rf"^  arat-fast {command} .*\n(?:      .*\n)*", text, re.MULTILINE)
    recipes = text[text.index("recipes: ") :] if " RECIPE " in lines[0] else ""
    return f"usage:\n{''.join(lines)}\nevery option: {LISTS_OPTIONS[command]}\n{recipes}"


def _train(arguments: list[str]) -> int:
    name, rest = _take_recipe(arguments, "train")
    if name is None:
        print(_usage("train"), end="")
        return 0
    objective = value_of(rest, "--objective.name")
    base = recipe(name, _compat(rest), objective)  # type: ignore[arg-type]  # recipe() checks the value
    options = parse(TrainOptions, rest, f"arat-fast train {name}", TrainOptions(base))
    config = options.config
    out = options.out or Path("runs") / _run_name(config)
    from arat_fast.distributed import join
    from arat_fast.report import write_report
    from arat_fast.run.loop import train
    from arat_fast.stop import InterruptedRun

    command = shlex.join(["arat-fast", "train", *arguments])
    # What torchrun starts again goes on.
    resume = options.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with join(config.train.device, config.distributed.timeout) as ranks:
            summary = train(config, out, resume=resume, command=command, ranks=ranks)
            is_main = ranks.is_main
    except InterruptedRun as stopped:
        if not is_main:
            return stopped.exit_code
        print(f"arat-fast: {stopped}", file=sys.stderr)
        again = [argument for argument in arguments if argument != "--resume"]
        if options.out is None:
            again += ["--out", str(out)]
        again.append("--resume")
        print(f"    {shlex.join(['arat-fast', 'train', *again])}", file=sys.stderr)
        return stopped.exit_code
    if not is_main:
        return 0
    report = write_report(out)
    _print_accuracy(summary["accuracy"])
    print(f"report: {report}")
    return 0


def _eval(arguments: list[str]) -> int:
    from arat_fast.distributed import join
    from arat_fast.evaluation.checkpoint import evaluate_checkpoint
    from arat_fast.evaluation.record import record_path

    options = parse(EvalOptions, arguments, "arat-fast eval")
    path = options.out or record_path(options.checkpoint)
    settings = {**dataclasses.asdict(options), "out": path}
    try:
        with join(options.device) as ranks:
            record = evaluate_checkpoint(**settings, ranks=ranks)
            if not ranks.is_main:
                return 0
    except KeyboardInterrupt:
        partial = path.with_suffix(".partial")
        if not partial.is_dir():
            raise
        if os.environ.get("RANK", "0") == "0":
            print(
                f"arat-fast: interrupted; what is finished is kept in {partial}, and the same "
                f"command goes on from there:\n    {shlex.join(['arat-fast', 'eval', *arguments])}",
                file=sys.stderr,
            )
        return 130
    if "interrupted" in record:
        steps = record["interrupted"]
        print(
            f"an interrupted run: {steps['steps']:,} of {steps['of']:,} steps are trained; "
            "arat-fast train with --resume goes on with it"
        )
    _print_accuracy(record["accuracy"])
    per_example = path.with_name(record["per_example"])
    print(f"record: {per_example.with_suffix('.json')}")
    print(f"image by image: {per_example}")
    return 0


def _compare(arguments: list[str]) -> int:
    from arat_fast.compare import compare_command

    if any(argument.partition("=")[0] == "--from" for argument in arguments):
        return compare_command(arguments, None)
    name, rest = _take_recipe(arguments, "compare")
    if name is None:
        print(_usage("compare"), end="")
        return 0
    return compare_command(rest, recipe(name, _compat(rest), value_of(rest, "--objective.name")))  # type: ignore[arg-type]  # checked


def _analyze(arguments: list[str]) -> int:
    from arat_fast.analysis.run import AnalyzeOptions, analyze_networks
    from arat_fast.report.analysis_words import analysis_sentences
    from arat_fast.report.records import write_analysis_plots

    options = parse(AnalyzeOptions, arguments, "arat-fast analyze")
    if not options.checkpoints:
        raise UsageError("a run or a checkpoint is expected after analyze, got nothing")
    found = analyze_networks(options.checkpoints, options.settings)
    write_analysis_plots(found)
    for analysis in found:
        print(f"{analysis.name}: {analysis.folder}")
        for sentence in analysis_sentences(analysis.records):
            print(f"  {sentence}")
        for part, reason in analysis.left_out.items():
            print(f"  {part} left out: {reason}")
    for path in dict.fromkeys(options.checkpoints):
        if (path / "config.json").is_file():
            print(f"in the report: {shlex.join(['arat-fast', 'report', str(path)])}")
    return 0


def _report(arguments: list[str]) -> int:
    from arat_fast.report import write_report

    options = parse(ReportOptions, arguments, "arat-fast report")
    print(f"report: {write_report(options.run, options.compare)}")
    return 0


def _export(arguments: list[str]) -> int:
    from arat_fast.export.folder import export_checkpoint

    options = parse(ExportOptions, arguments, "arat-fast export")
    record = export_checkpoint(**dataclasses.asdict(options))
    difference, largest = record["largest_difference"], record["largest_logit"]
    relative = difference / largest if largest else 0.0
    print(
        f"exported: {record['model']}, {record['num_classes']} classes, {record['branch']} "
        f"BatchNorm, {record['weights']} weights; read back, logits differ by at most "
        f"{difference:.1e}, {relative:.1e} of the largest"
    )
    if options.format == "hub" and options.license == "unknown":
        print("licence: unknown; add --license ID, for example apache-2.0")
    print(f"folder: {options.out}")
    return 0


def _bench(arguments: list[str]) -> int:
    from arat_fast.bench.scaling import ScalingOptions, bench_scaling
    from arat_fast.bench.step import StepOptions, bench_step

    name, rest = (arguments[0], arguments[1:]) if arguments else ("nothing", [])
    if name in ("-h", "--help"):
        print(_usage("bench"), end="")
        return 0
    if name == "step":
        return bench_step(parse(StepOptions, rest, "arat-fast bench step"))
    if name == "eval":
        from arat_fast.bench.evaluation import EvalBenchOptions, bench_eval

        return bench_eval(parse(EvalBenchOptions, rest, "arat-fast bench eval"))
    if name == "scaling":
        return bench_scaling(parse(ScalingOptions, rest, "arat-fast bench scaling"))
    if name == "data":
        from arat_fast.bench.data import DataOptions, bench_data

        return bench_data(parse(DataOptions, rest, "arat-fast bench data"))
    raise UsageError(f"step, scaling, data or eval is expected after bench, got {name}")


def _data(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("nothing", [])
    if name in ("-h", "--help"):
        print(_usage("data"), end="")
        return 0
    if name == "inspect":
        return _inspect(parse(InspectOptions, rest, "arat-fast data inspect"))
    if name == "prepare":
        return _prepare(parse(PrepareOptions, rest, "arat-fast data prepare"))
    raise UsageError(f"inspect or prepare is expected after data, got {name}")


def _inspect(options: InspectOptions) -> int:
    from arat_fast.data.inspect import inspect

    sheet = options.sheet
    if sheet is None:
        # Never into the dataset: the sheet would be one of its images.
        path, here = options.path.resolve(), Path.cwd()
        sheet = (path.parent if here.is_relative_to(path) else here) / f"{path.name}-sheet.png"
    found = inspect(options.path, sheet, options.max_samples)
    print("\n".join(found.lines()))
    print(f"sheet        {sheet}")
    return 0


def _prepare(options: PrepareOptions) -> int:
    from arat_fast.data.prepare import convert_npz, verify

    if options.path.suffix == ".npz":
        if options.out is None:
            raise UsageError(f"a folder to write is expected after {options.path}")
        number = convert_npz(options.path, options.out)
        print(f"converted: {number:,} images with labels, checksums right")
        print(f"folder: {options.out}; mix it in with --data.unsup {options.out}")
        return 0
    if options.out is not None:
        raise UsageError(f"{options.path} is used as it is: no folder to write, got {options.out}")
    number, bad = verify(options.path)
    for reason in bad:
        print(f"unreadable: {reason}")
    print(f"{number - len(bad):,} of {number:,} files can be decoded")
    if bad:
        print("train on the others with --data.bad-images skip, or remove the files")
    return 2 if bad else 0


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


def _take_recipe(arguments: list[str], command: str) -> tuple[str | None, list[str]]:
    if arguments and arguments[0] in ("-h", "--help"):
        return None, []
    if not arguments or arguments[0].startswith("-"):
        got = arguments[0] if arguments else "nothing"
        raise UsageError(f"a recipe is expected after {command}, got {got}: {', '.join(RECIPES)}")
    return arguments[0], arguments[1:]


def _compat(arguments: list[str]) -> str:
    """The value of --compat: it decides the defaults that the other options override."""
    return value_of(arguments, "--compat") or "paper"


def _run_name(config: Config) -> str:
    parts = [config.recipe]
    if config.objective.name != "arat":
        parts.append(config.objective.name)
    if config.compat != "paper":
        parts.append(config.compat)
    return "-".join([*parts, f"seed{config.seed}"])


def _print_accuracy(accuracy: dict[str, dict[str, Any]]) -> None:
    labels = {
        "clean": "clean",
        "clean_branch": "clean (clean branch)",
        "autoattack": "AutoAttack",
        "aa-torchattacks10": "aa-torchattacks10",
        "apgd-ce": "APGD-CE alone",
        "square": "Square alone",
        "corruptions": "common corruptions",
    }
    for name, record in accuracy.items():
        label = labels.get(name, name.upper().replace("PGD", "PGD-"))
        counts = f"{record['correct']}/{record['num_samples']}"
        low, high = (100 * end for end in record["interval"])
        print(
            f"{label:22} {100 * record['value']:6.2f} %   {counts:12}  "
            f"95 % interval {low:.2f} to {high:.2f} %"
        )
