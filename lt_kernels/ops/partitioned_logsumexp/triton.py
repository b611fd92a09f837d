"""The Triton backend: launch tables and launchers, of blocks and of tiles. Formulas in ``triton_kernels.py``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..linear_margin_cross_entropy.triton import (
    _PADDING,
    _architecture,
    _block_d,
    _Launch,
    _launch,
    _machine,
    _merged,
    _most_splits,
    _partial_gradients,
    _per_split,
    _precision,
    _readable,
)
from .arguments import N_SLOPES, N_STATISTICS, N_TERMS, Arguments, Block
from .triton_kernels import (
    _block_backward_kernel,
    _block_forward_kernel,
    _grad_both_kernel,
    _grad_key_kernel,
    _grad_query_kernel,
    _merge_kernel,
    _row_terms_kernel,
    _tiled_forward_kernel,
)

# --- launch tables ---------------------------------------------------------------------------------------------------

#: Where |u| <= bound and 2 bound is at most this, exponentials are taken relative to the bound: none underflows.
_CONSTANT_RANGE = 60.0
#: Rows that the block kernels' backward takes at a time, and the most warps that a program of theirs has.
_BLOCK_ROWS, _BLOCK_WARPS = 4, 4
#: Programs of the block kernels that run together on a multiprocessor, about.
_BLOCK_TOGETHER = 4
#: Splits of the forward pass, at most; and rows of a program that merges them.
_MOST_SPLITS, _MERGED_ROWS = 128, 16


class _Launches(NamedTuple):
    forward: _Launch
    forward_bounded: _Launch  # where all logits have a bound: fewer registers, larger tiles
    grad_query: _Launch
    grad_key: _Launch
    grad_both: _Launch
    grad_both_bounded: _Launch | None = None  # another than grad_both


#: By machine and kind of product, by largest D, as in the linear heads' table: what compiles without spills into the
#: shared memory that there is. Blocks of 128 rows where that is possible: each block of rows reads all keys from L2.
_TABLE = {
    ("hopper", "half"): {
        64: _Launches(
            _Launch(64, 64, 4, 2, 3), _Launch(128, 64, 8, 2, 2), _Launch(128, 64, 8, 2), _Launch(64, 128, 8, 2),
            _Launch(128, 32, 8, 2),
        ),
        128: _Launches(
            _Launch(64, 64, 4, 2, 3), _Launch(128, 64, 8, 2, 2), _Launch(128, 64, 8, 2), _Launch(64, 128, 8, 2),
            _Launch(128, 32, 8, 2), _Launch(128, 64, 8, 2),
        ),
        256: _Launches(
            _Launch(64, 64, 4, 2, 2), _Launch(128, 64, 8, 2), _Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2),
            _Launch(64, 64, 8, 2),
        ),
    },
    ("blackwell", "half"): {
        64: _Launches(
            _Launch(64, 64, 4, 2, 3), _Launch(128, 64, 8, 2, 2), _Launch(64, 64, 8, 2), _Launch(64, 64, 4, 2),
            _Launch(64, 32, 8, 2),
        ),
        128: _Launches(
            _Launch(64, 64, 4, 2, 3), _Launch(128, 64, 8, 2, 2), _Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2),
            _Launch(64, 32, 8, 2),
        ),
        256: _Launches(
            _Launch(64, 64, 4, 2, 2), _Launch(128, 64, 8, 2), _Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2),
            _Launch(64, 32, 8, 2),
        ),
    },
    ("ampere", "half"): {
        128: _Launches(
            _Launch(64, 64, 8, 2, 2), _Launch(128, 64, 8, 2, 2), _Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2),
            _Launch(64, 32, 8, 2),
        ),
        256: _Launches(
            _Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2), _Launch(64, 32, 8, 2), _Launch(32, 64, 8, 2),
            _Launch(64, 32, 8, 2),
        ),
    },
    ("amd", "half"): {
        128: _Launches(
            _Launch(64, 64, 4, 1), _Launch(64, 64, 4, 1), _Launch(64, 32, 4, 1), _Launch(32, 64, 4, 1),
            _Launch(64, 32, 4, 1),
        ),
        256: _Launches(
            _Launch(64, 32, 4, 1), _Launch(64, 32, 4, 1), _Launch(64, 16, 4, 1), _Launch(16, 64, 4, 1),
            _Launch(64, 16, 4, 1),
        ),
    },
    ("nvidia", "tf32"): {
        128: _Launches(
            _Launch(64, 32, 8, 2), _Launch(64, 64, 8, 2), _Launch(32, 32, 4, 2, 2), _Launch(32, 32, 4, 2, 2),
            _Launch(32, 32, 4, 2, 2),
        ),
        256: _Launches(
            _Launch(32, 32, 4, 2), _Launch(32, 32, 4, 2), _Launch(32, 32, 4, 2), _Launch(32, 32, 4, 2),
            _Launch(32, 32, 4, 2),
        ),
    },
    ("nvidia", "ieee"): {
        128: _Launches(
            _Launch(32, 32, 8, 2, 2), _Launch(32, 32, 8, 2, 2), _Launch(32, 32, 8, 2, 2), _Launch(32, 32, 8, 2, 2),
            _Launch(32, 32, 8, 2, 2),
        ),
        256: _Launches(
            _Launch(32, 32, 8, 2), _Launch(32, 32, 8, 2), _Launch(32, 16, 8, 2), _Launch(16, 32, 8, 2),
            _Launch(32, 16, 8, 2),
        ),
    },
    ("amd", "ieee"): {
        128: _Launches(
            _Launch(32, 32, 4, 1), _Launch(32, 32, 4, 1), _Launch(32, 32, 4, 1), _Launch(32, 32, 4, 1),
            _Launch(32, 32, 4, 1),
        ),
        256: _Launches(
            _Launch(32, 16, 4, 1), _Launch(32, 16, 4, 1), _Launch(32, 16, 4, 1), _Launch(16, 32, 4, 1),
            _Launch(32, 16, 4, 1),
        ),
    },
}  # fmt: skip


@functools.cache
def _launches(width: int, itemsize: int, tf32: bool, architecture: int) -> _Launches:
    """architecture: ten times the compute capability, 0 on AMD's."""
    machine = _machine(architecture)
    product = "half" if itemsize == 2 else "tf32" if tf32 and machine != "amd" else "ieee"
    if machine != "amd" and product != "half":
        machine = "nvidia"
    by_width = _TABLE[machine, product]
    limit = min((d for d in by_width if d >= width), default=None)
    if limit is None:
        raise ValueError(f"query: got {width} columns, expected at most {max(by_width)} for the tiled strategy")
    return by_width[limit]


