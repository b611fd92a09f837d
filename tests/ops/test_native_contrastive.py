"""The native kernels of a block of similarities: sizes, layouts, special values, threads, instruction sets.

What users see is in test_partitioned_logsumexp.py, for every backend.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from test_instruction_sets import ORDER, best, run
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
STATISTICS = ("NEG_PEAK", "NEG_MASS", "POS_PEAK", "POS_MASS", "POS_SUM", "NUM_POS", "NEG_SLOPE", "POS_SLOPE")
#: (rows, columns): vectors, groups, stretches and ranges that end early; rows that are split; none
SIZES = [(1, 1), (5, 7), (9, 130), (3, 1000), (12, 2048), (2, 8142), (70, 517), (3, 0), (0, 4), (0, 0)]
LARGE = [(3, 40_001), (1, 100_003)]
#: How many labels there are: all positive, every vector mixed, few positives, none.
CLASSES = {"all": 1, "dense": 3, "few": 300, "none": 0}
EXCLUDE = ("nothing", "self", "-1", "some")
LAYOUTS = ("one", "buffer", "any address")
NEEDS = ([True, False, False], [True, True, True], [False, True, False], [False, False, True])


@pytest.fixture(autouse=True)
def one_thread():
    """Waking threads takes longer than these sizes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x among NaN: as it comes, with rows at multiples of 64 bytes, or at any address."""
    if layout == "one":
        return x.contiguous()
    rows, columns = x.shape
    before, stride = (0, -(-columns // 64) * 64 + 64) if layout == "buffer" else (3, columns + 5)
    room = torch.full((rows * stride + before + 64,), math.nan, dtype=x.dtype)
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
    """options: "b"ias, one of it -inf; key "s"cale; "l"earned scale."""
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
    return Block(
        laid_out((uniform(rows, columns) * 2 - 1).to(dtype), layout),
        query_label,
        key_label,
        excluded,
        first,
        bias,
        (uniform(columns) + 0.5).to(compute) if "s" in options else None,
        torch.tensor(1.3, dtype=compute) if "l" in options else None,
        1 / 0.07,
    )


def double(block: Block) -> Block:
    """The same numbers in float64."""
    return Block(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in block))


def upstream(statistics: Tensor) -> Tensor:
    """Terms of backward for upstream gradients of both signs."""
    terms = statistics[:N_TERMS].clone()
    rows = terms.shape[1]
    for row, low, high in ((NEG_MASS, -1.0, 2.0), (POS_MASS, 2.0, -1.0)):
        grad = torch.linspace(low, high, rows, dtype=terms.dtype)
        terms[row] = torch.where(terms[row] == 0, 0.0, grad / terms[row])
    terms[POS_SUM] = torch.linspace(0.5, -0.7, rows, dtype=terms.dtype)
    return terms


def gradients(kernels, block: Block, terms: Tensor, needs: list[bool], layout: str) -> dict[str, Tensor]:
    out = None
    if needs[0]:
        # in a buffer whose surroundings must stay NaN
        out = laid_out(torch.full(block.z.shape, math.nan, dtype=block.z.dtype), layout)
        room = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    of_bias, of_scale = kernels.backward(block, terms, needs, out)
    assert (of_bias.shape, of_scale.shape) == tuple((block.z.shape[1] if need else 0,) for need in needs[1:])
    assert of_bias.dtype == of_scale.dtype == block.compute_dtype
    if out is not None:
        assert int((~room.isnan()).sum()) <= out.numel()
    found = {"dz": out, "sum of G": of_bias, "sum of G a z": of_scale}
    return {name: found[name] for name, need in zip(found, needs, strict=True) if need}


def check(block: Block, layout: str = "one") -> None:
    """Holds forward and backward to the error budget; the eager error of few numbers is a matter of luck."""
    # rounding a logit of 30 changes its exponential by 8 roundings
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


ALL = [(size, name, "few", "self", "", "one") for size in SIZES for name in DTYPES]
ALL += [(size, name, "few", "self", "bsl", "buffer") for size in SIZES for name in DTYPES]
ALL += [(size, name, "few", "some", "bs", "one") for size in LARGE for name in ("fp32", "bf16")]
ALL += [
    ((9, 1300), name, classes, exclude, options, "one")
    for name in ("fp32", "bf16")
    for classes, exclude, options in product(CLASSES, EXCLUDE, ("", "b", "sl"))
]
ALL += [
    ((7, columns), name, "dense", "some", "bsl", layout)
    for columns in (33, 257)
    for name in DTYPES
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("size", "dtype", "classes", "exclude", "options", "layout"), ALL)
def test_values(size, dtype, classes, exclude, options, layout):
    first = 5 if options == "bsl" else 0
    check(drawn(size, DTYPES[dtype], classes, exclude, first, options, layout), layout)


@pytest.mark.parametrize("classes", ["all", "none"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_values_of_long_sums(dtype, classes):
    """Many terms of about the same size, and many beside a large one."""
    block = drawn((2, 100_003), DTYPES[dtype], classes, "nothing")
    check(block._replace(scale=0.01))
    z = block.z.clone()
    z[:, 50_000] = 1.5
    check(block._replace(z=z))


@pytest.mark.parametrize("options", ["", "bsl"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_u_agree_to_the_last_bit(dtype, options):
    """In both directions: the exponential of a side's largest logit is 1."""
    for classes in ("few", "dense"):
        block = drawn((1, 3000), DTYPES[dtype], classes, "self", 0, options)
        statistics = native.forward(block, False)
        terms = statistics[:N_TERMS].clone()
        terms[[NEG_MASS, POS_MASS]], terms[POS_SUM] = 1.0, 0.0
        found = gradients(native, block, terms, [False, True, False], "one")["sum of G"]
        same = block.query_label == block.key_label
        assert found[~same].max() == found[same].max() == 1.0


