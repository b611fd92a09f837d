"""The operators as one table: how each is called, and the calls that the contract tests make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import _strategies
import torch
from torch import Tensor

from _cases import contrastive, experts, linear, rows
from lt_kernels import functional as F
from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.expert_cross_entropy.arguments import SIGNATURE as EXPERTS
from lt_kernels.ops.expert_cross_entropy.arguments import Arguments as ExpertArguments
from lt_kernels.ops.linear_margin_cross_entropy import op as linear_op
from lt_kernels.ops.linear_margin_cross_entropy.arguments import SIGNATURE as LINEAR
from lt_kernels.ops.linear_margin_cross_entropy.arguments import Arguments as LinearArguments
from lt_kernels.ops.margin_cross_entropy.arguments import SIGNATURE as ROWS
from lt_kernels.ops.margin_cross_entropy.arguments import Arguments as RowArguments
from lt_kernels.ops.partitioned_logsumexp.arguments import SIGNATURE as CONTRASTIVE
from lt_kernels.ops.partitioned_logsumexp.arguments import Arguments as ContrastiveArguments
from lt_kernels.testing import ContrastiveSample, Sample


@dataclass(frozen=True)
class Operator:
    name: str
    #: Called with a sample and keyword options; returns what it computes.
    call: Callable[..., Any]
    #: Cases of calls that do something of their own with their inputs.
    cases: tuple[Any, ...]
    #: A large case whose sums are cut between threads or programs.
    large: tuple[Any, ...] = ()
    #: Cases that are compiled.
    compiled: tuple[Any, ...] = ()
    strategy: str | None = None
    #: Entered around calls: see ``_strategies``.
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    #: Whether results have gradients.
    differentiable: bool = True
    #: Whether it computes matrix products, whose bits depend on the number of threads.
    products: bool = False
    #: Option for losses per row.
    per_row: dict[str, Any] = field(default_factory=dict)

    def results(self, sample: Any, **options: Any) -> list[Tensor]:
        given = {"strategy": self.strategy} if self.strategy else {}
        result = self.call(sample, **given, **options)
        parts = result if isinstance(result, tuple) else (result,)
        flat = [value for part in parts for value in (part if isinstance(part, tuple) else (part,))]
        return [value for value in flat if value is not None]

    def loss(self, sample: Any, **options: Any) -> Tensor:
        """Return one number; rows and sides without a finite value count nothing."""
        values = self.results(sample, **options)
        finite = [value.nan_to_num(0.0, 0.0, 0.0).sum() for value in values if value.is_floating_point()]
        return sum(finite[1:], finite[0])

    def step(self, sample: Any) -> list[Tensor]:
        """Return every result, then the gradient of everything that requires one."""
        values = self.results(sample)
        if not self.differentiable:
            return values
        leaves = list(sample.differentiable.values())
        loss = sum((value.nan_to_num(0.0, 0.0, 0.0).sum() for value in values if value.requires_grad), 0.0)
        return [*(value.detach() for value in values), *torch.autograd.grad(loss, leaves)]


def with_input(sample: Any, x: Tensor) -> Any:
    """Return a sample with x as its logits, features or queries (and keys, if the queries are the keys)."""
    if isinstance(sample, ContrastiveSample):
        key = x if sample.key is sample.query else sample.key
        return ContrastiveSample(x, key, sample.query_label, sample.key_label, sample.options)
    return Sample(x, sample.target, sample.options)


def _rows(sample: Any, **options: Any) -> Any:
    return F.margin_cross_entropy(sample.input, sample.target, **{**sample.options, **options})


def _linear(sample: Any, **options: Any) -> Any:
    given = {**sample.options, **options}
    return F.linear_margin_cross_entropy(sample.input, given.pop("linear_weight"), sample.target, **given)


def _experts(sample: Any, **options: Any) -> Any:
    return F.expert_cross_entropy(sample.input, sample.target, **{**sample.options, **options})


def _experts_of_a_list(sample: Any, **options: Any) -> Any:
    logits = [x.clone() for x in sample.input.unbind(0)]
    return F.expert_cross_entropy(logits, sample.target, return_ensemble=True, **{**sample.options, **options})


def _fusion(sample: Any, **options: Any) -> Any:
    return F.expert_fusion(sample.input, topk=3, return_log_probs=True, **options)


def _divergence(kind: str) -> Callable[..., Any]:
    return lambda sample, **options: F.expert_divergence(sample.input, kind, 3.0, **options)


def _contrastive(sample: Any, **options: Any) -> Any:
    return F.partitioned_logsumexp(*sample.arguments, **{**sample.options, **options})


def _chosen(cases: Any, *names: str) -> tuple[Any, ...]:
    return tuple(cases.BY_ID[name] for name in names)


PER_ROW = {"reduction": "none"}
OPERATORS = [
    Operator(
        "margin_cross_entropy",
        _rows,
        _chosen(rows, "logit adjustment", "mixup with everything", "probabilities with everything",
                "transposed with everything", "segmentation with everything", "learnable vectors"),
        _chosen(rows, "inat18 width, all vectors", "few rows, many columns", "transposed with everything"),
        _chosen(rows, "plain", "mixup with everything", "probabilities with everything", "segmentation"),
        per_row=PER_ROW,
    ),
    *(
        Operator(
            f"linear_margin_cross_entropy, {mode}",
            _linear,
            _chosen(linear, "logit adjustment", "mixup with everything", "probabilities",
                    "cosine, learnable vectors", "positions", "cosine", "learnable vectors"),
            _chosen(linear, "logit adjustment", "cosine, mixup", "learnable vectors"),
            _chosen(linear, "logit adjustment", "mixup with everything", "cosine", "positions"),
            strategy=_strategies.strategy_of(mode),
            around=lambda mode=mode: _strategies.linear_mode(mode),
            products=True,
            per_row=PER_ROW,
        )
        for mode in _strategies.LINEAR_MODES
    ),
    *(
        Operator(
            name,
            call,
            _chosen(experts, "balpoe", "mixup with everything", "samples first"),
            _chosen(experts, "inat18 width, mixed", "vectors that learn", "few rows, many columns"),
            _chosen(experts, "balpoe", "mixup with everything"),
            per_row=PER_ROW,
        )
        for name, call in (("expert_cross_entropy", _experts), ("expert_cross_entropy of a list", _experts_of_a_list))
    ),
    Operator(
        "expert_fusion",
        _fusion,
        _chosen(experts, "balpoe", "samples first"),
        (experts.Case("8142", 3, 7, 8142), experts.Case("100003", 2, 2, 100_003)),
        _chosen(experts, "balpoe"),
        differentiable=False,
    ),
    *(
        Operator(
            f"expert_divergence, {kind}",
            _divergence(kind),
            _chosen(experts, "balpoe", "samples first"),
            (experts.Case("8142", 3, 9, 8142), experts.Case("100003", 2, 2, 100_003)),
            _chosen(experts, "balpoe"),
            per_row=PER_ROW,
        )
        for kind in ("to_mean", "pairwise")
    ),
    *(
        Operator(
            f"partitioned_logsumexp, {strategy}",
            _contrastive,
            _chosen(contrastive, "everything", "everything with itself", "supcon"),
            (contrastive.Case("5003 keys", 33, 20, 5003, **contrastive.LEARNED),),
            _chosen(contrastive, "everything", "supcon"),
            strategy=strategy,
        )
        for strategy in _strategies.CONTRASTIVE_STRATEGIES
    ),
]  # fmt: skip
BY_NAME = {operator.name: operator for operator in OPERATORS}

# ------------------------------------------------------------------------------------------- calls of registered ops

Call = tuple[str, Any, tuple[Any, ...]]  # what is looked at, the overload, its arguments
OPS = torch.ops.lt_kernels


def _row_options(sample: Any, target: Tensor, *names: str) -> RowOptions:
    return RowOptions(target)._replace(**{name: sample.options.get(name) for name in names})


def _detached(arguments: Any) -> list[Any]:
    return [a.detach() if isinstance(a, Tensor) else a for a in arguments]


def _row_calls(backend: str, device: str) -> Iterator[Call]:
    forward, backward = OPS.margin_cross_entropy_fwd.default, OPS.margin_cross_entropy_bwd.default
    for name in ("logit adjustment", "probabilities", "learnable vectors"):
        sample = rows.BY_ID[name].sample(torch.float32, device)
        options = _row_options(sample, sample.target[..., None], "weight", "class_bias", "class_scale")
        arguments = [*ROWS.flatten(RowArguments(sample.input[:, :, None], options))]
        for reduce, with_prediction in ((True, True), (False, False)):
            yield f"forward, {name}", forward, (*arguments, reduce, with_prediction, False, backend)
        if name == "logit adjustment":
            yield "forward with the gradient", forward, (*arguments, True, False, True, backend)
        if name != "learnable vectors":
            frozen = _detached(arguments)
            rest = forward(*frozen, False, False, False, backend)[3]
            needs = [True, name == "probabilities", True, False, False, False]
            yield f"backward, {name}", backward, (rest.new_ones(()), None, rest, *frozen, needs, backend)


def _linear_calls(mode: str, device: str) -> Iterator[Call]:
    for name in ("logit adjustment", "probabilities", "cosine"):
        sample = linear.BY_ID[name].sample(torch.float32, device)
        given = sample.options
        options = _row_options(sample, sample.target[..., None], "weight", "class_bias", "class_scale")
        a = LinearArguments(
            sample.input, given["linear_weight"], None, given.get("linear_bias"), options, given["normalize"]
        )
        arguments, frozen = [*LINEAR.flatten(a)], _detached(LINEAR.flatten(a))
        learns = name != "cosine"
        for reduce, with_prediction, with_grad in ((True, True, False), (False, False, False), (True, False, True)):
            needs = [with_grad] * 2 + [with_grad and learns]
            # with kept logits backward turns them into their gradient
            given_ = frozen if mode == "materialize" and not with_grad else arguments
            rest = (mode, 2**20, reduce, with_prediction, with_grad, needs, "reference")
            yield f"forward, {name}", OPS.linear_margin_cross_entropy_fwd.default, (*given_, *rest)
        found = linear_op.forward(*frozen, mode, 2**20, False, False, False, [False] * 3, "reference")
        rest, logits = found[3], found[4] if mode == "materialize" else None
        needs = [True, True, learns, name == "probabilities", True, False, False, False]
        tail = (*frozen, mode, 2**20, False, needs, "reference")
        yield f"backward, {name}", OPS.linear_margin_cross_entropy_bwd.default, (
            rest.new_ones(()), None, rest, logits, False, *tail,
        )  # fmt: skip
        if logits is not None:
            yield f"backward in place, {name}", OPS.linear_margin_cross_entropy_bwd_.default, (
                rest.new_ones(()), None, rest, logits.clone(), False, *tail,
            )  # fmt: skip


def _expert_calls(backend: str, device: str) -> Iterator[Call]:
    forward, backward = OPS.expert_cross_entropy_fwd.default, OPS.expert_cross_entropy_bwd.default
    for listed in (False, True):
        for name in ("balpoe", "mixup", "bias per expert"):
            sample = experts.BY_ID[name].sample(torch.float32, device)
            e, n, c = sample.input.shape
            logits = [x.detach().clone().requires_grad_() for x in sample.input] if listed else [sample.input]
            mixed = sample.options.get("mixed_target")
            coefficient = torch.full((1 if mixed is None else 2,), 1 / (e * n), device=device)
            options = RowOptions(sample.target[:, None])._replace(
                mixed_target=None if mixed is None else mixed[:, None],
                mix_lambda=None if mixed is None else torch.full((), 0.3, device=device),
                class_bias=sample.options.get("class_bias"),
                class_scale=None if mixed is None else torch.linspace(0.5, 1.5, c, device=device),
                coefficient=coefficient,
            )
            taus = [float(i) for i in range(e)]
            a = ExpertArguments(logits, options, sample.options.get("log_prior"), coefficient * e, taus)
            what = f"{name}, list" if listed else name
            for rest in (("all", True, False), ("rows", False, True), ("none", True, False)):
                yield f"forward, {what}", forward, (*EXPERTS.flatten(a), *rest, backend)
            if name != "mixup":
                with torch.no_grad():
                    rest_ = forward(*EXPERTS.flatten(a), "all", False, False, backend)[1]
                frozen = a._replace(logits=[x.detach() for x in logits])
                needs = [True, options.class_bias is not None, False, False, False]
                one = torch.ones((), device=device)
                yield f"backward, {what}", backward, (one, rest_, *EXPERTS.flatten(frozen), needs, backend)


def _fusion_calls(backend: str, device: str) -> Iterator[Call]:
    x, shift = torch.randn(3, 4, 33, device=device), torch.zeros(33, device=device)
    for what, logits in (("stacked", [x]), ("list", list(x.clone()))):
        for k, with_log_probs in ((1, False), (3, True)):
            arguments = (logits, None, shift, None, [0.5, 0.25, 0.25], 2.0, k > 1, None, k, with_log_probs, backend)
            yield what, OPS.expert_fusion.default, arguments


def _divergence_calls(backend: str, device: str) -> Iterator[Call]:
    forward, backward = OPS.expert_divergence_fwd.default, OPS.expert_divergence_bwd.default
    x, scale = torch.randn(3, 4, 33, device=device), torch.linspace(0.5, 2.0, 33, device=device)
    for what in ("stacked", "list"):
        for kind, detach, reduce in (("to_mean", True, True), ("to_mean", False, False), ("pairwise", True, False)):
            leaves = [e.clone().requires_grad_() for e in (x if what == "list" else [x])]
            weight = torch.tensor([0.0, 1.0, 0.5, 2.0], device=device) if reduce else None
            others = (scale, weight, kind, detach, reduce, backend)
            yield f"forward, {what}, {kind}, {detach}", forward, (leaves, *others)
            frozen = [leaf.detach() for leaf in leaves]
            value, saved = forward(frozen, *others)
            rest = (saved.nan_to_num(0.0), frozen, *others)
            yield f"backward, {what}, {kind}, {detach}", backward, (torch.ones_like(value), *rest)


def _contrastive_calls(strategy: str, backend: str, device: str) -> Iterator[Call]:
    case = contrastive.Case("opcheck", 6, 4, 10, options=contrastive.CONTRASTIVE_OPTIONS,
                            requires_grad=("query", "key", *contrastive.ALL_VECTORS))  # fmt: skip
    sample = case.sample(torch.float32, device)
    o = sample.options
    whole = ContrastiveArguments(
        sample.query, sample.key, sample.query_label.int(), sample.key_label.int(), o["exclude"].int(), o["key_bias"],
        o["key_scale"], o["scale"], 2.0, 2, 9, True,
    )  # fmt: skip
    itself = whole._replace(key=None, key_label=whole.query_label, key_bias=None, key_scale=None, key_grad_end=6)
    rest = (strategy, 2**30, backend)
    for what, a in (("keys", whole), ("itself", itself._replace(exclude=torch.arange(6, device=device).int()))):
        for separate in (False, True):
            forward = (*CONTRASTIVE.flatten(a), True, separate, *rest)
            yield f"forward, {what}, {separate}", OPS.partitioned_logsumexp_fwd.default, forward
            frozen = _detached(CONTRASTIVE.flatten(a))
            *_, kept, slopes, products, _ = OPS.partitioned_logsumexp_fwd(*frozen, True, False, *rest)
            upstream = [torch.randn(6, device=device) for _ in range(3)]
            of_scale = torch.randn(3, 6, device=device) if separate else None
            needs = [True, a.key is not None, a.key_bias is not None, a.key_scale is not None, True]
            products = products if strategy == "materialize" else None
            backward = (*upstream, of_scale, kept, slopes, products, *frozen, separate, strategy, 2**30, needs, backend)
            yield f"backward, {what}, {separate}", OPS.partitioned_logsumexp_bwd.default, backward


def _topk_calls() -> Iterator[Call]:
    x, w, b = torch.randn(5, 8), torch.randn(90, 8), torch.randn(90)
    for arguments in (
        (x, w, b, b, torch.tensor(2.0), 1.5, False, None, 3, 2**20, "reference"),
        (x.bfloat16(), w, None, None, None, 1.0, True, None, 1, 1000, "reference"),
    ):
        yield "topk", OPS.linear_topk.default, arguments


def registered_calls(op: str, backend: str, device: str) -> Iterator[Call]:
    """Yield calls of the registered operators of ``op`` ("name" or "name, mode")."""
    name, _, mode = op.partition(", ")
    if name == "linear_margin_cross_entropy":
        with _strategies.linear_mode(mode) as strategy:
            yield from _linear_calls(strategy, device)
    elif name == "partitioned_logsumexp":
        yield from _contrastive_calls(mode, backend, device)
    elif name == "linear_topk":
        yield from _topk_calls()
    else:
        by_name = {
            "margin_cross_entropy": _row_calls,
            "expert_cross_entropy": _expert_calls,
            "expert_fusion": _fusion_calls,
            "expert_divergence": _divergence_calls,
        }
        yield from by_name[name](backend, device)