def _block_launch(columns: int) -> dict[str, int]:
    """Columns of a tile: no more warps than fill a row. A lane has 8 columns: 16 or 32 bytes."""
    group = 8
    warps = _BLOCK_WARPS
    while warps > 1 and 16 * warps * group >= columns:
        warps //= 2
    return {"GROUP": group, "LANES": 32 * warps, "num_warps": warps}


# --- blocks ----------------------------------------------------------------------------------------------------------


def _of_block(block: Block) -> dict[str, Any]:
    """Arguments of the kernels, by name."""
    return {
        "z_ptr": block.z,
        "query_label_ptr": block.query_label,
        "key_label_ptr": block.key_label,
        "exclude_ptr": block.exclude,
        "key_bias_ptr": block.key_bias,
        "key_scale_ptr": block.key_scale,
        "learned_scale_ptr": block.learned_scale,
        "rows": block.z.shape[0],
        "columns": block.z.shape[1],
        "first_column": block.first,
        "z_stride": block.z.stride(0),
        "scale": block.scale,
    }


def forward(block: Block, with_slopes: bool) -> Tensor:
    n, m = block.z.shape
    kinds = N_STATISTICS + N_SLOPES * with_slopes
    if n == 0 or m == 0:
        return block.z.new_zeros((kinds, n), dtype=torch.float32)
    with torch.cuda.device_of(block.z):
        constants = _block_launch(m)
        tiles = triton.cdiv(m, constants["LANES"] * constants["GROUP"])
        per_split = _per_split(n, tiles, _BLOCK_TOGETHER, _MOST_SPLITS)
        splits = triton.cdiv(tiles, per_split)
        partial = block.z.new_empty((kinds, splits, n), dtype=torch.float32)
        arguments = _of_block(block) | {"out_ptr": partial, "tiles_per_split": per_split, "SLOPES": with_slopes}
        _launch(_block_forward_kernel, (n, splits), arguments, **constants)
        return _merged_statistics(partial)


