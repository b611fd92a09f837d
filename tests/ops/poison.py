"""Allocations of kernels' launchers, poisoned: what is not written stays NaN, and what is written outside is found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

Guards = list[tuple[Tensor, int]]

_ROOM = 64  # elements before and after


@contextmanager
def nan_allocations() -> Iterator[Guards]:
    """Whatever a launcher allocates starts as NaN, in a larger allocation whose surroundings must stay NaN.

    Yields these allocations, each with the elements between its surroundings: a list that grows.
    """
    guards: Guards = []
    plain_empty_like, plain_new_empty = torch.empty_like, Tensor.new_empty

    def guarded(like: Tensor) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        room = torch.full((size + 2 * _ROOM,), math.nan if like.is_floating_point() else -7, dtype=like.dtype)
        guards.append((room, size))
        return room[_ROOM:].as_strided(like.shape, like.stride(), _ROOM)

    def empty_like(x, **keywords):
        return guarded(plain_empty_like(x, **keywords))

    def new_empty(self, shape, dtype=None, **others):
        if others:  # the interpreter's own
            return plain_new_empty(self, shape, dtype=dtype, **others)
        return guarded(torch.empty(shape, dtype=dtype or self.dtype, device="meta"))

    with mock.patch.object(torch, "empty_like", empty_like), mock.patch.object(Tensor, "new_empty", new_empty):
        yield guards
    for room, size in guards:
        outside = torch.cat([room[:_ROOM], room[_ROOM + size :]])
        untouched = outside.isnan() if outside.is_floating_point() else outside == -7
        assert bool(untouched.all()), "wrote outside an output"
