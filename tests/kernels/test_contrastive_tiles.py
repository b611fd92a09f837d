"""The Triton kernels of the partitioned log-sum-exp: blocks of similarities, and tiles of queries and keys.

The truth is the reference in float64, on similarities in memory; eager is the same in the queries' dtype.
"""

from __future__ import annotations

import math

import _forced_launches as forced
import pytest
import torch
from _arguments import converted
from _engines import ENGINE
from _layouts import MATRICES, guarded, surroundings_are_nan, window
from torch import Tensor

from lt_kernels.ops.partitioned_logsumexp import arguments as contract
from lt_kernels.ops.partitioned_logsumexp import reference
from lt_kernels.ops.partitioned_logsumexp import triton as backend
from lt_kernels.ops.partitioned_logsumexp.arguments import Arguments, Block
from lt_kernels.ops.partitioned_logsumexp.triton.launch import bounds_exponents, is_symmetric
from lt_kernels.testing import assert_within_budget

pytestmark = pytest.mark.backends("triton")

STATISTICS = ("neg_peak", "neg_mass", "pos_peak", "pos_mass", "pos_sum", "num_pos", "neg_slope", "pos_slope")
OPTIONS = {
    "plain": (),
    "self": ("self",),
    "none left out": ("nothing",),
    "random": ("random", "learned_scale"),
    "key_bias": ("random", "key_bias"),
    "masked keys": ("self", "masked", "key_scale"),
    "all": ("random", "key_bias", "key_scale", "learned_scale"),
}
#: Labels by number of classes: all positive, few, no positive.
LABELS = {"all positive": 1, "few": 7, "no positive": 0}
CASES = [
    *((option, "few") for option in OPTIONS),
    *((option, labels) for option in ("self", "all") for labels in ("all positive", "no positive")),
]


def placed(x: Tensor) -> Tensor:
    return guarded(x.to(ENGINE.device))


