"""Results as Markdown."""

from __future__ import annotations

from typing import Any

BASELINES = ("naive", "tuned", "compiled", "official")


def step_tables(record: dict[str, Any]) -> str:
    """The record of ``bench step`` for people to read."""
    settings = record["settings"]
    lines = [
        f"# Training step: {settings['model']}, {record['machine']['device']}",
        "",
        *_machine(record),
        "",
        f"One step of ARAT with PGD-{settings['num_steps']} is "
        f"{record['flops']['forward_equivalents']} forward passes, "
        f"{record['flops']['step_per_image'] / 1e9:.1f} GFLOP for an image of "
        f"{settings['image_size']}×{settings['image_size']}. The contestants take turns; each time "
        f"is the median of {settings['rounds']} turns of {_plural(settings['steps'], 'step')}, the "
        "spread is from the shortest to the longest.",
        "",
        *_speeds(record),
        "",
        *(f"- {name}: {what}" for name, what in settings["contestants"].items()),
    ]
    processor = _processor_time(record)
    if processor:
        lines += ["", processor]
    if record["correctness"]:
        lines += ["", *_correctness(record)]
    for entry in record["profile"]:
        lines += ["", *_profile(entry, record["machine"]["type"])]
    if record["roofline"]:
        lines += ["", *_roofline(record)]
    if record["problems"]:
        lines += ["", "Problems:", "", *(f"- {problem}" for problem in record["problems"])]
    return "\n".join(lines) + "\n"


def scaling_tables(record: dict[str, Any]) -> str:
    """The record of ``bench scaling`` for people to read."""
    base = record["settings"]["base"]
    lines = [
        f"# Step cost as work grows: {base['model']}, {record['machine']['device']}",
        "",
        *_machine(record),
        "",
        f"Batch {base['batch_size']}, {base['image_size']}×{base['image_size']} pixels, "
        f"{_plural(base['num_steps'], 'attack step')} and the published width, but for what a "
        "table varies.",
    ]
    for axis, label in record["settings"]["axes"].items():
        rows = [row for row in record["results"] if row["axis"] == axis]
        if not rows:
            continue
        values = list(dict.fromkeys(row["value"] for row in rows))
        names = list(dict.fromkeys(row["contestant"] for row in rows))
        lines += ["", f"| {label} | {' | '.join(f'{n}: images/s | memory' for n in names)} |"]
        lines.append("|---|" + "---|---|" * len(names))
        for value in values:
            cells = []
            for name in names:
                found = [r for r in rows if r["value"] == value and r["contestant"] == name]
                cells += _scaling_cells(found[0]) if found else ["–", "–"]
            lines.append(f"| {value:g} | {' | '.join(cells)} |")
    if record["problems"]:
        lines += ["", "Problems:", "", *(f"- {problem}" for problem in record["problems"])]
    return "\n".join(lines) + "\n"


def _scaling_cells(entry: dict[str, Any]) -> list[str]:
    if entry["status"] != "measured":
        return [entry["status"], "–"]
    return [_rate(entry["images_per_second"]), _memory(entry["peak_memory_bytes"])]


def _machine(record: dict[str, Any]) -> list[str]:
    machine, rates = record["machine"], record["rates"]
    peak = rates["peak_flops_per_second"]
    commit = machine["commit"][:12] + (" with local changes" if machine["dirty"] else "")
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    return [
        f"{record['date']}; {driver}torch {machine['versions']['torch']}, commit {commit}, clocks "
        f"as read {machine['clocks']}. Measured in the same run: copy "
        f"{_bandwidth(rates['copy_bytes_per_second'])} (read + written), {rates['matmul_dtype']} "
        f"matrix product {_flops(rates['matmul_flops_per_second'])}"
        + (f"; the data sheet says {_flops(peak)}." if peak else "."),
    ]


def _speeds(record: dict[str, Any]) -> list[str]:
    losses = {entry["contestant"]: entry for entry in record["correctness"]}
    known = {name for entry in record["results"] for name in entry.get("speed_up", {})}
    baselines = [name for name in BASELINES if name in known]
    head = ["batch", "contestant", "images/s", "spread", "MFU", "of matrix product", "memory"]
    head += [f"× {name}" for name in baselines] + ["loss against float32"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for entry in record["results"]:
        cells = [str(entry["batch_size"]), entry["contestant"]]
        if entry["status"] != "measured":
            cells += [entry["status"], *["–"] * (len(head) - 3)]
        else:
            cells += [
                _rate(entry["images_per_second"]),
                f"{entry['spread']:.1%}",
                "–" if entry["mfu"] is None else f"{entry['mfu']:.1%}",
                f"{entry['share_of_matmul']:.1%}",
                _memory(entry["peak_memory_bytes"]),
                *(_times(entry["speed_up"].get(name)) for name in baselines),
                _loss(losses.get(entry["contestant"])) if entry["ours"] else "–",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _processor_time(record: dict[str, Any]) -> str:
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
        return ""
    return f"In processor time, which other jobs on the machine disturb less: {'; '.join(told)}."


def _loss(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not compared"
    difference = entry["mean_relative_difference"]
    if difference is None:
        return "not finite"
    return f"{difference:.2%}" + ("" if entry["within"] else ", **over budget**")


def _correctness(record: dict[str, Any]) -> list[str]:
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


def _profile(entry: dict[str, Any], device_type: str) -> list[str]:
    unit = "launches" if device_type == "cuda" else "operators"
    kinds = [kind for kind, share in entry["share"].items() if share >= 0.0005]
    return [
        f"{entry['contestant']}, batch {entry['batch_size']}, profiled: {entry['launches']:,.0f} "
        f"{unit} and {entry['microseconds'] / 1e3:,.1f} ms per step.",
        "",
        f"| {' | '.join(kinds)} |",
        "|" + "---|" * len(kinds),
        f"| {' | '.join(format(entry['share'][kind], '.1%') for kind in kinds)} |",
    ]


def _roofline(record: dict[str, Any]) -> list[str]:
    found = record["roofline"]
    batch = found["workload"]["batch_size"]
    lines = [
        f"Layer by layer, batch {batch}, {found['dtype']}: the time that the layers of a step "
        "would take at the rates of this run, each the longer of computing and of moving its "
        "bytes, and the time that they take by themselves. Longest excess first.",
        "",
        "| layers | number | attack ms | measured | training ms | measured | excess ms |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = sorted(found["layers"], key=lambda row: -_excess(row))
    for row in rows:
        expected, measured = row["predicted"], row["measured"]
        cells = [
            row["name"],
            str(row["count"]),
            *(
                f"{1e3 * source[part]:.3g}"
                for part in ("attack", "train")
                for source in (expected, measured)
            ),
            f"{1e3 * _excess(row):.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    bound, folded = found["predicted"], found["predicted_folded"]
    summary = (
        f"All layers: predicted {_milliseconds(bound)} ({_rate(batch / bound)} images/s), measured "
        f"{_milliseconds(found['measured'])}; with the folded attack, predicted "
        f"{_milliseconds(folded)} ({_rate(batch / folded)} images/s)."
    )
    for entry in record["results"]:
        if entry["batch_size"] == batch and entry["ours"] and entry["status"] == "measured":
            took = _milliseconds(entry["seconds_per_step"])
            summary += f" The step of {entry['contestant']} took {took}."
    return [*lines, "", summary]


def _excess(row: dict[str, Any]) -> float:
    return float(
        sum(row["measured"][part] - row["predicted"][part] for part in ("attack", "train"))
    )


def _rate(value: float) -> str:
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
