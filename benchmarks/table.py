"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

BASELINES = ("naive", "tuned", "compiled", "official")
Record = dict[str, Any]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def page(title: str, record: Record, *parts: Sequence[str]) -> str:
    """Title, machine, the parts that are not empty, and problems, with a blank line between."""
    machine, rates = record["machine"], record.get("rates")
    commit = machine["commit"][:12] + (" with local changes" if machine["dirty"] else "")
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    about = (
        f"{record['date']}; {driver}torch {machine['versions']['torch']}, commit {commit}, clocks "
        f"as read {machine['clocks']}."
    )
    if rates:
        peak = rates["peak_flops_per_second"]
        about += (
            f" Measured in the same run: copy {_bandwidth(rates['copy_bytes_per_second'])} (read + "
            f"written), {rates['matmul_dtype']} matrix product "
            f"{_flops(rates['matmul_flops_per_second'])}"
            + (f"; the data sheet says {_flops(peak)}." if peak else ".")
        )
    problems = [f"- {problem}" for problem in record["problems"]]
    lines = [f"# {title}, {machine['device']}", "", about]
    for part in (*parts, ["Problems:", "", *problems] if problems else []):
        if part:
            lines += ["", *part]
    return "\n".join(lines) + "\n"


def step_tables(record: Record) -> str:
    """The record of ``benchmarks.step`` for people to read."""
    settings = record["settings"]
    about = (
        f"One step of ARAT with PGD-{settings['num_steps']} is "
        f"{record['flops']['forward_equivalents']} forward passes, "
        f"{record['flops']['step_per_image'] / 1e9:.1f} GFLOP for an image of "
        f"{settings['image_size']}×{settings['image_size']}. The contestants take turns; each time "
        f"is the median of {settings['rounds']} turns of {_plural(settings['steps'], 'step')}, the "
        "spread is from the shortest to the longest."
    )
    return page(
        f"Training step: {settings['model']}",
        record,
        [about],
        _speeds(record),
        [f"- {name}: {what}" for name, what in settings["contestants"].items()],
        _processor_time(record),
        _correctness(record),
        *(_profile(entry, record["machine"]["type"]) for entry in record["profile"]),
        _roofline(record),
    )


def scaling_tables(record: Record) -> str:
    """The record of ``benchmarks.scaling`` for people to read."""
    base, names = record["settings"]["base"], list(record["settings"]["contestants"])
    about = (
        f"Batch {base['batch_size']}, {base['image_size']}×{base['image_size']} pixels, "
        f"{_plural(base['num_steps'], 'attack step')} and the published width, but for what a "
        "table varies."
    )
    tables = []
    for axis, label in record["settings"]["axes"].items():
        rows: dict[float, list[str]] = {}
        for entry in record["results"]:
            if entry["axis"] != axis:
                continue
            cells = [entry["status"], "–"]
            if entry["status"] == "measured":
                cells = [rate(entry["images_per_second"]), _memory(entry["peak_memory_bytes"])]
            rows.setdefault(entry["value"], [f"{entry['value']:g}"]).extend(cells)
        head = [label, *(text for n in names for text in (f"{n}: images/s", "memory"))]
        tables.append(grid(head, rows.values()) if rows else [])
    return page(f"Step cost as work grows: {base['model']}", record, [about], *tables)


def _speeds(record: Record) -> list[str]:
    losses = {entry["contestant"]: entry for entry in record["correctness"]}
    known = {name for entry in record["results"] for name in entry.get("speed_up", {})}
    baselines = [name for name in BASELINES if name in known]
    head = ["batch", "contestant", "images/s", "spread", "MFU", "of matrix product", "memory"]
    head += [f"× {name}" for name in baselines] + ["loss against float32"]
    rows = []
    for entry in record["results"]:
        cells = [str(entry["batch_size"]), entry["contestant"]]
        if entry["status"] != "measured":
            cells += [entry["status"], *["–"] * (len(head) - 3)]
        else:
            cells += [
                rate(entry["images_per_second"]),
                f"{entry['spread']:.1%}",
                "–" if entry["mfu"] is None else f"{entry['mfu']:.1%}",
                f"{entry['share_of_matmul']:.1%}",
                _memory(entry["peak_memory_bytes"]),
                *(_times(entry["speed_up"].get(name)) for name in baselines),
                _loss(losses.get(entry["contestant"])) if entry["ours"] else "–",
            ]
        rows.append(cells)
    return grid(head, rows)


