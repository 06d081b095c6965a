"""The same commands give the same bits as when the table was made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache

import pytest
from bits.bits import CASES, SAME, TABLE, environment, run

SHARE = ["arat", "official", "trades", "lbgat", "swa", "bf16", "folded", "two-ranks", "autoattack"]
"""The cases that are tried unless EXHAUSTIVE is set."""

RECORDS = json.loads(TABLE.read_text())

pytestmark = pytest.mark.slow


Digests = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> Digests:
    """Those of a case, which is run once."""
    return cache(lambda case: run(case, tmp_path_factory.mktemp(case) / "run"))


@pytest.mark.parametrize("case", CASES if "EXHAUSTIVE" in os.environ else SHARE)
def test_bits(case: str, digests: Digests) -> None:
    """A run's weights, optimiser state, metrics and evaluation, by their digests."""
    if environment() not in RECORDS:
        pytest.skip(f"the table was made on {' and '.join(RECORDS)}, this is {environment()}")
    assert digests(case) == RECORDS[environment()][case]


@pytest.mark.parametrize(("case", "other"), SAME.items())
def test_cases_agree(case: str, other: str, digests: Digests) -> None:
    """A run that was interrupted and resumed ends as one that was not, on any machine."""
    one, two = digests(case), digests(other)
    assert one.keys() - {"metrics"} and all(one[k] == two[k] for k in one if k != "metrics")
