"""The page on the paper's Table 3 is what its script prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reproduce import PUBLISHED, page, relative_cost

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"


@pytest.mark.slow
def test_the_page_is_printed_by_the_script() -> None:
    assert PAGE.read_text(encoding="utf-8") == "\n".join([*page(), ""])


def test_every_published_number_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    numbers = [pair for rows in PUBLISHED.values() for pair in rows.values()]
    assert len(numbers) == 27
    assert all(f"| {clean:.2f} / {robust:.2f} |" in text for clean, robust in numbers)


def test_cost_counts_what_comes_before_the_training() -> None:
    cost = relative_cost()
    assert cost["arat"] == 1 and cost["at"] == 23 / 26
    assert cost["arrest"] == (25 + 3) / 26
