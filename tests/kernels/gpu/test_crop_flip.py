"""The batch assembly kernel on real hardware, beside what all operations promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.graphs import capture, need_gib
from kernels.support import generator
from torch import Tensor

from arat_kernels.crop_flip import crop_flip, draw_crop_flip

pytestmark = pytest.mark.gpu

OUTPUTS: list[dict[str, Any]] = [
    {"dtype": dtype, "memory_format": memory_format}
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for memory_format in (torch.channels_last, torch.contiguous_format)
] + [{"dtype": torch.bfloat16, "split": True}]


def case(
    num_images: int, shape: tuple[int, int, int], num: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    source = generator(seed)
    images = torch.randint(256, (num_images, *shape), generator=source, dtype=torch.uint8)
    return images.to("cuda"), torch.randint(num_images, (num,), generator=source).to("cuda")


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 64), (2, 7, 11)], ids=str)
def test_equals_the_reference_bit_for_bit(
    output: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    images, index = case(50, shape, 128)
    rng = torch.tensor([2**40 + 1, 2**33 + 7], device="cuda")
    arguments = {"padding": 4, "flip": True, "rng": rng, **output}
    expected = crop_flip(images, index, impl="reference", **arguments)
    for stored in (images, images.to(memory_format=torch.channels_last)):
        assert torch.equal(crop_flip(stored, index, impl="triton", **arguments), expected)
    offsets = draw_crop_flip(rng, 128, padding=4, flip=True)
    assert torch.equal(offsets.cpu(), draw_crop_flip(rng.cpu(), 128, padding=4, flip=True))
    given = crop_flip(images, index, padding=4, offsets=offsets, impl="triton", **output)
    assert torch.equal(given, expected)
    plain = crop_flip(images, index, impl="triton", **output)
    assert torch.equal(plain, crop_flip(images, index, impl="reference", **output))


def test_unknown_index_gives_nan() -> None:
    images, _ = case(5, (3, 32, 32), 1)
    index = torch.tensor([0, 5, -1, 4], device="cuda")
    got = crop_flip(images, index, impl="triton").isnan().flatten(1)
    assert got.all(1).tolist() == [False, True, True, False]
    assert got.any(1).tolist() == [False, True, True, False]


def test_graph_replay_with_changed_indices_and_seeds() -> None:
    images, index = case(50, (3, 32, 32), 64)
    rng = torch.tensor([3, 0], device="cuda")

    def batch() -> Tensor:
        x = crop_flip(images, index, padding=4, flip=True, rng=rng, impl="triton")
        rng[1].add_(1)
        return x

    graph, static = capture(batch)
    seen = []
    for seed, offset in ((3, 0), (3, 1), (4, 0)):
        index.copy_(torch.randint(50, (64,), generator=generator(seed + offset)))
        rng.copy_(torch.tensor([seed, offset]))
        graph.replay()
        assert rng.tolist() == [seed, offset + 1]
        rng.copy_(torch.tensor([seed, offset]))
        assert torch.equal(static, batch())
        seen.append(static.clone())
    assert not torch.equal(seen[0], seen[1])
    graph.replay()
    first = static.clone()
    graph.replay()
    assert not torch.equal(first, static)


def test_datasets_and_batches_of_more_than_two_to_the_31_elements() -> None:
    need_gib(20)
    num = 700_000
    images = torch.empty(num, 3, 32, 32, dtype=torch.uint8, device="cuda")
    assert images.numel() > 2**31
    for part in images.split(2**14):
        part.random_(0, 256)
    index = torch.arange(num, device="cuda").flip(0)
    x = crop_flip(images, index, dtype=torch.bfloat16, impl="triton")
    assert x.numel() > 2**31
    max_value = torch.full((), 255.0, device="cuda")
    for place in (0, num // 2, num - 1):
        expected = (images[num - 1 - place].float() / max_value).bfloat16()
        assert torch.equal(x[place], expected)