def backward(block: Block, terms: Tensor, needs: list[bool], out: Tensor | None) -> tuple[Tensor, Tensor]:
    n, m = block.z.shape
    need_products, need_bias, need_scale = needs
    if n == 0 or m == 0:
        bias, scale = (block.z.new_zeros((m if need else 0,), dtype=torch.float32) for need in needs[1:])
        return bias, scale
    none = terms.new_empty((0,))
    if not any(needs):
        return none, none
    with torch.cuda.device_of(block.z):
        constants = _block_launch(m)
        programs = triton.cdiv(m, constants["LANES"] * constants["GROUP"])
        blocks = triton.cdiv(n, _BLOCK_ROWS)
        per_split = _per_split(programs, blocks, _BLOCK_TOGETHER, 256)
        splits = triton.cdiv(blocks, per_split)
        kinds = need_bias + need_scale
        sums = terms.new_empty((splits, kinds, m), dtype=torch.float32) if kinds else None
        if terms.stride(1) != 1:
            terms = terms.contiguous()
        arguments = _of_block(block) | {
            "terms_ptr": terms,
            "dz_ptr": out if need_products else None,
            "sums_ptr": sums,
            "blocks_per_split": per_split,
            "terms_stride": terms.stride(0),
            "dz_stride": 0 if out is None else out.stride(0),
            "SUM_BIAS": need_bias,
            "SUM_SCALE": need_scale,
        }
        _launch(_block_backward_kernel, (programs, splits), arguments, ROWS=_BLOCK_ROWS, **constants)
        return _merged_sums(sums, need_bias, need_scale, none)


def _merged_statistics(partial: Tensor) -> Tensor:
    """[kinds, splits, n] -> [kinds, n]."""
    kinds, splits, n = partial.shape
    if splits == 1:
        return partial[:, 0]
    out = partial.new_empty((kinds, n))
    arguments = {"partial_ptr": partial, "out_ptr": out, "rows": n, "splits": splits, "SLOPES": kinds > N_STATISTICS}
    constants = {"SPLITS": triton.next_power_of_2(splits), "BLOCK": _MERGED_ROWS, "num_warps": 4}
    _launch(_merge_kernel, (triton.cdiv(n, _MERGED_ROWS),), arguments, **constants)
    return out


def _merged_sums(sums: Tensor | None, need_bias: bool, need_scale: bool, none: Tensor) -> tuple[Tensor, Tensor]:
    """[splits, kinds, m] -> [m] each, the splits added up in a fixed order."""
    if sums is None:
        return none, none
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    if need_bias and need_scale:  # apart: compiled code takes results to start at multiples of 16 bytes
        return total[0].clone(), total[1].clone()
    return total[0] if need_bias else none, total[0] if need_scale else none


# --- tiles -----------------------------------------------------------------------------------------------------------


def _constant(a: Arguments) -> bool:
    """Whether exponentials are taken relative to a bound of all logits."""
    plain = a.learned_scale is None and a.key_bias is None and a.key_scale is None
    return a.normalized and plain and 2 * abs(a.scale) <= _CONSTANT_RANGE


def _of_tiles(a: Arguments) -> tuple[dict[str, Any], _Launches]:
    """Arguments of the kernels, by name; and how they are launched."""
    query = _readable(a.query)
    key = query if a.key is None else _readable(a.key)
    width = query.shape[1]
    precision = _precision(query.dtype)
    arguments = {
        "query_ptr": query,
        "key_ptr": key,
        "query_label_ptr": a.query_label,
        "key_label_ptr": a.key_label,
        "exclude_ptr": a.exclude,
        "key_bias_ptr": a.key_bias,
        "key_scale_ptr": a.key_scale,
        "learned_scale_ptr": a.learned_scale,
        "rows": query.shape[0],
        "columns": key.shape[0],
        "width": width,
        "query_stride": query.stride(0),
        "key_stride": key.stride(0),
        "scale": a.scale,
        "bound": abs(a.scale),
        "CONSTANT": _constant(a),
        "PRECISION": precision,
        "FULL": width == _block_d(width),
        "BLOCK_D": _block_d(width),
    }
    return arguments, _launches(width, query.element_size(), precision == "tf32", _architecture(query.device))


