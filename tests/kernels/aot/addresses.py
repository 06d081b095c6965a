"""How the accesses of a compiled kernel find their place in a tensor, from Triton's own text."""

from __future__ import annotations

import re

_OPERATION = re.compile(r"^(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?(.*?)(?: loc\(.*)?$")
_ACCESS = re.compile(r"\btt\.(?:load|store) (%\w+)")
_VALUE = re.compile(r"%\w+")


def wide_addresses(ttir: str) -> dict[str, bool]:
    """Every pointer argument that is loaded from or stored to, and whether the offset of each such
    access has a part that is the product of 64-bit numbers.

    A product of 32-bit numbers that is widened afterwards is none. Pointers that are chosen among
    several while the kernel runs, as those of a tuple, are left out.
    """
    # Names are unique within a block alone: the latest definition is the one that an access means.
    operations: dict[str, tuple[str, list[str], str]] = {}
    found: dict[str, bool] = {}
    for line in map(str.strip, ttir.splitlines()):
        if access := _ACCESS.search(line):
            pointer, wide = _origin(access[1], operations)
            if pointer is not None:
                found[pointer] = found.get(pointer, True) and wide
        if made := _OPERATION.match(line):
            name, operation, rest = made.groups()
            operands, _, types = rest.partition(" : ")
            operations[name] = operation, _VALUE.findall(operands), types
    return found


def _origin(
    address: str, operations: dict[str, tuple[str, list[str], str]]
) -> tuple[str | None, bool]:
    """The argument that an address is reached from, and whether by a product of 64 bits."""
    wide = False
    while address in operations:
        operation, operands, _ = operations[address]
        if operation == "tt.addptr":
            wide = wide or _has_wide_product(operands[1], operations)
        elif operation not in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            return None, wide
        address = operands[0]
    return address.removeprefix("%"), wide


def _has_wide_product(value: str, operations: dict[str, tuple[str, list[str], str]]) -> bool:
    seen, ahead = set(), [value]
    while ahead:
        value = ahead.pop()
        if value in seen or value not in operations:
            continue
        seen.add(value)
        operation, operands, types = operations[value]
        if operation == "arith.muli" and re.search(r"\bi64\b|xi64\b", types):
            return True
        ahead += operands
    return False
