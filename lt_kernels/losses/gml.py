"""GML: mutual information of features and labels, by a classifier and a contrastive part over a queue of classes."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _settings
from .. import functional as LF
from .._checks import ClassVector, as_int64, check_embeddings, check_int, check_number, check_positive
from .._smooth import quick_logaddexp
from ..priors import ClassPrior
from ._contrastive_base import (
    ContrastiveLossBase,
    ContrastiveOptions,
    check_ids,
    check_label_values,
    check_labels,
    checkpointed,
    count_classes,
    row_chunks,
    zero_rows,
)
from .pixels import sample_pixels

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Temperature of the distillation, published.
DISTILLATION_TEMPERATURE = 4.0


class GMLTerms(NamedTuple):
    """The total of [`GMLLoss`][lt_kernels.losses.GMLLoss] and its parts, without their weights."""

    total: Tensor
    sup: Tensor
    con: Tensor
    con_temperature: Tensor
    div: Tensor | None  #: None with alpha 0


class GMLOptions(TypedDict, total=False):
    """The optional arguments of a call, for type checkers."""

    target: Tensor | None
    query_id: Tensor | None
    key_id: Tensor | None
    own_key: Tensor | None
    teacher_logits: Tensor | None
    generator: torch.Generator | None


class GMLLoss(ContrastiveLossBase):
    """The loss of GML: a cosine classifier and a contrastive classifier over class means of a queue.

    Suh, Seo, *Long-Tailed Recognition by Mutual Information Maximization between Latent Features and Ground-Truth
    Labels*, ICML 2023. With the mean over the n_c keys of class c

        S_ic = log[ 1/n_c sum over keys k of class c of exp(<q_i, k> / T) ],

        L_sup   = CE(scale cos + log pi, y)
        L_con   = CE(S + log pi, y)        T fixed; gradient to queries and keys
        L_con_T = CE(S' + log pi, y)       S' without keys of the query's own sample; gradient to T only
        L_div   = 16 KL(softmax(scale teacher_logits / 4) || softmax(scale cos / 4))
        loss    = gamma L_sup + beta (L_con + L_con_T) + alpha L_div

    Sets ``class_bias`` = log pi, and for each key the bias log pi_l - log n_l: then the softmax over classes is a sum
    over keys. L_con and L_con_T come from one sweep over the keys, forward and backward. If ids tell the own keys, the
    positives of other samples are compared once more, in chunks of rows: at most 2^22 similarities are kept.

    ``log_temperature`` = log T is a parameter, 0-dim; leave it out of weight decay, as published. Keys are those
    of a [`ClassQueue`][lt_kernels.queues.ClassQueue], after the enqueue of the batch, perhaps through a network that
    learns. Classes without keys take no part. A query without keys of its class (in L_con_T: of other
    samples) contributes 0 to that term (the published code gives NaN) and counts in its mean. Predict with the cosines
    alone.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        beta: weight of the contrastive parts; 0 leaves them out.
        gamma: weight of the classifier's part.
        alpha: weight of the distillation; published: 1 on CIFAR, 0 otherwise.
        temperature: T at the start.
        scale: of the cosines.
        pixels_per_class: for segmentation: of each class up to this many pixels of the batch are queries (see
            [`sample_pixels`][lt_kernels.losses.sample_pixels]), where the call has ``query`` [N, D, H, W].
        options: ``ignore_index``, ``reduction``, ``empty_mean``, ``zero_counts``, ``device``, ``dtype``,
            ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        IndexError: a label or ``own_key`` out of range, on the CPU or with checks on; on a GPU without checks the loss
            of a query of no class is NaN, and a key of no class counts nowhere.

    Example:
        >>> from lt_kernels import ClassQueue
        >>> loss, queue = GMLLoss([90, 9, 1]), ClassQueue([90, 9, 1], size=32, dim=16)
        >>> labels, cosines = torch.tensor([0, 1, 2, 0]), torch.rand(4, 3, requires_grad=True)
        >>> index = torch.tensor([70, 71, 72, 73])  # of the samples in the training set
        >>> slots = queue.enqueue(torch.randn(4, 16), labels, index)  # the teacher's features
        >>> query = F.normalize(torch.randn(4, 16), dim=1).requires_grad_()
        >>> key = F.normalize(queue.features, dim=1)
        >>> loss(query, labels, key, queue.labels, cosines, query_id=index, key_id=queue.ids).backward()
        >>> loss.log_temperature.grad.shape
        torch.Size([])
    """

    log_temperature: nn.Parameter

    def __init__(
        self,
        class_counts: ClassVector,
        beta: float = 1.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 0.07,
        *,
        scale: float = 30.0,
        pixels_per_class: int | None = None,
        **options: Unpack[ContrastiveOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.beta, self.gamma = check_number("beta", beta, 0.0), check_number("gamma", gamma, 0.0)
        self.alpha = check_number("alpha", alpha, 0.0)
        if pixels_per_class is not None:
            check_int("pixels_per_class", pixels_per_class, 1, kind="an int or None")
        self.pixels_per_class = pixels_per_class
        self._set_counts(class_counts)
        assert self.class_bias is not None
        start = math.log(check_positive("temperature", temperature))
        self._keep_start("log_temperature", torch.tensor(start, device="cpu"))
        self._set("log_temperature", nn.Parameter(self.class_bias.new_tensor(start)))

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"class_bias": prior.log_prior()}

    @property
    def temperature(self) -> Tensor:
        """T, 0-dim."""
        return self.log_temperature.exp()

    @overload
    def forward(
        self,
        query: Tensor,
        query_label: Tensor,
        key: Tensor,
        key_label: Tensor,
        logits: Tensor,
        *,
        return_terms: Literal[False] = False,
        **options: Unpack[GMLOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        query_label: Tensor,
        key: Tensor,
        key_label: Tensor,
        logits: Tensor,
        *,
        return_terms: Literal[True],
        **options: Unpack[GMLOptions],
    ) -> GMLTerms: ...
    @overload
    def forward(
        self,
        query: Tensor,
        query_label: Tensor,
        key: Tensor,
        key_label: Tensor,
        logits: Tensor,
        *,
        return_terms: bool = False,
        **options: Unpack[GMLOptions],
    ) -> Tensor | GMLTerms: ...
    def forward(
        self,
        query: Tensor,
        query_label: Tensor,
        key: Tensor,
        key_label: Tensor,
        logits: Tensor,
        *,
        target: Tensor | None = None,
        query_id: Tensor | None = None,
        key_id: Tensor | None = None,
        own_key: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_terms: bool = False,
    ) -> Tensor | GMLTerms:
        """Return the loss of float16, bfloat16, float32 or float64 queries and logits.

        Args:
            query: [N, D], unit vectors; or [N, D, H, W], of which ``pixels_per_class`` are drawn.
            query_label: [N], any integer dtype; or [N, H, W]. Queries of ``ignore_index`` contribute nothing, nor
                does padding, -1, where there is a ``target``.
            key: [M, D], unit vectors; they receive gradients if they require them.
            key_label: [M]; keys of label -1, such as empty slots, count nowhere.
            logits: cosines [N, C], or [N, C, H, W].
            target: the classes of ``logits``; None: ``query_label``. For queries that are drawn beforehand.
            query_id: [N], or [N, H, W] of the embeddings' size: which sample each query is, negative for none.
            key_id: [M], likewise; all keys of a query's label and id are its own, as published.
            own_key: like ``query_id``: the query's own key, -1 for none, in place of ids;
                [`ClassQueue.enqueue`][lt_kernels.queues.ClassQueue.enqueue] returns it. It leaves out that key alone:
                older keys of the same sample, if the queue holds any, count like others. One sweep serves both terms.
            teacher_logits: cosines like ``logits``; needed with alpha > 0, and refused otherwise.
            generator: draws the pixels; on the device of ``query``.
            return_terms: return ``GMLTerms(total, sup, con, con_temperature, div)``.

        Returns:
            0-dim, or [N] with ``reduction="none"`` (not where queries are drawn); float32 (float64 for float64
            queries). Means are over the queries and targets that are not ignored.
        """
        if isinstance(query, Tensor) and query.dim() == 4:
            query, query_label, target, query_id, own_key = self._drawn(
                query, query_label, target, query_id, own_key, generator
            )
        elif generator is not None:
            raise ValueError("generator: got one with query [N, D], expected None (no pixels are drawn)")
        check_embeddings("query", query, "[N, D]")
        check_embeddings("key", key, "[M, D]")
        if self.reduction == "none" and target is not None:
            raise ValueError("target: got one with reduction 'none', expected None (rows and targets differ)")
        name, of_logits = ("query_label", query_label) if target is None else ("target", target)
        check_embeddings("logits", logits, "[N, C, H, W]" if getattr(logits, "ndim", 2) == 4 else "[N, C]")
        classes = logits.shape[1]
        self._check_counted(classes, "logits")
        shape = (len(logits), *logits.shape[2:])
        of_logits = check_label_values(name, of_logits, shape, classes, logits, self.ignore_index)
        sup = LF.margin_cross_entropy(
            logits, of_logits, class_bias=self.class_bias, scale=self.scale, ignore_index=self.ignore_index,
            reduction=self.reduction, empty_mean=self.empty_mean,
        )  # fmt: skip
        total = self.gamma * sup
        con = con_temperature = torch.zeros_like(sup)
        if self.beta > 0:
            own = self._own(query, key, query_id, key_id, own_key)
            con, con_temperature = self._contrastive(query, query_label, key, key_label, own)
            total = total + self.beta * (con + con_temperature)
        else:  # DistributedDataParallel expects a gradient of every parameter
            total = total + 0.0 * self.log_temperature
        div = self._distillation(logits, of_logits, teacher_logits)
        if div is not None:
            total = total + self.alpha * div
        return GMLTerms(total, sup, con, con_temperature, div) if return_terms else total

    def _contrastive(
        self, query: Tensor, query_label: Tensor, key: Tensor, key_label: Tensor, own: Tensor | _SampleIds | None
    ) -> tuple[Tensor, Tensor]:
        """Return L_con and L_con_T."""
        assert self.class_bias is not None
        classes = len(self.class_bias)
        given = check_ids("query_label", query_label, (len(query),), query)
        given = given.masked_fill(given == self.ignore_index, -1)
        query = zero_rows(query, given == -1)
        _, label, is_class = check_labels("query_label", given, (len(query),), classes, query, -1)
        _, key_class, is_key = check_labels("key_label", key_label, (len(key),), classes, query, -1)
        counts = count_classes(key_class, is_key, classes).to(self.class_bias.dtype)
        bias = (self.class_bias - counts.clamp_min(1).log())[key_class].masked_fill(~is_key, -math.inf)
        # queries of no class match no key
        labels = torch.where(is_class, label, -2), torch.where(is_key, key_class, -1)
        scale = (-self.log_temperature).exp()
        if isinstance(own, _SampleIds):
            sides = _without_sample(query, key, labels, scale, bias, own)
        else:
            sides = _without_one_key(query, key, labels, counts[label], scale, bias, own)
        con = _softplus_where(sides.matched, sides.neg - torch.where(sides.matched, sides.pos, 0.0))
        of_others = torch.where(sides.has_others, sides.others, 0.0)
        con_temperature = _softplus_where(sides.has_others, sides.neg_of_scale - of_others)
        counted = given != -1
        nothing = torch.where(is_class | ~counted, 0.0, math.nan)  # a class out of range, on a GPU
        return self._reduce(con + nothing, counted), self._reduce(con_temperature + nothing, counted)

    def _own(
        self, query: Tensor, key: Tensor, query_id: Tensor | None, key_id: Tensor | None, own_key: Tensor | None
    ) -> Tensor | _SampleIds | None:
        """Return what tells each query's own keys: the one key [N], -1 for none; or ids; or nothing."""
        if (query_id is None) != (key_id is None):
            given, missing = ("key_id", "query_id") if query_id is None else ("query_id", "key_id")
            raise ValueError(f"{missing}: got None with {given}, expected both or neither")
        if own_key is not None:
            if query_id is not None:
                raise ValueError("own_key: got both own_key and ids, expected one of them")
            _, index, is_key = check_labels("own_key", own_key, (len(query),), len(key), query, -1, "key")
            return index.masked_fill(~is_key, -1)
        if query_id is None or key_id is None:
            return None
        ids = check_ids("query_id", query_id, (len(query),), query)
        return _SampleIds(ids, check_ids("key_id", key_id, (len(key),), query))

    def _distillation(self, logits: Tensor, target: Tensor, teacher_logits: Tensor | None) -> Tensor | None:
        if teacher_logits is None and self.alpha == 0:
            return None
        if teacher_logits is None or self.alpha == 0:
            got = "None" if teacher_logits is None else "logits"
            raise ValueError(
                f"teacher_logits: got {got} with alpha {self.alpha}, expected them if and only if alpha > 0"
            )
        check_embeddings("teacher_logits", teacher_logits, "[N, C]" if logits.dim() == 2 else "[N, C, H, W]")
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f"teacher_logits: got shape {tuple(teacher_logits.shape)}, expected {tuple(logits.shape)} as logits"
            )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        factor = self.scale / DISTILLATION_TEMPERATURE
        student, teacher = (factor * z.to(dtype) for z in (logits, teacher_logits.detach()))
        if self.masked_classes:
            assert self.class_bias is not None
            # finite: a log-softmax of -inf would be 0 * -inf in the divergence
            masked = (self.class_bias == -math.inf).view(-1, *[1] * (logits.dim() - 2))
            student, teacher = (z.masked_fill(masked, torch.finfo(dtype).min / 4) for z in (student, teacher))
        student, teacher = student.log_softmax(1), teacher.log_softmax(1)
        rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * DISTILLATION_TEMPERATURE**2
        counted = as_int64("query_label", target) != self.ignore_index
        return self._reduce(torch.where(counted, rows, 0.0), counted)

    def _drawn(
        self,
        query: Tensor,
        query_label: Tensor,
        target: Tensor | None,
        query_id: Tensor | None,
        own_key: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return pixels as queries: their features, labels, the classes of the logits, their ids and own keys."""
        assert self.class_bias is not None
        if self.pixels_per_class is None:
            raise ValueError(
                f"query: got shape {tuple(query.shape)}, expected [N, D], or pixels_per_class in the constructor"
            )
        if self.reduction == "none":
            raise ValueError("reduction: got 'none' with query [N, D, H, W], expected 'mean' or 'sum' (drawn pixels)")
        sample = sample_pixels(
            query, query_label, self.pixels_per_class, self.ignore_index,
            num_classes=len(self.class_bias), generator=generator,
        )  # fmt: skip
        shape = (query.shape[0], *query.shape[2:])
        taken = [
            None if value is None else sample.take(check_ids(name, value, shape, query))
            for name, value in (("query_id", query_id), ("own_key", own_key))
        ]
        return sample.features, sample.labels, query_label if target is None else target, taken[0], taken[1]

    def extra_repr(self) -> str:
        own = {"beta": self.beta, "gamma": self.gamma, "alpha": self.alpha}
        if self.pixels_per_class is not None:
            own["pixels_per_class"] = self.pixels_per_class
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in own.items())])


class _SampleIds(NamedTuple):
    """Which sample queries and keys are; negative: none."""

    of_queries: Tensor  # [N]
    of_keys: Tensor  # [M]


class _Vectors(NamedTuple):
    """Queries or keys, with what is compared of them."""

    features: Tensor  # [N, D]
    label: Tensor  # [N]
    id: Tensor  # [N]


class _Sides(NamedTuple):
    """Log-sum-exps [N] of both terms: gradients of the first three reach features, of the others the scale."""

    neg: Tensor
    pos: Tensor
    matched: Tensor  # whether there are positives
    neg_of_scale: Tensor
    others: Tensor  # the positives of other samples, raised to the mean over them
    has_others: Tensor


def _without_one_key(
    query: Tensor,
    key: Tensor,
    labels: tuple[Tensor, Tensor],
    count: Tensor,
    scale: Tensor,
    bias: Tensor,
    own: Tensor | None,
) -> _Sides:
    """Leave at most one key out for each query, in one sweep; ``count`` [N] is how many keys its class has."""
    if own is not None and len(key) > 0:
        at = own.clamp(0, len(key) - 1)
        own = torch.where((own == at) & (labels[1][at] == labels[0]), own, -1)
    elif own is not None:
        own = None
    sums, of_scale = LF.partitioned_logsumexp(
        query, key, *labels, scale=scale, key_bias=bias, exclude=own, separate_scale=True
    )
    others = sums.num_pos > 0
    if own is None:
        return _Sides(sums.neg, sums.pos, others, of_scale.neg, of_scale.pos, others)
    # the own key's term, and a finite stand-in for the logarithm of nothing: -inf would have no slope
    has, at, dtype = own >= 0, own.clamp_min(0), sums.pos.dtype
    floor = torch.finfo(dtype).min / 4
    similarity = (query.to(dtype) * _rows_of(key, at).to(dtype)).sum(1)
    term = scale.detach().to(dtype) * similarity + bias[at].to(dtype)
    pos = quick_logaddexp(sums.pos.clamp_min(floor), torch.where(has, term, floor).clamp_min(floor))
    offset = (count.clamp_min(1) / (count - has.to(count.dtype)).clamp_min(1)).log().to(dtype)
    return _Sides(sums.neg, pos, others | has, of_scale.neg, of_scale.pos + offset, others)


def _rows_of(key: Tensor, at: Tensor) -> Tensor:
    """Return key[at] [N, D].

    On the CPU its gradient is sparse, unless second derivatives may be wanted (on the reference backend, asked for by
    name): autograd adds it in place to that of the sweep, without zeros [M, D] of its own.
    """
    if key.device.type != "cpu" or torch.compiler.is_compiling() or _settings.backend == "reference":
        return key[at]
    return F.embedding(at, key, sparse=True)


def _without_sample(
    query: Tensor, key: Tensor, labels: tuple[Tensor, Tensor], scale: Tensor, bias: Tensor, ids: _SampleIds
) -> _Sides:
    """Leave all keys of each query's own sample out of the temperature's term.

    One sweep makes the sums of all keys. The positives of other samples, whose gradient reaches the scale alone, are
    compared in chunks of rows; several are computed again in backward.
    """
    sums, of_scale = LF.partitioned_logsumexp(query, key, *labels, scale=scale, key_bias=bias, separate_scale=True)
    dtype = sums.pos.dtype
    queries = _Vectors(query.detach().to(dtype), labels[0], ids.of_queries)
    keys = _Vectors(key.detach().to(dtype), labels[1], ids.of_keys)
    parts = row_chunks(len(query), len(key))
    compare = _other_positives if len(parts) == 1 else partial(checkpointed, _other_positives)
    found = [
        compare(_Vectors(*(each[part] for each in queries)), keys, scale.to(dtype), bias.to(dtype)) for part in parts
    ]
    others, count = (torch.cat(each) for each in zip(*found, strict=True))
    mean = (sums.num_pos.clamp_min(1) / count.clamp_min(1)).log()
    return _Sides(sums.neg, sums.pos, sums.num_pos > 0, of_scale.neg, others + mean, count > 0)


def _other_positives(queries: _Vectors, keys: _Vectors, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over positives of other samples, and their number."""
    of_others = (queries.id[:, None] != keys.id) | (queries.id < 0)[:, None]
    keep = (queries.label[:, None] == keys.label) & of_others
    s = (queries.features @ keys.features.T).to(bias.dtype)  # autocast may have narrowed it
    u = torch.where(keep, scale * s + bias, -math.inf)
    some = (u > -math.inf).any(1)  # the logarithm of nothing is to have no slope
    return torch.where(some, torch.where(some[:, None], u, 0.0).logsumexp(1), -math.inf), keep.sum(1)


def _softplus_where(condition: Tensor, value: Tensor) -> Tensor:
    """Return softplus(value), and 0 where not ``condition``."""
    return torch.where(condition, F.softplus(value), 0.0)
