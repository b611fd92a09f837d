"""Benchmark of ``partitioned_logsumexp`` as the contrastive losses that are made of it: SupCon in a batch, against a
memory of keys and against momentum contrast's queue, BCL, PaCo and GML; of ``cases.ContrastiveCase`` each has a method.

The least work that the result needs, of N queries and M keys of D features, whatever a provider does:

    fwd      one product Q K^T, 2 N M D operations    reads queries and keys once
    bwd      dS K and, where keys learn, dS^T Q,      reads them, writes the gradients of what learns
             2 N M D each
    fwd_bwd  6 N M D where all keys learn             reads them once, writes those gradients once

and one exponential per similarity; where the queries are all the keys, one product serves both gradients. Logits beside
the similarities (PaCo, GML) are read, their gradients written, and each has an exponential. Similarities are no part of
the bytes: they need not exist in memory. What can be reached is the time of the products alone, by the library that
PyTorch calls for them: the provider ``gemms``, measured in turns with the others, makes them by ``torch.mm`` into
outputs that exist already. It computes no loss.

``dense`` is the algorithm of the papers' code, with its masks, one-hots and passes, but for BCL's Python loop over all
keys, which is one tensor operation here. ``masked`` is what a user would write: one mask, and ``logsumexp``. The losses
of GML and PaCo include the cross-entropy of the classifier.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, losses
from ..ops.partitioned_logsumexp import plan
from . import agreement, cases
from .cases import Case, ContrastiveCase, ContrastiveInputs
from .providers import Provider, Step, backend_unavailable, eager, first_line, kernels_unavailable, named, ours
from .records import GEMMS, Cost, Record, Target

OP = "partitioned_logsumexp"
CASES = cases.CONTRASTS | cases.SMALL_CONTRASTS
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")  # the last is that of targets, summaries and plots
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_MEMORY, _FROZEN, _GML = "supcon-512x16384x128", "supcon-512x16384x128-frozen", "gml-128x16384x1024-c8142"
#: What ``lt-kernels bench compare`` measures, and what it divides our time by.
COMPARE_CASES = (_MEMORY,)
REFERENCES = ("dense", "gemms")

FLOOR = GEMMS
PLOTS = ()
SHAPE = "N x M x D"
MEMORY = "Peak memory beside the gradients"

TARGETS = (
    Target("cpu", _MEMORY, "float32", "dense", 1.6),
    Target("cpu", _FROZEN, "float32", "dense", 2.0),
    Target("cpu", _GML, "float32", "dense", 15.0),
    # a tenth of what the dense form takes, 2.2 GB or 262 times the similarities
    Target("cpu", _GML, "float32", "memory", at_most=26.0),
    Target("cuda", _MEMORY, "float32", "dense", 10.0),
    Target("cuda", _MEMORY, "bfloat16", "dense", 10.0),
    Target("cuda", _MEMORY, "bfloat16", "static floor", 0.4),
)

#: Temperatures of the published settings, and the weight of PaCo's positive keys.
TEMPERATURE = {"views": 0.07, "supcon": 0.07, "moco": 0.07, "bcl": 0.1, "paco": 0.2}
COSINE_TEMPERATURE = 1 / 30  # GML's classifier
ALPHA = 0.05
#: Float64 losses are made in pieces of about this many similarities.
PIECE = 2**22


def cost(case: ContrastiveCase, dtype: torch.dtype, direction: str) -> Cost:
    """Counted as in the module's docstring."""
    n, m, d = case.rows, case.keys, case.width
    learning = _keys_that_learn(case)
    of_gradients = 1 if case.method == "views" else 1 + learning / m
    products = {"fwd": 1.0, "bwd": of_gradients, "fwd_bwd": 1 + of_gradients}[direction]
    operands = (n + m if case.method != "views" else n) * d
    gradients = _gradient_elements(case)
    logits = n * case.classes if case.method in ("paco", "gml") else 0
    elements = operands + logits + (0 if direction == "fwd" else gradients)
    return Cost(elements * dtype.itemsize, round(2 * products * case.logits * d), case.logits + logits)


def _keys_that_learn(case: ContrastiveCase) -> int:
    if case.method in ("moco", "paco"):
        return case.rows
    return 0 if case.frozen else case.keys


def _gradient_elements(case: ContrastiveCase) -> int:
    """How many elements the gradients of all leaves have."""
    vectors = {
        "views": case.rows, "bcl": case.keys, "moco": 2 * case.rows, "paco": case.rows,
    }.get(case.method, case.rows + _keys_that_learn(case))  # fmt: skip
    logits = case.rows * case.classes if case.method in ("paco", "gml") else 0
    return vectors * case.width + logits


