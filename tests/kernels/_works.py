"""What a device runs: calls of every operator, strategy and loss, which the tests of a device all go through.

A work is one call and its gradients in one dtype. The functions ``rows``, ``linear``, ``experts``, ``contrastive`` and
``recipes`` list works; ``each`` parametrizes a test over such lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from typing import Any

import pytest
import torch
from _cases import contrastive as contrastive_cases
from _cases import experts as expert_cases
from _cases import linear as linear_cases
from _cases import rows as row_cases
from _cases.operators import BY_NAME, Operator
from _device import DTYPES, REDUCTIONS
from _recipes import RECIPES
from _strategies import gradient_policy, linear_mode, small_blocks, strategy_of
from torch import Tensor

from lt_kernels.functional import expert_divergence, expert_fusion
from lt_kernels.ops.partitioned_logsumexp import plan


@dataclass(frozen=True)
class Work:
    id: str
    #: What is called: has ``results(sample, **options)`` and ``around()``.
    operator: Any
    #: What it is called with: has ``sample(dtype, device, **keywords)``.
    case: Any
    dtype: torch.dtype = torch.bfloat16
    policy: str = "auto"
    #: Keywords of the sample.
    keywords: dict[str, Any] = field(default_factory=dict)
    #: Whether the same call always gives the same bits; the library may choose another matrix product.
    exact: bool = True

    @property
    def marks(self) -> Any:
        return pytest.mark.backends("triton") if "-tiled-" in self.id else ()

    @property
    def family(self) -> str:
        return self.id.partition("-")[0]

    @property
    def plain(self) -> Work:
        """The same call with everything in memory at once."""
        strategy = self.operator.strategy and "materialize"
        return replace(self, operator=replace(self.operator, strategy=strategy, around=nullcontext))

    def sample(self, device: str, **keywords: Any) -> Any:
        return self.case.sample(self.dtype, device, **self.keywords, **keywords)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Run calls under the policy, in the chunks of the strategy."""
        with gradient_policy(self.policy), self.operator.around():
            yield

    def values(self, sample: Any) -> list[Tensor]:
        return self.operator.results(sample)

    def step(self, sample: Any, upstream: float = 0.5) -> list[Tensor]:
        """Return every result, then the gradient of everything that requires one."""
        values = self.values(sample)
        return [*(value.detach() for value in values), *gradients(values, sample, upstream)]


def gradients(values: Iterable[Tensor], sample: Any, upstream: float, retain_graph: bool = False) -> list[Tensor]:
    """Return the gradients of a sum of values with factors of both signs."""
    terms = [value.sum() * (upstream * (-1.5) ** i) for i, value in enumerate(values) if value.requires_grad]
    if not terms:
        return []
    leaves = list(sample.differentiable.values())
    grads = torch.autograd.grad(sum(terms), leaves, retain_graph=retain_graph, allow_unused=True)
    return [grad for grad in grads if grad is not None]


