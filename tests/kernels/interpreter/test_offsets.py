"""The one expression by which every kernel finds its place in a large tensor."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from arat_kernels.offsets import start_of


@triton.jit
def _places_kernel(scalar_ptr, block_ptr, first, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = first + tl.program_id(0)
    tl.store(scalar_ptr + 2 * tl.program_id(0), start_of(index, size))
    tl.store(scalar_ptr + 2 * tl.program_id(0) + 1, start_of(index, SIZE))
    block = tl.arange(0, 4)
    tl.store(block_ptr + 4 * tl.program_id(0) + block, start_of(index + block, size))


@pytest.mark.parametrize("first", [0, 2**21, 2**31 - 8])
def test_offsets_of_32_bit_indices_have_64_bits(first: int) -> None:
    scalars = torch.zeros(3, 2, dtype=torch.int64)
    blocks = torch.zeros(3, 4, dtype=torch.int64)
    _places_kernel[(3,)](scalars, blocks, first, 3072, 4096)
    for program, (by_argument, by_constant) in enumerate(scalars.tolist()):
        assert by_argument == (first + program) * 3072
        assert by_constant == (first + program) * 4096
        assert blocks[program].tolist() == [(first + program + i) * 3072 for i in range(4)]