def memory(record: Record) -> float | None:
    """Peak memory of forward and backward, less the gradients' bytes, in multiples of the similarities' bytes."""
    case = CASES.get(record.case)
    if record.peak_bytes is None or case is None:
        return None
    itemsize = getattr(torch, record.dtype).itemsize
    return (record.peak_bytes - _gradient_elements(case) * itemsize) / (case.logits * itemsize)


def make_inputs(case: ContrastiveCase, dtype: torch.dtype, device: str) -> ContrastiveInputs:
    return case.inputs(dtype, device)


def make_step(provider: str, inputs: ContrastiveInputs) -> Step:
    """A call without arguments that computes the loss of ``inputs``."""
    return PROVIDERS[provider].make(inputs)


class Agreement(agreement.LossAgreement[ContrastiveInputs]):
    """Compares the loss and every gradient. Float64 has the masked form, some queries at a time."""

    def __init__(self, inputs: ContrastiveInputs) -> None:
        super().__init__(OP, inputs, make_step("dense", inputs))

    def _parts(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"gradient of {name}": gradient for name, gradient in gradients.items()}

    def _true_values(self) -> dict[str, Tensor]:
        inputs = self._inputs.converted(torch.float64)
        n, m = len(inputs.target), len(inputs.key_label)
        total = inputs.log_prior.new_zeros(())
        with torch.enable_grad():
            for rows in torch.arange(n, device=inputs.target.device).split(max(1, PIECE // m)):
                part = masked_losses(inputs, rows).sum() / n
                part.backward()
                total += part.detach()
        gradients = {name: leaf.grad for name, leaf in inputs.leaves.items()}
        assert all(gradient is not None for gradient in gradients.values())
        return {"loss": total, **self._parts(gradients)}  # type: ignore[arg-type]


def check_agreement(provider: str, inputs: ContrastiveInputs) -> None:
    """AssertionError unless ``provider`` agrees with float64 on ``inputs``; see ``Agreement``."""
    Agreement(inputs).check(provider, make_step(provider, inputs))


# What all forms of a loss are given


def vectors(inputs: ContrastiveInputs) -> tuple[Tensor, Tensor]:
    """Queries [N, D] and keys [M, D]; views of a batch come first view first."""
    given, method = inputs.tensors, inputs.case.method
    if method in ("views", "bcl"):
        query = torch.cat(given["features"].unbind(1))
        return query, query if method == "views" else torch.cat([query, given["centers"]])
    query = given["query"]
    if method == "moco":
        return query, torch.cat([given["batch"], given["queue"]])
    return query, torch.cat([query, given["queue"]]) if method == "paco" else given["key"]


def leaves_out_own(method: str) -> bool:
    """Whether key i is query i itself, and left out."""
    return method in ("views", "supcon", "bcl", "paco")


# The published algorithms


def dense_loss(inputs: ContrastiveInputs) -> Tensor:
    query, key = vectors(inputs)
    given, method = inputs.tensors, inputs.case.method
    labels = (inputs.target, inputs.key_label)
    if method == "bcl":
        return dense_bcl(query, key, *labels, inputs.case.classes)
    if method == "paco":
        return dense_paco(query, key, *labels, given["logits"], inputs.log_prior)
    if method == "gml":
        ids = (given["query_id"], given["key_id"])
        return dense_gml(query, key, *labels, *ids, given["logits"], inputs.log_prior, given["log_temperature"])
    return dense_supcon(query, key, *labels, TEMPERATURE[method], leaves_out_own(method))


def _masks(query_label: Tensor, key_label: Tensor, own: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Floating: which keys are positive, and which count at all."""
    mask = torch.eq(query_label.view(-1, 1), key_label.view(1, -1)).to(like.dtype)
    logits_mask = torch.ones_like(mask)
    if own:
        diagonal = torch.arange(len(mask), device=mask.device).view(-1, 1)
        logits_mask = torch.scatter(logits_mask, 1, diagonal, 0)
    return mask * logits_mask, logits_mask


def dense_supcon(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor, temperature: float, own: bool
) -> Tensor:
    """Supervised contrastive learning: every similarity's log-probability, of which the mask picks the positives."""
    mask, logits_mask = _masks(query_label, key_label, own, query)
    logits = torch.div(torch.matmul(query, key.T), temperature)
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    exp_logits = torch.exp(logits) * logits_mask
    log_prob = logits - torch.log(exp_logits.sum(1, keepdim=True))
    pairs = mask.sum(1)
    pairs = torch.where(pairs < 1e-6, 1, pairs)  # queries without positives have loss 0
    return -((mask * log_prob).sum(1) / pairs).mean()


def dense_bcl(query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor, classes: int) -> Tensor:
    """Class averaging: exponentials over how many keys their class has, counted in one-hot rows of all keys."""
    counts = torch.eye(classes, device=key.device)[key_label].sum(0)
    mask, logits_mask = _masks(query_label, key_label, True, query)
    logits = torch.div(query.mm(key.T), TEMPERATURE["bcl"])
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    exp_logits = torch.exp(logits) * logits_mask
    weight = counts[key_label].view(1, -1).expand(len(query), len(key)) - mask
    exp_logits_sum = exp_logits.div(weight).sum(1, keepdim=True)
    log_prob = logits - torch.log(exp_logits_sum)
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def dense_paco(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor, logits: Tensor, log_prior: Tensor
) -> Tensor:
    """Adjusted logits of the classes and similarities side by side, and masks as wide as both."""
    classes = logits.shape[1]
    mask, logits_mask = _masks(query_label, key_label, True, query)
    similarities = torch.div(torch.matmul(query, key.T), TEMPERATURE["paco"])
    both = torch.cat((logits + torch.log(log_prior.exp() + 1e-9), similarities), dim=1)
    both = both - both.max(dim=1, keepdim=True).values.detach()
    one_hot = F.one_hot(query_label, classes).to(torch.float32)
    mask = torch.cat((one_hot, mask * ALPHA), dim=1)
    logits_mask = torch.cat((torch.ones_like(one_hot), logits_mask), dim=1)
    exp_logits = torch.exp(both) * logits_mask
    log_prob = both - torch.log(exp_logits.sum(1, keepdim=True) + 1e-12)
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def dense_gml(
    query: Tensor,
    key: Tensor,
    query_label: Tensor,
    key_label: Tensor,
    query_id: Tensor,
    key_id: Tensor,
    logits: Tensor,
    log_prior: Tensor,
    log_temperature: Tensor,
) -> Tensor:
    """Class means of exponentials by products with a one-hot matrix of all keys, once for the vectors and once, without
    each query's own key, for the temperature."""
    classes = logits.shape[1]

    def class_means(similarities: Tensor, weights: Tensor) -> Tensor:
        largest = similarities.amax(1, keepdim=True).detach()
        one_hot = F.one_hot(key_label, classes).to(weights.dtype)
        sums = ((similarities - largest).exp() * weights) @ one_hot
        return (sums / (weights @ one_hot)).log() + largest

    prior = log_prior.exp().log()
    temperature = log_temperature.exp().view(1)
    similarities = query @ key.T / temperature.detach()
    of_vectors = class_means(similarities, torch.ones_like(similarities))
    others = (query_id[:, None] != key_id[None, :]).to(similarities.dtype)
    of_temperature = class_means((query @ key.T).detach() / temperature, others)
    supervised = F.cross_entropy(logits / COSINE_TEMPERATURE + prior, query_label)
    contrastive = F.cross_entropy(of_vectors + prior, query_label)
    return supervised + contrastive + F.cross_entropy(of_temperature + prior, query_label)


# The lean form


def masked_losses(inputs: ContrastiveInputs, rows: Tensor | None = None) -> Tensor:
    """Losses of the queries, or of some: one boolean mask, and ``logsumexp``."""
    query, key = vectors(inputs)
    given, case, label = inputs.tensors, inputs.case, inputs.target
    positions = torch.arange(len(query), device=query.device)
    if rows is not None:
        query, label, positions = query[rows], label[rows], positions[rows]
    same = label[:, None] == inputs.key_label
    columns = torch.arange(len(key), device=key.device)
    s = query @ key.T
    s = s.to(torch.promote_types(s.dtype, torch.float32))

    if case.method == "gml":
        logits = given["logits"] if rows is None else given["logits"][rows]
        ids = given["query_id"] if rows is None else given["query_id"][rows]
        supervised = F.cross_entropy(logits / COSINE_TEMPERATURE + inputs.log_prior, label, reduction="none")
        temperature, dtype = given["log_temperature"].exp(), inputs.log_prior.dtype
        sizes = torch.bincount(inputs.key_label, minlength=case.classes).to(dtype)
        bias = (inputs.log_prior - sizes.log())[inputs.key_label]
        of_vectors = s / temperature.detach() + bias
        contrastive = of_vectors.logsumexp(1) - of_vectors.masked_fill(~same, -torch.inf).logsumexp(1)
        same_id = ids[:, None] == given["key_id"]
        of_temperature = s.detach() / temperature + bias
        # the mean over a class without the own key, in that class alone
        left = (sizes / (sizes - 1))[label].log()
        positive = of_temperature.masked_fill(~same | same_id, -torch.inf).logsumexp(1) + left
        negative = of_temperature.masked_fill(same, -torch.inf).logsumexp(1)
        return supervised + contrastive + torch.logaddexp(negative, positive) - positive

    s = s / TEMPERATURE[case.method]
    own = (positions[:, None] == columns) if leaves_out_own(case.method) else None
    same = same if own is None else same & ~own
    count = same.sum(1)
    pulled = s.masked_fill(~same, 0.0).sum(1)
    if case.method == "bcl":
        assert own is not None
        sizes = torch.bincount(inputs.key_label, minlength=case.classes).to(s.dtype)
        weights = torch.where(same, (sizes[label] - 1)[:, None], sizes[inputs.key_label])
        return (s - weights.log()).masked_fill(own, -torch.inf).logsumexp(1) - pulled / count
    total = (s if own is None else s.masked_fill(own, -torch.inf)).logsumexp(1)
    if case.method == "paco":
        logits = given["logits"] if rows is None else given["logits"][rows]
        adjusted = logits + torch.log(inputs.log_prior.exp() + 1e-9)
        total = torch.logaddexp(adjusted.logsumexp(1), total)
        return total - (adjusted.gather(1, label[:, None])[:, 0] + ALPHA * pulled) / (1 + ALPHA * count)
    return torch.where(count > 0, total - pulled / count.clamp_min(1), 0.0)


def masked_loss(inputs: ContrastiveInputs) -> Tensor:
    return masked_losses(inputs).mean()


# Ours


def _our_step(inputs: ContrastiveInputs) -> Callable[[], Tensor]:
    """The public loss of the case's method."""
    given, case = inputs.tensors, inputs.case
    counts, label, key_label = inputs.counts.cpu(), inputs.target, inputs.key_label
    device = label.device
    if case.method == "views":
        supcon, samples = losses.SupConLoss(temperature=TEMPERATURE["views"]), label[: case.rows // 2].contiguous()
        return lambda: supcon(given["features"], samples)
    if case.method == "bcl":
        bcl = losses.BalancedContrastiveLoss(counts, temperature=TEMPERATURE["bcl"])
        samples = label[: case.rows // 2].contiguous()
        return lambda: bcl(given["features"], samples, given["centers"])
    if case.method == "paco":
        paco = losses.PaCoLoss(counts, alpha=ALPHA, temperature=TEMPERATURE["paco"], device=device)
        own, grad_rows = torch.arange(case.rows, device=device), (0, case.rows)

        def with_queue() -> Tensor:
            query, key = vectors(inputs)
            loss: Tensor = paco(query, label, key, key_label, given["logits"], exclude=own, key_grad_rows=grad_rows)
            return loss

        return with_queue
    if case.method == "gml":
        gml = losses.GMLLoss(counts, device=device)
        ((name, learned),) = gml.named_parameters()
        shared = {name: given["log_temperature"].view(learned.shape)}  # the leaf of every provider
        ids = {"query_id": given["query_id"], "key_id": given["key_id"]}
        arguments = (given["query"], label, given["key"], key_label, given["logits"])
        return lambda: torch.func.functional_call(gml, shared, arguments, ids)
    return lambda: _our_supcon(inputs)


def _our_supcon(inputs: ContrastiveInputs, **options: Any) -> Tensor:
    """Of the methods ``supcon`` and ``moco``. options: a strategy, which the loss itself does not take."""
    case, temperature = inputs.case, TEMPERATURE[inputs.case.method]
    arguments = (*vectors(inputs), inputs.target, inputs.key_label)
    given: dict[str, Any] = {"normalized": True}
    given |= {"exclude": "self"} if leaves_out_own(case.method) else {}
    given |= {"key_grad_rows": (0, case.rows)} if case.method == "moco" else {}
    if not options:
        return functional.supervised_contrastive(*arguments, **{"temperature": temperature, **given})
    sums = functional.partitioned_logsumexp(*arguments, **{"scale": 1 / temperature, **given, **options})
    loss = torch.logaddexp(sums.neg, sums.pos) - sums.pos_sum / sums.num_pos.clamp_min(1)
    return torch.where(sums.num_pos > 0, loss, 0.0).mean()


# Providers


class _Products:
    """The matrix products, in the form of a loss: called for the first, ``backward`` for those of the gradients."""

    def __init__(self, inputs: ContrastiveInputs) -> None:
        self._query, self._key = (x.detach() for x in vectors(inputs))
        self._similarities = self._query.new_empty(len(self._query), len(self._key))
        learning = 0 if inputs.case.method == "views" else _keys_that_learn(inputs.case)
        self._of_query, self._of_key = torch.empty_like(self._query), torch.empty_like(self._key[:learning])

    def __call__(self) -> _Products:
        torch.mm(self._query, self._key.T, out=self._similarities)
        return self

    def backward(self) -> None:
        torch.mm(self._similarities, self._key, out=self._of_query)
        if len(self._of_key) > 0:
            torch.mm(self._similarities[:, : len(self._of_key)].T, self._query, out=self._of_key)


def _compiled(inputs: ContrastiveInputs) -> Step:
    function = torch.compile(dense_loss, fullgraph=True, dynamic=False)
    return lambda: function(inputs)


def _first_headline_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    if device == "cpu" and case.name != _MEMORY:
        return f"on a CPU it is measured in {_MEMORY} only"
    return None


def _metric_learning(inputs: ContrastiveInputs) -> Step:
    module, *_ = (importlib.import_module(f"pytorch_metric_learning.{name}") for name in _PML)
    others = [importlib.import_module(f"pytorch_metric_learning.{name}") for name in _PML[1:]]
    loss = module.SupConLoss(
        temperature=TEMPERATURE[inputs.case.method],
        distance=others[0].DotProductSimilarity(normalize_embeddings=False),
        reducer=others[1].MeanReducer(),
    )

    def step() -> Any:
        query, key = vectors(inputs)
        if inputs.case.method == "views":
            return loss(query, inputs.target)
        return loss(query, inputs.target, ref_emb=key, ref_labels=inputs.key_label)

    return step


_PML = ("losses", "distances", "reducers")


def _metric_learning_unavailable(device: str) -> str | None:
    try:
        for name in _PML:
            importlib.import_module(f"pytorch_metric_learning.{name}")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # other people's packages fail to import in many ways
        return f"pytorch_metric_learning cannot be imported: {first_line(error)}"
    return None


def _metric_learning_left_out(case: Case, dtype: str, device: str) -> str | None:
    assert isinstance(case, ContrastiveCase)
    if case.method in ("views", "moco"):
        return None
    return "it cannot leave out a query's own among other keys" if case.method == "supcon" else "it has no such loss"


def _strategy(name: str, unavailable: Callable[[str], str | None]) -> Provider:
    """One strategy by name, on the backend that the library chooses."""

    def left_out(case: Case, dtype: str, device: str) -> str | None:
        assert isinstance(case, ContrastiveCase)
        if case.method not in ("supcon", "moco"):
            return "its loss leaves the strategy to the library"
        product = getattr(torch, dtype)
        reason = plan.tiled_reason(case.width, product)
        tiled = device == "cuda" and backend_unavailable(OP, "triton", device) is None and reason is None
        if name == "tiled" and reason is not None:
            return reason
        if plan.choose(case.rows, case.keys, product, True, tiled, "auto", 2**31) == name:
            return "it is what the library chooses here by itself"
        return None

    return Provider(
        f"lt-{name}",
        lambda inputs: lambda: _our_supcon(inputs, strategy=name),
        unavailable,
        left_out=left_out,
    )


def _ours_unavailable(device: str) -> str | None:
    return kernels_unavailable(OP, device)


def _tiled_unavailable(device: str) -> str | None:
    return "it needs CUDA tensors" if device == "cpu" else backend_unavailable(OP, "triton", device)


def _ours(backend: str) -> Provider:
    provider = ours(OP, backend, lambda call: call())

    def make(inputs: ContrastiveInputs) -> Step:
        return provider.make(_our_step(inputs))

    return replace(provider, make=make)


def _inputs(inputs: ContrastiveInputs) -> tuple[ContrastiveInputs]:
    return (inputs,)


PROVIDERS = named(
    Provider("gemms", _Products, is_loss=False),
    eager("dense", dense_loss, _inputs),
    eager("masked", masked_loss, _inputs),
    Provider("compile", _compiled, left_out=_first_headline_on_cpu, compiler_seconds=15.0),
    Provider("pml", _metric_learning, _metric_learning_unavailable, left_out=_metric_learning_left_out),
    _ours("reference"),
    _ours("native"),
    _ours("triton"),
    _strategy("materialize", _ours_unavailable),
    _strategy("chunked", _ours_unavailable),
    _strategy("tiled", _tiled_unavailable),
)
