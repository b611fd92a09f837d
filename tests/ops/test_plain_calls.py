"""Plain calls on the CPU (csrc/common/plain.h): which calls take them, and that nothing else can tell.

The other tests call public functions, and so take plain calls where they can. Here the same calls go both ways.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.nn.functional as F
from _cases import experts as expert_cases
from _cases import rows as row_cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import expert_cross_entropy, margin_cross_entropy, supervised_contrastive
from lt_kernels.losses import BalPoELoss, LogitAdjustmentLoss, SupConLoss
from lt_kernels.ops import _backend
from lt_kernels.testing import Sample, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether each call so far was a plain one."""
    found: list[bool] = []
    original = _backend._plain_function

    def watched(op: str) -> Callable[..., Tensor | None]:
        function = original(op)
        assert function is not None

        def call(*arguments: Any) -> Tensor | None:
            loss = function(*arguments)
            found.append(loss is not None)
            return loss

        return call

    monkeypatch.setattr(_backend, "_plain_function", watched)
    return found


@contextmanager
def no_plain_calls() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "_plain_function", lambda op: None)
        yield


def results_of(function: Callable[..., Tensor], sample: Sample, upstream: float = 0.7) -> list[Tensor]:
    """The loss, and the gradients of all leaves."""
    arguments = {"logits" if function is expert_cross_entropy else "input": sample.input, "target": sample.target}
    leaves = [
        value
        for value in (*arguments.values(), *sample.options.values())
        if isinstance(value, Tensor) and value.requires_grad
    ]
    loss = function(**arguments, **sample.options)
    grads = torch.autograd.grad((loss * upstream).sum(), leaves, allow_unused=True)
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


def one_path_each(function: Callable[..., Tensor], sample: Sample, taken: list[bool]) -> bool:
    """Compare the results of both ways, bit by bit; return whether the first call was a plain one."""
    del taken[:]
    plain = results_of(function, sample)
    was_plain = taken[0]
    with no_plain_calls():
        ordinary = results_of(function, sample)
    assert len(plain) == len(ordinary)
    for one, other in zip(plain, ordinary, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))
    return was_plain


