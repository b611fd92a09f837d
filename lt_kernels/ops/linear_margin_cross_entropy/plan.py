"""Which way a linear head is computed: costs of each, and the choice.

Of N samples, D features, C classes (times K losses a sample), b bytes per element of the matrix products:

    strategy     operations   bytes of logits        buffer             beside
    materialize  6 N D C      10 b N C (1)           N C b
    chunked      6 N D C      10 b N C               R C b (2)          C D 4 where products of chunks are added up
      rows                                                              and gradients are not float32 themselves
    chunked      8 N D C      10 b N C + 2 b N C     N B b (3)          N D 4 likewise
      classes
    tiled        10 N D C     none                   none               partial sums where rows are few

(1) written by the product; read and written as their own gradient by the rows kernel; read by two products.
(2) R rows at a time; each chunk but the first reads and writes the weight's gradient again.
(3) B classes at a time, in two passes: statistics of the rows, then gradients from logits computed again.

Forward alone is 2 N D C everywhere. Gradients that forward cannot know (reduction="none", return_lse, class vectors
that learn, float16, see ``set_gradient_policy``) make "chunked" by rows compute its logits again: 8 N D C.

Time is estimated as operations / rate + bytes / bandwidth with the constants below: an H200 and, for CPUs, two cores
of a server. Only comparisons of these estimates matter. Sizes and settings alone decide, never free memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._device import BYTES_PER_SECOND, PRODUCT_FLOPS
from .._gemm.layout import line, padded

STRATEGIES = ("auto", "materialize", "chunked", "tiled")
#: Widest features for which "auto" considers "tiled", and the widest that strategy takes.
TILED_WIDTH, LARGEST_TILED_WIDTH = 256, 512

_RATE = {  # operations per second of the libraries' matrix products
    "cpu": {8: 0.9e11, 4: 1.8e11, 2: 4e11},
    "cuda": PRODUCT_FLOPS,
}
_BANDWIDTH = {"cpu": 4e10, "cuda": BYTES_PER_SECOND}
_TILED_EFFICIENCY = 0.6  # of the libraries' rate
#: "chunked" asked for by name where everything would fit: at least this many chunks, of at least this many rows.
_CHUNKS, _FEWEST_ROWS = 5, 64


class LinearPlan(NamedTuple):
    """How a linear head is computed, and what that costs; see ``plan_linear``."""

    strategy: str  #: "materialize", "chunked" or "tiled"
    by: str | None  #: what chunks are cut along: "rows" or "classes"; None where nothing is cut
    chunk: int  #: rows (or classes) of a chunk
    flops: int  #: floating-point operations, 2 per multiply-add
    bytes_moved: int  #: bytes read and written by the products and the rows kernel, each pass counted
    peak_memory: int  #: bytes beside inputs, results and gradients; "tiled": without partial sums, at most 512 MiB
    seconds: float  #: the model's estimate on the device it was fitted to; for comparison only


class Sizes(NamedTuple):
    """What a plan depends on."""

    rows: int
    width: int
    classes: int
    positions: int
    dtype: torch.dtype  # of the products
    weight_dtype: torch.dtype
    device: str
    training: bool  # features and weight receive gradients
    one_pass: bool  # forward knows the upstream gradient up to a factor
    divisible: bool  # classes may be cut: one loss per sample, class-index targets, no class vector that learns

    @property
    def columns(self) -> int:
        return self.classes * self.positions

    @property
    def row_bytes(self) -> int:
        """Of a buffer's row."""
        return padded(self.columns, self.dtype) * self.dtype.itemsize


def _estimate(
    s: Sizes, strategy: str, by: str | None, chunk: int, products: int, traffic: int, buffer: int, again: int = 0
) -> LinearPlan:
    """products: how often N D C multiply-adds are done; traffic: bytes of logits; again: bytes of re-read gradients."""
    b = s.dtype.itemsize
    operands = s.rows * s.width + s.columns * s.width
    flops = 2 * products * s.rows * s.width * s.columns
    moved = products * operands * b + traffic + again
    if s.weight_dtype != s.dtype:
        moved += s.columns * s.width * (b + s.weight_dtype.itemsize)
        buffer += s.columns * s.width * b
    device = s.device if s.device in _RATE else "cpu"
    rate = _RATE[device][b] * (_TILED_EFFICIENCY if strategy == "tiled" else 1.0)
    return LinearPlan(strategy, by, chunk, flops, moved, buffer, flops / rate + moved / _BANDWIDTH[device])


