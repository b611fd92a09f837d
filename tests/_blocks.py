"""Blocks of similarities for the native kernels of ``partitioned_logsumexp``, and the comparison with the reference."""

from __future__ import annotations

import math

import torch
from _arguments import converted
from _engines import DTYPES as ALL_DTYPES
from _engines import ENGINE
from torch import Tensor

from lt_kernels.ops.partitioned_logsumexp import native, reference
from lt_kernels.ops.partitioned_logsumexp.arguments import (
    N_TERMS,
    NEG_MASS,
    NUM_POS,
    POS_MASS,
    POS_SUM,
    Block,
)
from lt_kernels.testing import assert_within_budget

DTYPES = {name: ALL_DTYPES[name] for name in ("fp32", "bf16", "fp16", "fp64")}
STATISTICS = ("NEG_PEAK", "NEG_MASS", "POS_PEAK", "POS_MASS", "POS_SUM", "NUM_POS", "NEG_SLOPE", "POS_SLOPE")
#: Number of labels: all positive, every vector mixed, few positives, none.
CLASSES = {"all": 1, "dense": 3, "few": 300, "none": 0}
EXCLUDE = ("nothing", "self", "-1", "some")
LAYOUTS = ("one", "buffer", "any address")
NEEDS = ([True, False, False], [True, True, True], [False, True, False], [False, False, True])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return x as it is, with rows at multiples of 64 bytes, or at any address; the last two among NaN."""
    if layout == "one":
        return x.contiguous()
    rows, columns = x.shape
    before, stride = (0, -(-columns // 64) * 64 + 64) if layout == "buffer" else (3, columns + 5)
    room = x.new_full((rows * stride + before + 64,), math.nan)
    inside = room[before : before + rows * stride].view(rows, stride)[:, :columns]
    return inside.copy_(x)


def drawn(
    size: tuple[int, int],
    dtype: torch.dtype,
    classes: str = "few",
    exclude: str = "self",
    first: int = 0,
    options: str = "",
    layout: str = "one",
    seed: int = 0,
) -> Block:
    """Draw a block; options: "b"ias, with a value of -inf; key "s"cale; "l"earned scale."""
    rows, columns = size
    generator = torch.Generator().manual_seed(rows * 1000 + columns + seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def labels(count: int) -> Tensor:
        return torch.randint(max(CLASSES[classes], 1), (count,), generator=generator, dtype=torch.int32)

    query_label = labels(rows)
    # what lies beyond the block has a label that would count
    around = torch.full((columns + 40,), int(query_label[0]) if rows else 0, dtype=torch.int32)
    key_label = around[7 : 7 + columns]
    key_label.copy_(labels(columns) + (1000 if classes == "none" else 0))
    excluded = {
        "nothing": None,
        "self": torch.arange(rows, dtype=torch.int32) + first,
        "-1": torch.full((rows,), -1, dtype=torch.int32),
        "some": torch.randint(-2, first + columns + 3, (rows,), generator=generator, dtype=torch.int32),
    }[exclude]
    bias = (uniform(columns) * 4 - 2).to(compute) if "b" in options else None
    if bias is not None and columns > 3:
        bias[2] = -math.inf
    block = Block(
        laid_out((uniform(rows, columns) * 2 - 1).to(ENGINE.device, dtype), layout),
        query_label,
        key_label,
        excluded,
        first,
        bias,
        (uniform(columns) + 0.5).to(compute) if "s" in options else None,
        torch.tensor(1.3, dtype=compute) if "l" in options else None,
        1 / 0.07,
    )
    return Block(*(v.to(ENGINE.device) if isinstance(v, Tensor) else v for v in block))


def double(block: Block) -> Block:
    return converted(block, torch.float64)


def upstream(statistics: Tensor) -> Tensor:
    """Return terms of backward for upstream gradients of both signs."""
    terms = statistics[:N_TERMS].clone()
    rows = terms.shape[1]
    for row, low, high in ((NEG_MASS, -1.0, 2.0), (POS_MASS, 2.0, -1.0)):
        grad = torch.linspace(low, high, rows, dtype=terms.dtype, device=terms.device)
        terms[row] = torch.where(terms[row] == 0, 0.0, grad / terms[row])
    terms[POS_SUM] = torch.linspace(0.5, -0.7, rows, dtype=terms.dtype, device=terms.device)
    return terms


def gradients(kernels, block: Block, terms: Tensor, needs: list[bool], layout: str) -> dict[str, Tensor]:
    out = None
    if needs[0]:
        # in a buffer whose surroundings must stay NaN
        out = laid_out(torch.full_like(block.z, math.nan), layout)
        room = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    of_bias, of_scale = kernels.backward(block, terms, needs, out)
    assert (of_bias.shape, of_scale.shape) == tuple((block.z.shape[1] if need else 0,) for need in needs[1:])
    assert of_bias.dtype == of_scale.dtype == block.compute_dtype
    if out is not None:
        assert int((~room.isnan()).sum()) <= out.numel()
    found = {"dz": out, "sum of G": of_bias, "sum of G a z": of_scale}
    return {name: found[name] for name, need in zip(found, needs, strict=True) if need}


def check(block: Block, layout: str = "one") -> None:
    """Hold forward and backward to the error budget."""
    # rounding a logit of 30 changes its exponential by 8 roundings; eager's error in few rows is a matter of luck
    roundings = 16.0 if block.z.dtype == torch.float32 and block.z.shape[0] < 4 else None
    for with_slopes in (False, True):
        statistics = native.forward(block, with_slopes)
        eager, truth = reference.forward(block, with_slopes), reference.forward(double(block), with_slopes)
        assert (statistics.shape, statistics.dtype) == (eager.shape, eager.dtype)
        for row in range(len(statistics)):
            assert_within_budget(statistics[row], eager[row], truth[row], STATISTICS[row], roundings=roundings)
        assert torch.equal(statistics[NUM_POS], eager[NUM_POS])
    terms = upstream(eager)
    for needs in NEEDS:
        ours = gradients(native, block, terms, needs, layout)
        eager = gradients(reference, block, terms, needs, "one")
        truth = gradients(reference, double(block), terms.double(), needs, "one")
        for name, value in ours.items():
            assert_within_budget(value, eager[name], truth[name], f"{name}, needs {needs}", roundings=roundings)
