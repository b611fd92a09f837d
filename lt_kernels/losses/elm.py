"""ELM: margins between logits and, by a regulariser, between embeddings."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as LF
from .._checks import (
    ClassVector,
    as_class_vector,
    check_choice,
    check_embeddings,
    check_flag,
    check_number,
    check_positive,
    check_shape,
)
from .._smooth import quick_logaddexp
from ..priors import ClassPrior
from ._contrastive_base import (
    ContrastiveLossBase,
    ContrastiveOptions,
    check_labels,
    checkpointed,
    row_chunks,
    shown_temperature,
    zero_rows,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

REGULARIZERS = ("pairwise", "contrastive", "spread")
LOGIT_MARGINS = ("logit_adjustment", "ldam")


class ELMTerms(NamedTuple):
    """The total of [`ELMLoss`][lt_kernels.losses.ELMLoss] and its parts, the second without its weight."""

    total: Tensor
    logit: Tensor
    embedding: Tensor


class ELMKeys(TypedDict, total=False):
    """What the embeddings are compared with, for type checkers."""

    key: Tensor | None
    key_label: Tensor | None
    exclude: Tensor | Literal["self"] | None


class ELMLoss(ContrastiveLossBase):
    """Embedding and logit margins.

    Jitkrittum, Menon, Rawat, Kumar, *ELM: Embedding and Logit Margins for Long-Tail Learning*, 2022: one objective that
    enforces margins in logit space and regularises the distribution of the embeddings.

    [unverified]: only the abstract could be read, neither a formula nor code. The regularisers below are this
    package's, made after what the abstract says (metric and contrastive learning, tighter embeddings of tail classes);
    no number of the paper has been reproduced.

        loss = CE with logit margins + embedding_weight R

    With unit embeddings z, s_ij = <z_i, z_j> / T over the other samples of the batch (or keys), P_i positives, of the
    same class, a margin delta_y that grows for rarer classes, and b the logit half's class bias, R is the mean of

        "pairwise"      1/P_i sum over positives p of log[ 1 + sum over negatives j of exp(s_ij - s_ip + delta_y) ]
        "contrastive"   log[ sum over positives p of exp(s_ip) + sum over negatives j of
                             exp(s_ij + b_j - b_y + delta_y) ] - 1/P_i sum over positives p of s_ip
        "spread"        delta_y 1/P_i sum over positives p of |z_i - z_p|^2

    0 for a sample without positives, which counts in the mean. Sets ``class_bias`` = tau log pi or the margins of LDAM,
    and ``embedding_margin`` [C]. [`WithinClassSpread`][lt_kernels.metrics.WithinClassSpread] measures what R is for.

    "contrastive" and "spread" are one sweep over the keys. "pairwise" takes one for the negatives, then compares them
    with the positives in chunks of rows, whose similarities are computed again in backward: it keeps no N x M matrix
    either, but does about twice the work.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        tau: of the logit adjustment.
        embedding_weight: weight of R.
        regularizer: R.
        embedding_margin: delta: a number m: m n^-1/4 / max(n^-1/4), the rarest class has m, as the margins of LDAM; or
            a vector [C], fixed.
        temperature: T; a number, or a 0-dim tensor: an ``nn.Parameter`` is a parameter of the loss and is trained,
            another tensor is a buffer.
        logit_margin: ``"logit_adjustment"``, or ``"ldam"``: margins ``max_margin`` n^-1/4 / max(n^-1/4) on the target,
            and no class bias.
        max_margin: of LDAM.
        scale: multiplies the logits; LDAM's are cosines, with a scale of 30.
        normalize: divide embeddings by their norm first. Otherwise they must be unit vectors.
        options: ``ignore_index``, ``reduction``, ``empty_mean``, ``zero_counts``, ``device``, ``dtype``,
            ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        IndexError: a label or ``exclude`` out of range, on the CPU or with checks on.

    Example:
        >>> loss = ELMLoss([900, 90, 10], regularizer="contrastive")
        >>> logits, embeddings = torch.randn(6, 3, requires_grad=True), torch.randn(6, 16, requires_grad=True)
        >>> loss(logits, embeddings, torch.tensor([0, 1, 2, 0, 1, 0])).backward()
        >>> loss.embedding_margin
        tensor([0.1623, 0.2887, 0.5000])
    """

    _CLASS_TENSORS = ("class_counts", "class_bias", "margin", "embedding_margin")

    margin: Tensor | None
    embedding_margin: Tensor
    temperature: float | Tensor

    def __init__(
        self,
        class_counts: ClassVector,
        tau: float = 1.0,
        embedding_weight: float = 0.1,
        regularizer: Literal["pairwise", "contrastive", "spread"] = "pairwise",
        *,
        embedding_margin: float | ClassVector = 0.5,
        temperature: float | Tensor = 0.1,
        logit_margin: Literal["logit_adjustment", "ldam"] = "logit_adjustment",
        max_margin: float = 0.5,
        scale: float = 1.0,
        normalize: bool = True,
        **options: Unpack[ContrastiveOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        check_choice("regularizer", regularizer, REGULARIZERS)
        check_choice("logit_margin", logit_margin, LOGIT_MARGINS)
        self.regularizer, self.logit_margin = regularizer, logit_margin
        self.tau, self.max_margin = check_number("tau", tau), check_number("max_margin", max_margin, 0.0)
        self.embedding_weight = check_number("embedding_weight", embedding_weight, 0.0)
        self._set("temperature", self._scalar("temperature", temperature, check_positive))
        self.normalize = check_flag("normalize", normalize)
        self._rule: float | None = None
        if isinstance(embedding_margin, Real):
            self._rule = check_number("embedding_margin", embedding_margin, 0.0)
        self._set_counts(class_counts)
        if self._rule is None:
            fixed = as_class_vector("embedding_margin", embedding_margin)  # type: ignore[arg-type]
            assert self.class_counts is not None
            if len(fixed) != len(self.class_counts):
                raise ValueError(f"embedding_margin: got {len(fixed)} values, expected {len(self.class_counts)}")
            self._keep_start("embedding_margin", fixed)
            self._set("embedding_margin", fixed.to(self.class_counts))

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        derived: dict[str, Tensor] = {} if self._rule is None else {"embedding_margin": prior.ldam_margins(self._rule)}
        if self.logit_margin == "ldam":
            return {**derived, "margin": prior.ldam_margins(self.max_margin)}
        return {**derived, "class_bias": prior.log_prior(self.tau)}

    @overload
    def forward(
        self,
        logits: Tensor,
        embeddings: Tensor,
        target: Tensor,
        *,
        return_terms: Literal[False] = False,
        **keys: Unpack[ELMKeys],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        logits: Tensor,
        embeddings: Tensor,
        target: Tensor,
        *,
        return_terms: Literal[True],
        **keys: Unpack[ELMKeys],
    ) -> ELMTerms: ...
    @overload
    def forward(
        self,
        logits: Tensor,
        embeddings: Tensor,
        target: Tensor,
        *,
        return_terms: bool = False,
        **keys: Unpack[ELMKeys],
    ) -> Tensor | ELMTerms: ...
    def forward(
        self,
        logits: Tensor,
        embeddings: Tensor,
        target: Tensor,
        *,
        key: Tensor | None = None,
        key_label: Tensor | None = None,
        exclude: Tensor | Literal["self"] | None = None,
        return_terms: bool = False,
    ) -> Tensor | ELMTerms:
        """Return the loss of float16, bfloat16, float32 or float64 logits and embeddings.

        Args:
            logits: [N, C].
            embeddings: [N, D].
            target: [N], any integer dtype; samples of ``ignore_index`` contribute nothing.
            key: [M, D], to compare the embeddings with; None: the embeddings themselves, each but with itself.
            key_label: [M]; keys of label -1, such as empty slots of a queue, count nowhere.
            exclude: [N], the key that each embedding leaves out, -1 for none; ``"self"``: key i of embedding i. Only
                with ``key``.
            return_terms: return ``ELMTerms(total, logit, embedding)``.

        Returns:
            0-dim, or [N] with ``reduction="none"``; float32 (float64 for float64).
        """
        check_embeddings("logits", logits, "[N, C]")
        check_embeddings("embeddings", embeddings, "[N, D]")
        classes = logits.shape[1]
        self._check_counted(classes, "logits")
        check_shape("logits", logits, (len(embeddings), classes))
        if (key is None) != (key_label is None):
            given, missing = ("key_label", "key") if key is None else ("key", "key_label")
            raise ValueError(f"{missing}: got None with {given}, expected both or neither")
        if key is None and exclude is not None:
            raise ValueError("exclude: got one without key, expected None (embeddings leave themselves out)")
        target, label, is_class = check_labels(
            "target", target, (len(embeddings),), classes, embeddings, self.ignore_index
        )
        of_logits = LF.margin_cross_entropy(
            logits, target, class_bias=self.class_bias, margin=self.margin, scale=self.scale,
            ignore_index=self.ignore_index, reduction=self.reduction, empty_mean=self.empty_mean,
        )  # fmt: skip
        embeddings = zero_rows(embeddings, target == self.ignore_index)
        query = F.normalize(embeddings, dim=1) if self.normalize else embeddings
        if key is None or key_label is None:
            key, of_keys, is_key, exclude = query, label, is_class, "self"
        else:
            check_embeddings("key", key, "[M, D]")
            _, of_keys, is_key = check_labels("key_label", key_label, (len(key),), classes, embeddings, -1)
            key = F.normalize(key, dim=1) if self.normalize else key
        no_class = ~is_class
        no_key = no_class if is_key is is_class else ~is_key
        rows = self._regularizer(query, label.masked_fill(no_class, -2), label, key, of_keys, no_key, exclude)
        embedding = self._reduce(rows, is_class)
        total = of_logits + self.embedding_weight * embedding
        return ELMTerms(total, of_logits, embedding) if return_terms else total

    def _regularizer(
        self,
        query: Tensor,
        query_label: Tensor,
        label: Tensor,
        key: Tensor,
        key_label: Tensor,
        no_key: Tensor,
        exclude: Tensor | Literal["self"] | None,
    ) -> Tensor:
        """Return R of each row [N], 0 without positives; ``query_label`` is -2 where ``label`` is of no class."""
        scale = 1 / self.temperature
        key_bias = torch.zeros_like(key_label, dtype=self.embedding_margin.dtype)
        of_class = self.class_bias if self.regularizer == "contrastive" else None
        if of_class is not None:
            # class bias of no class (masked): its keys have none either
            of_class = of_class.masked_fill(of_class == -math.inf, 0.0)
            key_bias = of_class[key_label]
        key_bias = key_bias.masked_fill(no_key, -math.inf)
        query_label, key_label = query_label.to(torch.int32), key_label.to(torch.int32).masked_fill(no_key, -1)
        sums = LF.partitioned_logsumexp(
            query, key, query_label, key_label,
            scale=scale, key_bias=key_bias, exclude=exclude,
        )  # fmt: skip
        dtype = sums.neg.dtype
        delta = self.embedding_margin[label].to(dtype)
        alone, count = sums.num_pos == 0, sums.num_pos.clamp_min(1)
        if self.regularizer == "spread":
            rows = delta * (2 - 2 * self.temperature * sums.pos_sum / count)
        elif self.regularizer == "contrastive":
            own_bias = 0.0 if of_class is None else of_class[label].to(dtype)
            pos = (sums.pos - own_bias).masked_fill(alone, 0.0)
            rows = quick_logaddexp(sums.neg - own_bias + delta, pos) - sums.pos_sum / count
        else:
            left_out = torch.arange(len(query), device=query.device) if isinstance(exclude, str) else exclude
            rows = self._pairwise(query, query_label, key, key_label, left_out, sums.neg + delta) / count
        return rows.masked_fill(alone, 0.0)

    def _pairwise(
        self,
        query: Tensor,
        query_label: Tensor,
        key: Tensor,
        key_label: Tensor,
        exclude: Tensor | None,
        against: Tensor,
    ) -> Tensor:
        """Return the sum over positives p of softplus(against - s_ip) for each row, [N]."""
        columns = torch.arange(len(key), device=key.device)

        # all that is differentiated is an argument: functional_call has its own temperature, in backward too
        def chunk(
            query: Tensor,
            label: Tensor,
            against: Tensor,
            key: Tensor,
            temperature: float | Tensor,
            left_out: Tensor | None,
        ) -> Tensor:
            s = query.to(against.dtype) @ key.to(against.dtype).T / temperature
            is_positive = label[:, None] == key_label
            if left_out is not None:
                is_positive = is_positive & (left_out[:, None] != columns)
            return torch.where(is_positive, F.softplus(against[:, None] - s), 0.0).sum(1)

        parts = row_chunks(len(query), len(key))
        if len(parts) == 1:
            rows: Tensor = checkpointed(chunk, query, query_label, against, key, self.temperature, exclude)
            return rows
        values = []
        for part in parts:
            left_out = None if exclude is None else exclude[part]
            of_part = (query[part], query_label[part], against[part], key, self.temperature, left_out)
            values.append(checkpointed(chunk, *of_part))
        return torch.cat(values)

    def extra_repr(self) -> str:
        own: dict[str, Any] = {"regularizer": self.regularizer, "embedding_weight": self.embedding_weight}
        own |= {"temperature": shown_temperature(self.temperature), "logit_margin": self.logit_margin}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in own.items())])
