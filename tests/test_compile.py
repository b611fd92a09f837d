"""Traced code: torch.compile, whose graphs are counted, torch.export, and tensors without memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from _loss_cases import CASES, CONTRASTIVE, COUNTS, make_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lt_kernels import ClassQueue, ExpertHead, FeatureQueue, LinearHead, losses
from lt_kernels import functional as LF
from lt_kernels.mixing import mixup

SINGLE = make_batch().to(torch.float32)
X, Y, EXPERTS, Z, KEY = SINGLE.logits, SINGLE.target, SINGLE.experts, SINGLE.embeddings, SINGLE.key
MIXED = Y.flip(0)
PRIOR = torch.tensor(COUNTS).float().softmax(0).log()
W = F.normalize(torch.linspace(-1, 1, len(COUNTS) * Z.shape[1]).sin().reshape(len(COUNTS), -1), dim=1)
HEADS = torch.stack([W, W.flip(0), -W])


def each_loss() -> Any:
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES)


#: Traces the backward pass too. What is traced a second time, with other options, takes the cheaper "eager".
FIRST = "aot_eager"


class Graphs:
    """A compiled function, and how many graphs were made for it."""

    def __init__(self, function: Callable[..., Any], backend: str = FIRST, **options: Any) -> None:
        torch._dynamo.reset()
        self._counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        self.call = torch.compile(function, fullgraph=True, backend=self._counter, **options)

    @property
    def number(self) -> int:
        return self._counter.frame_count


# -------------------------------------------------------------------------------------------------------------- numbers

#: A function of the tensor that is differentiated and of a number in (0, 1), by name.
NUMBERS: dict[str, Callable[[Tensor, float], Any]] = {
    "scale": lambda x, v: LF.margin_cross_entropy(x, Y, scale=v),
    "margin": lambda x, v: LF.margin_cross_entropy(x, Y, margin=v),
    "angular margin": lambda x, v: LF.margin_cross_entropy(x, Y, margin=v, margin_type="angular", scale=30.0),
    "label_smoothing": lambda x, v: LF.margin_cross_entropy(x, Y, label_smoothing=v),
    "mix_lambda": lambda x, v: LF.margin_cross_entropy(x, Y, mixed_target=MIXED, mix_lambda=v),
    "all of them": lambda x, v: LF.margin_cross_entropy(
        x, Y, scale=2 + v, margin=v, label_smoothing=v, mixed_target=MIXED, mix_lambda=1 - v
    ),
    "linear, scale": lambda x, v: LF.linear_margin_cross_entropy(x, W, Y % 10, scale=v),
    "linear, margin": lambda x, v: LF.linear_margin_cross_entropy(x, W, Y, margin=v, reduction="none"),
    "linear, label_smoothing": lambda x, v: LF.linear_margin_cross_entropy(x, W, Y, label_smoothing=v),
    "linear, mix_lambda": lambda x, v: LF.linear_margin_cross_entropy(x, W, Y, mixed_target=MIXED, mix_lambda=v),
    "topk, scale": lambda x, v: LF.linear_topk(x, W, 3, scale=v),
    "experts, scale": lambda x, v: LF.expert_cross_entropy(x, Y, scale=v),
    "experts, margin": lambda x, v: LF.expert_cross_entropy(x, Y, margin=v),
    "experts, taus": lambda x, v: LF.expert_cross_entropy(x, Y, log_prior=PRIOR, taus=(0.0, 1.0, v)),
    "experts, label_smoothing": lambda x, v: LF.expert_cross_entropy(x, Y, label_smoothing=v),
    "experts, mix_lambda": lambda x, v: LF.expert_cross_entropy(x, Y, mixed_target=MIXED, mix_lambda=v),
    "fusion, expert_weight": lambda x, v: LF.expert_fusion(x, expert_weight=(v, 0.2, 0.5), topk=2),
    "fusion, scale": lambda x, v: LF.expert_fusion(x, scale=v),
    "fusion, temperature": lambda x, v: LF.expert_fusion(x, temperature=v),
    "linear fusion, expert_weight": lambda x, v: LF.linear_expert_fusion(x, HEADS, expert_weight=(v, 0.2, 0.5)),
    "linear fusion, scale": lambda x, v: LF.linear_expert_fusion(x, HEADS, scale=v, temperature=2.0),
    "divergence, temperature": lambda x, v: LF.expert_divergence(x, temperature=v),
    "partitioned, scale": lambda x, v: LF.partitioned_logsumexp(x, KEY, Y, SINGLE.key_label, scale=v)[:3],
    "contrastive, temperature": lambda x, v: LF.supervised_contrastive(x, x, Y, temperature=v, exclude="self"),
    "LinearHead, mix_lambda": lambda x, v: LINEAR_HEAD(x, Y, MIXED, v),
    "LinearHead, loss's scale": lambda x, v: changed(LINEAR_HEAD, LINEAR_HEAD.loss, "scale", v)(x, Y),
    "ExpertHead, scale": lambda x, v: changed(EXPERT_HEAD, EXPERT_HEAD, "scale", v)(x),
}
LINEAR_HEAD = LinearHead(Z.shape[1], len(COUNTS), losses.LDAMLoss(COUNTS))
EXPERT_HEAD = ExpertHead(Z.shape[1], len(COUNTS), 3, shared=True)
VALUES = [0.05 + 0.9 * (i * 7 % 20) / 20 for i in range(20)]


def changed(module: nn.Module, part: nn.Module, name: str, value: float) -> nn.Module:
    setattr(part, name, value)
    return module


def leaf_of(name: str) -> Tensor:
    of_features = name.startswith(("linear", "topk", "partitioned", "contrastive", "LinearHead", "ExpertHead"))
    of_experts = name.startswith(("experts", "fusion", "divergence"))
    return (Z if of_features else EXPERTS if of_experts else X).clone().requires_grad_()


def with_gradient(function: Callable[..., Any], x: Tensor, *args: Any) -> list[Tensor]:
    """Return the floating results and the gradient of x, if there is one."""
    results = function(x, *args)
    found = [r for r in (results if isinstance(results, tuple) else [results]) if isinstance(r, Tensor)]
    totals = [r.clamp(-1e4, 1e4).sum() for r in found if r.requires_grad]
    return found + ([*torch.autograd.grad(sum(totals[1:], totals[0]), x)] if totals else [])


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_makes_no_more_than_two_graphs(name, dynamic):
    function = NUMBERS[name]
    graphs = Graphs(lambda x, v: function(x, v), FIRST if dynamic is None else "eager", dynamic=dynamic)
    for value in VALUES if dynamic is None else VALUES[:3]:
        x = leaf_of(name)
        actual, expected = with_gradient(graphs.call, x, value), with_gradient(function, x, value)
        torch.testing.assert_close(actual, expected)
    assert graphs.number <= 2


@pytest.mark.parametrize("kind", [np.float64, lambda value: 1 + round(100 * value)], ids=["numpy", "int"])
def test_other_kinds_of_numbers_make_no_more_graphs(kind):
    graphs = Graphs(lambda x, v: LF.margin_cross_entropy(x, Y, scale=v, margin=0.2))
    for value in map(kind, VALUES):
        torch.testing.assert_close(graphs.call(X, value), LF.margin_cross_entropy(X, Y, scale=value, margin=0.2))
    assert graphs.number <= 2


def test_mixtures_compile_with_inductor():
    """Steps as a user has them: the share of the classes is another number in each."""
    loss = losses.LogitAdjustmentLoss(COUNTS)
    graphs = Graphs(lambda x, *mixed: loss(x, *mixed), "inductor")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, *mixed = mixup(X, Y, 0.4, generator=generator)
        x.requires_grad_()
        torch.testing.assert_close(with_gradient(graphs.call, x, *mixed), with_gradient(loss, x, *mixed))
    assert graphs.number <= 2


def test_numbers_are_checked_in_compiled_code():
    compiled = torch.compile(lambda v: LF.margin_cross_entropy(X, Y, label_smoothing=v), backend="eager")
    for value in (0.1, 0.2, 0.3):
        compiled(value)
    for value in (1.5, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing: got .*, expected a (finite )?number"):
            compiled(value)


# ---------------------------------------------------------------------------------------------------------------- sizes

#: Rows of the batches, one row among them.
SIZES = (37, 36, 20, 5, 17, 28)


def leaves_of(batch: Any) -> list[Tensor]:
    return [x for x in batch if x.is_floating_point()]


def batch_of(rows: int) -> Any:
    """Return a batch with its own memory, whose floating tensors are differentiated."""
    cut = SINGLE.rows(slice(0, rows))
    return type(cut)(*(x.clone().requires_grad_(x.is_floating_point()) for x in cut))


def compare(actual: Callable[..., Tensor], expected: Callable[..., Tensor], batch: Any) -> None:
    """Compare two losses and all their gradients."""
    found = []
    for function in (actual, expected):
        loss = function(batch)
        grads = torch.autograd.grad(loss.sum(), leaves_of(batch), allow_unused=True)
        found.append([loss, *(grad for grad in grads if grad is not None)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@each_loss()
def test_batches_of_all_sizes_make_no_more_than_two_graphs(case, dynamic):
    loss = case.make(COUNTS, **case.options)
    graphs = Graphs(lambda batch: case.call(loss, batch), FIRST if dynamic is None else "eager", dynamic=dynamic)
    for rows in SIZES:
        compare(graphs.call, lambda batch: case.call(loss, batch), batch_of(rows))
    assert graphs.number <= 2


#: Functions of a batch of features with themselves.
ITSELF: dict[str, Callable[[Any], Any]] = {
    "partitioned_logsumexp": lambda b: sum(LF.partitioned_logsumexp(b.embeddings, b.embeddings, b.target)[:3]),
    "partitioned_logsumexp, exclude": lambda b: (
        LF.partitioned_logsumexp(
            b.embeddings, b.embeddings, b.target, exclude="self", key_grad_rows=(1, len(b.target))
        ).pos_sum
    ),
    "supervised_contrastive": lambda b: LF.supervised_contrastive(
        b.embeddings, b.embeddings, b.target, temperature=0.1, exclude="self"
    ),
    "LinearHead": lambda b: LINEAR_HEAD(b.embeddings, b.target),
    "linear_topk": lambda b: LF.linear_topk(b.embeddings, W, 2).confidence,
    "expert_fusion": lambda b: LF.expert_fusion(b.experts, topk=2).confidence,
    "expert_divergence": lambda b: LF.expert_divergence(b.experts, "pairwise", 2.0),
}


@pytest.mark.parametrize("name", ITSELF)
def test_functions_of_marked_sizes_make_one_graph(name):
    graphs = Graphs(ITSELF[name])
    for rows in SIZES:
        batch = batch_of(rows)
        for x in (*batch[:1], *batch[2:4], batch.target):
            torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(batch.experts, 1)
        torch.testing.assert_close(graphs.call(batch), ITSELF[name](batch))
    assert graphs.number == 1


# --------------------------------------------------------------------------------------------------------------- values


def refusal(function: Callable[[Any], Any], given: Any) -> tuple[type[Exception], str]:
    with pytest.raises((IndexError, ValueError)) as caught:
        function(given)
    return caught.type, str(caught.value)


def refused_alike(function: Callable[[Any], Any], good: Any, *bad: Any, backend: str = FIRST) -> None:
    """Check that one graph takes what is good, and refuses what is bad in the words of eager code."""
    graphs = Graphs(function, backend)
    for each in bad:
        graphs.call(good)
        assert refusal(graphs.call, each) == refusal(function, each)
    assert graphs.number == 1


@pytest.mark.parametrize("name", [name for name in CASES if name != "supcon"])  # its labels are any integers
def test_compiled_losses_refuse_a_class_out_of_range(name):
    case = CASES[name]
    loss = case.make(COUNTS, **case.options)
    target = Y.clone()
    target[2] = len(COUNTS)
    backend = FIRST if name in CONTRASTIVE else "eager"  # the others are checked by their operator
    refused_alike(lambda y: case.call(loss, SINGLE._replace(target=y)), Y, target, backend=backend)


ROWS, KEYS, KL = len(Y), len(KEY), SINGLE.key_label
PACO, GML, ELM = losses.PaCoLoss(COUNTS, 0.05), losses.GMLLoss(COUNTS), losses.ELMLoss(COUNTS)
SUPCON, PIXELS = losses.SupConLoss(0.1), Z[:32, :, None, None].reshape(2, 4, 4, -1).movedim(3, 1)
LOGITS, EXCLUDE, NO_MASK = X[:, : len(COUNTS)], torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS, ROWS)
#: Functions of integers, some that they accept, and a value that they refuse.
REFUSED: dict[str, tuple[Callable[[Tensor], Any], Tensor, tuple[Any, ...]]] = {
    "exclude": (lambda e: LF.partitioned_logsumexp(Z, KEY, Y, KL, exclude=e).neg, EXCLUDE, (KEYS, -2)),
    "supervised_contrastive, exclude": (
        lambda e: LF.supervised_contrastive(Z, KEY, Y, KL, temperature=0.1, exclude=e), EXCLUDE, (KEYS,)
    ),
    "query_label": (lambda y: LF.partitioned_logsumexp(Z, KEY, y, KL).neg, Y, (2**31, -(2**40))),
    "key_label": (lambda y: LF.partitioned_logsumexp(Z, KEY, Y, y).neg, KL, (2**31,)),
    "key_label, uint64": (lambda y: LF.partitioned_logsumexp(Z, KEY, Y, y).neg, KL.to(torch.uint64), (2**63,)),
    "target, uint64": (lambda y: LF.margin_cross_entropy(LOGITS, y), Y.to(torch.uint64), (2**63,)),
    "SupCon, mask": (lambda m: SUPCON(SINGLE.views, mask=m), NO_MASK, (-1.0, math.inf, math.nan)),
    "PaCo, key_label": (lambda y: PACO(Z, Y, KEY, y, LOGITS), KL, (len(COUNTS), -2)),
    "PaCo, exclude": (lambda e: PACO(Z, Y, KEY, KL, LOGITS, exclude=e), EXCLUDE, (KEYS,)),
    "GML, key_label": (lambda y: GML(Z, Y, KEY, y, LOGITS), KL, (len(COUNTS),)),
    "GML, own_key": (lambda e: GML(Z, Y, KEY, KL, LOGITS, own_key=e), EXCLUDE, (KEYS, -2)),
    "ELM, key_label": (lambda y: ELM(LOGITS, Z, Y, key=KEY, key_label=y), KL, (len(COUNTS),)),
    "ELM, exclude": (lambda e: ELM(LOGITS, Z, Y, key=KEY, key_label=KL, exclude=e), EXCLUDE, (KEYS,)),
    "sample_pixels": (
        lambda y: losses.sample_pixels(PIXELS, y, 2, num_classes=len(COUNTS)).labels,
        Y[:32].reshape(2, 4, 4),
        (len(COUNTS),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_compiled_functions_refuse_a_value_out_of_range(name):
    function, good, values = REFUSED[name]
    bad = []
    for value in values:
        flat = good.flatten().tolist()
        flat[1] = value
        bad.append(torch.tensor(flat, dtype=good.dtype).reshape(good.shape))
    refused_alike(function, good, *bad)


@pytest.mark.parametrize("value", [Y, KL.int(), Z], ids=["int64", "int32", "floating"])
def test_the_operator_that_checks(value):
    check, numbers, words = (
        ("check_weights", [], []) if value is Z else ("check_classes", [len(COUNTS), -1], ["", "key"])
    )
    torch.library.opcheck(torch.ops.lt_kernels.checked.default, (value.abs(), check, "name", numbers, words))


@pytest.mark.parametrize("name", ["FeatureQueue", "ClassQueue", "ClassQueue, ids"])
def test_compiled_queues_refuse_a_label_before_they_change(name):
    """Inductor orders what is written by what it is made of."""
    queue: Any = FeatureQueue(8, 3) if name == "FeatureQueue" else ClassQueue([3, 2, 2], 8, 3)
    features, labels = torch.ones(3, 3), torch.tensor([0, 1, 2])
    argument = (lambda y: (features, labels, y)) if name.endswith("ids") else (lambda y: (features, y))
    before = {key: value.clone() for key, value in queue.state_dict().items()}
    graphs = Graphs(queue.enqueue, "inductor")
    wrong = torch.tensor([0, -2, 1])
    words = refusal(lambda y: queue.enqueue(*argument(y)), wrong)
    assert refusal(lambda y: graphs.call(*argument(y)), wrong) == words
    assert graphs.number == 1
    for key, value in queue.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------- export


def arguments(case: Any, batch: Any = SINGLE) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a case calls its loss with."""
    calls: list[Any] = []
    case.call(lambda *args, **keywords: calls.append((args, keywords)), batch)
    return calls[0]