class Sample:
    """Vectors of one call, every tensor surrounded by NaN."""

    def __init__(
        self, n: int, m: int, options: tuple[str, ...], classes: int, scale: float, first: int = 0, seed: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.m, self.options, self.scale = n, m, options, scale
        top = max(classes, 1)
        self.query_label = placed(self.integers(0, top, n))
        self.key_label = placed(self.integers(0, top, m) if classes else torch.full((m,), top, dtype=torch.int32))
        self.exclude = None
        if "self" in options:
            self.exclude = placed(first + torch.arange(n, dtype=torch.int32))
        elif "nothing" in options:
            self.exclude = placed(torch.full((n,), -1, dtype=torch.int32))
        elif "random" in options:
            self.exclude = placed(self.integers(-1, first + m + 3, n))
        self.key_bias = self.key_scale = self.learned_scale = None
        if "key_bias" in options or "masked" in options:
            self.key_bias = placed(self.uniform(m).log())
        if "masked" in options:
            self.key_bias[: m // 2] = -math.inf
            self.key_bias[self.key_label == 1] = -math.inf
        if "key_scale" in options:
            self.key_scale = placed(self.uniform(m) * 2 - 0.5)
        if "learned_scale" in options:
            self.learned_scale = torch.tensor(0.8, device=ENGINE.device)

    def integers(self, low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=self.generator, dtype=torch.int32)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(ENGINE.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(ENGINE.device)


def terms_of(statistics: Tensor, upstream: Tensor) -> Tensor:
    """Return backward's terms for forward's statistics and gradients [3, n] of (neg, pos, pos_sum)."""
    s, g = statistics[:5].clone(), upstream.to(statistics.dtype)
    for row, grad in ((contract.NEG_MASS, g[0]), (contract.POS_MASS, g[1])):
        s[row] = torch.where(s[row] == 0, 0.0, grad / s[row])
    s[contract.POS_SUM] = g[2]
    return s


def logs(statistics: Tensor) -> Tensor:
    """Return neg and pos."""
    masses, peaks = statistics[[1, 3]], statistics[[0, 2]]
    return torch.where(masses == 0, -math.inf, peaks + masses.log())


def check_statistics(actual: Tensor, eager: Tensor, truth: Tensor, roundings: float | None = None) -> None:
    """Compare logarithms and means, which do not depend on the peaks."""
    assert actual.dtype == torch.float32
    assert actual.shape == truth.shape
    assert_within_budget(logs(actual), logs(eager), logs(truth), "log-sum-exp", roundings=roundings)
    for row in (contract.POS_SUM, contract.NUM_POS):
        assert_within_budget(actual[row], eager[row], truth[row], STATISTICS[row], roundings=roundings)
    for peak, mass in ((contract.NEG_PEAK, contract.NEG_MASS), (contract.POS_PEAK, contract.POS_MASS)):
        assert torch.equal(actual[mass] == 0, truth[mass] == 0)
        assert bool((actual[peak][truth[mass] == 0] == 0).all())
    for slope, mass in ((contract.NEG_SLOPE, contract.NEG_MASS), (contract.POS_SLOPE, contract.POS_MASS)):
        if len(truth) > slope:
            assert bool((actual[slope][truth[mass] == 0] == 0).all())
            means = (torch.where(s[mass] == 0, 0.0, s[slope] / s[mass]) for s in (actual, eager, truth))
            assert_within_budget(*means, STATISTICS[slope], roundings=16.0)


# --- blocks ----------------------------------------------------------------------------------------------------------


def check_block(
    z: Tensor, sample: Sample, first: int = 0, with_slopes: bool = True, needs: tuple[bool, ...] = (True, True, True),
    roundings: float | None = None, out: Tensor | None = None,
) -> None:  # fmt: skip
    n, m = z.shape
    block = Block(
        z, sample.query_label, sample.key_label, sample.exclude, first, sample.key_bias, sample.key_scale,
        sample.learned_scale, sample.scale,
    )  # fmt: skip
    wide = converted(block, torch.float64)
    truth = reference.forward(wide, with_slopes)
    check_statistics(backend.forward(block, with_slopes), reference.forward(block, with_slopes), truth)
    terms = terms_of(truth, sample.normal(3, n))
    outs = [torch.empty(n, m, dtype=dtype, device=z.device) for dtype in (torch.float64, z.dtype)]
    out = window(torch.full_like(z, math.nan)) if out is None else out
    results = [
        module.backward(each, t, list(needs), o if needs[0] else None)
        for module, each, t, o in (
            (reference, wide, terms, outs[0]),
            (reference, block, terms.float(), outs[1]),
            (backend, block, placed(terms.float()), out),
        )
    ]
    if needs[0]:
        assert_within_budget(out, outs[1], outs[0], "dz", roundings=roundings)
        assert surroundings_are_nan(out), "wrote outside of dz"
    for need, name, exact, eager, actual in zip(needs[1:], ("sums", "sums of z"), *results, strict=True):
        if need:
            assert actual.dtype == torch.float32
            assert_within_budget(actual, eager, exact, name, roundings=16.0)
        else:
            assert actual.shape == (0,)


@pytest.fixture(params=["one split", "splits"])
def splits(request, monkeypatch):
    forced.splits(monkeypatch, "partitioned_logsumexp", 2 if request.param == "splits" else None)


@pytest.mark.usefixtures("splits")
class TestBlocks:
    @pytest.mark.parametrize(("option", "labels"), CASES)
    def test_statistics_and_gradients(self, option, labels):
        sample = Sample(6, 261, OPTIONS[option], LABELS[labels], 2.0, first=5)
        check_block(window(sample.normal(6, 261)), sample, first=5)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 300), (13, 1), (5, 3), (3, 1100)])
    def test_shapes(self, shape):
        for dtype in (torch.float32, torch.bfloat16):
            sample = Sample(*shape, OPTIONS["all"], 3, 1.5)
            check_block(window(sample.normal(*shape).to(dtype)), sample, roundings=4.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, dtype):
        sample = Sample(9, 530, OPTIONS["all"], 3, 1.5)
        check_block(window(sample.normal(9, 530).to(dtype)), sample, roundings=4.0)

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
    def test_one_gradient_at_a_time(self, needs):
        sample = Sample(9, 130, OPTIONS["all"], 3, 1.5)
        check_block(window(sample.normal(9, 130)), sample, with_slopes=False, needs=needs)


