"""Similarities block by block: torch's matrix products into a small buffer, and a backend's block kernels on it.

Forward: each block's statistics join those of the columns before it. Backward: the products are computed again (or
read, where they were kept), the block kernel turns them into their gradient in a second buffer, and two products make
the queries' gradient and that of the block's keys. Blocks hold all rows unless there are very many, so that each key's
gradient is written once; what is added up over blocks is added in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from .._gemm import products
from .arguments import (
    N_SLOPES,
    N_STATISTICS,
    NEG_MASS,
    NEG_PEAK,
    NEG_SLOPE,
    NUM_POS,
    POS_MASS,
    POS_PEAK,
    POS_SLOPE,
    POS_SUM,
    Arguments,
    Block,
)
from .plan import Blocks


class Sweep:
    """The blocks of one call, in order: which rows, which keys, and their products."""

    def __init__(self, a: Arguments, blocks: Blocks, kept: Tensor | None = None) -> None:
        """kept: [N, M], where the products go or already are."""
        self.a, self.blocks, self.kept = a, blocks, kept
        self.n, self.m = a.query.shape[0], a.keys.shape[0]
        self._room = None if kept is not None else self.buffer()

    def buffer(self) -> Tensor:
        """Room for a block."""
        n, m = min(self.blocks.rows, self.n), min(self.blocks.keys, self.m)
        return products.buffer(n, m, self.a.query.dtype, self.a.query.device)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for rows in products.slices(self.n, self.blocks.rows):
            for keys in products.slices(self.m, self.blocks.keys):
                yield rows, keys

    def block(self, rows: slice, keys: slice, filled: bool = False) -> Block:
        """filled: whether the products are there already."""
        a = self.a
        if self.kept is not None:
            z = self.kept[rows, keys]
        else:
            assert self._room is not None
            z = self._room[: rows.stop - rows.start, : keys.stop - keys.start]
        if not filled:
            torch.mm(self.of_rows(a.query, rows), self.of_keys(a.keys, keys).t(), out=z)
        return Block(
            z,
            self.of_rows(a.query_label, rows),
            self.of_keys(a.key_label, keys),
            None if a.exclude is None else self.of_rows(a.exclude, rows),
            keys.start,
            None if a.key_bias is None else self.of_keys(a.key_bias, keys),
            None if a.key_scale is None else self.of_keys(a.key_scale, keys),
            a.learned_scale,
            a.scale,
        )

    def of_rows(self, value: Tensor, rows: slice) -> Tensor:
        """value[rows]; small calls spend much of their time on slices."""
        return value if rows.stop - rows.start == self.n else value[rows]

    def of_keys(self, value: Tensor, keys: slice) -> Tensor:
        """value[keys]"""
        return value if keys.stop - keys.start == self.m else value[keys]


def join_(total: Tensor, part: Tensor) -> None:
    """Add the statistics of more columns to those so far, both as ``Block`` has them."""
    for peak, mass, slope in ((NEG_PEAK, NEG_MASS, NEG_SLOPE), (POS_PEAK, POS_MASS, POS_SLOPE)):
        kept, added = products.merge(total[peak : mass + 1], part[peak], part[mass])
        if len(total) > slope:
            total[slope] = total[slope] * kept + part[slope] * added
    total[POS_SUM] += part[POS_SUM]
    total[NUM_POS] += part[NUM_POS]


def forward(a: Arguments, kernels: ModuleType, blocks: Blocks, with_slopes: bool, kept: Tensor | None) -> Tensor:
    """Statistics [6, N], or [8, N] with_slopes. kept: [N, M], where all products are to stay."""
    sweep = Sweep(a, blocks, kept)
    pieces = list(sweep)
    if len(pieces) == 1:
        return kernels.forward(sweep.block(*pieces[0]), with_slopes)
    size = N_STATISTICS + N_SLOPES * with_slopes
    statistics = torch.zeros((size, sweep.n), dtype=a.compute_dtype, device=a.query.device)
    for rows, keys in pieces:
        part = kernels.forward(sweep.block(rows, keys), with_slopes)
        if keys.start == 0:
            statistics[:, rows] = part
        else:
            join_(statistics[:, rows], part)
    return statistics


def backward(
    a: Arguments, kernels: ModuleType, blocks: Blocks, terms: Tensor, needs: list[bool], kept: Tensor | None
) -> list[Tensor]:
    """Gradients of query and key, and the sums over rows that those of key_bias and key_scale are; [0] where not
    needed. kept: [N, M], the products of forward, left as they are.

    Where the queries are the keys, both gradients belong to the queries; they are added up where both are needed.
    """
    sweep = Sweep(a, blocks, kept)
    need_query, need_key, need_bias, need_scale = needs
    none = a.query.new_empty((0,))
    room = sweep.buffer() if need_query or need_key else None
    whole_rows, whole_keys = blocks.rows >= sweep.n, blocks.keys >= sweep.m
    grad_query = grad_key = none
    if need_query:
        dtype = a.query.dtype if whole_keys else a.compute_dtype
        grad_query = _fresh(a.query, dtype, sweep.m)
    begin, end = a.key_grad_begin, a.key_grad_end
    if need_key:
        dtype = a.keys.dtype if whole_rows else a.compute_dtype
        grad_key = _fresh(a.keys, dtype, sweep.n)
        grad_key[:begin].zero_()
        grad_key[end:].zero_()
    grad_bias = torch.zeros(sweep.m if need_bias else 0, dtype=a.compute_dtype, device=a.query.device)
    grad_scale = torch.zeros(sweep.m if need_scale else 0, dtype=a.compute_dtype, device=a.query.device)
    for rows, keys in sweep:
        learning = slice(max(keys.start, begin), min(keys.stop, end))  # keys of this block that receive a gradient
        for_keys = need_key and learning.start < learning.stop
        block_needs = [need_query or for_keys, need_bias, need_scale]
        if not any(block_needs):
            continue
        block = sweep.block(rows, keys, filled=kept is not None)
        dz = None if room is None else room[: rows.stop - rows.start, : keys.stop - keys.start]
        of_rows = terms if whole_rows else terms[:, rows]
        of_bias, of_scale = kernels.backward(block, of_rows, block_needs, dz)
        if need_bias:
            grad_bias[keys] += of_bias
        if need_scale:
            grad_scale[keys] += of_scale
        if need_query:
            assert dz is not None
            _add(grad_query, rows, dz, sweep.of_keys(a.keys, keys), first=keys.start == 0)
        if for_keys:
            assert dz is not None
            columns = slice(learning.start - keys.start, learning.stop - keys.start)
            _add(grad_key, learning, dz[:, columns].t(), sweep.of_rows(a.query, rows), first=rows.start == 0)
    return [grad_query.to(a.query.dtype), grad_key.to(a.query.dtype), grad_bias, grad_scale]


def _fresh(like: Tensor, dtype: torch.dtype, others: int) -> Tensor:
    """Room for a gradient shaped like ``like``; zeros where no block will write to it."""
    if others == 0 or like.numel() == 0:
        return torch.zeros(like.shape, dtype=dtype, device=like.device)
    return products.empty(like.shape[0], like.shape[1], dtype, like.device)


def _add(total: Tensor, rows: slice, left: Tensor, right: Tensor, first: bool) -> None:
    """total[rows] += left right, or = where it is the first."""
    part = total[rows]
    if first and part.dtype == left.dtype:
        torch.mm(left, right, out=part)
    elif first:
        products.product_into(part, left, right)
    else:
        products.added(part, left, right, part.dtype)
