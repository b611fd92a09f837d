"""Benchmark of ``partitioned_logsumexp`` as the contrastive losses that are made of it.

SupCon in a batch, against a memory of keys and against momentum contrast's queue, BCL, PaCo and GML: each is a method
of ``contrastive.ContrastiveCase``. The least work that the result needs, for N queries and M keys of D features,
whatever a provider does:

    fwd      one product Q K^T, 2 N M D operations    reads queries and keys once
    bwd      dS K and, where keys learn, dS^T Q,      reads them, writes the gradients of vectors that learn
             2 N M D each
    fwd_bwd  6 N M D if all keys learn                reads them once, writes those gradients once

and one exponential per similarity. If the queries are all the keys, one product serves both gradients. Logits next to
the similarities (PaCo, GML) are read, their gradients written, and each has an exponential. Similarities are no part of
the bytes: they need not exist in memory. The provider ``gemms`` is measured in turns with the others. It computes no
loss: it makes the products alone by ``torch.mm``, into outputs that exist already. Its time is what can be reached.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import functional, losses
from ...ops.partitioned_logsumexp import plan
from ..agreement import LossAgreement
from ..cases import Case, Inputs, by_name
from ..contrastive import (
    ALPHA,
    CASES,
    SMALL,
    TEMPERATURE,
    ContrastiveCase,
    dense_loss,
    leaves_out_own,
    masked_loss,
    masked_losses,
    vectors,
)
from ..op import GEMMS, Cost, Op, Target
from ..providers import (
    Products,
    Provider,
    Step,
    backend_unavailable,
    backends,
    compiled,
    eager,
    import_failure,
    strategies,
)

NAME = "partitioned_logsumexp"
_MEMORY, _FROZEN, _GML = "supcon-512x16384x128", "supcon-512x16384x128-frozen", "gml-128x16384x1024-c8142"
_VIEWS, _SMALL_VIEWS = "supcon-2x256x128", "supcon-2x64x128"
TARGETS = (
    *(Target("cpu", _MEMORY, dtype, "fastest other", 2.0) for dtype in ("float32", "bfloat16")),
    *(Target("cpu", _MEMORY, dtype, "gemms", at_most=1.2) for dtype in ("float32", "bfloat16")),
    Target("cpu", _VIEWS, "float32", "fastest other", 2.0),
    Target("cpu", _SMALL_VIEWS, "float32", "fastest other", 2.0),
    Target("cpu", _FROZEN, "float32", "fastest other", 2.0),
    Target("cpu", _GML, "float32", "gemms", at_most=1.2),
    # that of the masked form: one mask and logsumexp
    Target("cpu", _GML, "float32", "memory", at_most=1.0),
    Target("cuda", _MEMORY, "float32", "dense", 10.0),
    Target("cuda", _MEMORY, "bfloat16", "dense", 10.0),
    Target("cuda", _MEMORY, "bfloat16", "static floor", 0.4),
)


def cost(case: ContrastiveCase, dtype: torch.dtype, direction: str) -> Cost:
    """Count the work as the module's docstring says."""
    n, m, d = case.rows, case.keys, case.width
    of_gradients = 1 if case.method == "views" else 1 + case.learning_keys / m
    products = {"fwd": 1.0, "bwd": of_gradients, "fwd_bwd": 1 + of_gradients}[direction]
    operands = (n + m if case.method != "views" else n) * d
    logits = case.classifier_logits
    elements = operands + logits + (0 if direction == "fwd" else case.uncounted)
    return Cost(elements * dtype.itemsize, round(2 * products * case.logits * d), case.logits + logits)


class Agreement(LossAgreement):
    """The truth is the masked form."""

    def _losses(self, inputs: Inputs, rows: Tensor) -> Tensor:
        return masked_losses(inputs, rows)


# Ours


