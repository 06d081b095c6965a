"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

BASELINES = ("naive", "tuned", "compiled", "official")
AXES = {"batch_size": "batch", "image_size": "pixels", "num_steps": "PGD steps"}
"""Names of the sizes, for people."""
Record = dict[str, Any]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def page(title: str, record: Record, *parts: Sequence[str]) -> str:
    """Title, machine, the parts that are not empty, and problems, with a blank line between."""
    machine, rates = record["machine"], record.get("rates")
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    about = (
        f"{record['date']}; {driver}torch {machine['versions']['torch']}, commit "
        f"{machine['commit']}, clocks as read {machine['clocks']}."
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
        f"{settings['image_size']}×{settings['image_size']} pixels, PGD-{settings['num_steps']}, "
        "but for what the table varies. The contestants take turns; each time is the median of "
        f"{settings['rounds']} turns of {settings['steps']} steps, the spread is from the shortest "
        "to the longest."
    )
    return page(
        f"Training step: {settings['model']}",
        record,
        [about],
        _speeds(record),
        [f"- {name}: {what}" for name, what in settings["contestants"].items()],
        _correctness(record),
        *(_profile(entry, record["machine"]["type"]) for entry in record["profile"]),
    )


def _speeds(record: Record) -> list[str]:
    losses = {entry["contestant"]: entry for entry in record["correctness"]}
    # Other jobs on the machine disturb processor time less.
    times = {"speed_up": "", "speed_up_in_processor_time": ", processor time"}
    ratios = {
        (field, name): f"× {name}{of}"
        for field, of in times.items()
        for name in BASELINES
        if any(name in entry.get(field, {}) for entry in record["results"])
    }
    axes = [
        axis
        for axis in AXES
        if axis == "batch_size" or len({entry[axis] for entry in record["results"]}) > 1
    ]
    head = [*(AXES[axis] for axis in axes), "contestant", "images/s", "spread", "MFU"]
    head += ["of matrix product", "memory", *ratios.values()]
    head += ["loss against float32"]
    rows = []
    for entry in record["results"]:
        cells = [*(f"{entry[axis]:g}" for axis in axes), entry["contestant"]]
        if entry["status"] != "measured":
            cells += [entry["status"], *["–"] * (len(head) - len(axes) - 2)]
        else:
            cells += [
                _rate(entry["images_per_second"]),
                f"{entry['spread']:.1%}",
                "–" if entry["mfu"] is None else f"{entry['mfu']:.1%}",
                f"{entry['share_of_matmul']:.1%}",
                _memory(entry["peak_memory_bytes"]),
                *(_times(entry[field].get(name)) for field, name in ratios),
                _loss(losses.get(entry["contestant"])) if entry["ours"] else "–",
            ]
        rows.append(cells)
    return grid(head, rows)


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


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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