@pytest.mark.parametrize("policy", ["auto", "one_pass", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", row_cases.CASES, ids=lambda case: case.id)
def test_rows_have_the_same_bits_both_ways(case, reduction, policy, taken, monkeypatch):
    monkeypatch.setattr(_settings, "gradient_policy", policy)
    for dtype in DTYPES[:1] if case.classes > 2000 else DTYPES:
        sample = case.sample(dtype, "cpu", reduction=reduction)
        assert one_path_each(margin_cross_entropy, sample, taken)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("expert_reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", expert_cases.CASES, ids=lambda case: case.id)
def test_experts_have_the_same_bits_both_ways(case, reduction, expert_reduction, taken):
    for dtype in DTYPES[:1] if case.classes > 2000 else DTYPES:
        sample = case.sample(dtype, "cpu", reduction=reduction, expert_reduction=expert_reduction)
        prior, taus, bias = map(sample.options.get, ("log_prior", "taus", "class_bias"))
        per_expert = isinstance(taus, Tensor) or (bias is not None and bias.dim() == 2)
        learned = prior is not None and prior.requires_grad
        plain = "none" not in (reduction, expert_reduction) and not per_expert and not learned
        assert one_path_each(expert_cross_entropy, sample, taken) is plain


def test_experts_in_a_list_have_the_same_bits_both_ways(taken):
    sample = expert_cases.BY_ID["balpoe"].sample(torch.float32, "cpu")

    def of_list(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return expert_cross_entropy([each.clone() for each in logits.unbind(0)], target, **options)

    def of_two_that_learn(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        first, *others = logits.unbind(0)
        return expert_cross_entropy((first.detach(), *others), target, **options)

    for function in (of_list, of_two_that_learn):
        loss = function(sample.input, sample.target, **sample.options)
        (plain,) = torch.autograd.grad(loss, sample.input)
        with no_plain_calls():
            ordinary_loss = function(sample.input, sample.target, **sample.options)
            (ordinary,) = torch.autograd.grad(ordinary_loss, sample.input)
        assert torch.equal(loss, ordinary_loss)
        assert torch.equal(plain, ordinary)
    assert taken == [True, True]


def check_the_long_way(function: Callable[..., Tensor], arguments: dict[str, Any], taken: list[bool]) -> None:
    """Hold that the call is no plain one, and that it is as without them: its result, or its error."""

    def outcome() -> str | Tensor:
        try:
            return function(**arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    found = outcome()
    assert True not in taken
    with no_plain_calls():
        expected = outcome()
    assert found == expected if isinstance(found, str) else torch.equal(found.nan_to_num(), expected.nan_to_num())


# ------------------------------------------------------------------------------------------------ pairs of vectors


def vectors(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 19) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=1).to(dtype).requires_grad_()


def labels(rows: int, seed: int = 0) -> Tensor:
    drawn = torch.randint(0, 9, (rows,), generator=torch.Generator().manual_seed(seed))
    drawn[0] = 77  # without positives
    return drawn


def pairs_in(dtype: torch.dtype, form: str, kind: str) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors that learn, and the arguments of a call."""
    q, y = vectors(41, dtype), labels(41)
    given: dict[str, Any] = {"query": q, "key": q, "query_label": y, "temperature": 0.2, "form": form}
    if kind == "batch against itself":
        return [q], given | {"exclude": "self"}
    if kind == "batch with every key":
        return [q], given | {"key_label": y.clone(), "key_bias": torch.linspace(-1, 0.5, 41)}
    if kind == "some keys learn":
        return [q], given | {"key_grad_rows": (3, 30), "exclude": "self"}
    if kind == "no key learns":
        key = vectors(41, dtype, seed=1)
        return [q, key], given | {"key": key, "key_grad_rows": (7, 7)}
    key = vectors(67, dtype, seed=1).detach().requires_grad_(kind != "queue")
    bias = torch.linspace(-1, 1, 67).index_fill(0, torch.tensor([5]), -math.inf)
    own = torch.arange(41).sub(1).to(torch.int32)
    given |= {"key": key, "key_label": labels(67, seed=2).to(torch.int16), "key_bias": bias, "exclude": own}
    if kind == "queue beside a batch":
        given |= {"key_grad_rows": (10, 51)}
    return [q] if kind == "queue" else [q, key], given


KINDS = [
    "batch against itself",
    "batch with every key",
    "some keys learn",
    "no key learns",
    "keys",
    "queue",
    "queue beside a batch",
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "mean_positives"])
@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_within_the_budget_both_ways(kind, form, reduction, taken):
    for dtype in DTYPES:

        def results(dtype: torch.dtype = dtype) -> list[Tensor]:
            leaves, arguments = pairs_in(dtype, form, kind)
            if dtype == torch.float64:  # the truth of what the vectors in the narrower dtype say
                narrow, _ = pairs_in(here, form, kind)
                for leaf, same in zip(leaves, narrow, strict=True):
                    leaf.data.copy_(same.detach())
            loss = supervised_contrastive(**arguments, reduction=reduction)
            weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
            return [loss.detach(), *torch.autograd.grad((weights * loss).sum(), leaves)]

        here = dtype
        del taken[:]
        plain = results()
        assert taken == [True]
        with no_plain_calls():
            ordinary = results()
        with lt_kernels.use_backend("reference"):
            eager, truth = results(), results(torch.float64)
        for name, *values in zip(("loss", "query", "key"), plain, ordinary, eager, truth, strict=False):
            one, other, theirs, exact = values
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert_within_budget(one, theirs, exact, f"{dtype} {name}")


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": torch.tensor(0.2)},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"form": "both"},
        {"reduction": "average"},
        {"empty_mean": "one"},
        {"ignore_index": 3},
        {"normalized": 1},
        {"exclude": "own"},
        {"exclude": torch.full((41,), 41)},
        {"exclude": torch.full((41,), -2)},
        {"exclude": torch.arange(40)},
        {"key_grad_rows": (3, 42)},
        {"key_grad_rows": (3, 2)},
        {"key_grad_rows": 3},
        {"key_bias": torch.zeros(40)},
        {"key_bias": torch.zeros(41, requires_grad=True)},
        {"query_label": labels(41) + 2**40},
        {"query_label": labels(40)},
        {"query_label": labels(41).float()},
        {"key": vectors(40)},
        {"key": vectors(41, width=18)},
        {"key": vectors(41, torch.bfloat16)},
        {"key": vectors(41).tolist()},
        {"query": vectors(0), "key": vectors(0), "query_label": labels(1)[:0]},
        {"query": vectors(41)[0]},
    ],
    ids=lambda change: ", ".join(f"{name} {str(value)[:20]}" for name, value in change.items()),
)
def test_pairs_that_are_refused_or_unusual_are_no_plain_call(change, taken):
    q = vectors(41)
    arguments = {"query": q, "key": q, "query_label": labels(41), "temperature": 0.2, **change}
    check_the_long_way(supervised_contrastive, arguments, taken)


def test_similarities_beyond_a_block_and_under_autocast_go_the_long_way(taken):
    q = vectors(1500)
    supervised_contrastive(q, q, labels(1500), temperature=0.2)
    q = vectors(41)
    with torch.autocast("cpu", torch.bfloat16):
        supervised_contrastive(q, q, labels(41), temperature=0.2)
    assert True not in taken
    lt_kernels.set_memory_budget(1000)
    try:
        supervised_contrastive(q, q, labels(41), temperature=0.2)
    finally:
        lt_kernels.set_memory_budget(2 * 2**30)
    assert True not in taken


def test_vectors_that_are_not_finite_show_in_their_rows():
    q = vectors(41).detach()
    q[3] = math.nan
    q[4] = math.inf
    q.requires_grad_()
    for form in ("out", "in"):
        loss = supervised_contrastive(q, q, labels(41), temperature=0.2, form=form, reduction="none", exclude="self")
        with no_plain_calls():
            ordinary = supervised_contrastive(
                q, q, labels(41), temperature=0.2, form=form, reduction="none", exclude="self"
            )
        assert torch.equal(loss.isnan(), ordinary.isnan())


# ------------------------------------------------------------------------------------------------------ who is let in


X = torch.linspace(-3, 3, 24).reshape(4, 6)
Y = torch.tensor([0, 5, 2, -100])
BIAS = torch.linspace(-1, 0, 6)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def checks() -> Iterator[None]:
    lt_kernels.set_checks(True)
    try:
        yield
    finally:
        lt_kernels.set_checks(False)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def call(x: Tensor = X) -> Tensor:
    return margin_cross_entropy(x, Y, class_bias=BIAS)


def call_experts(x: Tensor = X) -> Tensor:
    return expert_cross_entropy(torch.stack([x, 2 * x]), Y, log_prior=BIAS, taus=(0.5, 1.5))


def call_pairs(x: Tensor = X) -> Tensor:
    return supervised_contrastive(x, x, torch.tensor([3, 4, 3, 3]), temperature=0.7, exclude="self")


@pytest.mark.parametrize("function", [call, call_experts, call_pairs])
@pytest.mark.parametrize(
    ("context", "plain"),
    [
        (nullcontext, True),
        (torch.no_grad, True),
        (torch.inference_mode, False),
        (autocast, True),
        (lambda: lt_kernels.use_backend("native"), True),
        (torch.autograd.set_detect_anomaly, True),
        (Seen, False),
        (Functions, False),
        (lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), False),
        (forward_ad.dual_level, False),
        (checks, False),
    ],
)
def test_plain_calls_are_taken_where_nothing_else_takes_part(function, context, plain, taken):
    expected = function(X)
    assert taken == [True]
    with context() if context is not torch.autograd.set_detect_anomaly else context(True):
        loss = function(X)
    if function is call_pairs:  # autocast chooses the dtype of their products; checks look at norms alone
        plain = context is checks or (plain and context is not autocast)
        torch.testing.assert_close(loss, expected, rtol=1e-2 if context is autocast else 1e-6, atol=0)
    else:
        assert torch.equal(loss, expected)
    assert taken[1:] in (([True],) if plain else ([False], []))


@pytest.mark.parametrize("function", [call, call_experts, call_pairs])
def test_other_backends_modes_and_transforms_go_the_long_way(function, taken):
    expected = function(X)
    del taken[:]
    with lt_kernels.use_backend("reference"):
        torch.testing.assert_close(function(X), expected)
        torch.testing.assert_close(torch.func.grad(function)(X), torch.autograd.functional.jacobian(function, X))
        with forward_ad.dual_level():
            dual = function(forward_ad.make_dual(X, torch.ones_like(X)))
            assert forward_ad.unpack_dual(dual).tangent is not None
    torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(X), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert function(mode.from_tensor(X)).shape == ()
    assert True not in taken
    with Seen() as seen:
        function(X)
    assert any("lt_kernels" in name and "_fwd" in name for name in seen.names)  # a mode sees the operator


@pytest.mark.parametrize("function", [call, call_experts, call_pairs])
def test_modes_see_the_operator_of_the_backward_pass_too(function):
    x = X.clone().requires_grad_()
    loss = function(x)
    with Seen() as seen:
        (watched,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert any("lt_kernels" in name and "_bwd" in name for name in seen.names)
    (plain,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(watched, plain)


@pytest.mark.parametrize("function", [call, call_experts, call_pairs])
def test_backward_passes_of_a_plain_function(function):
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x), x)
    loss = function(x)
    grads = [torch.autograd.grad(loss, x, torch.tensor(factor), retain_graph=True)[0] for factor in (1.0, 2.0, 1.0)]
    for grad, factor in zip(grads, (1, 2, 1), strict=True):
        torch.testing.assert_close(grad, factor * expected)  # none of them is the memory of another
    with pytest.raises(NotImplementedError, match="is_grads_batched=True"):
        torch.autograd.grad(loss, x, torch.ones(3), is_grads_batched=True, retain_graph=True)
    (once,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(once.detach(), expected)
    with pytest.raises(NotImplementedError, match="reference"):
        once.sum().backward()
    (function(x) + function(x)).backward()
    torch.testing.assert_close(x.grad, 2 * expected)
    loss = function(x)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def call_of(kind: str, x: Tensor, y: Tensor, share: Tensor, vector: Tensor) -> Tensor:
    if kind == "pairs":
        return supervised_contrastive(x, x, y, temperature=0.7, key_bias=vector[:4], exclude=y)
    options = {"class_bias": vector, "mix_lambda": share, "mixed_target": y}
    if kind == "rows":
        return margin_cross_entropy(x, y, **options)
    if kind == "rows that learn":
        return margin_cross_entropy(x, y, scale=torch.tensor(2.0, requires_grad=True), **options)
    return expert_cross_entropy([x, 2 * x], y, **options)


@pytest.mark.parametrize("changed", ["x", "y", "share", "vector"])
@pytest.mark.parametrize("kind", ["rows", "rows that learn", "experts", "pairs"])
def test_what_backward_needs_must_not_be_changed(kind, changed, taken):
    """Checked for float64, whose vectors are not converted; the labels of pairs are copies of their own."""
    given = {
        "x": X.double().requires_grad_() * 1,
        "y": torch.tensor([3, 0, 2, 1]),
        "share": torch.full((4,), 0.3, dtype=torch.float64),
        "vector": BIAS.double(),
    }
    loss = call_of(kind, **given)
    assert taken == [True]
    with torch.no_grad():
        given[changed].mul_(1)
    kept = kind == "pairs" and changed in ("y", "share")
    with nullcontext() if kept else pytest.raises(RuntimeError, match="in ?place"):
        loss.backward()


@pytest.mark.parametrize("function", [call, call_experts, call_pairs])
def test_upstream_gradients_without_memory_or_lazily_negated(function):
    for upstream in (torch._efficientzerotensor(()), torch._neg_view(torch.tensor(-0.7)), torch.ones(1).expand(1)[0]):
        x = X.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(x), x, upstream)
        (expected,) = torch.autograd.grad(function(x), x, upstream.resolve_neg() + torch.zeros(()))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function", [call, call_experts, call_pairs])
def test_autocast_around_backward_changes_nothing(function):
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x), x)
    loss = function(x)
    with autocast():
        (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("function", [call, call_experts, call_pairs])
def test_compiled_autograd_takes_plain_functions(function, taken):
    weight = torch.eye(6).requires_grad_()
    (expected,) = torch.autograd.grad(function(X @ weight), weight)
    loss = function(X @ weight)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward(retain_graph=True)
        loss.backward()
    assert taken == [True, True]
    torch.testing.assert_close(weight.grad, 2 * expected)


class Named(torch.Tensor):
    """A subclass that changes nothing."""


def test_subclasses_and_parameters(taken):
    expected = call(X)
    parameter = torch.nn.Parameter(X.clone())
    assert torch.equal(call(parameter).detach(), expected)
    assert taken == [True, True]
    loss = call(X.as_subclass(Named))
    assert torch.equal(loss.as_subclass(Tensor), expected)
    assert taken == [True, True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"input": X.tolist()},
        {"input": X.long()},
        {"input": torch.tensor(1.0)},
        {"input": torch.zeros(0, 6), "target": Y[:0]},
        {"target": Y[:3]},
        {"target": Y.bool()},
        {"target": Y.tolist()},
        {"class_bias": BIAS[:5]},
        {"class_bias": BIAS.long()},
        {"class_bias": BIAS.tolist()},
        {"class_bias": BIAS.to("meta")},
        {"weight": torch.ones(6, requires_grad=True)},
        {"margin": math.inf},
        {"margin": "0.5"},
        {"margin": 4.0, "margin_type": "angular"},
        {"scale": math.nan},
        {"scale": torch.ones(6)},
        {"scale": True},
        {"margin_type": "neither"},
        {"ignore_index": 2**64},
        {"ignore_index": -100.0},
        {"reduction": "average"},
        {"reduction": None},
        {"empty_mean": "one"},
        {"label_smoothing": 1.5},
        {"label_smoothing": -0.1},
        {"masked_classes": 1},
        {"mixed_target": Y},
        {"mix_lambda": 0.5},
        {"mixed_target": Y, "mix_lambda": 1.5},
        {"mixed_target": Y, "mix_lambda": torch.ones(3)},
        {"target": X.softmax(1), "margin": 0.5},
        {"target": X.softmax(1), "ignore_index": 3},
        {"target": X.softmax(1), "mixed_target": Y, "mix_lambda": 0.5},
        {"return_lse": 1},
        {"return_prediction": None},
    ],
    ids=lambda change: ", ".join(f"{name} {str(value)[:20]}" for name, value in change.items()),
)
def test_what_is_refused_or_unusual_is_no_plain_call(change, taken):
    """The long way says what is wrong, or takes it."""
    arguments = {"input": X, "target": Y, **change}
    check_the_long_way(margin_cross_entropy, arguments, taken)


def test_class_indices_out_of_range_are_named_by_both_ways():
    target = torch.tensor([0, 6, 1, 1])
    for function in (margin_cross_entropy, lambda x, y: expert_cross_entropy(x.expand(2, 4, 6), y)):
        messages = []
        for context in (nullcontext, no_plain_calls):
            with context(), pytest.raises(IndexError, match="target: row 1 has class 6") as refusal:
                function(X, target)
            messages.append(str(refusal.value).splitlines()[0])
        assert messages[0] == messages[1]


# ---------------------------------------------------------------------------------------------------- what they read


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages that must not be touched")
def test_kernels_read_and_write_nothing_beyond_their_tensors():
    """In a process of its own, which a stray access ends."""
    program = Path(__file__).parents[1] / "_guarded.py"
    finished = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout[-500:] + finished.stderr[-3000:]


# ------------------------------------------------------------------------------------------------------ what they cost


def python_calls(step: Callable[[], object]) -> int:
    for _ in range(3):
        step()
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def test_plain_calls_do_little_in_python():
    """Forward and backward: what a small call costs is counted in calls of Python, which no noisy machine changes."""
    x, experts = X.clone().requires_grad_(), torch.stack([X, X, X]).requires_grad_()
    module, balpoe = LogitAdjustmentLoss([6, 5, 4, 3, 2, 1]), BalPoELoss([6, 5, 4, 3, 2, 1])
    supcon, features = SupConLoss(), vectors(6, width=4).detach().view(3, 2, 4).requires_grad_()
    eager = python_calls(lambda: F.cross_entropy(x + BIAS, Y).backward())
    for most, step in (
        (4, lambda: margin_cross_entropy(x, Y, class_bias=BIAS).backward()),
        (24, lambda: module(x, Y).backward()),
        (28, lambda: balpoe(experts, Y).backward()),
        (60, lambda: supcon(features, torch.tensor([0, 1, 0])).backward()),
    ):
        assert python_calls(step) - eager <= most


def test_profilers_see_plain_calls():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(X)
        call_experts(X)
    names = {event.key for event in profile.key_averages()}
    assert {"lt_kernels::margin_cross_entropy", "lt_kernels::expert_cross_entropy"} <= names
