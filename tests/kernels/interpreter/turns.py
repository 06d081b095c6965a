"""Programs of a grid that wait for each other, in Triton's interpreter, which runs one after the
other: here each is a thread, and the next one runs when one waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest.mock import patch

from triton.runtime.interpreter import GridExecutor, interpreter_builder

_this = threading.local()


class _Program:
    def __init__(self, place: tuple[int, int, int], work: Callable[[], None]) -> None:
        self.place, self.work = place, work
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.done, self.error = False, None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        _this.program = self
        self.go.acquire()
        try:
            self.work()
        except BaseException as error:  # told where it is waited for
            self.error = error
        self.done = True
        self.back.release()

    def take_turn(self) -> None:
        interpreter_builder.set_grid_idx(*self.place)
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error


@contextmanager
def in_turns() -> Iterator[None]:
    """Kernels inside the context."""
    call, add = GridExecutor.__call__, interpreter_builder.create_atomic_rmw
    set_dim = interpreter_builder.set_grid_dim

    def atomic(kind: Any, pointers: Any, value: Any, *given: Any) -> Any:
        result = add(kind, pointers, value, *given)
        # Nothing is added by who looks whether all have come.
        if not value.data.any():
            _this.program.back.release()
            _this.program.go.acquire()
        return result

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        fn = executor.fn

        def begin(*grid: int) -> None:
            set_dim(*grid)
            programs = deque[_Program]()

            def start(**given: Any) -> None:
                programs.append(_Program(interpreter_builder.grid_idx, lambda: fn(**given)))
                if len(programs) < prod(grid):
                    return
                for _ in range(10_000):
                    if not programs:
                        return
                    programs[0].take_turn()
                    if programs[0].done:
                        programs.popleft()
                    programs.rotate(-1)
                raise AssertionError("they wait for ever")

            # The kernel itself has told its arguments before.
            executor.fn = start

        with patch.object(interpreter_builder, "set_grid_dim", begin):
            return call(executor, *args, **kwargs)

    with (
        patch.object(GridExecutor, "__call__", run),
        patch.object(interpreter_builder, "create_atomic_rmw", atomic),
    ):
        yield
