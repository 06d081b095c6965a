"""Two and three processes compute what one does: gradients, BatchNorm, evaluations, metrics."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from distributed import cases, jobs, worker

from arat_fast.distributed import ALONE

SIZES = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every rank of a job of 2 and of one of 3 found, case by case."""
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in SIZES}
    started = {
        size: jobs.start(worker.as_rank, (str(folder),), size, folder)
        for size, folder in folders.items()
    }
    for size, folder in folders.items():
        assert jobs.wait(started[size], 280) == [0] * size, jobs.printed(folder)
    return {
        size: [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
        for size, folder in folders.items()
    }


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
def test_evaluations_count_every_image_once(results: Results, size: int) -> None:
    expected = worker.evaluations(ALONE)
    for rank in results[size]:
        got = rank["evaluations"]
        for name in ("x", "y", "few", "clean correct"):
            assert torch.equal(got[name], expected[name]), name  # type: ignore[arg-type]
        assert got["clean"] == expected["clean"]
        for name in ("pgd", "autoattack"):
            record, correct = got[name], got[f"{name} correct"]
            assert record["num_samples"] == 20 == len(correct)
            assert record["correct"] == int(correct.sum())
            assert record["value"] == record["correct"] / 20
            assert got[f"{name} x_adv"].shape == got["x"].shape
            assert (got[f"{name} x_adv"] - got["x"]).abs().max() <= 0.02 + 1e-6
            # Random starts differ; the attacks do not.
            assert abs(record["correct"] - expected[name]["correct"]) <= 3  # type: ignore[index]
        after = list(got["autoattack"]["attacks"].values())
        assert after == sorted(after, reverse=True)
        assert after[-1] == got["autoattack"]["value"]


@pytest.mark.parametrize("size", SIZES)
def test_metrics_are_means_over_all_samples(results: Results, size: int) -> None:
    for rank in results[size]:
        found = rank["metrics"]
        total = found["total"]
        weights = [5] * (size - 1) + [4]
        mean = sum(w * r for r, w in enumerate(weights)) / total
        assert found["means"]["loss"] == pytest.approx(10 + mean)
        assert f"step 4 on rank {size - 1}: loss is nan" in found["error"]


@pytest.mark.parametrize("size", SIZES)
def test_only_rank_0_sees_the_checkpoints(results: Results, size: int) -> None:
    for rank in results[size]:
        found = rank["own disks"]
        assert found["before"] == "there is no checkpoint yet"
        assert "stopped being finite at step 8: bias; the last good" in found["error"]
        assert found["error"].endswith("disk0/checkpoint.pt")


@pytest.mark.parametrize("size", SIZES)
def test_what_ranks_tell_each_other(results: Results, size: int) -> None:
    for rank in results[size]:
        assert rank["broadcast"] == list(b"abc")
        assert rank["rows"].tolist() == [[r, r] for r in range(size) for _ in range(r)]
        assert rank["all"] == [True, False]
