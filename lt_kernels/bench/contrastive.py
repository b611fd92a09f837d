"""Contrastive cases and inputs, and the losses in plain PyTorch: the papers' dense form and a lean one with a mask.

``dense`` is the algorithm of the papers' code, with its masks, one-hots and passes. Only BCL's Python loop over all
keys is one tensor operation here. ``masked`` is the code that a user would write: one mask, and ``logsumexp``. The
losses of GML and PaCo include the cross-entropy of the classifier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.partitioned_logsumexp.configs import SHAPES
from ..queues import ClassQueue
from .cases import BOTH, Case, Inputs, by_name, cases_of, normal

#: Temperatures of the published settings, and the weight of PaCo's positive keys.
TEMPERATURE = {"views": 0.07, "supcon": 0.07, "moco": 0.07, "bcl": 0.1, "paco": 0.2}
COSINE_TEMPERATURE = 1 / 30  # GML's classifier
ALPHA = 0.05


@dataclass(frozen=True)
class ContrastiveCase(Case):
    """A contrastive loss of queries [rows, width] against keys [keys, width]; ``method`` says which.

    views    two views of rows / 2 samples against each other: SupCon in a batch
    supcon   queries against keys whose first rows are the queries' own, which are left out
    moco     queries against the batch's keys and a queue that learns nothing: supervised momentum contrast
    bcl      two views of rows / 2 samples against each other and the centre of each class
    paco     queries against each other and a queue that learns nothing, and logits of a classifier
    gml      queries against keys that all learn, some of each class, and logits of a cosine classifier
    """

    cpu_dtypes: tuple[str, ...] = ("float32",)
    method: str = "supcon"
    keys: int = 0
    width: int = 128
    frozen: bool = False  # supcon alone: the keys learn nothing
    letters = (("N", "rows"), ("M", "keys"), ("D", "width"))

    @property
    def logits(self) -> int:
        """The number of similarities."""
        return self.rows * self.keys

    @property
    def learning_keys(self) -> int:
        """The number of keys that learn."""
        if self.method in ("moco", "paco"):
            return self.rows
        return 0 if self.frozen else self.keys

    @property
    def classifier_logits(self) -> int:
        return self.rows * self.classes if self.method in ("paco", "gml") else 0

    @property
    def uncounted(self) -> int:
        """The elements of all gradients."""
        vectors = {"views": self.rows, "bcl": self.keys, "moco": 2 * self.rows, "paco": self.rows}
        return vectors.get(self.method, self.rows + self.learning_keys) * self.width + self.classifier_logits

    def _draw(self, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Make vectors of norm 1, and labels of queries and keys."""
        n, m, c, device = self.rows, self.keys, self.classes, generator.device

        def vectors(*shape: int, learn: bool = True) -> Tensor:
            x = normal(generator, *shape, self.width)
            return F.normalize(x, dim=-1).to(dtype).requires_grad_(learn)

        def cosines() -> Tensor:
            x = torch.rand(n, c, generator=generator, device=device)
            return x.mul_(2).sub_(1).to(dtype).requires_grad_()

        views = self.method in ("views", "bcl")
        label = self._draw_labels(generator, n // 2).repeat(2) if views else self._draw_labels(generator, n)
        if self.method == "views":
            return label, {"features": vectors(n // 2, 2), "key_label": label}
        if self.method == "bcl":
            key_label = torch.cat([label, torch.arange(c, device=device)])
            return label, {"features": vectors(n // 2, 2), "centers": vectors(c), "key_label": key_label}
        if self.method == "gml":
            sizes = ClassQueue(self.class_counts(), m, 1, base=2).sizes.to(device)
            key_id = torch.randperm(4 * m, generator=generator, device=device)[:m]
            own = (sizes.cumsum(0) - 1)[label]  # the slot that a class wrote last
            return label, {
                "query": vectors(n),
                "key": vectors(m),
                "logits": cosines(),
                "log_temperature": torch.full((), math.log(0.07), device=device).requires_grad_(),
                "key_label": torch.arange(c, device=device).repeat_interleave(sizes),
                "key_id": key_id,
                "query_id": key_id[own],
            }
        key_label = torch.cat([label, self._draw_labels(generator, m - n)])
        common = {"query": vectors(n), "key_label": key_label}
        if self.method == "supcon":
            return label, {**common, "key": vectors(m, learn=not self.frozen)}
        more = {"batch": vectors(n)} if self.method == "moco" else {"logits": cosines()}
        return label, {**common, **more, "queue": vectors(m - n, learn=False)}


_real = cases_of(ContrastiveCase, SHAPES)
_INAT18: dict[str, Any] = {"classes": 8142}
_BFLOAT16: dict[str, Any] = {"cpu_dtypes": ("float32", "bfloat16")}

#: Contrastive losses, [N, D] queries and [M, D] keys.
CASES = by_name(
    _real("supcon-512x16384x128", **_INAT18 | _BFLOAT16, headline=BOTH, note="SupCon with a memory of keys that learn"),
    _real("gml-128x16384x1024-c8142", method="gml", **_INAT18, headline=BOTH, note="GML, all keys of the queue learn"),
    _real("supcon-512x16384x128-frozen", **_INAT18, frozen=True, note="the same with keys that learn nothing"),
    _real("supcon-2x256x128", method="views", classes=1000, note="SupCon, two views of a batch"),
    _real("supcon-2x64x128", method="views", classes=100, note="SupCon, two views of a small batch"),
    _real("moco-256x65536x128", method="moco", **_INAT18, note="SupCon with momentum contrast's queue"),
    _real("bcl-512x8654x1024", method="bcl", **_INAT18, note="BCL, two views and the class centres"),
    _real("paco-64x16398x128", method="paco", **_INAT18, note="PaCo, 8,142 logits and 8,256 keys"),
)


def _small(name: str, method: str, rows: int, keys: int, width: int, classes: int, **options: Any) -> ContrastiveCase:
    return ContrastiveCase(name, rows, classes, method=method, keys=keys, width=width, devices=(), **options)


#: Small ones for tests and for trying the command.
SMALL = by_name(
    _small("views-10x10x5", "views", 10, 10, 5, 4),
    _small("supcon-7x33x5", "supcon", 7, 33, 5, 6),
    _small("supcon-7x33x5-frozen", "supcon", 7, 33, 5, 6, frozen=True),
    _small("moco-5x41x6", "moco", 5, 41, 6, 7),
    _small("bcl-12x17x6", "bcl", 12, 17, 6, 5),
    _small("paco-5x32x6", "paco", 5, 21, 6, 11),
    _small("gml-9x40x6-c11", "gml", 9, 40, 6, 11),
)


# The arguments of every form of a loss


def vectors(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return queries [N, D] and keys [M, D]; views of a batch come first view first."""
    method = inputs.case.method
    if method in ("views", "bcl"):
        query = torch.cat(inputs["features"].unbind(1))
        return query, query if method == "views" else torch.cat([query, inputs["centers"]])
    query = inputs["query"]
    if method == "moco":
        return query, torch.cat([inputs["batch"], inputs["queue"]])
    return query, torch.cat([query, inputs["queue"]]) if method == "paco" else inputs["key"]


def leaves_out_own(method: str) -> bool:
    """Return whether key i is query i itself, and left out."""
    return method in ("views", "supcon", "bcl", "paco")


# The published algorithms


def dense_loss(inputs: Inputs) -> Tensor:
    query, key = vectors(inputs)
    method = inputs.case.method
    if method in ("views", "supcon", "moco"):
        labels = inputs.target, inputs["key_label"]
        return dense_supcon(query, key, *labels, TEMPERATURE[method], leaves_out_own(method))
    return {"bcl": _dense_bcl, "paco": _dense_paco, "gml": _dense_gml}[method](query, key, inputs)


def _masks(query_label: Tensor, key_label: Tensor, own: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Floating: which keys are positive, and which count at all."""
    mask = torch.eq(query_label.view(-1, 1), key_label.view(1, -1)).to(like.dtype)
    logits_mask = torch.ones_like(mask)
    if own:
        diagonal = torch.arange(len(mask), device=mask.device).view(-1, 1)
        logits_mask = torch.scatter(logits_mask, 1, diagonal, 0)
    return mask * logits_mask, logits_mask


def _similarities(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    return torch.div(torch.matmul(query, key.T), temperature)


def _shifted(logits: Tensor) -> Tensor:
    return logits - logits.max(dim=1, keepdim=True).values.detach()


def _pulled(log_prob: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
    """The loss of every similarity's log-probability, of which the mask picks the positives."""
    return -((mask * log_prob).sum(1) / pairs).mean()


def dense_supcon(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor, temperature: float, own: bool
) -> Tensor:
    """Supervised contrastive learning."""
    mask, logits_mask = _masks(query_label, key_label, own, query)
    logits = _shifted(_similarities(query, key, temperature))
    exp_logits = torch.exp(logits) * logits_mask
    log_prob = logits - torch.log(exp_logits.sum(1, keepdim=True))
    pairs = mask.sum(1)
    pairs = torch.where(pairs < 1e-6, 1, pairs)  # queries without positives have loss 0
    return _pulled(log_prob, mask, pairs)


def _dense_bcl(query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
    """Class averaging: exponentials over how many keys their class has, counted in one-hot rows of all keys."""
    key_label = inputs["key_label"]
    counts = torch.eye(inputs.case.classes, device=key.device)[key_label].sum(0)
    mask, logits_mask = _masks(inputs.target, key_label, True, query)
    logits = _shifted(_similarities(query, key, TEMPERATURE["bcl"]))
    exp_logits = torch.exp(logits) * logits_mask
    weight = counts[key_label].view(1, -1).expand(len(query), len(key)) - mask
    log_prob = logits - torch.log(exp_logits.div(weight).sum(1, keepdim=True))
    return _pulled(log_prob, mask, mask.sum(1))


def _dense_paco(query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
    """Adjusted logits of the classes and similarities side by side, and masks as wide as both."""
    mask, logits_mask = _masks(inputs.target, inputs["key_label"], True, query)
    similarities = _similarities(query, key, TEMPERATURE["paco"])
    both = torch.cat((inputs["logits"] + torch.log(inputs.log_prior.exp() + 1e-9), similarities), dim=1)
    both = _shifted(both)
    one_hot = F.one_hot(inputs.target, inputs.case.classes).to(torch.float32)
    mask = torch.cat((one_hot, mask * ALPHA), dim=1)
    logits_mask = torch.cat((torch.ones_like(one_hot), logits_mask), dim=1)
    exp_logits = torch.exp(both) * logits_mask
    log_prob = both - torch.log(exp_logits.sum(1, keepdim=True) + 1e-12)
    return _pulled(log_prob, mask, mask.sum(1))


def _dense_gml(query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
    """Class means of exponentials by products with a one-hot matrix of all keys, once for the vectors and once, without
    each query's own key, for the temperature."""
    label = inputs.target

    def class_means(similarities: Tensor, weights: Tensor) -> Tensor:
        largest = similarities.amax(1, keepdim=True).detach()
        one_hot = F.one_hot(inputs["key_label"], inputs.case.classes).to(weights.dtype)
        sums = ((similarities - largest).exp() * weights) @ one_hot
        return (sums / (weights @ one_hot)).log() + largest

    prior = inputs.log_prior.exp().log()
    temperature = inputs["log_temperature"].exp().view(1)
    similarities = query @ key.T / temperature.detach()
    of_vectors = class_means(similarities, torch.ones_like(similarities))
    others = (inputs["query_id"][:, None] != inputs["key_id"][None, :]).to(similarities.dtype)
    of_temperature = class_means((query @ key.T).detach() / temperature, others)
    supervised = F.cross_entropy(inputs["logits"] / COSINE_TEMPERATURE + prior, label)
    contrastive = F.cross_entropy(of_vectors + prior, label)
    return supervised + contrastive + F.cross_entropy(of_temperature + prior, label)


# The lean form


def masked_losses(inputs: Inputs, rows: Tensor | None = None) -> Tensor:
    """Losses of the queries, or of some: one boolean mask, and ``logsumexp``."""

    def some(values: Tensor) -> Tensor:
        return values if rows is None else values[rows]

    query, key = vectors(inputs)
    case, label, key_label = inputs.case, some(inputs.target), inputs["key_label"]
    positions, columns = some(torch.arange(len(query), device=query.device)), torch.arange(len(key), device=key.device)
    same = label[:, None] == key_label
    s = some(query) @ key.T
    s = s.to(torch.promote_types(s.dtype, torch.float32))

    if case.method == "gml":
        logits = some(inputs["logits"])
        supervised = F.cross_entropy(logits / COSINE_TEMPERATURE + inputs.log_prior, label, reduction="none")
        temperature, dtype = inputs["log_temperature"].exp(), inputs.log_prior.dtype
        sizes = torch.bincount(key_label, minlength=case.classes).to(dtype)
        bias = (inputs.log_prior - sizes.log())[key_label]
        of_vectors = s / temperature.detach() + bias
        contrastive = of_vectors.logsumexp(1) - of_vectors.masked_fill(~same, -torch.inf).logsumexp(1)
        same_id = some(inputs["query_id"])[:, None] == inputs["key_id"]
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
        sizes = torch.bincount(key_label, minlength=case.classes).to(s.dtype)
        weights = torch.where(same, (sizes[label] - 1)[:, None], sizes[key_label])
        return (s - weights.log()).masked_fill(own, -torch.inf).logsumexp(1) - pulled / count
    total = (s if own is None else s.masked_fill(own, -torch.inf)).logsumexp(1)
    if case.method == "paco":
        adjusted = some(inputs["logits"]) + torch.log(inputs.log_prior.exp() + 1e-9)
        total = torch.logaddexp(adjusted.logsumexp(1), total)
        return total - (adjusted.gather(1, label[:, None])[:, 0] + ALPHA * pulled) / (1 + ALPHA * count)
    return torch.where(count > 0, total - pulled / count.clamp_min(1), 0.0)


def masked_loss(inputs: Inputs) -> Tensor:
    return masked_losses(inputs).mean()
