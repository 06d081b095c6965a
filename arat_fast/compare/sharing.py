"""One training for two runs of which one only averages its weights beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from arat_fast.compare.plan import Cell
from arat_fast.config import Config, check_same_run, config_from_dict, config_to_dict
from arat_fast.files import write_text
from arat_fast.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint

METRICS = "metrics.jsonl"


def same_training(averaging: Config, plain: Config) -> bool:
    """Whether the raw weights of ``averaging`` are, bit for bit, those that ``plain`` trains.

    SWA copies the weights after a step and never touches them, nor the random generators.
    """
    return (
        averaging.average.kind == "swa"
        and plain.average.kind == "none"
        and dataclasses.replace(averaging, average=plain.average) == plain
    )


def find_source(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The run of ``cells`` whose training ``cell`` can take over; None where there is none."""
    return next((other for other in cells if same_training(other.config, cell.config)), None)


def share_training(source: Path, target: Path, config: Config) -> bool:
    """Write the checkpoint that a run of ``config`` would have written at the end of its training.

    Args:
        source: folder of a run whose training is over, of a configuration for which
            :func:`same_training` holds.
        target: folder to make; left alone where it holds a checkpoint already.
        config: of the run.

    Returns:
        Whether the checkpoint was written.

    Raises:
        ValueError: the checkpoint of ``source`` is damaged, or was trained in another way.
    """
    if (target / CHECKPOINT).exists() or not (source / CHECKPOINT).exists():
        return False
    state = load_checkpoint(source / CHECKPOINT)
    saved = dataclasses.replace(config_from_dict(state["run"]["config"]), average=config.average)
    check_same_run(config, saved, source / CHECKPOINT)
    lines = (source / METRICS).read_bytes()[: state["hooks"]["metrics.jsonl"]["bytes"]]
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / METRICS, lines.decode())
    state["run"]["config"] = config_to_dict(config)
    state["average"] = {"num_averaged": 0, "statistics_fresh": True, "model": None}
    save_checkpoint(target / CHECKPOINT, state)
    return True
