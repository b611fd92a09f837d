"""The native kernels of a block of similarities: sizes, layouts, special values, threads, instruction sets.

What users see is in test_partitioned_logsumexp.py, for every backend.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from _blocks import CLASSES, DTYPES, EXCLUDE, LAYOUTS, NEEDS, check, drawn, gradients, upstream
from torch import Tensor

from lt_kernels.ops.partitioned_logsumexp import native, reference
from lt_kernels.ops.partitioned_logsumexp.arguments import N_TERMS, NEG_MASS, POS_MASS, POS_SUM

#: (rows, columns): vectors, groups, stretches and ranges that end early; rows that are split; none
SIZES = [(1, 1), (5, 7), (9, 130), (3, 1000), (12, 2048), (2, 8142), (70, 517), (3, 0), (0, 4), (0, 0)]
LARGE = [(3, 40_001), (1, 100_003)]


@pytest.fixture(autouse=True)
def one_thread():
    """Waking threads takes longer than these sizes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
