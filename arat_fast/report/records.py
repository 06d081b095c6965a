"""What ``arat-fast eval`` and ``arat-fast analyze`` left beside a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arat_fast.analysis.run import Analysis
from arat_fast.evaluation.pieces import checksum
from arat_fast.evaluation.record import read_record, record_paths, root_of_own_images
from arat_fast.files import write_atomic
from arat_fast.report.analysis_plots import (
    Record,
    conflict_between,
    conflict_by_layer,
    conflict_over_time,
    masking_curves,
    mixture_by_layer,
    mixture_over_time,
)
from arat_fast.report.run import TrainingAnalysis, read_analyses, read_run
from arat_fast.report.style import Plot
from arat_fast.saved.network import SavedNetwork


def records_of(saved: SavedNetwork) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """The records that ``arat-fast eval`` wrote beside a saved network, by the name of the file.

    Args:
        saved: the network.

    Returns:
        Those of its weights and its dataset; and why each of the others is not among them.
    """
    found: dict[str, Mapping[str, Any]] = {}
    others: dict[str, str] = {}
    for path in (*record_paths(saved.path.parent), *record_paths(saved.path)):
        if not path.is_file():
            continue
        record = read_record(path)
        reason = _why_not(record, saved) if record else "it cannot be read"
        if reason is None:
            found[path.name] = record
        else:
            others[path.name] = reason
    return found, others


def analysis_plots(
    records: Mapping[str, Record], lines: Sequence[TrainingAnalysis]
) -> dict[str, Plot]:
    """Every plot that the analyses of one network allow, by the name of its file.

    Args:
        records: what ``arat-fast analyze`` found, by part.
        lines: the analyses along its training.
    """
    plots: dict[str, Plot | None] = {
        "gradient-conflict": conflict_over_time(lines),
        "mixture": mixture_over_time({"": [lines]}),
    }
    if "gradient-conflict" in records:
        plots["gradient-conflict-layers"] = conflict_by_layer(records["gradient-conflict"])
    if "mixture" in records:
        plots["mixture-layers"] = mixture_by_layer({"": [records["mixture"]]})
    if "masking" in records:
        plots["masking"] = masking_curves(records["masking"])
    return {name: plot for name, plot in plots.items() if plot is not None}


def write_analysis_plots(found: Sequence[Analysis]) -> None:
    """PNG files of analyses beside their records, and of several networks together.

    Args:
        found: what :func:`arat_fast.analysis.run.analyze_networks` returned; the plots of what two
            or more have, ``compared-….png``, go to the folder of the first.
    """
    lines = {each.name: _lines(each.checkpoint) for each in found}
    for each in found:
        records = read_analyses(each.folder, each.steps, [])
        _write(each.folder, analysis_plots(records, lines[each.name]))
    along = {name: [own] for name, own in lines.items() if own}
    mixtures = {e.name: [e.records["mixture"]] for e in found if "mixture" in e.records}
    compared: dict[str, Plot | None] = {}
    if len(along) > 1:
        compared["compared-gradient-conflict"] = conflict_between(along)
        compared["compared-mixture"] = mixture_over_time(along)
    if len(mixtures) > 1:
        compared["compared-mixture-layers"] = mixture_by_layer(mixtures)
    _write(found[0].folder, compared)


def _why_not(record: Mapping[str, Any], saved: SavedNetwork) -> str | None:
    """Why a record is not of these weights and their dataset; None where it is."""
    if saved.config is None:
        return f"the dataset of {saved.path.name} is not known"
    data = saved.config.data
    if record.get("dataset") != data.name:
        return "it is of images of another dataset"
    if record.get("root") != root_of_own_images(data):
        return f"its images lay in {record.get('root')}, those of the run in {data.root}"
    same = record.get("model") == saved.weights
    if same and record.get("weights_sha256") == checksum(saved.model):
        return None
    return f"it is of other weights or BatchNorm statistics than {saved.path.name} holds"


def _lines(checkpoint: Path) -> Sequence[TrainingAnalysis]:
    if not (checkpoint / "config.json").is_file():
        return ()
    return read_run(checkpoint).training_analyses


def _write(folder: Path, plots: Mapping[str, Plot | None]) -> None:
    for name, plot in plots.items():
        if plot is not None:
            write_atomic(folder / f"{name}.png", plot.write_png)
