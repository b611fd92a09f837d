"""Contrastive cases and inputs, and the losses in plain PyTorch: the papers' dense form and a lean one with a mask.

``dense`` is the algorithm of the papers' code, with its masks, one-hots and passes. Only BCL's Python loop over all
keys is one tensor operation here. ``masked`` is the code that a user would write: one mask, and ``logsumexp``. The
losses of GML and PaCo include the cross-entropy of the classifier.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..queues import ClassQueue
from .cases import BOTH, Case, Inputs, by_name

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

    method: str = "supcon"
    keys: int = 0
    width: int = 128
    frozen: bool = False  # supcon alone: the keys learn nothing

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "M": self.keys, "D": self.width}

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

    def inputs(self, dtype: torch.dtype, device: str) -> ContrastiveInputs:
        """Make vectors of norm 1; labels of queries and keys are drawn from the class frequencies."""
        generator = torch.Generator(device).manual_seed(0)
        n, m, c, counts = self.rows, self.keys, self.classes, self.class_counts()

        def vectors(*shape: int, learn: bool = True) -> Tensor:
            x = torch.randn(*shape, self.width, generator=generator, device=device)
            return F.normalize(x, dim=-1).to(dtype).requires_grad_(learn)

        def cosines() -> Tensor:
            x = torch.rand(n, c, generator=generator, device=device)
            return x.mul_(2).sub_(1).to(dtype).requires_grad_()

        def labels(size: int) -> Tensor:
            frequencies = counts.to(device, torch.float32)
            return torch.multinomial(frequencies, size, replacement=True, generator=generator)

        query_label = labels(n // 2).repeat(2) if self.method in ("views", "bcl") else labels(n)
        more: dict[str, Tensor] = {}
        if self.method == "views":
            key_label, more = query_label, {"features": vectors(n // 2, 2)}
        elif self.method == "bcl":
            key_label = torch.cat([query_label, torch.arange(c, device=device)])
            more = {"features": vectors(n // 2, 2), "centers": vectors(c)}
        elif self.method == "gml":
            sizes = ClassQueue(counts, m, 1, base=2).sizes.to(device)
            key_label = torch.arange(c, device=device).repeat_interleave(sizes)
            key_id = torch.randperm(4 * m, generator=generator, device=device)[:m]
            own = (sizes.cumsum(0) - 1)[query_label]  # the slot that a class wrote last
            more = {"query": vectors(n), "key": vectors(m), "logits": cosines()}
            more |= {"key_id": key_id, "query_id": key_id[own]}
            more |= {"log_temperature": torch.full((), math.log(0.07), device=device).requires_grad_()}
        else:
            key_label = torch.cat([query_label, labels(m - n)])
            more = {"query": vectors(n)}
            if self.method == "supcon":
                more |= {"key": vectors(m, learn=not self.frozen)}
            else:
                more |= {"batch": vectors(n)} if self.method == "moco" else {"logits": cosines()}
                more |= {"queue": vectors(m - n, learn=False)}
        log_prior = self.log_prior().to(device, torch.float32)
        return ContrastiveInputs(query_label, log_prior, counts.to(device, torch.float32), self, key_label, more)


@dataclass
class ContrastiveInputs(Inputs):
    """Vectors and logits by the names that ``ContrastiveCase.inputs`` gives them; ``target`` [N]: queries' labels."""

    case: ContrastiveCase
    key_label: Tensor  # [M]
    tensors: dict[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def converted(self, dtype: torch.dtype) -> ContrastiveInputs:
        """Return fresh leaves in another dtype."""
        tensors = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors, log_prior=self.log_prior.to(dtype))


def _contrast(
    name: str, method: str, rows: int, keys: int, width: int, classes: int, **options: Any
) -> ContrastiveCase:
    options = {"cpu_dtypes": ("float32",), **options}
    return ContrastiveCase(name, rows, classes, method=method, keys=keys, width=width, **options)


_INAT18: dict[str, Any] = {"classes": 8142, "counts": "inat18_like"}
_WITH_BFLOAT16: dict[str, Any] = {"cpu_dtypes": ("float32", "bfloat16")}

#: Contrastive losses, [N, D] queries and [M, D] keys.
CASES = by_name(
    _contrast(
        "supcon-512x16384x128",
        "supcon",
        512,
        16_384,
        128,
        headline=BOTH,
        note="SupCon with a memory of keys that learn",
        **_INAT18,
        **_WITH_BFLOAT16,
    ),
    _contrast(
        "gml-128x16384x1024-c8142",
        "gml",
        128,
        16_384,
        1024,
        headline=BOTH,
        note="GML, all keys of the queue learn",
        **_INAT18,
    ),
    _contrast(
        "supcon-512x16384x128-frozen",
        "supcon",
        512,
        16_384,
        128,
        frozen=True,
        note="the same with keys that learn nothing",
        **_INAT18,
    ),
    _contrast(
        "supcon-2x256x128", "views", 512, 512, 128, 1000, counts="imagenet_lt", note="SupCon, two views of a batch"
    ),
    _contrast("moco-256x65536x128", "moco", 256, 65_536, 128, note="SupCon with momentum contrast's queue", **_INAT18),
    _contrast("bcl-512x8654x1024", "bcl", 512, 8654, 1024, note="BCL, two views and the class centres", **_INAT18),
    _contrast("paco-64x16398x128", "paco", 64, 8256, 128, note="PaCo, 8,142 logits and 8,256 keys", **_INAT18),
)

#: Small ones for tests and for trying the command.
SMALL = by_name(
    _contrast("views-10x10x5", "views", 10, 10, 5, 4, devices=()),
    _contrast("supcon-7x33x5", "supcon", 7, 33, 5, 6, devices=()),
    _contrast("supcon-7x33x5-frozen", "supcon", 7, 33, 5, 6, frozen=True, devices=()),
    _contrast("moco-5x41x6", "moco", 5, 41, 6, 7, devices=()),
    _contrast("bcl-12x17x6", "bcl", 12, 17, 6, 5, devices=()),
    _contrast("paco-5x32x6", "paco", 5, 21, 6, 11, devices=()),
    _contrast("gml-9x40x6-c11", "gml", 9, 40, 6, 11, devices=()),
)


# The arguments of every form of a loss


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
    """Say whether key i is query i itself, and left out."""
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
