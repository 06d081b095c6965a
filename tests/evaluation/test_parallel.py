"""Batches shared by threads: the same outputs and gradients, and PyTorch's threads put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from arat_fast.evaluation.parallel import MIN_PART, SharedNetwork, Stopped, shared_batches


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return model.double().eval().requires_grad_(False)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("count", [1, 2 * MIN_PART - 1, 2 * MIN_PART, 3 * MIN_PART + 7])
def test_same_outputs_and_gradients(count: int) -> None:
    model = network()
    generator = torch.Generator().manual_seed(count)
    x = torch.rand((count, 1, 8, 8), generator=generator, dtype=torch.float64)
    upstream = torch.rand((count, 5), generator=generator, dtype=torch.float64)
    expected_x = x.clone().requires_grad_()
    expected = model(expected_x)
    expected.backward(upstream)
    with shared_batches(model, torch.zeros(3 * MIN_PART, 1, 8, 8)) as shared:
        assert shared is not model and torch.get_num_threads() == 1
        with torch.no_grad():
            y = shared(x)
        assert torch.allclose(y, expected, rtol=0, atol=1e-12) and not y.requires_grad
        given = x.clone().requires_grad_()
        y = shared(given)
        # As FAB for an untargeted attack: several gradients of one pass.
        y.backward(upstream, retain_graph=True)
        assert given.grad is not None and expected_x.grad is not None
        assert torch.allclose(given.grad, expected_x.grad, rtol=0, atol=1e-12)
        y.backward(upstream)
        assert torch.allclose(given.grad, 2 * expected_x.grad, rtol=0, atol=1e-12)
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_errors_and_few_images() -> None:
    model = network()
    with shared_batches(model, torch.zeros(2 * MIN_PART - 1, 1, 8, 8)) as shared:
        assert shared is model
    with pytest.raises(RuntimeError), shared_batches(model, torch.zeros(99, 1, 8, 8)) as shared:
        shared(torch.zeros(99, 2, 8, 8, dtype=torch.float64))
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_error_or_ctrl_c_stops_the_other_threads() -> None:
    images = torch.zeros(3 * MIN_PART, 1, 8, 8)
    images[:MIN_PART] = 1
    heard: list[bool] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        if x.any():
            raise ValueError("mine")
        heard.append(shared.stopped.wait(60))
        raise Stopped

    with pytest.raises(ValueError, match="mine"), shared_batches(network(), images) as shared:
        assert isinstance(shared, SharedNetwork)
        shared.map_parts(call, images)
    assert heard == [True, True]
    heard.clear()
    with pytest.raises(KeyboardInterrupt), shared_batches(network(), images) as shared:
        assert isinstance(shared, SharedNetwork)
        job = shared.pool.submit(call, images[MIN_PART:])
        raise KeyboardInterrupt
    assert heard == [True] and isinstance(job.exception(), Stopped)


@pytest.mark.usefixtures("three_threads")
def test_parts_are_put_together_in_order() -> None:
    images = torch.rand(3 * MIN_PART + 5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(len(images))
    with shared_batches(network(), images) as shared:
        assert isinstance(shared, SharedNetwork)
        sums = shared.map_parts(lambda x, n: x.sum(dim=(1, 2, 3)) + n, images, numbers)
        assert shared.map_parts(lambda x: x + 1, images[:1]).equal(images[:1] + 1)
    assert sums.equal(images.sum(dim=(1, 2, 3)) + numbers)