def _materialize(s: Sizes) -> LinearPlan:
    passes = 5 if s.training else 2
    buffer = s.rows * s.row_bytes
    return _estimate(s, "materialize", None, s.rows, 3 if s.training else 1, passes * buffer, buffer)


def _by_rows(s: Sizes, rows: int) -> LinearPlan:
    chunks = -(-s.rows // max(rows, 1))
    products = (3 if s.one_pass else 4) if s.training else 1
    traffic = (products + 2 if s.training else 2) * s.rows * s.row_bytes
    again = extra = 0
    if s.training and chunks > 1:
        again = (chunks - 1) * 8 * s.columns * s.width
        if s.weight_dtype.itemsize < 4:
            extra = 4 * s.columns * s.width
    buffer = min(rows, s.rows) * s.row_bytes + extra
    return _estimate(s, "chunked", "rows", rows, products, traffic, buffer, again)


def _by_classes(s: Sizes, classes: int) -> LinearPlan:
    chunks = -(-s.classes // max(classes, 1))
    buffer = s.rows * padded(min(classes, s.classes), s.dtype) * s.dtype.itemsize
    products, passes = (4, 7) if s.training else (1, 2)
    again = (chunks - 1) * 8 * s.rows * s.width if s.training else 0
    extra = 4 * s.rows * s.width if s.training and s.dtype.itemsize < 4 else 0
    return _estimate(s, "chunked", "classes", classes, products, passes * s.rows * s.row_bytes, buffer + extra, again)


def _tiled(s: Sizes) -> LinearPlan:
    return _estimate(s, "tiled", None, 0, 5 if s.training else 1, 0, 0)


def _rounded(rows: int, most: int) -> int:
    """Rows a chunk: even chunks, each a multiple of 128 (of 8 where they are small) if that many are allowed."""
    for step in (128, 8):
        up = -(-rows // step) * step
        if rows >= 4 * step and up <= most:
            return up
        if rows >= 4 * step and most >= step:
            return most // step * step
    return rows


def chunk_plan(s: Sizes, memory_budget: int) -> LinearPlan:
    """The cheaper way to cut what does not fit ``memory_budget``; by name also what would fit."""
    most = max(1, memory_budget // max(1, s.row_bytes))
    if most >= s.rows:  # asked for by name
        rows = min(s.rows, max(-(-s.rows // _CHUNKS), _FEWEST_ROWS))
    else:
        rows = -(-s.rows // (-(-s.rows // most)))
    best = _by_rows(s, max(1, _rounded(rows, most)))
    step = line(s.dtype)
    classes = memory_budget // max(1, s.rows * s.dtype.itemsize) // step * step
    if s.divisible and step <= classes < s.classes:
        blocks = -(-s.classes // classes)
        even = padded(-(-s.classes // blocks), s.dtype)
        best = min(best, _by_classes(s, min(even, classes)), key=lambda plan: plan.seconds)
    return best


def tiled_is_cheaper(s: Sizes) -> bool:
    """Whether "tiled" is estimated to be faster than logits in a buffer; depends on D, dtype and device alone, as far
    as rows are not few."""
    one = s._replace(rows=4096, classes=8192, positions=1)
    return s.width <= TILED_WIDTH and _tiled(one).seconds < _materialize(one).seconds


def tiled_reason(width: int, positions: int, dtype: torch.dtype, soft: bool) -> str | None:
    """Why "tiled" cannot run where Triton does; None where it can."""
    if width > LARGEST_TILED_WIDTH:
        return f"it takes at most {LARGEST_TILED_WIDTH} features, not {width}"
    if positions != 1:
        return "it takes one loss per sample"
    if soft:
        return "it takes class-index targets"
    if dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, not float64"
    return None


def choose(s: Sizes, strategy: str, tiled: bool, memory_budget: int) -> str:
    """The strategy that runs. tiled: whether that one can run the call. Sizes may be symbolic."""
    if strategy != "auto":
        return strategy
    if tiled and tiled_is_cheaper(s):
        return "tiled"
    return "materialize" if s.rows * s.row_bytes <= memory_budget else "chunked"


def make_plan(s: Sizes, strategy: str, memory_budget: int) -> LinearPlan:
    """Of a strategy that is not "auto"."""
    if strategy == "chunked":
        return chunk_plan(s, memory_budget)
    return _tiled(s) if strategy == "tiled" else _materialize(s)