def _processor_time(record: Record) -> list[str]:
    """Speed-ups that other work on the machine disturbs less, for the CPU."""
    told = [
        f"{entry['contestant']} at batch {entry['batch_size']} "
        + ", ".join(
            f"{_times(value)} × {name}"
            for name, value in entry["speed_up_in_processor_time"].items()
        )
        for entry in record["results"]
        if entry["ours"] and entry.get("speed_up_in_processor_time")
    ]
    if not told:
        return []
    return [f"In processor time, which other jobs on the machine disturb less: {'; '.join(told)}."]


def _loss(entry: Record | None) -> str:
    if entry is None:
        return "not compared"
    difference = entry["mean_relative_difference"]
    if difference is None:
        return "not finite"
    return f"{difference:.2%}" + ("" if entry["within"] else ", **over budget**")


def _correctness(record: Record) -> list[str]:
    if not record["correctness"]:
        return []
    first = record["correctness"][0]
    budgets = [
        f"{entry['budget']:.1%} for {entry['contestant']}"
        for entry in record["correctness"]
        if entry["budget"] is not None
    ]
    return [
        "Loss against float32: the mean relative difference of the first "
        f"{len(first['losses'])} losses from those of the float32 eager step with the same attack "
        f"statistics, weights, images and start noise, batch {first['workload']['batch_size']}. "
        "The budget is one bfloat16 forward pass, 1 %, and twice the difference of a float32 run "
        f"whose initial weights were rounded to bfloat16: {', '.join(budgets)}.",
    ]


def _profile(entry: Record, device_type: str) -> list[str]:
    unit = "launches" if device_type == "cuda" else "operators"
    kinds = [kind for kind, share in entry["share"].items() if share >= 0.0005]
    return [
        f"{entry['contestant']}, batch {entry['batch_size']}, profiled: {entry['launches']:,.0f} "
        f"{unit} and {entry['microseconds'] / 1e3:,.1f} ms per step.",
        "",
        *grid(kinds, [[f"{entry['share'][kind]:.1%}" for kind in kinds]]),
    ]


def _roofline(record: Record) -> list[str]:
    found = record["roofline"]
    if not found:
        return []
    batch = found["workload"]["batch_size"]
    about = (
        f"Layer by layer, batch {batch}, {found['dtype']}: the time that the layers of a step "
        "would take at the rates of this run, each the longer of computing and of moving its "
        "bytes, and the time that they take by themselves. Longest excess first."
    )
    head = ["layers", "number", "attack ms", "measured", "training ms", "measured", "excess ms"]
    rows = [
        [
            row["name"],
            str(row["count"]),
            *(
                f"{1e3 * row[source][part]:.3g}"
                for part in ("attack", "train")
                for source in ("predicted", "measured")
            ),
            f"{1e3 * _excess(row):.3g}",
        ]
        for row in sorted(found["layers"], key=lambda row: -_excess(row))
    ]
    bound, folded = found["predicted"], found["predicted_folded"]
    summary = (
        f"All layers: predicted {_milliseconds(bound)} ({rate(batch / bound)} images/s), measured "
        f"{_milliseconds(found['measured'])}; with the folded attack, predicted "
        f"{_milliseconds(folded)} ({rate(batch / folded)} images/s)."
    )
    for entry in record["results"]:
        if entry["batch_size"] == batch and entry["ours"] and entry["status"] == "measured":
            took = _milliseconds(entry["seconds_per_step"])
            summary += f" The step of {entry['contestant']} took {took}."
    return [about, "", *grid(head, rows), "", summary]


def _excess(row: Record) -> float:
    return float(
        sum(row["measured"][part] - row["predicted"][part] for part in ("attack", "train"))
    )


def rate(value: float) -> str:
    """Of images, for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _memory(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _bandwidth(value: float) -> str:
    return f"{value / 1e12:.2f} TB/s" if value >= 1e12 else f"{value / 1e9:.1f} GB/s"


def _flops(value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s" if value >= 1e13 else f"{value / 1e12:.2f} TFLOP/s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