def tiled_forward(a: Arguments, with_slopes: bool) -> Tensor:
    """Statistics of all columns [6, N], or [8, N] with_slopes."""
    n, m = a.query.shape[0], a.keys.shape[0]
    kinds = N_STATISTICS + N_SLOPES * with_slopes
    if n == 0 or m == 0:
        return a.query.new_zeros((kinds, n), dtype=torch.float32)
    with torch.cuda.device_of(a.query):
        arguments, launches = _of_tiles(a)
        launch = launches.forward_bounded if arguments["CONSTANT"] else launches.forward
        blocks, tiles = triton.cdiv(n, launch.block_n), triton.cdiv(m, launch.block_c)
        per_split = _per_split(blocks, tiles, launch.together, _MOST_SPLITS)
        partial = a.query.new_empty((kinds, triton.cdiv(tiles, per_split), n), dtype=torch.float32)
        arguments |= {"out_ptr": partial, "tiles_per_split": per_split, "SLOPES": with_slopes}
        arguments["RAGGED"] = m % launch.block_c != 0
        # products without tensor cores are long code, and twice that would spill
        arguments["APART"] = a.query.element_size() == 2 or arguments["PRECISION"] == "tf32"
        _launch(_tiled_forward_kernel, (blocks, partial.shape[1]), arguments, **launch.constants)
        return _merged_statistics(partial)


def _symmetric(a: Arguments) -> bool:
    """Whether the queries are the keys, in everything that backward sees."""
    whole = a.key_grad_begin == 0 and a.key_grad_end == a.query.shape[0]
    labels = a.query_label.data_ptr() == a.key_label.data_ptr()
    return a.key is None and a.key_bias is None and a.key_scale is None and labels and whole


