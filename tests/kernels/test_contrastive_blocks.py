"""The CUDA kernels of a block of similarities; sizes that the CPU's kernels have in common are in tests/ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from _blocks import DTYPES, NEEDS, check, drawn, gradients, upstream
from _orders import check_same_bits_in_any_order
from torch import Tensor

from lt_kernels.ops.partitioned_logsumexp import native, reference

pytestmark = pytest.mark.backends("native")

#: (rows, columns): blocks of 32, 128 and 256 threads; a few columns besides whole groups; rows split over blocks, the
#: last one short; chunks of 32 rows.
SIZES = [(2, 511), (3, 1029), (1, 8192), (2, 8203), (3, 20_001), (32, 40), (33, 70), (100, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shapes(size, dtype):
    check(drawn(size, DTYPES[dtype], "dense", "some", 0, "", "buffer"), "buffer")
    check(drawn(size, DTYPES[dtype], "few", "self", 4, "bsl", "one"))


@pytest.mark.parametrize("before", range(8))
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_rows_and_keys_at_any_address(dtype, before):
    """Aligned rows with keys that are not, and the reverse; z aligned and its gradient not."""
    for columns in (24, 45):
        block = drawn((5, columns), DTYPES[dtype], "dense", "some", 0, "bsl")

        def moved(x: Tensor, by: int = before) -> Tensor:
            room = x.new_full((x.numel() + 16,), 0 if x.dtype == torch.int32 else math.nan)
            return room[by : by + x.numel()].view(x.shape).copy_(x)

        keys = {name: moved(getattr(block, name)) for name in ("key_label", "key_bias", "key_scale")}
        for layout in ("one", "buffer", "any address"):
            check(block._replace(**keys), layout)
        check(block._replace(z=moved(block.z)), "buffer")


def test_terms_of_some_rows():
    block = drawn((40, 300), torch.float32, "dense", "self", 0, "b")
    terms = upstream(reference.forward(block, False))
    wide = terms.new_full((5, 100), math.nan)
    wide[:, 30:70] = terms
    for given in (wide[:, 30:70], terms.t().contiguous().t()):
        for needs in NEEDS:
            ours = gradients(native, block, given, needs, "one")
            expected = gradients(native, block, terms, needs, "one")
            assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_same_bits_in_any_order_of_threads():
    def everything() -> Iterator[Tensor]:
        sizes, dtypes = ((1, 9001), (3, 1029), (70, 200), (4, 33)), (torch.float32, torch.bfloat16)
        for size, dtype, layout in product(sizes, dtypes, ("buffer", "any address")):
            block = drawn(size, dtype, "dense", "self", 0, "bsl", layout)
            statistics = native.forward(block, True)
            yield from (native.forward(block, False), statistics)
            for needs in NEEDS:
                yield from gradients(native, block, upstream(statistics), needs, layout).values()

    check_same_bits_in_any_order(everything)
