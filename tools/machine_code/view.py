"""docs/kernels.md, made from the tables of the Triton kernels."""

from __future__ import annotations

import re
from typing import Any

import torch

from lt_kernels.ops import _configs as limits
from lt_kernels.ops._device import BYTES_PER_SECOND, INSTRUCTIONS_PER_SECOND, MULTIPROCESSORS
from lt_kernels.ops.expert_cross_entropy.triton import launch as experts_launch
from lt_kernels.ops.margin_cross_entropy.triton import launch as margin_launch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

_PATHS = """
# Machine code of the Triton kernels

`python -m tools.machine_code --write` writes this page and the tables in `benchmarks/results/aot`. The kernels are
compiled ahead of time with Triton {triton} and not run: this needs no GPU. Nothing on this page was measured on one.

## What a check compiles

`make aot` holds every row to its limits, but does not compile every row. Each row carries a seal: a hash of the kernel
with everything it calls, its specialised arguments, the compiler's version and options, and the recorded numbers. A
check compiles the rows whose seal does not fit, and one twentieth of the others. The number of commits chooses the
twentieth, so twenty successive commits check every row, and find a forged seal. `--all` compiles every row. A check
prints how many rows it compiled, how many it took from the table, and why.

After a change of a kernel, `python -m tools.machine_code --write` compiles the rows that it concerns and rewrites them.

One rule is checked on the compiled code and not recorded. The tiles kernel passes a row's sums through the memory of
the log-sum-exp. A barrier must stand between the loads of these sums and the store of the result.

## How wide rows are visited

Rows of up to 32,768 classes stay in the registers of one program: each logit is read once and its gradient written
once. The limit is 16,384 classes with class_scale, with label smoothing beside class weights or a class_bias (which may
mask classes, so that smoothing is a vector), with class probabilities, for predictions, with a mixed target, or with
any two options other than class_bias, scale and margin. It is 8192 with two of the first three. Wider rows are read
twice if a gradient is computed. Either one program *loops* over a row, so that the second read, last tile first, finds
in L2 what the first one left there. Or rows are split into *parts* of 8192 classes with a program each, which a small
kernel merges in order before the gradient's programs start. The choice depends on the sizes alone, never on the device:
it takes the path with the shorter estimate for 132 multiprocessors that share 25 MB of L2. The number in each cell is
the traffic of this estimate, in units of the logits' own bytes. The floor is 2; at 3, nothing is left in L2 for the
second read.

## Small launches

A mean over class indices is three launches forward (the mean's coefficient, the rows, their sum) and two backward
(autograd's own upstream gradient of 1, and the scaling of the gradient that forward wrote). Rows write gradients that
are already divided, so the coefficient comes before them, and the sum after. Scaling reads the upstream gradient on the
device and touches no memory if it is 1: its programs, two per multiprocessor, are then soon gone. Otherwise each has
8192 elements in flight.

A linear head that keeps the logits' gradient is four launches each way (`tests/kernels/test_launch_counts.py`). The
first backward pass scales that gradient in place, by the same kernel, so an upstream gradient of 1 costs no pass over
features or gradients. A pass that may not overwrite it (`create_graph`, compiled code) scales its results this way.
float16 does too: its scaled logits' gradient might leave the range.
"""

_CODE = """
## Registers, instructions, widths

"Per logit" is (SASS instructions on the longest path through the kernel, with loops as often as they run) x threads /
logits of the program. Among the branches for the alignment of a class vector, the longest counts. Loads and stores are
counted by width in bits. No kernel uses a stack or spills.

The limits in the table are asserted: {one_tile:.0f} for cross-entropy and logit adjustment of rows that one program
keeps, {memory:.0f} for others. The second is what an H200 can execute while its memory moves a bfloat16 logit and its
gradient. The other rows are recorded without a limit. Some do more for each logit: class_scale and weights are loaded
for every column, predictions and probabilities add sums. Some pad: 21,841 classes fill 32,768 lanes. Some have too few
classes to share their scalar arithmetic.
"""

