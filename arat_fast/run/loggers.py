"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, a table, Weights & Biases."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arat_fast.analysis.snapshot import headline_numbers
from arat_fast.config import config_to_dict
from arat_fast.extras import install_command
from arat_fast.files import parse_json, write_text
from arat_fast.run.hooks import Hook

if TYPE_CHECKING:
    from arat_fast.run.state import Run

PROJECT = "arat-fast"
"""Project of Weights & Biases where WANDB_PROJECT names none."""


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of the metrics, by names such as train/loss and eval/test/last/pgd."""
    numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
    prefix = line["kind"]
    if line["kind"] == "eval":
        prefix = f"{line['split']}/{line['model']}"
        numbers = {name: line[name] for name in ("clean", "pgd")}
    elif line["kind"] == "analysis":
        numbers = headline_numbers(line)
    return {f"{prefix}/{name}": value for name, value in numbers.items()}


class TensorBoard(Hook):
    """Scalars for TensorBoard in the run's folder, where it is installed."""

    def __init__(self) -> None:
        self.writer: Any = None

    def begin(self, run: Run) -> None:
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            step = run.progress.steps_made
            purge = step + 1 if step else None
            self.writer = SummaryWriter(str(run.out / "tensorboard"), purge_step=purge)

    def log(self, run: Run, line: dict[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Table(Hook):
    """``metrics.csv``, written of metrics.jsonl when the run is over or stops: a row a line, a
    column a number."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def begin(self, run: Run) -> None:
        self.folder = run.out

    def close(self) -> None:
        # What failed before its first line has no metrics.
        if self.folder is None or not (self.folder / "metrics.jsonl").exists():
            return
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [
            {"step": line["step"], "epoch": line["epoch"], **scalars(line)}
            for line in map(parse_json, text.splitlines())
        ]
        table = io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / "metrics.csv", table.getvalue())


class WeightsAndBiases(Hook):
    """Scalars and the configuration for Weights & Biases, under the run's own id, so that a resumed
    run goes on there too; WANDB_MODE=offline keeps them in the run's folder.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "train.loggers wandb needs Weights & Biases, which is not installed: "
                + install_command("wandb")
            ) from error
        self.wandb: Any = wandb
        self.session: Any = None

    def begin(self, run: Run) -> None:
        settings = self.wandb.setup().settings
        self.session = self.wandb.init(
            project=settings.project or PROJECT,
            name=run.out.resolve().name,
            id=run.id,
            resume="allow",
            dir=str(run.out),
            config=config_to_dict(run.config),
        )

    def log(self, run: Run, line: dict[str, Any]) -> None:
        self.session.log(scalars(line), step=line["step"])

    def close(self) -> None:
        if self.session is not None:
            self.session.finish()


LOGGERS: dict[str, Callable[[], Hook]] = {
    "tensorboard": TensorBoard,
    "csv": Table,
    "wandb": WeightsAndBiases,
}


def loggers(run: Run) -> list[Hook]:
    """Those that train.loggers names; rank 0 alone writes logs."""
    return [LOGGERS[name]() for name in run.config.train.loggers] if run.ranks.is_main else []
