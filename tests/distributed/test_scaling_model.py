"""The computed table of docs/scaling.md is what its script computes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "scaling_model.py"
    spec = importlib.util.spec_from_file_location("scaling_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_model"] = module
    spec.loader.exec_module(module)
    return module


def test_table_of_the_documentation(script: ModuleType) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    table = text.split("<!-- benchmarks/scaling_model.py -->\n")[1].split("\n<!-- end -->")[0]
    assert table == script.table()


def test_counts(script: ModuleType) -> None:
    facts = {w.config.model.name: script.count(w) for w in script.WORKLOADS}
    # Of the literature: 0.56 and 4.1 GMAC a forward pass, 11.2 and 25.6 M parameters; two branches.
    assert facts["resnet18"].step_flops == pytest.approx(26 * 128 * 2 * 0.556e9, rel=0.01)
    assert facts["resnet50"].step_flops == pytest.approx(12 * 64 * 2 * 4.1e9, rel=0.01)
    # A predictor of width d holds d²/2 weights: four of 512; nine for ImageNet, three of 2,048.
    gradients = {name: sum(f.bucket_bytes) for name, f in facts.items()}
    assert gradients["resnet18"] == pytest.approx(4 * (11.2e6 + 2 * 512**2), rel=0.005)
    wide = 3 * 2048**2 + 6 * 512**2
    assert gradients["resnet50"] == pytest.approx(4 * (25.6e6 + wide / 2), rel=0.005)
    # Mean and variance of 4,800 channels in two branches, and of the predictors' hidden units.
    assert facts["resnet18"].statistics_bytes == 8 * (2 * 4800 + 4 * 128)
    # 20 layers and the predictors' one, forward and backward.
    assert facts["resnet18"].num_syncs == 2 * (20 * 11 + 1)


def test_what_the_backward_pass_hides(script: ModuleType) -> None:
    two = script.Cluster("two", 1, 2, nvlink=1 / script.NETWORK_SHARE, nvlink_latency=0.5)

    def efficiency(backward: float, *buckets: int) -> float:
        facts = script.Facts(buckets, 2, 90, backward, 0)
        return 1 / float(script.predict(facts, two, 1)["efficiency"])

    # A second a byte and one of latency for every bucket; three for the statistics.
    assert efficiency(0, 4, 2) == pytest.approx((90 + 5 + 3 + 3) / 90)
    assert efficiency(4, 4, 2) == pytest.approx((90 + 8 - 4 + 3) / 90)
    # Never the last bucket.
    assert efficiency(30, 4, 2) == pytest.approx((90 + 3 + 3) / 90)
    facts = script.Facts((4, 2), 2, 90, 30, 1)
    found = script.predict(facts, two, 1)
    assert found["reduce"] == 11 and found["without overlap"] == pytest.approx(90 / 101)


def test_all_reduce(script: ModuleType) -> None:
    one = script.Cluster("one", 1, 1)
    assert script.all_reduce_seconds(1e9, one) == 0
    two = script.Cluster("two", 1, 2, nvlink=1e9, nvlink_latency=0.5)
    # Two turns of half of the bytes each.
    assert script.all_reduce_seconds(1e9, two) == pytest.approx(1 / script.NETWORK_SHARE + 1)


def test_record_of_a_gpu_gives_the_rate(script: ModuleType, tmp_path: Path) -> None:
    result = {
        "contestant": "fast",
        "ours": True,
        "status": "measured",
        "batch_size": 128,
        "seconds_per_step": 0.02,
    }
    record = {
        "machine": {"type": "cuda", "device": "some GPU"},
        "settings": {"model": "resnet18", "num_steps": 10},
        "results": [result],
    }
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    text = script.table(path)
    assert "Computed from a measured rate" in text and "| 20.0 |" in text
    record["machine"]["type"] = "cpu"  # type: ignore[index]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="a record of a GPU is expected"):
        script.table(path)
