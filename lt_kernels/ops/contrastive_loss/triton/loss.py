"""What the operator calls: forward from queries and keys to the loss, backward from there to the gradients.

Tiled: a sweep over the keys, the rows' losses (and their sum, where rows are many); backward the gradients of both
sides, and the sum of their splits. Blocks: torch's products in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gemm import launch as gemm
from ..._gemm import products
from ..._rows.triton_options import per_row
from ..._triton import launch_with
from ...partitioned_logsumexp.plan import Blocks
from ...partitioned_logsumexp.triton.launch import BLOCK_ROWS, BLOCK_TOGETHER, MOST_SPLITS, block_launch
from ..arguments import Arguments, terms_shape
from .backward import (
    Partial,
    Terms,
    Upstream,
    contrastive_loss_block_backward_kernel,
    contrastive_loss_both_kernel,
    contrastive_loss_finish_kernel,
    contrastive_loss_gradients_kernel,
)
from .forward import contrastive_loss_block_forward_kernel, contrastive_loss_tiled_forward_kernel
from .keys import N_SLOPES, N_SUMS
from .launch import (
    bounds_exponents,
    cut_gradients,
    is_symmetric,
    loss_options,
    tile_arguments,
)
from .launch import partial as room_for_splits
from .rows import Result, RowInputs, contrastive_loss_result_kernel, contrastive_loss_rows_kernel

#: Elements of the splits' sums that a program joins, and the most rows that it has.
_JOINED, _MOST_ROWS = 2048, 128
#: Elements of a program that adds up splits.
_FINISHED = 512
_OVER = {"sum": "sum", "mean": "count", "mean_counted": "counted", "mean_positives": "positives"}


class Made(NamedTuple):
    """Results of forward."""

    loss: Tensor  # [N] or 0-dim
    terms: Tensor  # of backward
    share: Tensor  # 0-dim, what a row counts; [0] where each row has its loss


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(a: Arguments, strategy: str, blocks: Blocks, with_slopes: bool, kept: Tensor | None) -> Made:
    """Return the loss. kept: [N, M], where the products are to stay."""
    n = a.query.shape[0]
    with torch.cuda.device_of(a.query):
        if n == 0 or a.keys.shape[0] == 0:
            kinds = N_SUMS + N_SLOPES * with_slopes
            return _finish_rows(a, a.query.new_zeros((kinds, 1, n), dtype=torch.float32), with_slopes, False)
        if strategy == "tiled":
            return _finish_rows(a, _sweep_tiles(a, with_slopes), with_slopes, bounds_exponents(a))
        return _finish_rows(a, _sweep_blocks(a, blocks, with_slopes, kept), with_slopes, False)


def _sweep_tiles(a: Arguments, with_slopes: bool) -> Tensor:
    """Return the sums over the keys of each split."""
    n, m = a.query.shape[0], a.keys.shape[0]
    arguments, launches = tile_arguments(a)
    launch = launches.forward_bounded if bounds_exponents(a) else launches.forward
    cut = launch.along_rows(n, m, MOST_SPLITS)
    sums = a.query.new_empty((N_SUMS + N_SLOPES * with_slopes, cut.splits, n), dtype=torch.float32)
    # products without tensor cores are long code, and twice that would spill
    apart = a.query.element_size() == 2 or arguments["f"].precision.value == "tf32"
    launch_with(
        contrastive_loss_tiled_forward_kernel, cut.grid,
        arguments | {"out_ptr": sums, "tiles_per_split": cut.per_split, "SLOPES": with_slopes},
        RAGGED=m % launch.block_c != 0, APART=apart, **launch.constants,
    )  # fmt: skip
    return sums


def _sweep_blocks(a: Arguments, blocks: Blocks, with_slopes: bool, kept: Tensor | None) -> Tensor:
    """Return the sums over the keys of each split of each block, whose products torch computes."""
    n, m = a.query.shape[0], a.keys.shape[0]
    room = _room(a, blocks, kept)
    cuts = []
    for keys in products.slices(m, blocks.keys):
        constants = block_launch(keys.stop - keys.start)
        tiles = triton.cdiv(keys.stop - keys.start, constants["LANES"] * constants["GROUP"])
        cuts.append((keys, constants, gemm.cut(min(n, blocks.rows), tiles, BLOCK_TOGETHER, MOST_SPLITS)))
    splits = sum(cut.splits for *_, cut in cuts)
    sums = a.query.new_empty((N_SUMS + N_SLOPES * with_slopes, splits, n), dtype=torch.float32)
    for rows in products.slices(n, blocks.rows):
        before = 0
        for keys, constants, cut in cuts:
            z = _products(a, rows, keys, room, kept, filled=False)
            arguments = _block_arguments(a, z, rows, keys) | {
                "out_ptr": sums, "rows": n, "first_split": before, "splits": splits,
                "tiles_per_split": cut.per_split, "SLOPES": with_slopes,
            }  # fmt: skip
            grid = (rows.stop - rows.start, cut.splits)
            launch_with(contrastive_loss_block_forward_kernel, grid, arguments, **constants)
            before += cut.splits
    return sums


def _room(a: Arguments, blocks: Blocks, kept: Tensor | None) -> Tensor:
    """Return where the products of a block go."""
    if kept is not None:
        return kept
    n, m = min(blocks.rows, a.query.shape[0]), min(blocks.keys, a.keys.shape[0])
    return products.buffer(n, m, a.query.dtype, a.query.device)


def _products(a: Arguments, rows: slice, keys: slice, room: Tensor, kept: Tensor | None, filled: bool) -> Tensor:
    """Return the products of a block. filled: whether they are there already."""
    if kept is not None:
        z = kept[rows, keys]
    else:
        z = room[: rows.stop - rows.start, : keys.stop - keys.start]
    if not filled:
        torch.mm(a.query[rows], a.keys[keys].t(), out=z)
    return z


def _block_arguments(a: Arguments, z: Tensor, rows: slice, keys: slice) -> dict[str, Any]:
    return {
        "z_ptr": z,
        "o": loss_options(a, False),
        "columns": keys.stop - keys.start,
        "first_row": rows.start,
        "first_column": keys.start,
        "z_stride": z.stride(0),
    }


def _finish_rows(a: Arguments, sums: Tensor, with_slopes: bool, bounded: bool) -> Made:
    """Return the loss and the terms of backward from the splits' sums."""
    _, splits, n = sums.shape
    terms = sums.new_empty(terms_shape(n))
    none = a.reduction == "none"
    losses = sums.new_empty((n,)) if none else None
    loss, share = (sums.new_empty(0 if none else ()) for _ in range(2))
    if none and n == 0:
        return Made(sums.new_empty((0,)), terms, share)
    joined = triton.next_power_of_2(splits)
    block = max(16, min(_MOST_ROWS, _JOINED // joined, triton.next_power_of_2(max(n, 1))))
    programs = max(1, triton.cdiv(n, block))
    result = Result(
        loss, share, None, n, tl.constexpr(_OVER.get(a.reduction, "sum")),
        tl.constexpr(a.empty_is_zero or a.reduction == "mean_positives"),
    )  # fmt: skip
    alone = programs == 1 and not none
    partial = None if alone or none else sums.new_empty((3, programs))
    contrastive_loss_rows_kernel[(programs,)](
        loss_options(a, bounded), RowInputs(a.extra, a.pulled, a.constant, a.counted, a.alpha, a.beta), result,
        sums, terms, losses, partial, n, splits, terms.shape[1],
        ALONE=alone, SLOPES=with_slopes, SPLITS=joined, BLOCK=block, num_warps=4,
    )  # fmt: skip
    if losses is not None:
        return Made(losses, terms, share)
    if partial is not None:
        constants = {"BLOCK": min(1024, max(32, triton.next_power_of_2(programs))), "num_warps": 4}
        contrastive_loss_result_kernel[(1,)](result, partial, programs, **constants)
    return Made(loss, terms, share)


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, a: Arguments, terms: Tensor, share: Tensor, strategy: str, blocks: Blocks, kept: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of ``DIFFERENTIABLE``, [0] where not needed; of the keys too where these are the queries."""
    n, m = a.query.shape[0], a.keys.shape[0]
    need_query, need_key, need_extra, need_pulled, need_scale = needs
    need_key = need_query if a.key is None else need_key
    none = terms.new_empty((0,))
    upstream, stride = per_row(grad, terms.new_empty((n,)).shape)
    g = Upstream(upstream, share if share.dim() == 0 else None, tl.constexpr(stride != 0))
    t = Terms(terms, n, terms.shape[1])
    query, key = a.query.new_empty((0,)), a.query.new_empty((0,))
    of_rows = [terms.new_empty((n,)) if need else None for need in (need_extra, need_pulled)]
    of_rows.append(terms.new_empty(()) if need_scale else None)
    with torch.cuda.device_of(a.query):
        if n == 0 or m == 0:
            if need_query:
                query = torch.zeros_like(a.query)
            if need_key and a.key is not None:
                key = torch.zeros_like(a.key)
            need_query = need_key = False
        if strategy == "tiled":
            query, key = _gradients_of_tiles(a, g, t, need_query, need_key, of_rows, query, key)
        else:
            if need_query or need_key:
                query, key = _gradients_of_blocks(a, g, t, blocks, kept, need_query, need_key)
            if any(value is not None for value in of_rows):
                _finish(a, g, t, None, None, None, None, of_rows)
    return [query, key, *(none if value is None else value for value in of_rows)]


def _gradients_of_tiles(
    a: Arguments, g: Upstream, t: Terms, need_query: bool, need_key: bool, of_rows: list[Tensor | None], query: Tensor,
    key: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries and keys; those of the rows' inputs are written to ``of_rows``."""
    many = any(value is not None for value in of_rows)
    if not (need_query or need_key):
        if many:
            _finish(a, g, t, None, None, None, None, of_rows)
        return query, key
    n, m = a.query.shape[0], a.keys.shape[0]
    arguments, launches = tile_arguments(a)
    both = need_query and is_symmetric(a)
    launch = launches.gradients_bounded if bounds_exponents(a) else launches.gradients
    if both:
        launch = launches.both
    grid = cut_gradients(a, launch, need_query, need_key and not both)
    begin, end = a.key_grad_begin, a.key_grad_end
    learning = a.keys[begin:end]
    merged = a.key is None and not both  # the keys' gradient is part of the queries'
    whole = (begin, end) == (0, m)
    of_query = of_key = None  # partial gradients; one split may be the gradient itself
    if need_query:
        query = a.query.new_empty(a.query.shape)
        of_query = query[None] if grid.query.splits == 1 and not merged else room_for_splits(grid.query.splits, query)
    if need_key and not both and end > begin:
        direct = grid.key.splits == 1 and whole and not merged
        if not merged:
            key = a.query.new_empty((m, a.query.shape[1]))
        of_key = key[None] if direct else room_for_splits(grid.key.splits, learning)
    elif need_key and a.key is not None:
        key = torch.zeros_like(a.key)
    launch_with(
        contrastive_loss_both_kernel if both else contrastive_loss_gradients_kernel,
        (grid.query_programs if both else grid.programs,),
        arguments | {
            "g": g, "terms": t, "grad_query_ptr": of_query, "grad_key_ptr": of_key, "first_key": begin, "end_key": end,
            "query_blocks": grid.query.programs, "query_programs": grid.query_programs,
            "tiles_per_split": grid.query.per_split, "key_blocks": grid.key.programs,
            "blocks_per_split": grid.key.per_split, "blocks": grid.query.programs,
        },
        RAGGED=(need_query and m % launch.block_c != 0) or (need_key and n % launch.block_c != 0), **launch.constants,
    )  # fmt: skip
    open_query = of_query if of_query is not None and of_query.data_ptr() != query.data_ptr() else None
    open_key = of_key if of_key is not None and (merged or of_key.data_ptr() != key.data_ptr()) else None
    if open_query is not None or open_key is not None or many:
        _finish(a, g, t, open_query, open_key, query, None if merged else key, of_rows)
    return query, key


def _finish(
    a: Arguments, g: Upstream, t: Terms, of_query: Tensor | None, of_key: Tensor | None, query: Tensor | None,
    key: Tensor | None, of_rows: list[Tensor | None],
) -> None:  # fmt: skip
    """Add up the splits to ``query`` and ``key``, and compute the gradients of the rows' inputs."""
    width = a.query.shape[1]
    of_queries = Partial(of_query, *((0, 0) if of_query is None else (len(of_query), of_query[0].numel())))
    of_keys = Partial(of_key, *((0, 0) if of_key is None else (len(of_key), of_key[0].numel())))
    key_out = key if of_key is not None else None
    query_size, key_size = a.query.numel(), a.keys.numel()
    query_programs = 0 if of_query is None else triton.cdiv(query_size, _FINISHED)
    key_programs = 0 if key_out is None else triton.cdiv(key_size, _FINISHED)
    programs = query_programs + key_programs + any(value is not None for value in of_rows)
    contrastive_loss_finish_kernel[(programs,)](
        g, t, of_queries, of_keys, query, key_out, *of_rows, a.scale, query_size, key_size, a.key_grad_begin * width,
        a.key_grad_end * width, query_programs, key_programs, BLOCK=_FINISHED, num_warps=4,
    )  # fmt: skip


def _gradients_of_blocks(
    a: Arguments, g: Upstream, t: Terms, blocks: Blocks, kept: Tensor | None, need_query: bool, need_key: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and keys from blocks of products; one gradient where the queries are the keys."""
    n, m = a.query.shape[0], a.keys.shape[0]
    room, dz_room = _room(a, blocks, kept), _room(a, blocks, None)
    begin, end = a.key_grad_begin, a.key_grad_end
    of_query = of_key = None
    if a.key is None:
        of_query = of_key = _Total(a.query, True, zeroed=n > min(blocks.rows, blocks.keys))
    else:
        of_query = _Total(a.query, m > blocks.keys) if need_query else None
        of_key = _Total(a.keys, n > blocks.rows) if need_key else None
    for rows in products.slices(n, blocks.rows):
        for keys in products.slices(m, blocks.keys):
            learning = slice(max(keys.start, begin), min(keys.stop, end))
            learns = of_key is not None and learning.start < learning.stop
            if not (need_query or learns):
                continue
            z = _products(a, rows, keys, room, kept, filled=kept is not None)
            dz = dz_room[: rows.stop - rows.start, : keys.stop - keys.start]
            _block_gradient(a, g, t, z, dz, rows, keys)
            if of_query is not None:
                of_query.add(rows, dz, a.keys[keys])
            if of_key is not None and learns:
                columns = slice(learning.start - keys.start, learning.stop - keys.start)
                of_key.add(learning, dz[:, columns].t(), a.query[rows])
    query = of_query.result() if of_query is not None else a.query.new_empty((0,))
    key = of_key.result() if of_key is not None and a.key is not None else a.query.new_empty((0,))
    return query, key


def _block_gradient(a: Arguments, g: Upstream, t: Terms, z: Tensor, dz: Tensor, rows: slice, keys: slice) -> None:
    """Write the gradient of a block's products."""
    m = keys.stop - keys.start
    constants = block_launch(m)
    programs = triton.cdiv(m, constants["LANES"] * constants["GROUP"])
    cut = gemm.cut(programs, triton.cdiv(rows.stop - rows.start, BLOCK_ROWS), BLOCK_TOGETHER, 256)
    arguments = _block_arguments(a, z, rows, keys) | {
        "g": g, "terms": t, "dz_ptr": dz, "end_row": rows.stop, "blocks_per_split": cut.per_split,
        "dz_stride": dz.stride(0),
    }  # fmt: skip
    launch_with(contrastive_loss_block_backward_kernel, cut.grid, arguments, ROWS=BLOCK_ROWS, **constants)


class _Total:
    """A gradient that products of blocks are added up to, in float32 where there are several for a row."""

    def __init__(self, like: Tensor, many: bool, zeroed: bool = False) -> None:
        """zeroed: blocks of other rows than those begun with may follow."""
        self.dtype = like.dtype
        room = torch.zeros if zeroed else torch.empty
        self.value = room(like.shape, dtype=torch.float32 if many else like.dtype, device=like.device)
        self.begun: set[tuple[int, int]] = set()
        self.zeroed = zeroed

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Add left right to the rows."""
        part = self.value[rows]
        if self.zeroed or (rows.start, rows.stop) in self.begun:
            products.added(part, left, right, part.dtype)
        else:
            self.begun.add((rows.start, rows.stop))
            products.product_into(part, left, right)

    def result(self) -> Tensor:
        """Return the gradient; 0 where nothing was added."""
        if not self.zeroed:
            done = 0
            for start, stop in [*sorted(self.begun), (len(self.value), 0)]:
                if start > done:
                    self.value[done:start].zero_()
                done = max(done, stop)
        return self.value.to(self.dtype)
