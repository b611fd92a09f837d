"""The order of programs (interpreter), or of threads and blocks (emulator): a result must not depend on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from _engines import ENGINE
from torch import Tensor


@contextmanager
def order(name: str) -> Iterator[None]:
    """Run programs or threads in the order "forward" or "reversed"; a device has an order of its own."""
    if ENGINE.name == "interpreter" and name == "reversed":
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        ascending = builder.set_grid_idx

        def descending(*index: int) -> None:
            ascending(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

        with mock.patch.object(builder, "set_grid_idx", descending):
            yield
    else:
        with mock.patch.dict(os.environ, LTK_EMULATED_ORDER=name):
            yield


FORWARD, REVERSED = partial(order, "forward"), partial(order, "reversed")
ORDERS = (FORWARD, REVERSED)


def check_same_bits_in_any_order(run: Callable[[], Iterable[Tensor]]) -> None:
    """A missing barrier shows as a difference, and so does what a program reads of another one."""
    runs = []
    for each in ORDERS:
        with each():
            runs.append(list(run()))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