def exported(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    program = torch.export.export(module, args, keywords).module()
    torch.testing.assert_close(program(*args, **keywords), module(*args, **keywords))


@each_loss()
def test_losses_export(case):
    exported(case.make(COUNTS, **case.options), *arguments(case))


HEAD_CALLS: dict[str, Any] = {
    "LinearHead": lambda b: LINEAR_HEAD(b.embeddings, b.target),
    "LinearHead.logits": lambda b: LINEAR_HEAD(b.embeddings),
    "LinearHead.predict": lambda b: LINEAR_HEAD.predict(b.embeddings, 2).confidence,
    "ExpertHead": lambda b: EXPERT_HEAD(b.embeddings),
    "ExpertHead.predict": lambda b: EXPERT_HEAD.predict(b.embeddings, 2).confidence,
}


class _Calls(nn.Module):
    """A module for the exporter, which calls a head."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.head, self.experts, self.call = LINEAR_HEAD, EXPERT_HEAD, call

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        return self.call(SINGLE._replace(embeddings=embeddings, target=target))


@pytest.mark.parametrize("name", HEAD_CALLS)
def test_heads_export(name):
    exported(_Calls(HEAD_CALLS[name]), (Z, Y), {})


# -------------------------------------------------------------------------------------------- tensors without memory


def without_memory(call: Callable[[Any], Tensor], device: str) -> None:
    """Run a loss forward and backward on meta or fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True) if device == "fake" else contextlib.nullcontext() as mode:
        fresh = (mode.from_tensor(x) if device == "fake" else x.to("meta") for x in SINGLE)
        batch = type(SINGLE)(*(x.requires_grad_(x.is_floating_point()) for x in fresh))
        loss = call(batch)
        if loss.requires_grad:
            loss.sum().backward()
            assert any(x.grad is not None for x in leaves_of(batch))
    real = call(SINGLE) if device == "fake" else loss
    assert (loss.shape, loss.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("device", ["meta", "fake"])
@each_loss()
def test_losses_of_tensors_without_memory(case, device):
    loss = case.make(COUNTS, **case.options)
    if device == "meta":
        loss = loss.to("meta")
    without_memory(lambda batch: case.call(loss, batch), device)


@pytest.mark.parametrize("name", ITSELF)
def test_functions_of_fake_tensors(name):
    without_memory(ITSELF[name], "fake")


@pytest.mark.parametrize("strategy", ["auto", "materialize", "chunked"])
def test_functions_of_meta_tensors(strategy):
    weight = W.to("meta")
    without_memory(lambda b: LF.linear_margin_cross_entropy(b.embeddings, weight, b.target, strategy=strategy), "meta")
    without_memory(
        lambda b: LF.partitioned_logsumexp(b.embeddings, b.key, b.target, b.key_label, strategy=strategy).neg, "meta"
    )
    without_memory(lambda b: LF.linear_topk(b.embeddings, weight, 2).confidence, "meta")
    without_memory(lambda b: LF.expert_fusion(b.experts).confidence, "meta")
    without_memory(lambda b: LF.expert_divergence(b.experts), "meta")