_LOSSES = """
## Losses of several experts

`expert_cross_entropy` has one program per sample, which visits the experts' rows one after another; a logit belongs to
one expert. Rows of up to 16,384 classes stay in its registers: each logit is read once and its gradient written once.
The limit is 8192 classes with class_scale, with smoothing beside class weights or a class_bias, with two kinds of bias,
or with two of smoothing, a mixed target and angular margins. The log prior is read once per sample and stays in
registers beside the row if the logits have 16 bits, are read 16 bytes at a time, and none of these options is used;
else each expert reads it again, from the cache. The ensemble is a second sweep over the sample's rows, out of the
cache.

The rows kernel takes wider rows, rows with more options, logits whose classes are not contiguous, and experts whose
rows are not the same distance apart. It visits one expert at a time: its second read finds one expert's rows in L2
where it would not find all experts'. Their ensemble is a read of its own, by the fusion's kernel. Few rows with very
many classes take this path too. Up to 8192 classes, the next expert's row is loaded while one is summed and written. A
launch then takes {ahead} experts at most, else {most}, and the ensemble of more is a read of its own.

Asserted: no stack, no spills, and 16-byte loads and stores wherever the rows of all experts begin at the same place
within 16 bytes. The last column is the predicted, unmeasured time of 4096 samples on an H200: the longer of bytes
(4.3e12 a second) and instructions (3.35e13 a second).
"""

_EXPERTS = """
## Logits of several experts

The fusion's kernel also makes the probabilities of the largest classes, and the log-sum-exp: a prediction is one launch
up to 8 classes and 16,384 logits of a row. `linear_topk` is a matrix product and the fusion of one expert for each
block: 3 launches where one block has all classes. The divergences' kernels multiply by a weight of each row, 0 where
its target is ignored, which one small kernel makes from the targets; RIDE is 7 launches forward and 4 backward with
autograd's own. `tests/kernels/test_launch_counts.py` holds these counts.

`expert_fusion` and `expert_divergence` hold the same columns of all experts at once; a logit belongs to one expert.
Asserted: no stack, no spills, and 16-byte loads wherever the rows of all experts begin at the same place within 16
bytes; outputs as long as the logits are then stored 16 bytes at a time. Rows of 8142 bfloat16 logits in [N, E, C]
(samples first) do not begin so, and get 4 bytes; nine experts leave a thread 8 bytes of each in bfloat16. The limit of
{read} is what an H200 can execute while its memory reads a bfloat16 logit. The divergences' forward pass exceeds it. It
has an exponential and a product for each logit, one exponential more for all experts' mean, and a selection for -inf.
"""

_TILED = """
## Tiles of linear heads

The tiled strategy of `linear_margin_cross_entropy` multiplies a block of rows with a block of classes, and does not
store this tile of logits. Tiles (rows x classes), warps and pipeline stages depend on the GPU, the dtype and D. Each
cell is one kernel compiled for one GPU: tile, warps, stages; registers; kilobytes of shared memory; tensor-core
instructions in the code (HMMA, HGMMA, UTCHMMA, v_mfma). The kernels of rows' and classes' scalars have warps and
registers alone. Asserted for all: no stack, no spills, shared memory within the GPU's (163, 227, 227 and 64 KB); for
16-bit numbers, tensor-core instructions. Products of float32 that may not be rounded to tf32 have none on NVIDIA's.
"""

_KEYS = """
## Contrastive keys

`partitioned_logsumexp` works in tiles (D <= 256; cells as above) and on blocks of similarities in memory (D > 256;
warps and registers). Each row compiles the most expensive variant: a partial last tile, with some keys excluded. "Per
logit" is (SASS instructions once round the sm_90 loop over the tiles in which no column is looked up) x threads /
logits of a tile. At D = 128, tensor cores take as long as 11 instructions for the product of a forward tile, and as 22
for both products of a backward tile. The limits are about a tenth above the loops' counts.
"""

_CONTRASTIVE = """
## Contrastive losses

`contrastive_loss` is a whole loss: the sums over keys (tiled_forward, or block_forward on similarities in memory), the
rows' losses and what backward needs of them (rows), their sum (result); then the gradients of queries and keys as
programs of one grid (gradients; both where the queries are the keys), and the sum of their splits (finish). SupCon is 6
launches with autograd's own. Cells and "per logit" are as above; the loop of "gradients" is that of the queries where
both sides have a gradient. SupCon's sweeps are held to 9.9 instructions for a logit forward with labels of int32, 10.5
with labels of int64 (whose comparison is one more), to 9.5 and 10.5 for the gradient of queries, and to 10.5 and 10.8
for that of keys. Their labels and terms are loaded straight to registers: no loop copies 4 bytes at a time to shared
memory, with Triton 3.6 either.
"""


