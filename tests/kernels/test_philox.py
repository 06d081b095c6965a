"""The random words are Philox-4x32-10, by the known answers of its authors."""

from __future__ import annotations

import pytest
import torch

from arat_kernels.philox import streams
from arat_kernels.philox.reference import random_words


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# Random123's kat_vectors: counter, key, result.
KNOWN = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = counter
    rng = torch.tensor([signed(key[0] | key[1] << 32), c2])
    index = torch.tensor([signed(c0 | c1 << 32)])
    assert tuple(int(word) for word in random_words(rng, index, c3)) == expected


def test_streams_differ() -> None:
    names = [name for name in vars(streams) if name.isupper()]
    assert len(names) >= 3
    assert len({getattr(streams, name) for name in names}) == len(names)