def tiled_backward(a: Arguments, terms: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of query and key, and the sums over rows of G and of G a z [M], from the terms of ``Block``; [0] where
    not needed. Where the queries are the keys, theirs is the whole gradient."""
    n, m = a.query.shape[0], a.keys.shape[0]
    need_query, need_key, need_bias, need_scale = needs
    need_key = need_key and a.key is not None
    none = a.query.new_empty((0,))
    if n == 0 or m == 0:
        column = a.query.new_zeros((m,), dtype=torch.float32)
        likes = zip((a.query, a.keys, column, column), (need_query, need_key, need_bias, need_scale), strict=True)
        return [torch.zeros_like(like) if need else none for like, need in likes]
    if not (need_query or need_key or need_bias or need_scale):
        return [none] * 4
    with torch.cuda.device_of(a.query):
        arguments, launches = _of_tiles(a)
        if _symmetric(a) and need_query and not (need_bias or need_scale):
            launch = (arguments["CONSTANT"] and launches.grad_both_bounded) or launches.grad_both
            arguments |= _row_terms(arguments, terms, launch.block_c)
            return [_merged(_grad_both(a, arguments, launch), a.query.dtype), none, none, none]
        arguments |= _row_terms(arguments, terms, launches.grad_key.block_n)
        grad_query = grad_key = none
        if need_query:
            dtype = a.query.dtype if a.key is not None else torch.float32
            grad_query = _merged(_grad_query(a, arguments, launches.grad_query, dtype), dtype)
        through_columns = need_key or (need_query and a.key is None)
        of_keys, sums = _of_keys(a, arguments, launches.grad_key, through_columns, need_bias, need_scale)
        if a.key is None and need_query:
            grad_query[a.key_grad_begin : a.key_grad_end] += of_keys
            grad_query = grad_query.to(a.query.dtype)
        elif need_key:
            grad_key = of_keys
            if len(of_keys) < m:
                grad_key = a.keys.new_zeros(a.keys.shape)
                grad_key[a.key_grad_begin : a.key_grad_end] = of_keys
        return [grad_query, grad_key, *sums]


def _row_terms(arguments: dict[str, Any], terms: Tensor, block: int) -> dict[str, Any]:
    """The padded terms, and which columns each block of so many rows leaves out."""
    rows = arguments["rows"]
    padded = triton.cdiv(rows, _PADDING) * _PADDING
    blocks = padded // block
    own = {
        "terms_ptr": terms.contiguous(),
        "padded_terms_ptr": terms.new_empty((N_TERMS, padded)),
        "range_ptr": None if arguments["exclude_ptr"] is None else terms.new_empty((2, blocks), dtype=torch.int32),
        "padded": padded,
        "ranges": blocks,
    }
    _launch(_row_terms_kernel, (blocks,), arguments | own, BLOCK=block, num_warps=max(1, min(4, block // 32)))
    return own


def _grad_query(a: Arguments, arguments: dict[str, Any], launch: _Launch, dtype: torch.dtype) -> Tensor:
    """[splits, N, D]."""
    blocks, tiles = triton.cdiv(arguments["rows"], launch.block_n), triton.cdiv(arguments["columns"], launch.block_c)
    per_split = _per_split(blocks, tiles, launch.together, _most_splits(a.query.numel()))
    grad = _partial_gradients(triton.cdiv(tiles, per_split), a.query, dtype)
    own = {"grad_ptr": grad, "tiles_per_split": per_split}
    _launch(_grad_query_kernel, (blocks, len(grad)), arguments | own, **launch.constants)
    return grad


def _grad_both(a: Arguments, arguments: dict[str, Any], launch: _Launch) -> Tensor:
    """[splits, N, D]."""
    blocks, tiles = triton.cdiv(arguments["rows"], launch.block_n), triton.cdiv(arguments["rows"], launch.block_c)
    per_split = _per_split(blocks, tiles, launch.together, _most_splits(a.query.numel()))
    grad = _partial_gradients(triton.cdiv(tiles, per_split), a.query, a.query.dtype)
    own = {"grad_ptr": grad, "tiles_per_split": per_split}
    _launch(_grad_both_kernel, (blocks, len(grad)), arguments | own, **launch.constants)
    return grad


def _of_keys(
    a: Arguments, arguments: dict[str, Any], launch: _Launch, need_key: bool, need_bias: bool, need_scale: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gradient of the keys that receive one, and the sums over rows [M] of all keys; [0] where not needed."""
    begin, end = (a.key_grad_begin, a.key_grad_end) if need_key else (0, 0)
    grad, none = arguments["padded_terms_ptr"].new_empty((0,)), arguments["padded_terms_ptr"].new_empty((0,))
    dtype = a.query.dtype if a.key is not None else torch.float32
    sums: list[tuple[Tensor, Tensor]] = []
    if begin < end:
        partial, total = _grad_key(a, arguments, launch, begin, end, dtype, need_bias, need_scale)
        grad, sums = _merged(partial, dtype), [total]
    elif need_key:
        grad = a.keys.new_zeros((0, a.keys.shape[1]), dtype=dtype)
    if need_bias or need_scale:
        m = arguments["columns"]
        before, after = (
            [_grad_key(a, arguments, launch, first, last, None, need_bias, need_scale)[1]] if first < last else []
            for first, last in ((0, begin), (end, m))
        )
        sums = before + sums + after
    if not sums:
        return grad, (none, none)
    of_bias, of_scale = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*sums, strict=True))
    return grad, (of_bias, of_scale)


def _grad_key(
    a: Arguments, arguments: dict[str, Any], launch: _Launch, begin: int, end: int, dtype: torch.dtype | None,
    need_bias: bool, need_scale: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Of the keys in a range: the partial gradients [splits, end - begin, D], [0] if dtype is None; the sums over rows,
    [0] where not needed."""
    keys, terms = a.keys[begin:end], arguments["padded_terms_ptr"]
    blocks, tiles = triton.cdiv(arguments["rows"], launch.block_n), triton.cdiv(end - begin, launch.block_c)
    per_split = _per_split(tiles, blocks, launch.together, _most_splits(keys.numel()))
    splits = triton.cdiv(blocks, per_split)
    none = terms.new_empty((0,))
    grad = none if dtype is None else _partial_gradients(splits, keys, dtype)
    kinds = need_bias + need_scale
    sums = terms.new_empty((splits, kinds, end - begin)) if kinds else None
    own = {
        "grad_ptr": None if dtype is None else grad,
        "sums_ptr": sums,
        "first_column": begin,
        "end_column": end,
        "blocks": blocks,
        "blocks_per_split": per_split,
        "SUM_BIAS": need_bias,
        "SUM_SCALE": need_scale,
    }
    _launch(_grad_key_kernel, (tiles, splits), arguments | own, **launch.constants)
    return grad, _merged_sums(sums, need_bias, need_scale, none)
