"""``python -m benchmarks.reproduce``: the page docs/reproduce.md, every row of the paper's Table 3
with its command, its published numbers and the least time that it takes on one H200, computed."""

from __future__ import annotations

from collections.abc import Iterator

from arat_fast.compare.cost import step_cost
from arat_fast.recipes import recipe
from benchmarks.model import Options, recorded
from benchmarks.workload import Workload, forward_flops

METHODS = {
    "at": "AT",
    "trades": "TRADES",
    "mart": "MART",
    "lbgat": "LBGAT",
    "arrest": "ARREST",
    "arat": "ARAT",
}

PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "cifar10-resnet18": {
        "at": (83.77, 42.42),
        "trades": (81.25, 48.54),
        "mart": (82.15, 47.83),
        "lbgat": (85.00, 48.85),
        "arrest": (86.63, 46.14),
        "arat": (87.82, 49.02),
        "arat+swa": (86.44, 50.28),
    },
    "cifar100-resnet18": {
        "at": (55.82, 19.50),
        "trades": (54.74, 23.60),
        "mart": (54.54, 26.04),
        "lbgat": (65.87, 23.19),
        "arat": (67.51, 23.38),
        "arat+swa": (67.17, 24.36),
    },
    "cifar10-wrn34-10": {
        "at": (86.06, 46.26),
        "trades": (84.33, 51.75),
        "mart": (86.10, 49.11),
        "lbgat": (88.19, 52.56),
        "arrest": (90.24, 50.20),
        "arat": (90.89, 50.77),
        "arat+swa": (90.06, 54.03),
    },
    "cifar100-wrn34-10": {
        "at": (59.83, 23.94),
        "trades": (57.61, 26.88),
        "mart": (57.75, 24.89),
        "lbgat": (68.17, 26.92),
        "arrest": (73.05, 24.32),
        "arat": (72.51, 24.18),
        "arat+swa": (72.37, 27.31),
    },
}
"""Clean and AutoAttack accuracy in percent by recipe and method: arXiv 2402.14648, Table 3."""

NUM_TRAIN, NUM_TEST = 50_000, 10_000
REAL_CONVOLUTIONS = 0.6
"""Share of the matrix rate that real convolutions reach."""
FLOAT32 = 67e12
"""FLOP/s of an H200 in float32 without TF32: NVIDIA's data sheet."""
SURVIVES, FALLS = 9_700, 200
"""Forward passes of AutoAttack for an image that survives, and for one that falls to APGD-CE."""

HEAD = """\
# Reproduce the paper

Every row of Table 3 of the paper (arXiv 2402.14648) and the command that trains it.

**None of these runs has been made here**: they need a GPU and CIFAR. *Published* is what the paper
reports. *Computed* is the least time on one H200, from shapes; it is no measurement:

- Training: 100 epochs of 50,000 images at the speed that `python -m benchmarks.model` gives for
  ARAT's step (790 TFLOP/s in bf16, 4.3 TB/s); the other methods by their forward passes per image
  ([Compare](compare.md#fair-budgets)). The first figure is the bound, the second has convolutions
  at {share:.0%} of the matrix rate, about what real ones reach. Loading, capture and evaluation are
  left out. The natural training that comes first in ARREST is in it.
- AutoAttack: its forward passes on 10,000 images at the published accuracy, in float32 at the
  67 TFLOP/s of the data sheet. An image that survives costs {survives:,} passes, one that falls to
  the first attack {falls}.

## Before you compare

The AutoAttack of the paper's table ran ten steps of APGD and FAB instead of 100, which overstates
robustness ([official code](official.md)). Compare the table with `aa-torchattacks10`, and report
`autoattack`:

<!-- needs a dataset and a GPU -->
```sh
arat-fast eval runs/cifar10-resnet18-seed0 --attacks pgd autoattack aa-torchattacks10
```

- The published numbers come from code that departs from the text. `--compat official`, added to a
  command below, does what the code did; without it a run does what the text says.
- All methods run here with ARAT's optimiser, schedule and batch. The published runs of the others
  differ ([Methods](objectives.md)).
- ARREST is a reading of its abstract; its authors published no code.
- One seed is one draw: `--seed 1` makes another, `compare` all of them.

A column in one command, with its table and its plane. It goes on where it was stopped:

<!-- needs a dataset and a GPU -->
```sh
arat-fast compare cifar10-resnet18 --data.download \\
    --objectives at trades mart lbgat arrest arat arat+swa --seeds 0 1 2 --out runs/table3
```

The ablation is `--ablation`; its rows with a shared BatchNorm are the paper's only with
`--objective.separate-passes` ([why](official.md#one-pass-or-two)).
"""


def minutes_of_training(name: str, convolutions: float) -> float:
    """The least time of ARAT's 100 epochs on one H200, from shapes."""
    config = recipe(name)
    workload = Workload(model=config.model.name, batch_size=config.data.batch_size)
    options = Options(convolutions=convolutions)
    step = sum(map(options.seconds, recorded(workload, config.attack.bn)))
    return config.train.epochs * NUM_TRAIN / workload.batch_size * step / 60


def minutes_of_autoattack(name: str, clean: float, robust: float) -> float:
    """The least time of AutoAttack on the test images, accuracies in percent."""
    passes = NUM_TEST * (robust * SURVIVES + (clean - robust) * FALLS) / 100
    return passes * forward_flops(Workload(model=recipe(name).model.name)) / FLOAT32 / 60


def relative_cost() -> dict[str, float]:
    """Forward passes per image of each method, natural training before it included, over ARAT's.

    The count is that of PGD-10 and does not depend on the network: a small one is counted.
    """
    passes = {
        name: round(step_cost(recipe("digits", objective=name))) for name in ("natural", *METHODS)
    }
    passes["arrest"] += passes["natural"]
    return {name: count / passes["arat"] for name, count in passes.items()}


def command(name: str, method: str) -> str:
    options = {
        "arat": "",
        "arat+swa": " --average.kind swa",
    }.get(method, f" --objective.name {method}")
    return f"arat-fast train {name} --data.download{options}"


def page() -> Iterator[str]:
    """The lines of docs/reproduce.md."""
    yield HEAD.format(share=REAL_CONVOLUTIONS, survives=SURVIVES, falls=FALLS)
    cost = relative_cost()
    by_network = {
        recipe(name).model.name: [minutes_of_training(name, c) for c in (1.0, REAL_CONVOLUTIONS)]
        for name in ("cifar10-resnet18", "cifar10-wrn34-10")
    }
    for name, rows in PUBLISHED.items():
        config = recipe(name)
        yield f"## {config.data.name.replace('cifar', 'CIFAR-')}, {config.model.name}\n"
        yield (
            "| method | published clean / AutoAttack, % | training, computed, min | "
            "AutoAttack, computed, min |"
        )
        yield "|---|---|---|---|"
        for method, (clean, robust) in rows.items():
            base = method.removesuffix("+swa")
            least, real = (cost[base] * minutes for minutes in by_network[config.model.name])
            yield (
                f"| {METHODS[base]}{' + SWA' if method != base else ''} "
                f"| {clean:.2f} / {robust:.2f} | {least:.1f} to {real:.1f} "
                f"| {minutes_of_autoattack(name, clean, robust):.0f} |"
            )
        yield "\n<!-- needs a dataset and a GPU -->\n```sh"
        yield from (command(name, method) for method in rows)
        yield "```\n"
    yield "This page is printed by `python -m benchmarks.reproduce`; a test compares the two."


if __name__ == "__main__":
    print("\n".join(page()))
