"""partitioned_logsumexp and supervised_contrastive on every backend, strategy, dtype and case, against float64."""

from __future__ import annotations

import math
from functools import partial

import _strategies
import pytest
import torch
import torch.nn.functional as F
from _cases.contrastive import CASES, vectors
from _engines import of_backends
from torch import Tensor

import lt_kernels
from lt_kernels import _checks, _settings
from lt_kernels.functional import partitioned_logsumexp, supervised_contrastive
from lt_kernels.ops._gemm.layout import LINE, padded
from lt_kernels.ops.partitioned_logsumexp import chunked, plan
from lt_kernels.testing import assert_within_budget, check_partitioned_logsumexp

STRATEGIES = ("materialize", "chunked")
SMALL = [case for case in CASES if case.rows * (case.rows if case.keys is None else case.keys) < 2**16]


@pytest.fixture
def small_blocks():
    with _strategies.small_blocks():
        yield


def gradients(result, *leaves: Tensor, upstream=(0.7, -1.3, 0.4)) -> list[Tensor]:
    total = sum((factor * value).sum() for factor, value in zip(upstream, result[:3], strict=True))
    return list(torch.autograd.grad(total, leaves, retain_graph=True))


# ------------------------------------------------------------------------------------------------- value and gradients


@pytest.mark.parametrize("strategy", [*STRATEGIES, *of_backends(triton=("tiled",))])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_every_gradient(case, strategy, dtype, backend, device):
    if strategy == "tiled" and (reason := plan.tiled_reason(case.width, dtype)):
        pytest.skip(reason)
    check_partitioned_logsumexp(partial(partitioned_logsumexp, strategy=strategy), case.sample(dtype, device))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_value_and_every_gradient_of_many_blocks(case, strategy, dtype, backend, device, small_blocks):
    check_partitioned_logsumexp(partial(partitioned_logsumexp, strategy=strategy), case.sample(dtype, device))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck(strategy, backend, small_blocks):
    query, key, ql, kl = vectors(5, 9, 3, torch.float64, classes=2)
    bias, key_scale = torch.linspace(-1, 1, 9, dtype=torch.float64), torch.linspace(0.5, 2, 9, dtype=torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64)
    exclude = torch.tensor([0, 8, -1, 3, 3])
    leaves = [query, key, *(t.requires_grad_() for t in (bias, key_scale, scale))]

    def call(query, key, bias, key_scale, scale):
        result = partitioned_logsumexp(
            query, key, ql, kl, scale=scale, key_bias=bias, key_scale=key_scale, exclude=exclude, strategy=strategy
        )
        return result[:3]

    def of_itself(query, scale):
        return partitioned_logsumexp(query, query, ql, scale=scale, exclude="self", strategy=strategy)[:3]

    assert all(bool(value.isfinite().all()) for value in call(*leaves))
    assert torch.autograd.gradcheck(call, leaves)
    ql = torch.tensor([0, 1, 0, 1, 0])
    assert torch.autograd.gradcheck(of_itself, (query, scale))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_query_that_is_the_key_has_both_gradients(strategy, backend, device):
    query, _, ql, _ = vectors(23, 1, 7, device=device)
    weight = torch.linspace(-1, 1, 23, device=device)
    one = partitioned_logsumexp(query, query, ql, scale=5.0, exclude="self", strategy=strategy)
    other = query.detach().clone().requires_grad_()
    two = partitioned_logsumexp(query, other, ql, scale=5.0, exclude="self", strategy=strategy)
    (of_one,) = torch.autograd.grad((weight * (one.neg - one.pos + one.pos_sum)).sum(), query)
    of_two = torch.autograd.grad((weight * (two.neg - two.pos + two.pos_sum)).sum(), (query, other))
    torch.testing.assert_close(of_one, of_two[0] + of_two[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_some_keys_learn(strategy, backend, device, small_blocks):
    query, key, ql, kl = vectors(20, 50, 6, device=device)
    of_all = gradients(partitioned_logsumexp(query, key, ql, kl, strategy=strategy), query, key)
    for begin, end in ((0, 50), (3, 4), (7, 41), (20, 20), (49, 50)):
        result = partitioned_logsumexp(query, key, ql, kl, key_grad_rows=(begin, end), strategy=strategy)
        of_query, of_key = gradients(result, query, key)
        expected = torch.zeros_like(key)
        expected[begin:end] = of_all[1][begin:end]
        torch.testing.assert_close(of_query, of_all[0], rtol=0, atol=0)
        torch.testing.assert_close(of_key, expected, rtol=1e-5, atol=1e-6)


def test_only_some_of_the_queries_learn_as_keys(backend, device):
    query, _, ql, _ = vectors(20, 1, 6, device=device)
    (whole,) = gradients(partitioned_logsumexp(query, query, ql, exclude="self"), query)
    (as_query,) = gradients(partitioned_logsumexp(query, query.detach(), ql, exclude="self"), query)
    (half,) = gradients(partitioned_logsumexp(query, query, ql, exclude="self", key_grad_rows=(0, 10)), query)
    expected = torch.cat([whole[:10], as_query[10:]])
    torch.testing.assert_close(half, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", range(1, 32))
def test_any_subset_of_gradients(needs, backend, device):
    query, key, ql, kl = vectors(9, 17, 5, device=device)
    bias, key_scale = torch.linspace(-1, 1, 17, device=device), torch.linspace(0.5, 2, 17, device=device)
    names = ("query", "key", "key_bias", "key_scale", "scale")
    leaves = dict(zip(names, (query, key, bias, key_scale, torch.tensor(2.0, device=device)), strict=True))

    def run(chosen):
        given = {name: leaf.detach().clone().requires_grad_(name in chosen) for name, leaf in leaves.items()}
        rest = {name: given[name] for name in names[2:]}
        result = partitioned_logsumexp(given["query"], given["key"], ql, kl, **rest)
        return dict(zip(chosen, gradients(result, *(given[name] for name in chosen)), strict=True))

    everything = run(names)
    chosen = [name for bit, name in enumerate(names) if needs & 1 << bit]
    for name, gradient in run(chosen).items():
        torch.testing.assert_close(gradient, everything[name], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing(n, m, strategy, backend, device):
    query, key, ql, kl = vectors(n, m, 4, device=device)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    bias = torch.zeros(m, device=device, requires_grad=True)
    result = partitioned_logsumexp(query, key, ql, kl, scale=scale, key_bias=bias, strategy=strategy)
    assert all(value.shape == (n,) for value in result)
    assert bool((result.neg == -math.inf).all())
    assert bool((result.num_pos == 0).all())
    for leaf, grad in zip((query, key, scale, bias), gradients(result, query, key, scale, bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_sides_without_keys_have_no_gradient(backend, device):
    query, key, _, _ = vectors(4, 6, 3, device=device)
    ones, twos = torch.ones(4, device=device).long(), torch.full((6,), 2, device=device)
    result = partitioned_logsumexp(query, key, ones, twos)
    assert bool((result.pos == -math.inf).all())
    assert bool((result.pos_sum == 0).all())
    only = torch.autograd.grad(result.neg.sum(), (query, key), retain_graph=True)
    both = torch.autograd.grad((result.neg + 3 * result.pos).sum(), (query, key))
    assert all(torch.equal(a, b) for a, b in zip(only, both, strict=True))
    result = partitioned_logsumexp(query, key, ones, torch.ones(6, device=device).long())
    assert bool((result.neg == -math.inf).all())
    assert bool((result.num_pos == 6).all())


def test_masked_keys_count_nowhere(backend, device):
    query, key, ql, kl = vectors(6, 8, 3, device=device)
    masked = torch.tensor([1, 5], device=device)
    bias = torch.zeros(8, device=device).index_fill(0, masked, -math.inf)
    labels = kl.index_fill(0, masked, -1)
    kept = torch.tensor([0, 2, 3, 4, 6, 7], device=device)
    result = partitioned_logsumexp(query, key, ql, labels, key_bias=bias)
    expected = partitioned_logsumexp(query, key[kept], ql, kl[kept])
    for value, other in zip(result, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(result.neg.sum() + result.pos_sum.sum(), key)
    assert bool((grad[masked] == 0).all())


def test_labels_are_of_any_integer_dtype(backend, device):
    query, key, ql, kl = vectors(6, 8, 3, device=device)
    expected = partitioned_logsumexp(query, key, ql, kl)
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.int8):
        result = partitioned_logsumexp(query, key, ql.to(dtype), kl)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_strides_do_not_matter(backend, device):
    query, key, ql, kl = vectors(6, 8, 4, device=device)
    wide = torch.full((8, 9), math.nan, device=device)
    wide[:, 1::2] = key.detach()
    result = partitioned_logsumexp(query.detach().t().contiguous().t(), wide[:, 1::2], ql, kl)
    expected = partitioned_logsumexp(query, key, ql, kl)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_nan_stays_in_its_row(backend, device):
    query, key, ql, kl = vectors(6, 8, 3, device=device)
    with torch.no_grad():
        query[2, 1] = math.nan
    result = partitioned_logsumexp(query, key, ql, kl)
    rows = torch.arange(6, device=device)
    for value in result[:2]:
        assert torch.equal(value.isnan(), rows == 2)


def test_a_classifier_is_a_case_of_it(backend, device):
    """Keys that are the classes' weights: cross-entropy is softplus(neg - pos)."""
    query, key, ql, _ = vectors(9, 5, 4, device=device)
    result = partitioned_logsumexp(query, key, ql, torch.arange(5, device=device), scale=4.0)
    loss = F.softplus(result.neg - result.pos).mean()
    expected = F.cross_entropy(4.0 * query @ key.t(), ql)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, (query, key)), torch.autograd.grad(expected, (query, key)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- scale and graph


def test_a_separate_scale_has_its_own_gradients(backend, device):
    query, key, ql, kl = vectors(9, 17, 5, device=device)
    scale = torch.tensor(3.0, device=device, requires_grad=True)
    together = partitioned_logsumexp(query, key, ql, kl, scale=scale)
    features, of_scale = partitioned_logsumexp(query, key, ql, kl, scale=scale, separate_scale=True)
    expected = gradients(together, query, key, scale)
    for a, b, c in zip(together, features, of_scale, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    loss = sum(f * v.sum() for f, v in zip((0.7, -1.3, 0.4), features[:3], strict=True))
    assert torch.autograd.grad(loss, scale, retain_graph=True, allow_unused=True) == (None,)
    for a, b in zip(torch.autograd.grad(loss, (query, key), retain_graph=True), expected[:2], strict=True):
        assert torch.equal(a, b)
    (grad,) = gradients(of_scale, scale)
    torch.testing.assert_close(grad, expected[2])
    with torch.no_grad():
        features, of_scale = partitioned_logsumexp(query, key, ql, kl, scale=scale, separate_scale=True)
    assert torch.equal(of_scale.neg, together.neg)


@pytest.mark.parametrize("through", ["scale", "separate scale"])
def test_second_derivatives_are_of_the_reference_alone(through, backend, device):
    query, key, ql, kl = vectors(4, 6, 3, device=device)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    separate = through == "separate scale"
    result = partitioned_logsumexp(query, key, ql, kl, scale=scale, separate_scale=separate)
    neg = result[1].neg if separate else result.neg
    (grad,) = torch.autograd.grad(neg.exp().sum(), scale, create_graph=True)
    if backend != "reference":
        with pytest.raises(NotImplementedError, match="differentiable once"):
            torch.autograd.grad(grad.sum(), scale)
        return
    products = (query @ key.T).detach()
    slopes = torch.where(ql[:, None] == kl, 0.0, products.square() * (scale.detach() * products).exp())
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), scale)[0], slopes.sum().to(scale.dtype))


@pytest.mark.parametrize("form", ["out", "in"])
def test_a_row_without_any_key_has_no_gradient(form, backend, device):
    query, _, ql, _ = vectors(1, 1, 5, device=device)
    temperature = torch.tensor(0.1, device=device, requires_grad=True)
    loss = supervised_contrastive(query, query, ql, temperature=temperature, form=form, exclude="self")
    assert loss == 0
    for grad in torch.autograd.grad(loss, (query, temperature)):
        assert bool((grad == 0).all())


def test_autocast_products_run_in_its_dtype(backend, device):
    query, key, ql, kl = vectors(9, 17, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = partitioned_logsumexp(query, key, ql, kl, scale=5.0)
    expected = partitioned_logsumexp(query.bfloat16(), key.bfloat16(), ql, kl, scale=5.0)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert all(value.dtype == torch.float32 for value in result)
    assert gradients(result, query)[0].dtype == torch.float32


def test_keys_of_a_wider_dtype(backend, device):
    query, key, ql, kl = vectors(9, 17, 8, device=device)
    result = partitioned_logsumexp(query.bfloat16(), key, ql, kl)
    expected = partitioned_logsumexp(query.bfloat16(), key.bfloat16(), ql, kl)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    with pytest.raises(TypeError, match=r"key: got dtype torch.float64, expected torch.float32 as query"):
        partitioned_logsumexp(query, key.double(), ql, kl)


# ------------------------------------------------------------------------------------------------------ registration


def test_an_excluded_key_beyond_all_excludes_nothing_where_values_are_not_read(backend, device, monkeypatch):
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    query, key, ql, kl = vectors(3, 6, 4, device=device)
    result = partitioned_logsumexp(query, key, ql, kl, exclude=torch.tensor([2**32, 6, -7], device=device))
    expected = partitioned_logsumexp(query, key, ql, kl)
    for value, other in zip(result, expected, strict=True):
        torch.testing.assert_close(value, other)


# ------------------------------------------------------------------------------------------------------------- memory


class LargestBuffer:
    """Bytes of the largest buffer of products."""

    def __init__(self, monkeypatch) -> None:
        self.bytes = 0
        plain = chunked.products.buffer

        def buffer(rows, columns, dtype, device):
            self.bytes = max(self.bytes, rows * padded(columns, dtype) * dtype.itemsize)
            return plain(rows, columns, dtype, device)

        monkeypatch.setattr(chunked.products, "buffer", buffer)


@pytest.mark.parametrize(("n", "m"), [(64, 100_000), (100_000, 64), (3000, 3000), (1, 3_000_000)])
@pytest.mark.parametrize("dtype_", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_are_bounded(n, m, dtype_, monkeypatch):
    largest = LargestBuffer(monkeypatch)
    query, key = torch.randn(n, 2, dtype=dtype_, requires_grad=True), torch.randn(m, 2, dtype=dtype_)
    result = partitioned_logsumexp(query, key, torch.arange(n), torch.arange(m), strategy="chunked")
    torch.autograd.grad(result.neg.sum(), query)
    assert 0 < largest.bytes <= plan._BLOCK_BYTES["cpu"]


@pytest.mark.parametrize("rows", [1, 7, 512, 100_000, 3_000_000])
@pytest.mark.parametrize("keys", [1, 10, 60, 16_384, 1_000_003])
@pytest.mark.parametrize("budget", [1, 1000, 2**20, 2**31])
def test_blocks_cover_everything_within_the_budget(rows, keys, budget):
    for dtype in (torch.float16, torch.float32, torch.float64):
        found = plan.blocks(rows, keys, dtype, "cpu", budget)
        assert 1 <= found.rows <= rows
        assert 1 <= found.keys <= keys
        size = found.rows * padded(found.keys, dtype) * dtype.itemsize
        assert size <= max(min(budget, plan._BLOCK_BYTES["cpu"]), LINE)


def test_auto_keeps_what_fits():
    def chosen(rows, keys, training=True, tiled=False, dtype=torch.float32, budget=2**31):
        return plan.choose(rows, keys, dtype, training, tiled, "auto", budget)

    assert chosen(512, 16_384) == "materialize"
    assert chosen(512, 16_384, training=False) == "chunked"
    assert chosen(4096, 65_536) == "chunked"
    assert chosen(512, 16_384, budget=2**20) == "chunked"
    assert chosen(512, 16_384, tiled=True, dtype=torch.bfloat16) == "tiled"


def test_a_strategy_asked_for_by_name_runs_or_raises(backend, device):
    query, key, ql, kl = vectors(4, 6, 300, device=device)
    with pytest.raises(lt_kernels.BackendUnavailableError, match=r"strategy 'tiled' cannot run partitioned_logsumexp"):
        partitioned_logsumexp(query, key, ql, kl, strategy="tiled")


# ----------------------------------------------------------------------------------------------- supervised_contrastive


def dense_contrastive(query, key, ql, kl, temperature, form, bias=None, exclude=None) -> Tensor:
    u = query @ key.t() / temperature
    biased = u if bias is None else u + bias
    kept = torch.ones_like(u, dtype=torch.bool)
    if exclude is not None:
        kept = torch.arange(len(kl), device=u.device) != exclude[:, None]
    same = (ql[:, None] == kl) & kept
    total = biased.masked_fill(~kept, -math.inf).logsumexp(1)
    count = same.sum(1).clamp_min(1).to(u.dtype)
    if form == "out":
        loss = total - (u * same).sum(1) / count
    else:
        loss = total - biased.masked_fill(~same, -3e4 if u.dtype == torch.float16 else -1e9).logsumexp(1) + count.log()
    return torch.where(same.any(1), loss, torch.zeros_like(loss))


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_supervised_contrastive(form, reduction, dtype, backend, device):
    def leaves(dtype):
        query, key, ql, kl = vectors(24, 40, 16, torch.float64, device, classes=9)
        ql[3] = 100  # no positive
        bias = torch.linspace(-1, 1, 40, dtype=torch.float64, device=device)
        given = [t.detach().to(dtype).requires_grad_() for t in (query, key, bias)]
        return given, ql, kl

    def run(dtype, function):
        (query, key, bias), ql, kl = leaves(dtype)
        loss = function(query, key, ql, kl, bias)
        weight = torch.linspace(0.5, 1, 24, device=device, dtype=loss.dtype) if reduction == "none" else 1.0
        return [loss, *torch.autograd.grad((loss * weight).sum(), (query, key, bias))]

    exclude = torch.arange(24, device=device)

    def dense(query, key, ql, kl, bias):
        loss = dense_contrastive(query, key, ql, kl, 0.2, form, bias, exclude)
        return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]

    def ours(query, key, ql, kl, bias):
        return supervised_contrastive(
            query, key, ql, kl, temperature=0.2, form=form, key_bias=bias, exclude="self", reduction=reduction
        )

    for name, actual, eager, truth in zip(
        ("loss", "query", "key", "bias"), run(dtype, ours), run(dtype, dense), run(torch.float64, dense), strict=True
    ):
        assert_within_budget(actual, eager, truth, name)


def test_rows_without_positives_are_zero_and_have_no_gradient(backend, device):
    query, key, _, _ = vectors(4, 6, 3, device=device)
    ql, kl = torch.arange(4, device=device), torch.full((6,), 9, device=device)
    for form in ("out", "in"):
        for labels in (kl, kl[:0]):
            loss = supervised_contrastive(query, key[: len(labels)], ql, labels, temperature=0.1, form=form)
            assert loss == 0
            grads = torch.autograd.grad(loss, (query, key))
            assert all(bool((grad == 0).all()) for grad in grads)


# ---------------------------------------------------------------------------------------------------------- bad input

Q, K, QL, KL = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3, 4])
META = torch.device("meta")
TABLE = {
    "query type": ({"query": [1.0]}, TypeError, r"query: got list, expected a Tensor"),
    "query dtype": ({"query": Q.long()}, TypeError, r"query: got dtype torch.int64, expected one of"),
    "query shape": ({"query": Q[0]}, ValueError, r"query: got shape \(4,\), expected \[N, D\]"),
    "no features": ({"query": Q[:, :0], "key": K[:, :0]}, ValueError, r"query: got shape \(3, 0\), expected at least"),
    "key type": ({"key": None}, TypeError, r"key: got NoneType, expected a Tensor"),
    "key shape": ({"key": K[:, :, None]}, ValueError, r"key: got shape \(5, 4, 1\), expected \[M, D\]"),
    "key width": ({"key": K[:, :3]}, ValueError, r"key: got 3 features \(shape \(5, 3\)\), expected 4 as query"),
    "key device": ({"key": K.to(META)}, ValueError, r"key: got device meta, expected cpu as query"),
    "key dtype": ({"key": K.double()}, TypeError, r"key: got dtype torch.float64, expected torch.float32 as query"),
    "label type": ({"query_label": [0, 1, 2]}, TypeError, r"query_label: got list, expected a Tensor \[3\]"),
    "label dtype": ({"query_label": QL.float()}, TypeError, r"query_label: got dtype torch.float32, expected an int"),
    "label bool": ({"key_label": KL > 1}, TypeError, r"key_label: got dtype torch.bool, expected an integer dtype"),
    "label length": ({"key_label": KL[:4]}, ValueError, r"key_label: got shape \(4,\), expected \[5\]"),
    "label shape": ({"query_label": QL[:, None]}, ValueError, r"query_label: got shape \(3, 1\), expected \[3\]"),
    "label device": ({"key_label": KL.to(META)}, ValueError, r"key_label: got device meta, expected cpu as query"),
    "label range": ({"key_label": KL + 2**31}, ValueError, r"key_label: got 2147483652, expected labels from"),
    "no key_label": ({"key_label": None}, ValueError, r"key_label: got None with 5 keys for 3 queries"),
    "scale type": ({"scale": "14"}, TypeError, r"scale: got str, expected a number"),
    "scale nan": ({"scale": math.nan}, ValueError, r"scale: got nan, expected a finite number"),
    "scale shape": ({"scale": torch.ones(1)}, ValueError, r"scale: got shape \(1,\), expected a number or a 0-dim"),
    "scale dtype": ({"scale": torch.tensor(1)}, TypeError, r"scale: got dtype torch.int64"),
    "scale device": ({"scale": torch.ones((), device=META)}, ValueError, r"scale: got device meta"),
    "bias type": ({"key_bias": [0.0] * 5}, TypeError, r"key_bias: got list, expected a Tensor"),
    "bias shape": ({"key_bias": torch.ones(4)}, ValueError, r"key_bias: got shape \(4,\), expected \[5\], one value"),
    "key_scale dtype": ({"key_scale": KL}, TypeError, r"key_scale: got dtype torch.int64, expected a floating"),
    "exclude type": ({"exclude": 3}, TypeError, r"exclude: got int, expected a Tensor \[3\]"),
    "exclude word": ({"exclude": "own"}, ValueError, r"exclude: got 'own', expected one of 'self'"),
    "exclude self": ({"exclude": "self", "key": K[:2], "key_label": KL[:2]}, ValueError, r"exclude: got 'self' with 2"),
    "exclude shape": ({"exclude": QL[:2]}, ValueError, r"exclude: got shape \(2,\), expected \[3\]"),
    "exclude dtype": ({"exclude": QL.float()}, TypeError, r"exclude: got dtype torch.float32, expected an integer"),
    "exclude high": ({"exclude": torch.tensor([0, 5, 1])}, IndexError, r"exclude: got 5 in row 1, expected .* 0 to 4"),
    "exclude low": ({"exclude": torch.tensor([0, 1, -2])}, IndexError, r"exclude: got -2 in row 2, expected"),
    "rows type": ({"key_grad_rows": 3}, TypeError, r"key_grad_rows: got 3, expected \(begin, end\)"),
    "rows of floats": ({"key_grad_rows": (0, 1.0)}, TypeError, r"key_grad_rows: got float, expected two ints"),
    "rows range": ({"key_grad_rows": (2, 6)}, ValueError, r"key_grad_rows: got \(2, 6\), expected 0 <= begin"),
    "normalized type": ({"normalized": 1}, TypeError, r"normalized: got int, expected a bool"),
    "separate": ({"separate_scale": True}, ValueError, r"separate_scale: got True with scale 1.0, expected a 0-dim"),
    "strategy": ({"strategy": "fast"}, ValueError, r"strategy: got 'fast', expected one of 'auto'"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name):
    changes, error, message = TABLE[name]
    given = {"query": Q, "key": K, "query_label": QL, "key_label": KL, **changes}
    with pytest.raises(error, match=message):
        partitioned_logsumexp(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, r"temperature: got 0.0, expected a number > 0"),
        ({"temperature": -1}, ValueError, r"temperature: got -1.0, expected a number > 0"),
        ({"temperature": "0.1"}, TypeError, r"temperature: got str, expected a number"),
        ({"form": "both"}, ValueError, r"form: got 'both', expected one of 'out', 'in'"),
        ({"reduction": "avg"}, ValueError, r"reduction: got 'avg', expected one of"),
    ],
)
def test_bad_input_of_supervised_contrastive(changes, error, message):
    with pytest.raises(error, match=message):
        supervised_contrastive(Q, K, QL, KL, **{"temperature": 0.1, **changes})


def test_a_broken_promise_is_found_with_checks_on(monkeypatch):
    query, key, ql, kl = vectors(4, 6, 8)
    monkeypatch.setattr(_settings, "checks", True)
    partitioned_logsumexp(query, key, ql, kl, normalized=True)
    partitioned_logsumexp(query.bfloat16(), key.bfloat16(), ql, kl, normalized=True)
    with pytest.raises(ValueError, match=r"key: got norm 1\.\d+ in row 0, expected at most 1 with normalized=True"):
        partitioned_logsumexp(query, 1.01 * key, ql, kl, normalized=True)
    with pytest.raises(ValueError, match=r"query: got norm nan in row 2"):
        partitioned_logsumexp(query.detach().index_fill(0, torch.tensor([2]), math.nan), key, ql, kl, normalized=True)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *of_backends(triton=("tiled",))])
@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("column", [0, 1], ids=["a positive", "a negative"])
def test_a_similarity_that_overflows_shows(column, form, strategy, backend, device):
    """In the losses of the queries that have it, and in their gradients: never as a loss of 0."""
    query, key, ql, kl = vectors(3, 6, 8, device=device)
    ql, kl = torch.tensor([0, 1, 2], device=device), torch.tensor([0, 1, 2, 0, 1, 2], device=device)
    bias = torch.zeros(6, device=device).index_fill_(0, torch.tensor([column], device=device), math.inf)
    sums = partitioned_logsumexp(query, key, ql, kl, scale=2.0, key_bias=bias, strategy=strategy)
    if form == "out":
        loss = torch.logaddexp(sums.neg, sums.pos) - sums.pos_sum / sums.num_pos
    else:
        loss = torch.logaddexp(sums.neg - sums.pos, torch.zeros_like(sums.pos)) + sums.num_pos.log()
    assert not loss.isfinite().any()
    for gradient in torch.autograd.grad(loss.sum(), (query, key)):
        assert gradient.isnan().any()