def test_an_aligned_block_in_a_larger_buffer():
    """The chunked strategy has such blocks, and their gradient in a buffer of its own."""
    for m in (96, 88, 90):
        sample = Sample(6, m, OPTIONS["all"], 3, 1.5, first=32)
        room, out = (torch.full((8, 128), math.nan, device=ENGINE.device)[1:7, 32 : 32 + m] for _ in range(2))
        room.copy_(sample.normal(6, m))
        check_block(room, sample, first=32, out=out)


def test_huge_logits():
    for scale in (500.0, -500.0):
        sample = Sample(7, 140, OPTIONS["self"], 3, scale)
        check_block(sample.normal(7, 140), sample)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_blocks(shape):
    sample = Sample(*shape, ("key_bias", "key_scale"), 3, 1.5)
    check_block(sample.normal(*shape), sample)


# --- tiles -----------------------------------------------------------------------------------------------------------


def arguments(
    sample: Sample, width: int, dtype: torch.dtype = torch.float32, normalized: bool = False, alone: bool = False,
    begin: int = 0, end: int | None = None,
) -> Arguments:  # fmt: skip
    """alone: the queries are the keys."""
    query, key = sample.normal(sample.n, width), sample.normal(sample.m, width)
    if normalized:
        query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
    return Arguments(
        query=window(query.to(dtype)),
        key=None if alone else window(key.to(dtype)),
        query_label=sample.query_label,
        key_label=sample.query_label if alone else sample.key_label,
        exclude=sample.exclude,
        key_bias=sample.key_bias,
        key_scale=sample.key_scale,
        learned_scale=sample.learned_scale,
        scale=sample.scale,
        key_grad_begin=begin,
        key_grad_end=sample.m if end is None else end,
        normalized=normalized,
    )


def block_of(a: Arguments, dtype: torch.dtype) -> Block:
    a = converted(a, dtype)
    return Block(
        a.query @ a.keys.t(), a.query_label, a.key_label, a.exclude, 0, a.key_bias, a.key_scale, a.learned_scale,
        a.scale,
    )  # fmt: skip