def page(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables as Markdown."""
    import triton

    def lines(op: str) -> list[str]:
        return _lines(op, tables[op])

    losses, budgets = "expert_cross_entropy", {"one_tile": limits.ONE_TILE_BUDGET, "memory": limits.MEMORY_BUDGET}
    together = {"most": experts_launch.MOST_EXPERTS, "ahead": experts_launch.MOST_AHEAD}
    sections = [
        (_PATHS.format(triton=triton.__version__), _path_lines()),
        (_CODE.format(**budgets), lines("margin_cross_entropy")),
        (_LOSSES.format(**together), _with_prediction(lines(losses), tables[losses])),
        (_EXPERTS.format(read=limits.READ_BUDGET), [*lines("expert_fusion"), *lines("expert_divergence")[2:]]),
        (_TILED, _tile_lines("linear_margin_cross_entropy", tables, "linear, ", counted=False)),
        (_KEYS, _tile_lines("partitioned_logsumexp", tables, "keys, ", counted=True)),
        (_CONTRASTIVE, _tile_lines("contrastive_loss", tables, "contrastive, ", counted=True)),
    ]
    return "\n\n".join(f"{prose.strip()}\n\n" + "\n".join(lines) for prose, lines in sections) + "\n"


def _lines(op: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of kernels that all GPUs launch in the same way."""
    lines = [
        "| case | kernel | warps | registers sm_80 / 90 / 100 / gfx942 | per logit | loads | stores | shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sm90 = row["sm_90"]
        registers = " / ".join(str(row[target]["registers"]) for target in TARGETS)
        moved = (", ".join(f"{n}x{width}" for width, n in sm90[kind].items()) for kind in ("loads", "stores"))
        cells = [
            row["case"],
            _short(row["kernel"], op),
            row["num_warps"],
            registers,
            _per_logit(row),
            *moved,
            sm90["shared"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _with_prediction(lines: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines with one column more: microseconds for 4096 samples."""
    cells = [" predicted |", "---|"]
    for row in rows:
        e, c, dtype = re.search(r"E (\d+), C (\d+), (\w+)", row["case"]).groups()  # type: ignore[union-attr]
        logits = 4096 * int(e) * int(c)
        read_and_written = 2 * logits * getattr(torch, dtype).itemsize / BYTES_PER_SECOND
        cells.append(f" {max(read_and_written, logits * row['per_logit'] / INSTRUCTIONS_PER_SECOND) * 1e6:.0f} us |")
    return [line + cell for line, cell in zip(lines, cells, strict=True)]


def _tile_lines(op: str, tables: dict[str, list[dict[str, Any]]], prefix: str, counted: bool) -> list[str]:
    """Return a table of kernels that each GPU launches in its own way."""
    heads = ["case", "kernel", *(["per logit"] if counted else []), *TARGETS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in tables[op]:
        cells = [row["case"].removeprefix(prefix), _short(row["kernel"], op), *([_per_logit(row)] if counted else [])]
        lines.append(f"| {' | '.join([*cells, *(_tile_cell(row[target]) for target in TARGETS)])} |")
    return lines


def _per_logit(row: dict[str, Any]) -> str:
    return f"{row.get('per_logit', '-')}" + (f" (<= {row['budget']})" if "budget" in row else "")


def _short(kernel: str, op: str) -> str:
    """Return a kernel's name in the table of an operator."""
    return kernel.removesuffix("_kernel").removeprefix(f"{op}_")


def _tile_cell(code: dict[str, Any]) -> str:
    if "products" not in code:
        return f"{code['num_warps']} warps; {code['registers']}"
    tile = f"{code['BLOCK_N']}x{code['BLOCK_C']}, {code['num_warps']}, {code['num_stages']}"
    return f"{tile}; {code['registers']}; {code['shared'] / 1024:.0f}; {code['products']}"


def _path_lines() -> list[str]:
    """Return how the launch table visits rows, with the estimate that decides."""

    def cell(rows: int, classes: int, itemsize: int) -> str:
        launch, row_bytes = margin_launch.rows_launch(rows, classes, itemsize, True), classes * itemsize
        if launch.body == "tile":
            return f"one tile, {launch.num_warps} warps, 2.0"
        together = rows if launch.body == "parts" else MULTIPROCESSORS
        return f"{launch.body}, {launch.num_warps} warps, {margin_launch.traffic(together * row_bytes, True):.1f}"

    sizes = [(n, c) for c in (8142, 32768, 65536, 100_000, 1_000_000) for n in (64, 256, 4096)]
    cells = [f"| {n} x {c:,} | {cell(n, c, 2)} | {cell(n, c, 4)} |" for n, c in sizes]
    return ["| rows x classes | bfloat16 | float32 |", "|---|---|---|", *cells]
