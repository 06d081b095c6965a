"""What a step launches and moves, by the model of a GPU, is held at what was reached."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.model import Node, Options, recorded
from benchmarks.workload import Workload, forward_flops

# Launches and megabytes of one attack step and of the rest of a step at batch 128. Where a change
# needs less, they are lowered.
HELD = {
    ("resnet18", "batch", 0): ((117, 2103.2), (207, 5275.5)),
    ("resnet18", "running", 0): ((63, 1243.3), (240, 5342.9)),
    ("wrn34-10", "batch", 0): ((196, 10309.5), (320, 25588.1)),
    ("wrn34-10", "running", 0): ((120, 7156.5), (346, 25718.9)),
    # In one pass where an H200's registers hold it.
    ("resnet18", "batch", 132): ((89, 1702.5), (183, 4499.4)),
    ("wrn34-10", "batch", 132): ((150, 8462.3), (289, 22471.5)),
    ("wrn34-10", "running", 132): ((120, 7156.5), (315, 22602.3)),
}
FAST, *SLOW = HELD


@pytest.mark.parametrize(
    ("model", "bn", "one_pass_on"),
    [FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_no_step_launches_or_moves_more_than_was_reached(
    model: str, bn: str, one_pass_on: int
) -> None:
    found = []
    for num_steps in (1, 2):
        nodes = recorded(Workload(model=model, num_steps=num_steps), bn, one_pass_on)
        found.append((len(nodes), sum(node.bytes for node in nodes) / 1e6))
    (launches, moved), (more_launches, more_moved) = found
    attack = more_launches - launches, more_moved - moved
    rest = launches - attack[0], moved - attack[1]
    for got, held in zip((attack, rest), HELD[model, bn, one_pass_on], strict=True):
        assert got[0] <= held[0] and got[1] <= held[1] * 1.001, (attack, rest)


def test_the_work_is_that_of_its_forward_passes() -> None:
    """Convolutions and matrix products, but for the heads and for the parts of the image."""
    workload = Workload(model="resnet8", num_steps=3)
    nodes = recorded(workload, "batch")
    expected = workload.forward_equivalents * forward_flops(workload) * workload.batch_size
    assert sum(node.flops for node in nodes) == pytest.approx(expected, rel=0.03)
    kinds = Counter(node.kind for node in nodes)
    # Nine convolutions, each with its BatchNorm, in three attack steps and one pass of both halves;
    # no gradient of the image in the last.
    assert kinds["convolution, forward"] == kinds["BN statistics"] == 36
    # Two shortcuts' go with the BatchNorm that adds them, but for the one whose feature is pooled.
    assert kinds["BN normalise"] == 36 - 2 * 3 - 1
    assert kinds["convolution, gradients"] == 36 - 1 + 9


def test_a_launch_takes_the_longest_of_its_three_times() -> None:
    options = Options(tflops=100.0, tbs=1.0, convolutions=0.5, launch_us=2.0)
    for node, expected in (
        (Node("add", 10), 2e-6),
        (Node("add", 10**7), 1e-5),
        (Node("mm", 10, 10**9), 1e-5),
        (Node("conv_input", 10, 10**9), 2e-5),
    ):
        assert options.seconds(node) == pytest.approx(expected)