def _our_step(inputs: Inputs) -> Step:
    """Make a call of the public loss of the case's method."""
    case, counts, label, device = inputs.case, inputs.counts.cpu(), inputs.target, inputs.target.device
    samples = label[: case.rows // 2].contiguous()  # of two views
    if case.method == "views":
        return partial(losses.SupConLoss(temperature=TEMPERATURE["views"]), inputs["features"], samples)
    if case.method == "bcl":
        bcl = losses.BalancedContrastiveLoss(counts, temperature=TEMPERATURE["bcl"])
        return partial(bcl, inputs["features"], samples, inputs["centers"])
    if case.method == "paco":
        paco = losses.PaCoLoss(counts, alpha=ALPHA, temperature=TEMPERATURE["paco"], device=device)
        own, grad_rows = torch.arange(case.rows, device=device), (0, case.rows)

        def with_queue() -> Any:
            query, key = vectors(inputs)
            rest = key, inputs["key_label"], inputs["logits"]
            return paco(query, label, *rest, exclude=own, key_grad_rows=grad_rows)

        return with_queue
    if case.method == "gml":
        gml = losses.GMLLoss(counts, device=device)
        ((name, learned),) = gml.named_parameters()
        shared = {name: inputs["log_temperature"].view(learned.shape)}  # the leaf of every provider
        arguments = (inputs["query"], label, inputs["key"], inputs["key_label"], inputs["logits"])
        # each sample has one key here, which the other providers find by ids in each step
        own_key = (inputs["query_id"][:, None] == inputs["key_id"]).to(torch.uint8).argmax(1)
        return lambda: torch.func.functional_call(gml, shared, arguments, {"own_key": own_key})
    return partial(_our_supcon, inputs)


def _our_supcon(inputs: Inputs, **options: Any) -> Tensor:
    """Compute the loss of ``supcon`` and ``moco``; options: a strategy, which the public loss does not take."""
    case, temperature = inputs.case, TEMPERATURE[inputs.case.method]
    arguments = (*vectors(inputs), inputs.target, inputs["key_label"])
    given: dict[str, Any] = {"normalized": True}
    given |= {"exclude": "self"} if leaves_out_own(case.method) else {}
    given |= {"key_grad_rows": (0, case.rows)} if case.method == "moco" else {}
    if not options:
        return functional.supervised_contrastive(*arguments, **{"temperature": temperature, **given})
    sums = functional.partitioned_logsumexp(*arguments, **{"scale": 1 / temperature, **given, **options})
    loss = torch.logaddexp(sums.neg, sums.pos) - sums.pos_sum / sums.num_pos.clamp_min(1)
    return torch.where(sums.num_pos > 0, loss, 0.0).mean()


# Providers


def _products(inputs: Inputs) -> Products:
    case = inputs.case
    return Products(*vectors(inputs), learning=0 if case.method == "views" else case.learning_keys)


def _supcon_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    if device == "cpu" and case.name not in (_MEMORY, _VIEWS, _SMALL_VIEWS):
        return f"on a CPU it is measured in {_MEMORY}, {_VIEWS} and {_SMALL_VIEWS} only"
    return None


_PML_MODULES = tuple(f"pytorch_metric_learning.{name}" for name in ("losses", "distances", "reducers"))


def _metric_learning(inputs: Inputs) -> Step:
    losses, distances, reducers = map(importlib.import_module, _PML_MODULES)
    loss = losses.SupConLoss(
        temperature=TEMPERATURE[inputs.case.method],
        distance=distances.DotProductSimilarity(normalize_embeddings=False),
        reducer=reducers.MeanReducer(),
    )

    def step() -> Any:
        query, key = vectors(inputs)
        if inputs.case.method == "views":
            return loss(query, inputs.target)
        return loss(query, inputs.target, ref_emb=key, ref_labels=inputs["key_label"])

    return step


def _metric_learning_left_out(case: Case, dtype: str, device: str) -> str | None:
    assert isinstance(case, ContrastiveCase)
    if case.method in ("views", "moco"):
        return None
    return "it cannot leave out a query's own among other keys" if case.method == "supcon" else "it has no such loss"


def _strategy_left_out(name: str, case: Case, dtype: str, device: str) -> str | None:
    assert isinstance(case, ContrastiveCase)
    if case.method not in ("supcon", "moco"):
        return "its loss leaves the strategy to the library"
    product = getattr(torch, dtype)
    reason = plan.tiled_reason(case.width, product)
    if name == "tiled" and reason is not None:
        return reason
    tiled = device == "cuda" and backend_unavailable(NAME, "triton", device) is None and reason is None
    if plan.choose(case.rows, case.keys, product, True, tiled, "auto", 2**31) == name:
        return "it is what the library chooses here by itself"
    return None


PROVIDERS = by_name(
    Provider("gemms", _products, is_loss=False),
    eager("dense", dense_loss),
    eager("masked", masked_loss),
    compiled(dense_loss, left_out=_supcon_on_cpu),
    Provider("pml", _metric_learning, lambda device: import_failure(*_PML_MODULES), left_out=_metric_learning_left_out),
    *backends(NAME, _our_step),
    *strategies(NAME, _our_supcon, _strategy_left_out),
)


OP = Op(
    NAME,
    cases=CASES | SMALL,
    providers=PROVIDERS,
    cost=cost,
    agreement=Agreement,
    floor=GEMMS,
    rank=3,
    shape="N x M x D",
    compare_cases=(_MEMORY,),
    references=("dense", "gemms"),
    eager="dense",
    targets=TARGETS,
)
