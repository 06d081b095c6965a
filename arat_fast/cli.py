"""The command ``arat-fast``: train, eval, predict, compare, analyze, report, export, data, info,
layers and doctor.

Each command imports what it needs: ``--help`` and ``--version`` wait for no library.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import select
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from arat_fast import __version__
from arat_fast.command_line import (
    NetworkName,
    UsageError,
    base_config,
    choose,
    number,
    parse,
    purpose_of,
    typed,
)
from arat_fast.settings import NormName, shown
from arat_fast.stop import end_on_signals

if TYPE_CHECKING:
    from arat_fast.config import Config, ModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0; 2 for bad input, with one line on standard error that says what was got
        and what was expected; 130 for Ctrl-C and 75 for the other signals of
        :mod:`arat_fast.stop`, whatever they stopped; 141 where the reader of standard output has
        gone; 1, without returning, where another process of the job was lost. With the environment
        variable ARAT_FAST_TRACEBACK=1, errors are raised instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"arat-fast {__version__}")
        return 0
    try:
        with end_on_signals():
            code = _run("arat-fast", arguments, COMMANDS)
        sys.stdout.flush()
        return code
    except SystemExit as done:
        if done.code:
            raise
        # tyro has printed the help that was asked for.
        return 0
    except KeyboardInterrupt as stopped:
        print("arat-fast: interrupted", file=sys.stderr)
        return getattr(stopped, "exit_code", 130)
    except Exception as error:
        return _failed(error)


class Command:
    """A sub-command: a dataclass of its options, described by its docstring; called with the
    arguments as they were typed, it does its work and returns the exit code."""

    @classmethod
    def main(cls, program: str, arguments: list[str]) -> int:
        options: Any = parse(cls, arguments, program)
        return int(options(arguments))


def _run(program: str, arguments: list[str], commands: Mapping[str, type[Command]]) -> int:
    purposes = {name: purpose_of(command) for name, command in commands.items()}
    name, rest = choose(program, arguments, purposes, "COMMAND")
    return commands[name].main(f"{program} {name}", rest)


def _failed(error: Exception) -> int:
    """Say in one line what went wrong, as far as it is not this package's mistake."""
    if isinstance(error, BrokenPipeError) and _is_unread():
        return 141
    if isinstance(error, (ValueError, OSError)):
        if os.environ.get("ARAT_FAST_TRACEBACK") == "1":
            raise error
        # Every process has the same command line.
        if _is_first() or not isinstance(error, UsageError):
            _complain(error)
        return 2

    from arat_fast.distributed import LeftBehindError
    from arat_fast.training.memory import BatchTooLargeError, is_out_of_memory

    if isinstance(error, LeftBehindError):
        if str(error):
            _complain(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # The libraries' own clean-up would wait for the process that is lost.
        os._exit(error.exit_code)
    if not isinstance(error, MemoryError) and not is_out_of_memory(error):
        raise error
    message = str(error)
    if not isinstance(error, BatchTooLargeError):
        advice = "lower --data.batch-size for training, --eval.batch-size for evaluation"
        message = f"out of memory: {message.partition('. ')[0]}; {advice}"
    _complain(message)
    return 2


def _is_unread() -> bool:
    """Whether the reader of standard output has gone, as ``head`` does; the rest is dropped."""
    output, poll = 1, select.poll()
    poll.register(output, 0)
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _complain(message: object) -> None:
    print(f"arat-fast: error: {' '.join(str(message).split())}", file=sys.stderr)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _recipe(program: str, arguments: list[str]) -> tuple[Config, list[str]]:
    """The configuration of the recipe that comes first, and what follows it."""
    # What is imported stays: looking for garbage in it takes a tenth of a second or two.
    gc.disable()
    from arat_fast.recipes import RECIPES

    gc.freeze()
    gc.enable()
    purposes = {name: _course(make()) for name, make in RECIPES.items()}
    name, rest = choose(program, arguments, purposes, "RECIPE")
    return base_config(name, rest), rest


def _course(config: Config) -> str:
    """A recipe in a line."""
    what = f"{config.objective.name}, {config.model.name}, {config.data.name}"
    ball = f"{config.attack.norm} {shown(config.attack.eps)}"
    return f"{what}, {ball}, {config.train.epochs} epochs"


@dataclass(frozen=True)
class Train(Command):
    """Train a recipe, evaluate it and write a report. Options after the recipe's name override its
    fields, for example --train.epochs 30 --attack.eps 4/255; train RECIPE --help lists them."""

    # A Config, whose class is not named: it would be imported, and torch with it.
    config: Annotated[Any, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; default runs/RECIPE-…-seedN."""
    resume: bool = False
    """Go on from the checkpoint in the folder, bit for bit (on a GPU with --train.deterministic);
    start afresh if there is none."""

    @classmethod
    def main(cls, program: str, arguments: list[str]) -> int:
        base, rest = _recipe(program, arguments)
        purpose = f"{_course(base)}\n\nFor example: --train.epochs 30 --attack.eps 4/255"
        return parse(cls, rest, f"{program} {base.recipe}", cls(base), purpose)(arguments)

    def __call__(self, arguments: list[str]) -> int:
        config: Config = self.config
        out = self.out or Path("runs") / _run_name(config)
        from arat_fast.device import keep_freed_memory
        from arat_fast.distributed import join
        from arat_fast.files import written_here
        from arat_fast.report import write_report
        from arat_fast.report.run import read_run
        from arat_fast.report.words import better_before
        from arat_fast.run.loop import train
        from arat_fast.stop import InterruptedRun
        from arat_fast.training.checkpoint import BEST

        keep_freed_memory()
        command = shlex.join(["arat-fast", "train", *arguments])
        # What torchrun starts again goes on.
        resume = self.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        is_main = _is_first()
        try:
            with join(config.train.device, config.distributed.timeout) as ranks:
                summary = train(config, out, resume=resume, command=command, ranks=ranks)
                is_main = ranks.is_main
        except InterruptedRun as stopped:
            if is_main:
                again = [argument for argument in arguments if argument != "--resume"]
                again += ["--resume"] if self.out else ["--out", str(out), "--resume"]
                print(f"arat-fast: {stopped}", file=sys.stderr)
                for words in (["report", str(out)], ["train", *again]):
                    print(f"    {typed(*words)}", file=sys.stderr)
            return stopped.exit_code
        if is_main:
            report = write_report(out)
            with written_here(out / "summary.json"):
                _print_accuracy(summary)
            better = better_before(read_run(out))
            if better is not None:
                said, options = better
                print(f"{said}; {options or out / BEST} keeps the best by validation images")
            print(f"report: {report}")
        return 0


def _run_name(config: Config) -> str:
    usual = ("arat", "paper")
    parts = [p for p in (config.objective.name, config.compat) if p not in usual]
    return "-".join([config.recipe, *parts, f"seed{config.seed}"])


@dataclass(frozen=True)
class Eval(Command):
    """Clean, PGD and AutoAttack accuracy of a checkpoint, a run's folder, exported weights, an
    official AR-AT checkpoint or anybody's network, in one ball or several."""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """A run's folder, a checkpoint.pt, a model.safetensors, or an official AR-AT checkpoint."""
    model_name: Annotated[str | None, tyro.conf.arg(name="model.name")] = None
    """Anybody's network, as --model.name of train takes it, with its --weights; of a run whose
    network is one's own its name, which imports its module."""
    weights: Path | None = None
    """Its state dict, .safetensors or written by torch.save."""
    mean: Annotated[tuple[float, ...], tyro.conf.arg(name="model.mean")] = ()
    """Per-channel mean subtracted inside that network; empty for what it or its file says."""
    std: Annotated[tuple[float, ...], tyro.conf.arg(name="model.std")] = ()
    """Per-channel standard deviation divided by inside that network."""
    data: str | None = None
    """Other images of the same classes: a folder by class, an .npz file, tar shards, or a dataset's
    name, such as cifar10.1; cifar10-c or cifar100-c for the published mean over corruptions and
    severities, where nothing attacks. Images that are not split are all taken."""
    recipe: str | None = None
    """Recipe whose data, model and threat model are used; needed where the file is no run's own,
    unless --data and --eps are given with --model.name."""
    norm: NormName | None = None
    """Norm of the ball; default the run's, another one needs --eps."""
    eps: tuple[str, ...] = ()
    """Radii of the ball, one after the other; L2:0.5 is one in another norm. Default the run's."""
    num_steps: int | None = None
    """Steps of PGD; default the run's."""
    alpha: float | None = None
    """Step size of PGD; default that of the run's evaluation, in another ball eps / 4."""
    num_restarts: int = 1
    """Independent runs of PGD; an image counts as robust if it withstands them all; >= 1."""
    attacks: tuple[Literal["pgd", "autoattack", "apgd-ce", "square", "aa-torchattacks10"], ...] = (
        "pgd",
        "autoattack",
    )
    """What to run beside the clean images. apgd-ce and square are AutoAttack's first and last
    attack alone; aa-torchattacks10 is AutoAttack with torchattacks' 10 steps, as the paper's table
    had it: it overstates robustness and is for comparison with that table only."""
    max_samples: int = 0
    """Evaluate the first samples only, in the order of the dataset, of a folder one that mixes the
    classes; 0 for all."""
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
    NAME.evaluation.json beside a file NAME.pt or NAME.safetensors; with --norm or --eps
    evaluation-NORM-EPS.json, with --data evaluation-DATA.json. Attacks are added to a record of
    the same weights, images and settings. Results image by image go beside it as .npz; an
    interrupted evaluation goes on where it was when the same command is given again."""

    def __call__(self, arguments: list[str]) -> int:
        from arat_fast.config import ModelConfig
        from arat_fast.datasets.corruptions import FOLDERS
        from arat_fast.device import keep_freed_memory
        from arat_fast.display import Display
        from arat_fast.distributed import join
        from arat_fast.evaluation.checkpoint import evaluate_checkpoint
        from arat_fast.evaluation.record import record_path

        keep_freed_memory()
        if (self.checkpoint is None) == (self.weights is None):
            raise UsageError("PATH or --weights FILE is expected after eval")
        if self.weights is not None and self.model_name is None:
            raise UsageError("--weights FILE is a network's, expected --model.name too")
        named = None
        if self.model_name is not None:
            # Its own module is imported, also for a run that names it.
            named = ModelConfig(self.model_name, mean=self.mean, std=self.std)
        model = None if self.weights is None else named
        checkpoint = self.checkpoint or self.weights
        assert checkpoint is not None
        if self.data in FOLDERS:
            return self._corruptions(checkpoint, model)
        options = dataclasses.asdict(self)
        for name in ("model_name", "weights", "mean", "std"):
            del options[name]
        # One display, which says once what is so in every ball.
        options |= {"checkpoint": checkpoint, "model": model, "display": Display()}
        records = []
        path = checkpoint
        try:
            with join(self.device) as ranks:
                for norm, eps in self._balls():
                    path = record_path(checkpoint, norm, eps, self.data)
                    if self.out is not None:
                        several = len(self.eps) > 1
                        path = record_path(self.out, norm, eps) if several else self.out
                    ball = {"norm": norm, "eps": eps, "out": path}
                    records.append(evaluate_checkpoint(**{**options, **ball}, ranks=ranks))
                    if ranks.is_main:
                        self._print(records[-1], path, is_first=len(records) == 1)
                if not ranks.is_main:
                    return 0
        except KeyboardInterrupt as stopped:
            partial = path.with_suffix(".partial")
            if not partial.is_dir():
                raise
            if _is_first():
                kept = f"what is finished is kept in {partial}, and the same command goes on from"
                print(f"arat-fast: interrupted; {kept} there:", file=sys.stderr)
                print(f"    {typed('eval', *arguments)}", file=sys.stderr)
            return getattr(stopped, "exit_code", 130)
        if len(records) > 1:
            _print_balls(records)
        return 0

    def _balls(self) -> list[tuple[Any, float | None]]:
        """Norms and radii; None for the run's own."""
        found: list[tuple[Any, float | None]] = []
        for ball in self.eps:
            norm, _, radius = ball.rpartition(":")
            if norm not in ("", *get_args(NormName)):
                raise UsageError(f"--eps expects RADIUS or NORM:RADIUS, as L2:0.5, got {ball}")
            try:
                found.append((norm or self.norm, number(radius)))
            except ValueError as error:
                raise UsageError(f"--eps: {error}") from None
        return found or [(self.norm, None)]

    def _print(self, record: dict[str, Any], path: Path, is_first: bool) -> None:
        if "interrupted" in record and is_first:
            trained = "{steps:,} of {of:,} steps are trained".format(**record["interrupted"])
            print(f"an interrupted run: {trained}; arat-fast train with --resume goes on with it")
        _print_accuracy(record, remarks=is_first)
        per_example = path.with_name(record["per_example"])
        print(f"record: {per_example.with_suffix('.json')}")
        print(f"image by image: {per_example}")

    def _corruptions(self, checkpoint: Path, model: ModelConfig | None) -> int:
        from arat_fast.evaluation.corruptions import evaluate_corruptions
        from arat_fast.evaluation.record import record_path

        if not _is_first():
            return 0
        out = self.out or record_path(checkpoint, data=self.data)
        record = evaluate_corruptions(
            checkpoint,
            str(self.data),
            model=model,
            recipe=self.recipe,
            data_root=self.data_root,
            batch_size=self.batch_size,
            max_samples=self.max_samples,
            device=self.device,
            out=out,
        )
        for name, severities in record["corruptions"].items():
            print(f"{name:18}" + "".join(f"{100 * value:8.2f}" for value in severities))
        number = f"{record['num_samples']:,}"
        print(f"mean {100 * record['mean']:.2f} % over 15 corruptions, 5 severities of {number}")
        print(f"record: {out}")
        return 0


def _print_balls(records: list[dict[str, Any]]) -> None:
    """Accuracies by ball and attack."""
    attacks = list(dict.fromkeys(name for record in records for name in record["accuracy"]))
    print(f"{'ball':16}" + "".join(f"{name:>18}" for name in attacks))
    for record in records:
        ball = f"{record['norm']} {shown(record['eps'])}"
        values = (record["accuracy"].get(name) for name in attacks)
        shares = (f"{100 * v['value']:.2f} %" if v else "-" for v in values)
        print(f"{ball:16}" + "".join(f"{share:>18}" for share in shares))


def _print_accuracy(found: dict[str, Any], remarks: bool = True) -> None:
    from arat_fast.evaluation.suite import accuracy_lines

    print("\n".join(accuracy_lines(found["accuracy"])))
    for remark in ("collapsed", "randomised"):
        if remark in found and remarks:
            print(f"warning: {found[remark]}")


@dataclass(frozen=True)
class Predict(Command):
    """The class of pictures, and how sure the network is of it."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint.pt, a model.safetensors, or an official AR-AT checkpoint."""
    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them: BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF or WEBP, one
    picture each, of any size, in colour or grey, of 8 or 16 bits. They are cut and scaled to the
    size of the network's images as the run's test images were (with --data.crop pad not scaled),
    and become grey where those were; colour profiles and EXIF rotation are not applied."""
    branch: Literal["adv", "clean"] | None = None
    """BatchNorm branch of a network with two; default adv, the robust one."""
    weights: Literal["deployed", "last"] = "deployed"
    """deployed: the average where the run has one. last: the weights of the last step."""
    recipe: str | None = None
    """Recipe whose network it is, where the file does not say."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    model: NetworkName = field(default_factory=NetworkName)
    json: bool = False
    """Print a list of objects with file, label, confidence and problem."""

    def __call__(self, arguments: list[str]) -> int:
        import json

        from arat_fast.evaluation.pictures import predict_pictures

        options = dataclasses.asdict(self)
        as_json = options.pop("json")
        del options["model"]
        found = predict_pictures(**options)
        if as_json:
            print(json.dumps([vars(p) | {"file": str(p.file)} for p in found], indent=1))
        else:
            width = max(len(str(p.file)) for p in found)
            for p in found:
                answer = f"{100 * p.confidence:6.2f} %  {p.label}"
                print(p.problem or f"{p.file!s:{width}}  {answer}")
        return 2 if any(p.problem for p in found) else 0


class Compare(Command):
    """Methods over several seeds, as a table, LaTeX and a plane. compare RECIPE [--objectives NAME
    ...] [--seeds N ...] [--ablation] [overrides] goes on where it stopped; compare --from DIR
    prints the table of a saved comparison, or with --out runs it again."""

    @classmethod
    def main(cls, program: str, arguments: list[str]) -> int:
        saved = any(argument.partition("=")[0] == "--from" for argument in arguments)
        base, rest = (None, arguments) if saved else _recipe(program, arguments)
        from arat_fast.compare.command import compare_command
        from arat_fast.device import keep_freed_memory

        keep_freed_memory()
        return compare_command(rest, base)


class Analyze(Command):
    """Gradient conflict, mixture distribution and a check for masked gradients, as numbers and
    plots beside the run. Several networks attack each other with the examples made for one of
    them."""

    @classmethod
    def main(cls, program: str, arguments: list[str]) -> int:
        from arat_fast.analysis.run import AnalyzeOptions, analyze_networks
        from arat_fast.device import keep_freed_memory
        from arat_fast.report.analysis_words import analysis_sentences
        from arat_fast.report.records import write_analysis_plots

        keep_freed_memory()
        options = parse(AnalyzeOptions, arguments, program)
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
                print(f"in the report: {typed('report', str(path))}")
        return 0


@dataclass(frozen=True)
class Report(Command):
    """Write RUN/report.html again, beside other runs if some are given."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    compare: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = field(default=())
    """Folders of runs to set beside it."""

    def __call__(self, arguments: list[str]) -> int:
        from arat_fast.report import write_report

        print(f"report: {write_report(self.run, self.compare)}")
        return 0


@dataclass(frozen=True)
class Export(Command):
    """The network for other software: hub (safetensors and model card), robustbench, torchvision,
    timm, torch-export or onnx."""

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
    push: str | None = None
    """hub: upload the folder to this repository, USER/NAME, made where it is absent; needs the
    extra hub and what hf auth login leaves. arat_fast.load("hf:USER/NAME") loads it."""
    model: NetworkName = field(default_factory=NetworkName)

    def __call__(self, arguments: list[str]) -> int:
        from arat_fast.export.folder import export_checkpoint
        from arat_fast.extras import needed
        from arat_fast.saved.hub import push

        options = dataclasses.asdict(self)
        del options["model"]
        repository = options.pop("push")
        if repository is not None:
            if self.format != "hub":
                raise UsageError(f"--push is for --format hub, got {self.format}")
            needed("hub", "huggingface_hub")
        record = export_checkpoint(**options)
        difference, largest = record["largest_difference"], record["largest_logit"]
        relative = difference / largest if largest else 0.0
        print(
            f"exported: {record['model']}, {record['num_classes']} classes, {record['branch']} "
            f"BatchNorm, {record['weights']} weights; read back, logits differ by at most "
            f"{difference:.1e}, {relative:.1e} of the largest"
        )
        if self.format == "hub" and self.license == "unknown":
            print("licence: unknown; add --license ID, for example apache-2.0")
        print(f"folder: {self.out}")
        if repository is not None:
            print(f"uploaded: {push(self.out, repository)}")
        return 0


class Data(Command):
    """What a dataset is (inspect), and its conversion or verification (prepare)."""

    @classmethod
    def main(cls, program: str, arguments: list[str]) -> int:
        return _run(program, arguments, {"inspect": Inspect, "prepare": Prepare})


@dataclass(frozen=True)
class Inspect(Command):
    """Classes, counts, sizes, mean and std of a dataset, and a sheet of its images."""

    path: tyro.conf.Positional[Path]
    """Folder of a dataset or of images, an .npz file, or a tar shard."""
    sheet: Path | None = None
    """PNG file for the sheet; default NAME-sheet.png in the current folder, or beside the dataset
    where that folder is in it."""
    max_samples: int = 2000
    """Images decoded for sizes, mean and std, evenly spread; >= 1."""
    eps: tuple[float, ...] = ()
    """Radii to choose from: some images, and beside each of them itself with random signs of each
    radius, go to NAME-radii.png beside the sheet."""
    follow_links: bool = False
    """Also read class folders that are links to folders elsewhere."""

    def __call__(self, arguments: list[str]) -> int:
        from arat_fast.data.inspect import inspect

        sheet = self.sheet
        if sheet is None:
            # Never into the dataset: the sheet would be one of its images.
            path, here = self.path.resolve(), Path.cwd()
            sheet = (path.parent if here.is_relative_to(path) else here) / f"{path.name}-sheet.png"
        radii = sheet.with_name(f"{sheet.stem.removesuffix('-sheet')}-radii.png")
        found = inspect(
            self.path,
            sheet,
            self.max_samples,
            self.follow_links,
            radii=(radii, self.eps) if self.eps else None,
        )
        print("\n".join(found.lines()))
        print(f"sheet        {sheet}")
        if self.eps:
            print(f"radii        {radii}: as it is, {', '.join(map(shown, self.eps))}")
        return 0


@dataclass(frozen=True)
class Prepare(Command):
    """Convert an .npz file of generated images to arrays in a folder, or decode every image of a
    folder or of tar shards to name those that cannot be."""

    path: tyro.conf.Positional[Path]
    """An .npz file with image and label, a folder of images by class, or tar shards."""
    out: tyro.conf.Positional[Path | None] = None
    """Folder to make of an .npz file."""
    follow_links: bool = False
    """Also read class folders that are links to folders elsewhere."""

    def __call__(self, arguments: list[str]) -> int:
        from arat_fast.data.prepare import convert_npz, verify

        if self.path.suffix == ".npz":
            if self.out is None:
                raise UsageError(f"a folder to write is expected after {self.path}")
            number, note = convert_npz(self.path, self.out)
            print(f"converted: {number:,} images with labels, checksums right")
            if note:
                print(f"images were read from {note}")
            print(f"folder: {self.out}; mix it in with --data.unsup {self.out}")
            return 0
        if self.out is not None:
            raise UsageError(f"{self.path} is used as it is: no folder to write, got {self.out}")
        number, bad = verify(self.path, self.follow_links)
        for reason in bad:
            print(f"unreadable: {reason}")
        print(f"{number - len(bad):,} of {number:,} files can be decoded")
        if bad:
            print("train on the others with --data.bad-images skip, or remove the files")
        return 2 if bad else 0


@dataclass(frozen=True)
class Info(Command):
    """Versions, objectives, devices and arithmetic of this machine."""

    def __call__(self, arguments: list[str]) -> int:
        import torch

        from arat_fast.device import (
            count_gpus,
            describe_device,
            has_bf16,
            source_commit,
            versions,
        )
        from arat_fast.doctor import last_result, wrong_functions
        from arat_fast.objectives import OBJECTIVES

        facts = {**versions(), "commit": source_commit(), "objectives": ", ".join(OBJECTIVES)}
        num_gpus = 0
        try:
            num_gpus = count_gpus()
        except ValueError as error:
            facts["gpu"] = str(error)
        for name in ["cpu", *(f"cuda:{i}" for i in range(num_gpus))]:
            device = torch.device(name)
            arithmetic = "bf16" if has_bf16(device) else "no bf16"
            facts[name] = f"{describe_device(device)}, {arithmetic}"
        facts["kernels"] = "Triton (interpreter or GPU)" if num_gpus else "reference (no GPU)"
        last = last_result()
        if last is not None:
            wrong = ", ".join(wrong_functions(last[0]["operations"])) or "nothing"
            facts["self-check"] = f"wrong: {wrong} ({last[1]})"
        for name, fact in facts.items():
            if fact:
                print(f"{name:14} {fact}")
        return 0


@dataclass(frozen=True)
class Layers(Command):
    """The layers of a network, by the paths that --objective.layers takes; a star marks those that
    ARAT regularises where none are named."""

    model: tyro.conf.Positional[str]
    """A name as --model.name takes it."""
    image_size: int | None = None
    """Height and width of the images; default the network's own, else 32."""
    channels: int = 3
    """Channels of the images."""

    def __call__(self, arguments: list[str]) -> int:
        from arat_fast.models.features import default_layers, run_layers
        from arat_fast.models.registry import MODELS, create_model, image_size, import_model

        import_model(self.model)
        size = self.image_size or image_size(self.model) or 32
        model = create_model(self.model, 10, self.channels, "shared", image_size=size)
        shape = self.channels, size, size
        spec = MODELS.get(self.model)
        chosen = spec.regularized_layers if spec else default_layers(model, shape)
        layers = run_layers(model, shape)
        width = max(len(layer.path) for layer in layers)
        for path, module, (_, *rest) in layers:
            mark = "*" if path in chosen else " "
            size_of = " x ".join(map(str, rest))
            print(f"{mark} {path:{width}}  {type(module).__name__:20} {size_of}")
        return 0


@dataclass(frozen=True)
class Doctor(Command):
    """Hold every kernel to its reference on this machine's GPU, at the shapes of a recipe, and time
    it. Exits with 1 where one is wrong."""

    recipe: tyro.conf.Positional[str] = "cifar10-resnet18"
    """Recipe whose network, batch and attack are taken."""
    device: str = "cuda"
    """cuda or cuda:N."""

    def __call__(self, arguments: list[str]) -> int:
        import torch

        from arat_fast import doctor
        from arat_fast.build import build_network
        from arat_fast.device import resolve_device, resolve_precision
        from arat_fast.display import Display
        from arat_fast.recipes import recipe

        device, config = resolve_device(self.device), recipe(self.recipe)
        if device.type != "cuda":
            raise ValueError(f"the kernels run on a GPU, expected cuda or cuda:N, got {device}")
        shape, classes = config.image_shape, 10
        model = build_network(config, classes, shape)
        precision = resolve_precision("auto", device)
        operations = doctor.operations_of(
            model, shape, classes, config.data.batch_size, config.attack, precision
        )
        if device.index is not None:
            # Streams and events are those of the current one.
            torch.cuda.set_device(device)
        with Display().evaluating() as bar:
            record, file = doctor.examine(
                operations, precision, device, whole=True, trains=True, progress=bar
            )
        print(doctor.table(record))
        print(f"record: {file}")
        return 1 if doctor.wrong_functions(record["operations"]) else 0


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "compare": Compare,
    "analyze": Analyze,
    "report": Report,
    "export": Export,
    "data": Data,
    "info": Info,
    "layers": Layers,
    "doctor": Doctor,
}
