"""``linear_topk`` against a dense float64 softmax: values, the order of ties, blocks of every shape, bad input."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lt_kernels
from lt_kernels import functional
from lt_kernels.functional import TopK, linear_topk
from lt_kernels.ops.linear_margin_cross_entropy import topk
from lt_kernels.testing import assert_within_budget

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def restored_budget():
    budget = lt_kernels._settings.memory_budget
    yield
    lt_kernels.set_memory_budget(budget)


def dense_logits(x: Tensor, w: Tensor, *, linear_bias=None, class_shift=None, scale=1.0, normalize=False) -> Tensor:
    if normalize:
        u = F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)) * scale
    else:
        u = F.linear(x, w, linear_bias) * scale
    return u if class_shift is None else u + class_shift


def doubled(options: dict) -> dict:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}


def dense_topk(u: Tensor, k: int) -> TopK:
    classes = u.sort(dim=-1, descending=True, stable=True)[1][..., :k]
    return TopK(classes, u.softmax(-1).gather(-1, classes), u.logsumexp(-1))


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: logits are exact in every dtype, and full of ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SIZES = {
    "small": (5, 7, 33),
    "one class": (3, 4, 1),
    "one row": (1, 8, 5000),
    "no rows": (0, 4, 40),
    "several groups": (6, 3, 1025),
    "many classes": (2, 2, 70_001),
}
#: The default; blocks of several rows and classes; the smallest blocks there are.
BUDGETS = {"one block": 2**31, "blocks": 4 * 10_000, "smallest blocks": 1}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("k", [1, 2, 7, 33])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_ties_go_to_the_lowest_class(size, budget, k, shifted, backend):
    n, d, c = size
    k = min(k, c)
    lt_kernels.set_memory_budget(max(budget, c // 8))  # at most some hundreds of blocks
    x, w, b = integers(n, d), integers(c, d, seed=1), integers(c, seed=2)
    options = {"linear_bias": b, **({"class_shift": integers(c, seed=3), "scale": 2.0} if shifted else {})}
    got = linear_topk(x, w, k, **options)
    expected = dense_topk(dense_logits(x.double(), w.double(), **doubled(options)), k)
    assert torch.equal(got.classes, expected.classes)
    assert got.classes.shape == got.confidence.shape == (n, k)
    assert got.lse.shape == (n,)
    torch.testing.assert_close(got.confidence, expected.confidence.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.lse, expected.lse.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["linear", "cosine"])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("budget", [2**31, 20_000], ids=["one block", "blocks"])
def test_probabilities_of_the_classes_found_are_within_the_error_budget(dtype, normalize, shifted, budget, backend):
    lt_kernels.set_memory_budget(budget)
    n, d, c, k = 9, 24, 700, 5
    x, w = normal(n, d, dtype=dtype), normal(c, d, seed=1, dtype=dtype) * 0.5
    options = {"normalize": True, "scale": 20.0} if normalize else {"linear_bias": normal(c, seed=2, dtype=dtype)}
    if shifted:
        options |= {"class_shift": normal(c, seed=3).float(), "scale": 16.0 if normalize else 1.5}
    got = linear_topk(x, w, k, **options)
    truth = dense_logits(x.double(), w.double(), **doubled(options))
    eager = dense_logits(x, w, **options)

    def at(u: Tensor) -> Tensor:
        return u.softmax(-1).gather(-1, got.classes)

    assert got.confidence.dtype == got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.classes.dtype == torch.int64
    # of half precision: roundings of the dtype that the logits were computed in
    roundings = None if dtype.itemsize > 2 else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_within_budget(got.confidence, at(eager), at(truth), "confidence", roundings=roundings)
    assert_within_budget(got.lse, eager.logsumexp(-1), truth.logsumexp(-1), "lse", roundings=roundings)
    assert bool((got.confidence.diff(dim=1) <= 0).all())
    if dtype.itemsize > 2:
        assert torch.equal(got.classes, dense_topk(truth, k).classes)


def test_one_sample(backend):
    x, w = normal(1, 6), normal(50, 6, seed=1)
    several, one = linear_topk(x, w, 3), linear_topk(x[0], w, 3)
    assert [tuple(value.shape) for value in one] == [(3,), (3,), ()]
    assert all(torch.equal(a[0], b) for a, b in zip(several, one, strict=True))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("budget", [2**31, 1], ids=["one block", "smallest blocks"])
class TestNotFinite:
    def test_masked_classes_come_last(self, k, budget, backend):
        lt_kernels.set_memory_budget(budget)
        x, w = normal(4, 6).float(), normal(200, 6, seed=1).float()
        shift = torch.zeros(200)
        shift[:199] = -INF
        classes, confidence, lse = linear_topk(x, w, k, class_shift=shift)
        assert classes.tolist() == [[199, 0, 1][:k]] * 4
        assert confidence.tolist() == [[1.0, 0.0, 0.0][:k]] * 4
        torch.testing.assert_close(lse, F.linear(x, w)[:, 199])

    def test_all_masked(self, k, budget, backend):
        lt_kernels.set_memory_budget(budget)
        classes, confidence, lse = linear_topk(
            torch.ones(2, 3), torch.ones(150, 3), k, class_shift=torch.full((150,), -INF)
        )
        assert classes.tolist() == [[0, 1, 2][:k]] * 2
        assert bool(confidence.isnan().all())
        assert lse.tolist() == [-INF, -INF]

    def test_nan_is_the_largest(self, k, budget, backend):
        lt_kernels.set_memory_budget(budget)
        x, w = torch.ones(2, 1), torch.arange(150.0)[:, None].repeat(1, 1)
        w[77] = NAN
        classes, confidence, lse = linear_topk(x, w, k)
        assert classes.tolist() == [[77, 149, 148][:k]] * 2
        assert bool(confidence.isnan().all())
        assert bool(lse.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_selection_of_special_values_is_that_of_a_stable_sort(dtype):
    special = torch.tensor([-INF, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.5, INF, NAN, -NAN], dtype=torch.float64)
    x = special[torch.randint(0, len(special), (50, 64), generator=torch.Generator().manual_seed(0))].to(dtype)
    places = x.double().sort(dim=1, descending=True, stable=True)[1]
    for k in (1, 2, 30, 64):
        values, found = topk._largest(x, k)
        assert torch.equal(found, places[:, :k])
        assert torch.equal(values.nan_to_num(7.0), x.gather(1, found).nan_to_num(7.0))


def test_the_buffer_is_bounded():
    for rows, classes, k, element, buffer in [
        (512, 8142, 1, 4, 2**26),
        (64, 10**6, 5, 6, 2**26),
        (10**6, 10**6, 100, 4, 2**26),
        (10**6, 50, 5, 4, 2**20),
        (300, 10**6, 5, 4, 10**6),
        (1, 10**6, 1, 4, 2**26),
    ]:
        block_rows, block, group = topk.blocks(rows, classes, k, element, buffer)
        assert block_rows * block * element <= buffer
        assert block % group == 0
        assert 1 <= block_rows <= rows
    assert topk.blocks(5, 1000, 1, 4, 1) == (1, topk.group_size(1, 1), topk.group_size(1, 1))


def test_memory_stays_below_the_buffer():
    x, w = torch.randn(256, 8), torch.randn(40_000, 8)
    lt_kernels.set_memory_budget(2**21)
    linear_topk(x, w, 5)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_topk(x, w, 5)
    allocated, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    assert 0 < peak < 3 * 2**21  # the logits are 40 MB


def test_strides_and_layouts(backend):
    x, w, b = normal(11, 2 * 6)[:, ::2], normal(6, 300, seed=1).t(), normal(600, seed=2)[::2]
    expected = linear_topk(x.contiguous(), w.contiguous(), 4, linear_bias=b.contiguous())
    got = linear_topk(x, w, 4, linear_bias=b)
    assert torch.equal(got.classes, expected.classes)
    torch.testing.assert_close(got.confidence, expected.confidence)


def test_the_same_bits_from_run_to_run(backend):
    x, w = normal(30, 16).float(), normal(5000, 16, seed=1).float()
    lt_kernels.set_memory_budget(2**17)
    first, second = linear_topk(x, w, 6), linear_topk(x, w, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_learned_scale_and_gradients_are_left_alone():
    x, w = normal(3, 4).float().requires_grad_(), torch.nn.Parameter(normal(9, 4, seed=1).float())
    scale = torch.nn.Parameter(torch.tensor(2.5))
    shift = torch.zeros(9, requires_grad=True)
    got = linear_topk(x, w, 2, scale=scale, class_shift=shift)
    assert not any(value.requires_grad for value in got)
    assert torch.equal(got.confidence, linear_topk(x, w, 2, scale=2.5).confidence)


def test_mixed_precision_and_autocast_compute_as_linear_does():
    x, w = normal(6, 32).bfloat16(), normal(200, 32, seed=1).float()
    narrow = linear_topk(x, w.bfloat16(), 3)
    assert torch.equal(linear_topk(x, w, 3).confidence, narrow.confidence)
    with torch.autocast("cpu", torch.bfloat16):
        for features in (x, x.float()):
            got = linear_topk(features, w, 3)
            assert torch.equal(got.classes, narrow.classes)
            assert torch.equal(got.confidence, narrow.confidence)
            logits = F.linear(features, w)
        torch.testing.assert_close(got.lse, logits.float().logsumexp(1), rtol=1e-3, atol=1e-3)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    x, w, shift = normal(5, 8).float(), normal(90, 8, seed=1).float(), normal(90, seed=2).float()

    def predict(x: Tensor) -> TopK:
        return linear_topk(x * 1.0, w, 3, class_shift=shift, scale=4.0, normalize=True)

    for got, expected in zip(torch.compile(predict, fullgraph=True, backend="aot_eager")(x), predict(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_shapes_without_data():
    with FakeTensorMode():
        got = linear_topk(torch.empty(512, 64, dtype=torch.bfloat16), torch.empty(10**6, 64), 5)
    assert [(tuple(v.shape), v.dtype) for v in got] == [
        ((512, 5), torch.int64), ((512, 5), torch.float32), ((512,), torch.float32),
    ]  # fmt: skip


X, W = torch.randn(3, 4), torch.randn(6, 4)
BAD = {
    "input": ({"input": [1.0]}, TypeError, r"input: got list, expected a Tensor"),
    "input dtype": ({"input": X.long()}, TypeError, r"input: got dtype torch.int64"),
    "input shape": ({"input": X[0, 0]}, ValueError, r"input: got a 0-dim tensor, expected features \[..., D\]"),
    "weight": ({"linear_weight": None}, TypeError, r"linear_weight: got NoneType, expected a Tensor"),
    "weight shape": ({"linear_weight": W[None]}, ValueError, r"linear_weight: got shape \(1, 6, 4\), expected"),
    "weight width": ({"linear_weight": W[:, :3]}, ValueError, r"linear_weight: got 3 features"),
    "weight dtype": ({"linear_weight": W.double()}, TypeError, r"linear_weight: got dtype torch.float64"),
    "weight device": ({"linear_weight": W.to("meta")}, ValueError, r"linear_weight: got device meta"),
    "no classes": ({"linear_weight": W[:0]}, ValueError, r"linear_weight: got shape \(0, 4\), expected at least one"),
    "k type": ({"k": 1.0}, TypeError, r"k: got float, expected an int"),
    "k bool": ({"k": True}, TypeError, r"k: got bool, expected an int"),
    "k zero": ({"k": 0}, ValueError, r"k: got 0, expected 1 to 6"),
    "k large": ({"k": 7}, ValueError, r"k: got 7, expected 1 to 6, the number of classes"),
    "bias shape": ({"linear_bias": torch.ones(5)}, ValueError, r"linear_bias: got shape \(5,\), expected \(6,\)"),
    "bias of cosines": ({"linear_bias": torch.ones(6), "normalize": True}, ValueError, r"linear_bias: got a tensor"),
    "shift type": ({"class_shift": [0.0] * 6}, TypeError, r"class_shift: got list, expected a Tensor"),
    "shift shape": ({"class_shift": torch.ones(5)}, ValueError, r"class_shift: got shape \(5,\), expected \[6\]"),
    "shift dtype": ({"class_shift": torch.ones(6).long()}, TypeError, r"class_shift: got dtype torch.int64"),
    "shift device": ({"class_shift": torch.ones(6, device="meta")}, ValueError, r"class_shift: got device meta"),
    "scale type": ({"scale": "30"}, TypeError, r"scale: got str, expected a number"),
    "scale nan": ({"scale": NAN}, ValueError, r"scale: got nan, expected a finite number"),
    "scale shape": ({"scale": torch.ones(6)}, ValueError, r"scale: got shape \(6,\), expected a number or a 0-dim"),
    "normalize": ({"normalize": 1}, TypeError, r"normalize: got int, expected a bool"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        linear_topk(**{"input": X, "linear_weight": W, **changed})


def test_example():
    finder = doctest.DocTestFinder()
    names = {**vars(functional), "torch": torch}
    (example,) = [t for t in finder.find(linear_topk, "linear_topk", globs=names) if t.examples]
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
