"""Tensors in awkward places: the same values, surrounded by NaN that nothing may read and nothing may overwrite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

#: Integers around a tensor of integers; no label and no class has this value.
OUTSIDE = -7
#: Elements before and after an allocation of a launcher.
_ROOM = 64


def _filled(x: Tensor, *shape: int) -> Tensor:
    return x.new_full(shape, math.nan if x.is_floating_point() else OUTSIDE)


def window(x: Tensor, before: int = 3, after: int = 2, dim: int = 1) -> Tensor:
    """Return the values of x inside a larger tensor: one row more on both sides of dimension ``dim - 1``.

    Rows are ``before + after`` elements further apart than in x.
    """
    shape = list(x.shape)
    shape[dim - 1] += 2
    shape[dim] += before + after
    inside = _filled(x, *shape).narrow(dim - 1, 1, x.shape[dim - 1]).narrow(dim, before, x.shape[dim])
    return inside.copy_(x.detach()).requires_grad_(x.requires_grad)


def guarded(x: Tensor, before: int = 0) -> Tensor:
    """Return x as it is, but beginning ``before`` elements after an aligned address."""
    room = _filled(x, x.numel() + 64)
    inside = room[32 + before : 32 + before + x.numel()].view(x.shape)
    return inside.copy_(x.detach()).requires_grad_(x.requires_grad)


def padded(x: Tensor, columns: int = 7) -> Tensor:
    """Return x with ``columns`` unused columns behind each row."""
    room = _filled(x, x.shape[0], x.shape[1] + columns, *x.shape[2:])
    room[:, : x.shape[1]] = x.detach()
    return room[:, : x.shape[1]]


def every_other(x: Tensor, dim: int) -> Tensor:
    """Return x strided by two along ``dim``."""
    return torch.stack([x, torch.full_like(x, math.nan)], dim + 1).flatten(dim, dim + 1)[
        (slice(None),) * dim + (slice(None, None, 2),)
    ]


#: Layouts of a matrix.
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(x.shape),
    "every other row": lambda x: every_other(x, 0),
    "every other column": lambda x: every_other(x, 1),
}

Guards = list[tuple[Tensor, int]]


@contextmanager
def nan_allocations() -> Iterator[Guards]:
    """Make everything that a launcher allocates NaN, and require that its surroundings stay NaN.

    Yields the allocations so far, each with the number of elements between its surroundings.
    """
    guards: Guards = []
    plain_empty_like, plain_new_empty = torch.empty_like, Tensor.new_empty

    def allocate(like: Tensor) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        room = torch.full((size + 2 * _ROOM,), math.nan if like.is_floating_point() else OUTSIDE, dtype=like.dtype)
        guards.append((room, size))
        return room[_ROOM:].as_strided(like.shape, like.stride(), _ROOM)

    def empty_like(x, **keywords):
        return allocate(plain_empty_like(x, **keywords))

    def new_empty(self, shape, dtype=None, **others):
        if others:  # the interpreter's own
            return plain_new_empty(self, shape, dtype=dtype, **others)
        return allocate(torch.empty(shape, dtype=dtype or self.dtype, device="meta"))

    with mock.patch.object(torch, "empty_like", empty_like), mock.patch.object(Tensor, "new_empty", new_empty):
        yield guards
    for room, size in guards:
        outside = torch.cat([room[:_ROOM], room[_ROOM + size :]])
        untouched = outside.isnan() if outside.is_floating_point() else outside == OUTSIDE
        assert bool(untouched.all()), "wrote outside an output"


def surroundings_are_nan(x: Tensor) -> bool:
    """Whether everything around a view is still NaN."""
    if x._base is None:
        return True
    room, inside = x._base.clone(), torch.zeros_like(x._base)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(1)
    return bool(room[inside == 0].isnan().all())
