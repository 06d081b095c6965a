"""Two and three processes compute what one does: gradients, BatchNorm, evaluations, metrics."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import cases, jobs

from arat_fast.distributed import ALONE

SIZES = (2, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {size: tmp_path_factory.mktemp(f"ranks{size}") for size in SIZES}


@pytest.fixture(scope="module")
def results(folders: dict[int, Path]) -> dict[int, list[dict[str, Any]]]:
    """What every rank of a job of 2 and of one of 3 found, case by case."""
    started = {
        size: jobs.start(cases.as_rank, (folder,), size, folder) for size, folder in folders.items()
    }
    for size, folder in folders.items():
        assert jobs.wait(started[size], 280) == [0] * size, jobs.printed(folder)
    return {
        size: [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
        for size, folder in folders.items()
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one process finds, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, cases.evaluations(ALONE, folder)


@functools.cache
def alone(name: str) -> dict[str, Any]:
    return cases.train(cases.CASES[name])


Results = dict[int, list[dict[str, Any]]]
EXACT = ("num_batches_tracked", "next key")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [n for n, case in cases.CASES.items() if case.sync])
def test_ranks_equal_one_process(results: Results, size: int, name: str) -> None:
    expected, got = alone(name), results[size][0][name]
    assert expected.keys() == got.keys() and len(got) > 10
    for key, value in expected.items():
        if key.endswith(EXACT):
            if "accumulate" not in name:
                assert torch.equal(got[key], value), key
            continue
        torch.testing.assert_close(
            got[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [n for n, case in cases.CASES.items() if not case.sync])
def test_own_statistics_are_those_of_each_part(results: Results, size: int, name: str) -> None:
    expected, got = cases.shard_by_shard(cases.CASES[name], size), results[size][0][name]
    for key, value in expected.items():
        if not key.endswith(EXACT):
            torch.testing.assert_close(
                got[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: k + m
            )
    synchronised = alone("arat")
    assert any(
        not torch.allclose(got[key], synchronised[key], atol=1e-6)
        for key in expected
        if key.endswith("weight")
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(cases.CASES))
def test_ranks_are_bit_identical(results: Results, size: int, name: str) -> None:
    first = results[size][0][name]
    for other in results[size][1:]:
        for key, value in first.items():
            assert torch.equal(other[name][key], value), key


@pytest.mark.parametrize("size", SIZES)
def test_overlap_changes_nothing(results: Results, size: int) -> None:
    one, other = (results[size][0][name] for name in ("arat", "after the backward"))
    assert all(torch.equal(other[key], value) for key, value in one.items())


@pytest.mark.parametrize("name", [n for n in cases.CASES if n.startswith("accumulate")])
def test_accumulation_equals_the_whole_batch(name: str) -> None:
    whole = cases.train(dataclasses.replace(cases.CASES[name], accumulate=1))
    parts = alone(name)
    for key, value in whole.items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(parts[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_evaluations_count_every_image_once(
    results: Results, size: int, evaluated: tuple[Path, dict[str, Any]]
) -> None:
    _, expected = evaluated
    for name in ("x", "y"):
        parts = [rank["evaluations"][name] for rank in results[size]]
        assert torch.equal(torch.cat(parts), expected[name])
        assert {len(part) for part in parts} <= {20 // size, 20 // size + 1}
    for rank in results[size]:
        got = rank["evaluations"]
        for name in ("few", "clean correct"):
            assert torch.equal(got[name], expected[name]), name
        assert got["clean"] == expected["clean"]
        for name in ("pgd", "autoattack"):
            record, correct = got[name], got[f"{name} correct"]
            assert record["num_samples"] == 20 == len(correct)
            assert record["correct"] == int(correct.sum())
            assert record["value"] == record["correct"] / 20
            assert got[f"{name} x_adv"].shape == got["x"].shape
            assert (got[f"{name} x_adv"] - got["x"]).abs().max() <= 0.02 + 1e-6
            # Random starts differ; the attacks do not.
            assert abs(record["correct"] - expected[name]["correct"]) <= 3
        after = list(got["autoattack"]["attacks"].values())
        assert after == sorted(after, reverse=True)
        assert after[-1] == got["autoattack"]["value"]


@pytest.mark.parametrize("size", SIZES)
def test_rank_0_writes_every_image(
    results: Results,
    size: int,
    folders: dict[int, Path],
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    found = results[size][0]["evaluations"]
    for name, count in (("all", 20), ("few", 1)):
        expected = np.load(evaluated[0] / f"{name}.npz")
        with np.load(folders[size] / f"{name}.npz") as got:
            assert set(got.files) == set(expected.files)
            for key in got.files:
                assert got[key].shape == expected[key].shape and count in got[key].shape, key
            for key in ("label", "clean_correct", "clean_prediction"):
                assert np.array_equal(got[key], expected[key]), key
            np.testing.assert_allclose(got["clean_margin"], expected["clean_margin"], atol=1e-5)
            if name == "all":
                stands = got["pgd_prediction"] == got["label"]
                assert np.array_equal(stands, found["pgd correct"].numpy())
                assert np.array_equal(stands, got["pgd_margin"] > 0)


@pytest.mark.parametrize("size", SIZES)
def test_metrics_are_means_over_all_samples(results: Results, size: int) -> None:
    for rank in results[size]:
        found = rank["metrics"]
        total = found["total"]
        weights = [5] * (size - 1) + [4]
        mean = sum(w * r for r, w in enumerate(weights)) / total
        assert found["means"]["loss"] == pytest.approx(10 + mean)
        assert f"step 4 on rank {size - 1}" in found["error"]


@pytest.mark.parametrize("size", SIZES)
def test_only_rank_0_sees_the_checkpoints(results: Results, size: int) -> None:
    for rank in results[size]:
        found = rank["own disks"]
        assert "disk" not in found["before"]
        assert "bias" in found["error"] and found["error"].endswith("disk0/checkpoint.pt")


@pytest.mark.parametrize("size", SIZES)
def test_what_ranks_tell_each_other(results: Results, size: int) -> None:
    for rank in results[size]:
        assert rank["broadcast"] == list(b"abc")
        assert rank["rows"].tolist() == [[r, r] for r in range(size) for _ in range(r)]
        assert rank["largest"] == size - 1
