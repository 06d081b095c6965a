"""The same commands give the same bits as when the table was made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bits.bits import CASES, SAME, TABLE, environment, run

SHARE = ["arat", "official", "trades", "lbgat", "swa", "bf16", "folded", "two-ranks", "autoattack"]
"""The cases that are tried unless EXHAUSTIVE is set."""

RECORDS = json.loads(TABLE.read_text())

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES if "EXHAUSTIVE" in os.environ else SHARE)
def test_bits(case: str, tmp_path: Path) -> None:
    """A run's weights, optimiser state, metrics and evaluation, by their digests."""
    if environment() not in RECORDS:
        pytest.skip(f"the table was made on {' and '.join(RECORDS)}, this is {environment()}")
    assert run(case, tmp_path / "run") == RECORDS[environment()][case]


@pytest.mark.parametrize(("case", "other"), SAME.items())
def test_cases_agree(case: str, other: str, tmp_path: Path) -> None:
    """A run that was interrupted and resumed ends as one that was not, on any machine."""
    one, two = run(case, tmp_path / case), run(other, tmp_path / other)
    assert one.keys() - {"metrics"} and all(one[k] == two[k] for k in one if k != "metrics")