def each(*works: list[Work]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test over works; a strategy of one backend runs on that backend only."""
    parameters = [pytest.param(work, id=work.id, marks=work.marks) for work in chain(*works)]
    return pytest.mark.parametrize("work", parameters)


def named(words: Iterable[str]) -> dict[str, str]:
    return {word: word for word in words}


# ---------------------------------------------------------------------------------------------------------------- rows

BIAS: dict[str, Any] = {"options": ("class_bias",)}
#: One case of every way through the kernels.
WAYS = {
    name: row_cases.BY_ID[name]
    for name in (
        "inat18 width",
        "inat18 width, probabilities",
        "wide rows",
        "class weights",
        "weighted smoothing",
        "number margin",
        "angular",
        "learnable vectors",
        "mixup per row",
        "mixup with everything",
        "probabilities with everything",
        "segmentation with everything",
        "transposed with everything",
    )
}
#: Many rows, very many classes, and gradients that are sums over rows.
MANY = {
    f"{shape}{learned}": row_cases.Case("many", *sizes, **BIAS, requires_grad=names)
    for shape, sizes in {
        "8142": (1024, 8142, ()),
        "65536": (64, 65_536, ()),
        "1000003": (4, 1_000_003, ()),
        "pixels": (4, 150, (96, 96)),
    }.items()
    for learned, names in {"": ("input",), " learned": ("input", "class_bias")}.items()
}


def rows(
    cases: Mapping[str, Any],
    dtypes: Iterable[str] = ("bf16",),
    reductions: Iterable[str] = tuple(REDUCTIONS),
    policies: Iterable[str] = ("auto",),
) -> list[Work]:
    return [
        Work(f"rows-{name}-{reduction}-{dtype}-{policy}", BY_NAME["margin_cross_entropy"], case, DTYPES[dtype], policy,
             {"reduction": reduction})
        for (name, case), dtype, reduction, policy in product(cases.items(), dtypes, reductions, policies)
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- linear heads

#: How logits are made: strategies, and both ways to cut.
LINEAR_MODES = named(("materialize", "rows", "classes", "tiled"))
#: Real widths, in which products take the library's fast paths and rows start at odd addresses unless padded.
HEADS = {
    case.id: case
    for case in (
        linear_cases.Case("inat18", 256, 512, 8142),
        linear_cases.Case("narrow", 300, 128, 20_011),
        linear_cases.Case("cosine", 256, 256, 8142, normalize=True, keywords={"scale": 16.0}),
        linear_cases.Case("mixed", 256, 64, 8142, options=("weight", "class_bias", "mixed_target")),
        linear_cases.Case(
            "learned", 256, 64, 8142, requires_grad=("input", "linear_weight", "linear_bias", "class_bias")
        ),
        linear_cases.Case("frozen", 256, 64, 8142, requires_grad=("input",)),
    )
}


def linear_operator(mode: str) -> Operator:
    operator = BY_NAME["linear_margin_cross_entropy, materialize"]
    return replace(operator, strategy=strategy_of(mode), around=partial(linear_mode, mode))


def linear(
    cases: Mapping[str, Any],
    dtypes: Iterable[str] = ("bf16",),
    policies: Iterable[str] = ("auto",),
    reductions: Iterable[str] = ("mean",),
) -> list[Work]:
    return [
        Work(f"linear-{name}-{mode}-{reduction}-{dtype}-{policy}", linear_operator(mode), case, DTYPES[dtype], policy,
             {"reduction": reduction}, exact=False)
        for (name, case), mode, reduction, dtype, policy
        in product(cases.items(), LINEAR_MODES, reductions, dtypes, policies)
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- experts

#: Real widths, whose rows start at odd addresses; rows enough for eager's error to mean something.
EXPERTS = {
    case.id: case
    for case in (
        expert_cases.Case("8142", 3, 200, 8142),
        expert_cases.Case("six experts", 6, 100, 8142),
        expert_cases.Case("nine experts", 9, 300, 1203),
        expert_cases.Case("few classes", 3, 1000, 33),
        expert_cases.Case("100003", 3, 8, 100_003),
        expert_cases.Case("samples first", 3, 100, 8142, layout="samples first"),
    )
}
MIXED: dict[str, Any] = {"options": ("log_prior", "mixed_target", "mix_lambda")}
LEARNED: dict[str, Any] = {"options": ("log_prior", "weight"), "requires_grad": ("input", "log_prior")}


def _of_a_list(sample: Any, **options: Any) -> Any:
    return BY_NAME["expert_cross_entropy"].call(replace(sample, input=list(sample.input.unbind(0))), **options)


def _fused(sample: Any, k: int) -> Any:
    return expert_fusion(sample.input, log_prior_shift=sample.options["log_prior"], topk=k, return_log_probs=True)


def _diverged(sample: Any, kind: Any, **options: Any) -> Any:
    return expert_divergence(sample.input, kind, 1.5 - sample.options["log_prior"].detach().exp(), **options)


_CALL = BY_NAME["expert_cross_entropy"].call
_PER_ROW = {"reduction": "none", "expert_reduction": "none"}
#: One of every way through the operators: what differs in the case, and the call.
EXPERT_WAYS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "loss": ({}, _CALL),
    "losses": (MIXED, partial(_CALL, **_PER_ROW)),
    "loss of a list": (MIXED, _of_a_list),
    "loss and ensemble": (MIXED, partial(_CALL, return_ensemble=True)),
    "prior that learns": (LEARNED, _CALL),
    "fusion": ({}, partial(_fused, k=5)),
    "prediction": ({}, partial(_fused, k=1)),
    "to_mean": ({}, partial(_diverged, kind="to_mean", detach_mean=False)),
    "pairwise": ({}, partial(_diverged, kind="pairwise", **_PER_ROW)),
}


def experts(
    ways: Iterable[str] = tuple(EXPERT_WAYS),
    dtypes: Iterable[str] = ("bf16",),
    policies: Iterable[str] = ("auto",),
    shapes: Iterable[str] = ("8142", "few classes", "100003"),
    most_rows: int = 1000,
) -> list[Work]:
    found = []
    for way, shape, dtype, policy in product(ways, shapes, dtypes, policies):
        changes, call = EXPERT_WAYS[way]
        case = replace(EXPERTS[shape], rows=min(EXPERTS[shape].rows, most_rows), **changes)
        name = f"experts-{way}: {shape}-{dtype}-{policy}"
        found.append(Work(name, Operator(way, call, ()), case, DTYPES[dtype], policy))
    return found


# --------------------------------------------------------------------------------------------------- contrastive losses

COSINES, SELF = contrastive_cases.COSINES, contrastive_cases.SELF
#: Strategies, and "blocks": chunks of a few queries and keys, so that small cases take many.
CONTRASTIVE_MODES = named(("materialize", "chunked", "blocks", "tiled"))
#: Real sizes, in which products take the library's fast paths; every width that tiles are compiled for.
PAIRS = {
    case.id: case
    for case in (
        contrastive_cases.Case(
            "supcon", 1024, 128, None, classes=100, normalized=True, keywords={"scale": 1 / 0.07, **SELF}
        ),
        contrastive_cases.Case("memory", 512, 128, 16_384, classes=1000, **COSINES),
        contrastive_cases.Case("8142 keys", 300, 64, 8142, classes=500),
        contrastive_cases.Case("odd width", 300, 100, 8142, classes=500),
        contrastive_cases.Case("wide tiles", 128, 256, 16_384, classes=1000, **COSINES),
        contrastive_cases.Case(
            "gml", 128, 1024, 16_384, classes=1000, options=("key_bias", "scale", "exclude"), **COSINES
        ),
        contrastive_cases.Case(
            "everything", 256, 128, 8142, classes=500, unlabelled=0.1, masked=0.1, **contrastive_cases.EVERYTHING
        ),
        contrastive_cases.Case("with itself", 1000, 100, None, classes=100, **contrastive_cases.LEARNED),
        contrastive_cases.Case(
            "queue", 256, 128, 8142, classes=500, keywords={"key_grad_rows": (0, 256)}, options=("key_bias",)
        ),
    )
}
FEW_PAIRS = {name: PAIRS[name] for name in ("memory", "everything", "with itself")}


def contrastive_operator(mode: str) -> Operator:
    operator = BY_NAME["partitioned_logsumexp, materialize"]
    if mode == "blocks":
        return replace(operator, strategy="chunked", around=small_blocks)
    return replace(operator, strategy=mode, around=nullcontext)


def can_run(mode: str, case: Any, dtype: str) -> bool:
    """Whether a strategy has something to do: blocks cut small cases, and tiles have a largest width."""
    keys = case.rows if case.keys is None else case.keys
    return {
        "blocks": case.rows * keys < 2**16,
        "tiled": plan.tiled_reason(case.width, DTYPES[dtype]) is None,
    }.get(mode, True)


def contrastive(cases: Mapping[str, Any], dtypes: Iterable[str] = ("bf16",)) -> list[Work]:
    return [
        Work(f"contrastive-{name}-{mode}-{dtype}", contrastive_operator(mode), case, DTYPES[dtype], exact=False)
        for (name, case), mode, dtype in product(cases.items(), CONTRASTIVE_MODES, dtypes)
        if can_run(mode, case, dtype)
    ]


def recipes(names: Iterable[str] = tuple(RECIPES), dtypes: Iterable[str] = ("bf16",)) -> list[Work]:
    return [
        Work(f"recipes-{name}-{dtype}", RECIPES[name], RECIPES[name], DTYPES[dtype], exact=False)
        for name, dtype in product(names, dtypes)
    ]