def dense_backward(a: Arguments, terms: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Compute gradients from similarities in memory."""
    block = block_of(a, dtype)
    dz = torch.empty_like(block.z)
    sums = reference.backward(block, terms.to(dtype), [True] * 3, dz)
    grad_query, grad_key = dz @ a.keys.to(dtype), dz.t() @ a.query.to(dtype)
    grad_key[: a.key_grad_begin] = 0
    grad_key[a.key_grad_end :] = 0
    if a.key is None:
        grad_query = grad_query + grad_key
    return [grad_query, grad_key, *sums]


def check(
    a: Arguments, with_slopes: bool = True, needs: tuple[bool, ...] | None = None, roundings: float = 16.0
) -> None:
    truth, eager = (reference.forward(block_of(a, dtype), with_slopes) for dtype in (torch.float64, torch.float32))
    statistics = backend.tiled_forward(a, with_slopes)
    check_statistics(statistics, eager, truth, roundings)
    upstream = torch.randn(3, a.query.shape[0], generator=torch.Generator().manual_seed(5)).to(ENGINE.device)
    exact, plain = (
        dense_backward(a, terms_of(s, upstream), dtype) for s, dtype in ((truth, torch.float64), (eager, torch.float32))
    )
    if needs is None:
        needs = (True, a.key is not None, a.key_bias is not None, a.key_scale is not None)
    grads = backend.tiled_backward(a, placed(terms_of(statistics, upstream)), list(needs))
    for name, need, actual, e, t in zip(contract.DIFFERENTIABLE[:-1], needs, grads, plain, exact, strict=True):
        if need:
            assert actual.dtype == (a.query.dtype if name in ("query", "key") else torch.float32)
            assert_within_budget(actual, e, t, f"gradient of {name}", roundings=roundings)
        else:
            assert actual.shape == (0,)


@pytest.fixture(params=["one split", "splits"])
def small_tiles(request, monkeypatch):
    forced.contrastive_tiles(monkeypatch, 16, 16, 2 if request.param == "splits" else 1000)


@pytest.mark.usefixtures("small_tiles")
class TestSmallTiles:
    @pytest.mark.parametrize(("option", "labels"), CASES)
    def test_statistics_and_gradients(self, option, labels):
        check(arguments(Sample(20, 35, OPTIONS[option], LABELS[labels], 1.5), 17))

    @pytest.mark.parametrize("option", ["plain", "self", "random"])
    @pytest.mark.parametrize("scale", [14.0, 30.0, -14.0, 31.0])
    def test_bounded_logits(self, option, scale):
        a = arguments(Sample(20, 32, OPTIONS[option], 4, scale), 17, normalized=True)
        assert bounds_exponents(a) == (abs(scale) <= 30 and a.learned_scale is None)
        check(a)

    @pytest.mark.parametrize("normalized", [False, True])
    @pytest.mark.parametrize("option", OPTIONS)
    def test_the_queries_are_the_keys(self, option, normalized):
        a = arguments(Sample(21, 21, OPTIONS[option], 5, 2.0), 17, normalized=normalized, alone=True)
        assert is_symmetric(a) == (a.key_bias is None and a.key_scale is None)
        check(a)

    def test_the_queries_are_the_keys_under_other_labels(self):
        sample = Sample(20, 20, ("self",), 5, 2.0)
        a = arguments(sample, 17, alone=True)._replace(key_label=sample.key_label)
        assert not is_symmetric(a)
        check(a)
        check(arguments(sample, 17, alone=True, begin=3, end=19))

    @pytest.mark.parametrize("begin_end", [(0, 50), (7, 33), (16, 48), (5, 5), (50, 50), (0, 1)])
    def test_keys_that_receive_a_gradient(self, begin_end):
        begin, end = begin_end
        check(arguments(Sample(17, 50, OPTIONS["all"], 4, 1.5), 17, begin=begin, end=end))

    @pytest.mark.parametrize("position", range(4))
    def test_one_gradient_at_a_time(self, position):
        a = arguments(Sample(20, 35, OPTIONS["all"], 4, 1.5), 17, begin=3, end=30)
        check(a, with_slopes=False, needs=tuple(i == position for i in range(4)))

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 16), (21, 1, 3), (16, 16, 16)])
    def test_shapes(self, shape):
        n, m, d = shape
        for option in ("self", "all"):
            check(arguments(Sample(n, m, OPTIONS[option], 2, 1.5), d))
        check(arguments(Sample(n, n, OPTIONS["self"], 2, 1.5), d, alone=True))

    def test_huge_logits(self):
        """Rounding a logit of 1500 moves its exponential by 1000 roundings, in every implementation its own way."""
        for scale in (100.0, -100.0):
            check(arguments(Sample(20, 35, OPTIONS["self"], 4, scale), 17), roundings=1000.0)
            check(arguments(Sample(20, 20, OPTIONS["self"], 4, scale), 17, alone=True), roundings=1000.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, dtype):
        for normalized, alone in ((False, False), (True, False), (True, True)):
            sample = Sample(20, 20, OPTIONS["self"], 4, 4.0)
            a = arguments(sample, 17, dtype, normalized=normalized, alone=alone)
            check(a, roundings=8.0 if dtype == torch.float16 else 4.0)

    def test_the_same_bits_every_time(self):
        def run() -> list[Tensor]:
            sample = Sample(20, 50, OPTIONS["all"], 4, 1.5)
            a = arguments(sample, 17)
            statistics = backend.tiled_forward(a, True)
            return [statistics, *backend.tiled_backward(a, terms_of(statistics, sample.normal(3, 20)), [True] * 4)]

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)

    def test_nan_stays_in_its_rows(self):
        for normalized in (False, True):
            a = arguments(Sample(20, 35, OPTIONS["self"], 3, 2.0), 17, normalized=normalized)
            a.query[3, 5] = math.nan
            statistics = backend.tiled_forward(a, True)
            bad, keys = (torch.arange(count, device=ENGINE.device) == 3 for count in (20, 35))
            assert torch.equal(logs(statistics).isnan().all(0), bad)
            assert torch.equal(logs(statistics).isnan().any(0), bad)
            upstream = torch.ones(3, 20, device=ENGINE.device)
            grads = backend.tiled_backward(a, terms_of(statistics, upstream), [True, True, False, False])
            assert torch.equal(grads[0].isnan().all(1), bad)
            assert torch.equal(grads[0].isnan().any(1), bad)
            assert torch.equal(grads[1].isnan().all(1), ~keys)  # row 3 excludes key 3


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("shape", [(37, 129, 17), (130, 70, 100)])
def test_shipped_tiles(shape, normalized):
    n, m, d = shape
    check(arguments(Sample(n, m, OPTIONS["self"], 9, 14.0), d, normalized=normalized))
    check(arguments(Sample(n, n, OPTIONS["self"], 9, 14.0), d, normalized=normalized, alone=True))


@pytest.mark.parametrize("itself", [False, True])
def test_small_gradients_of_float16_keep_their_digits(itself, monkeypatch):
    """A mean over many queries and keys has gradients this small; the scale must be applied before rounding."""
    forced.contrastive_tiles(monkeypatch, 32, 32)
    sample = Sample(16, 16 if itself else 64, (), 3, 1 / 0.07)
    a = arguments(sample, 16, torch.float16, normalized=True, alone=itself)
    terms = terms_of(backend.tiled_forward(a, False), torch.full((3, 16), 2e-6, device=ENGINE.device))
    terms[4] = 0.0
    needs = [True, not itself, False, False]
    actual = backend.tiled_backward(a, terms, needs)
    plain, exact = (dense_backward(a, terms, dtype) for dtype in (torch.float16, torch.float64))
    for name, need, value, eager, truth in zip(("query", "key"), needs, actual, plain, exact, strict=False):
        if need:
            # in float32: the budget of float16 would allow everything subnormal
            assert_within_budget(value.float(), eager, truth, f"gradient of {name}")


@pytest.mark.parametrize("layout", MATRICES)
def test_layouts(layout, monkeypatch):
    forced.contrastive_tiles(monkeypatch, 16, 16)
    a = arguments(Sample(17, 20, OPTIONS["self"], 4, 1.5), 16)
    check(a._replace(query=MATRICES[layout](a.query), key=MATRICES[layout](a.key)))


@pytest.mark.parametrize("shape", [(0, 20), (20, 0), (0, 0)])
def test_nothing(shape):
    for alone in (False, True):
        n, m = (min(shape), min(shape)) if alone else shape
        a = arguments(Sample(n, m, OPTIONS["self"], 4, 1.5), 16, alone=alone)
        statistics = backend.tiled_forward(a, True)
        assert torch.equal(statistics, statistics.new_zeros(8, n))
        grads = backend.tiled_backward(a, statistics[:5], [True] * 4)
        shapes = [(n, 16), (0,) if alone else (m, 16), (m,), (m,)]
        for grad, expected in zip(grads, shapes, strict=True):
            assert torch.equal(grad, grad.new_zeros(expected))