def test_values_that_are_masked():
    """Columns of -inf on both sides; a side that has nothing else."""
    block = drawn((6, 300), torch.float32, "dense", "nothing", 0, "b")
    bias = block.key_bias.clone()
    bias[block.key_label == 1] = -math.inf
    check(block._replace(key_bias=bias))
    check(block._replace(key_bias=torch.full_like(bias, -math.inf)))


def test_what_is_left_out_is_not_looked_at():
    block = drawn((9, 300), torch.float32, "dense", "self", 0, "bs")
    z = block.z.clone()
    z.diagonal()[:] = math.nan
    ours, other = native.forward(block._replace(z=z), True), native.forward(block, True)
    assert torch.equal(ours, other)
    terms = upstream(ours)
    for needs in ([True, False, False], [True, True, False]):
        some = gradients(native, block._replace(z=z), terms, needs, "one")
        others = gradients(native, block, terms, needs, "one")
        for name in some:
            assert torch.equal(some[name], others[name])


@pytest.mark.parametrize("columns", [40, 40_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities(dtype, columns):
    for classes, options in product(("dense", "none", "all"), ("", "bs")):
        block = drawn((8, columns), DTYPES[dtype], classes, "self", 0, options)
        z = block.z.clone()
        z[1, 20] = math.nan
        z[2, columns - 3] = math.inf
        z[3, 17:20] = -math.inf
        z[4, :] = -math.inf
        z[5, ::3] = math.nan
        z[6, :] = math.nan
        block = block._replace(z=z)
        ours, expected = native.forward(block, True), reference.forward(block, True)
        tolerance = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(ours, expected, **tolerance)
        terms = upstream(expected)
        some = gradients(native, block, terms, [True, True, True], "one")
        others = gradients(reference, block, terms, [True, True, True], "one")
        rounding = 0.02 if dtype in ("bf16", "fp16") else 1e-4
        for name, value in some.items():
            torch.testing.assert_close(value, others[name], rtol=rounding, atol=rounding, equal_nan=True, msg=name)


# ----------------------------------------------------------------------------------------- threads and instruction sets


def everything(size: tuple[int, int], dtype: torch.dtype, kernels=native) -> list[Tensor]:
    results = []
    for classes, options in (("few", ""), ("dense", "bsl")):
        block = drawn(size, dtype, classes, "self", 0, options)
        results += [kernels.forward(block, False), kernels.forward(block, True)]
        terms = upstream(results[-1])
        for needs in NEEDS:
            results += gradients(kernels, block, terms, needs, "one").values()
    return results


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(2, 100_003), (31, 999), (200, 2500), (1, 20_000)], ids=str)
def test_same_bits_for_any_number_of_threads(size, dtype):
    alone = everything(size, DTYPES[dtype])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        together = everything(size, DTYPES[dtype])
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("capability", ORDER[:2])
def test_instruction_sets(capability):
    if ORDER.index(capability) > ORDER.index(best()):
        pytest.skip(f"this processor does not run {capability!r}")
    result = run(f"-m pytest -q -p no:cacheprovider {__file__} -k values", capability)
    assert result.returncode == 0, result.stdout
