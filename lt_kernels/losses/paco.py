"""Parametric contrastive learning: class logits and keys in one softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import functional as LF
from .._checks import ClassVector, check_device, check_embeddings, check_number, check_positive
from .._smooth import quick_logaddexp
from ..priors import ClassPrior
from ._contrastive_base import (
    ContrastiveLossBase,
    ContrastiveOptions,
    check_ids,
    check_labels,
    shown_temperature,
    zero_rows,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PaCoLoss(ContrastiveLossBase):
    """Parametric contrastive loss.

    Cui, Zhong, Liu, Yu, Jia, *Parametric Contrastive Learning*, ICCV 2021. With class logits v_ic = (z_ic + log(pi_c +
    eps)) / supt, similarities s_ij = <q_i, k_j> / T and P_i keys of query i's class (without its own),

        D_i    = log[ sum over classes c of exp(v_ic) + gamma sum over keys j of exp(s_ij) ]
        loss_i = D_i - [beta v_iy + alpha sum over positives p of s_ip] / (beta + alpha P_i)

    Sets ``class_bias`` = log(pi + eps) / supt, the scale 1/supt of the logits, and for the keys the scale 1/T and the
    bias log gamma. It is what the published code computes (whose further 1e-12 inside the logarithm is left out, and
    whose T / T_base is 1): gamma weighs the keys in the denominator only, and supt divides the log prior too.

    *Generalized Parametric Contrastive Learning* (GPaCo; Cui et al., TPAMI 2023) is the same loss with both views as
    queries, ``label_smoothing``, and, on balanced data, without a prior: ``class_counts=None``. ``two_views`` has both
    forms.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class; None: no prior.
        alpha: weight of each positive key. Published: 0.05 (ImageNet-LT); CIFAR-100-LT has 0.02 in the paper and 0.01
            in the scripts.
        beta: weight of the class logit.
        gamma: weight of the keys in the denominator; 0 takes them out.
        temperature: T; a number, or a 0-dim tensor: an ``nn.Parameter`` is a parameter of the loss and is trained,
            another tensor is a buffer.
        supt: the temperature of the logits.
        eps: the published code adds 1e-9 to the prior.
        label_smoothing: GPaCo's: the target's share of beta is 1 - label_smoothing, each other class's
            label_smoothing / (C - 1); in [0, 1).
        options: ``ignore_index`` (of queries), ``reduction``, ``empty_mean``, ``zero_counts``, ``device``, ``dtype``,
            ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        IndexError: a label or ``exclude`` out of range, on the CPU or with checks on.

    Example:
        >>> import torch.nn.functional as F
        >>> from lt_kernels import FeatureQueue
        >>> loss, queue = PaCoLoss([900, 90, 10], alpha=0.05), FeatureQueue(size=64, dim=16)
        >>> features = F.normalize(torch.randn(8, 2, 16), dim=-1).requires_grad_()
        >>> labels, logits = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]), torch.randn(8, 3, requires_grad=True)
        >>> loss.two_views(features, labels, logits, queue.features, queue.labels).backward()
        >>> slots = queue.enqueue(features[:, 1], labels)
    """

    temperature: float | Tensor
    _unmasked: int | None = None

    def __init__(
        self,
        class_counts: ClassVector | None,
        alpha: float,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float | Tensor = 0.2,
        supt: float = 1.0,
        *,
        eps: float = 1e-9,
        label_smoothing: float = 0.0,
        **options: Unpack[ContrastiveOptions],
    ) -> None:
        super().__init__(scale=1 / check_positive("supt", supt), **options)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0)
        if self.label_smoothing >= 1:
            raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1)")
        self.supt = float(supt)
        self.alpha, self.beta = check_number("alpha", alpha, 0.0), check_number("beta", beta, 0.0)
        self.gamma, self.eps = check_number("gamma", gamma, 0.0), check_number("eps", eps, 0.0)
        self._set("temperature", self._scalar("temperature", temperature, check_positive))
        if class_counts is not None:
            self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"class_bias": prior.log_prior(eps=self.eps) / self.supt}

    def _find_masks(self) -> None:
        super()._find_masks()
        held = self.zero_counts == "mask" and self.class_counts is not None
        #: How many classes label smoothing spreads over; None: all.
        self._unmasked = int((self._kept_start("class_counts") > 0).sum()) if held else None

    def forward(
        self,
        query: Tensor,
        query_label: Tensor,
        key: Tensor,
        key_label: Tensor,
        logits: Tensor,
        *,
        exclude: Tensor | Literal["self"] | None = None,
        key_grad_rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the loss of the queries, float16, bfloat16, float32 or float64.

        Args:
            query: [N, D]; unit vectors.
            query_label: [N], any integer dtype; queries of ``ignore_index`` contribute nothing.
            key: [M, D]; unit vectors.
            key_label: [M]; keys of label -1, such as empty slots of a queue, count nowhere.
            logits: [N, C], of the queries' samples.
            exclude: [N], the key that each query leaves out, -1 for none; ``"self"``: key i of query i.
            key_grad_rows: ``(begin, end)``: the other rows of ``key``, such as a queue's, receive no gradient.

        Returns:
            0-dim, or [N] with ``reduction="none"``; float32 (float64 for float64). The mean is over the queries that
            are not ignored. A query without positives of any weight (beta 0) has loss 0.
        """
        check_embeddings("query", query, "[N, D]")
        check_embeddings("key", key, "[M, D]")
        check_embeddings("logits", logits, "[N, C]")
        check_device("key", key, query, " as query")
        check_device("logits", logits, query, " as query")
        rows, classes = len(query), logits.shape[1]
        if len(logits) != rows:
            raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [{rows}, C], a row for each query")
        self._check_counted(classes, "logits")
        smoothed = classes if self._unmasked is None else self._unmasked
        most = (smoothed - 1) / smoothed
        if self.label_smoothing > most:
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing} with {smoothed} classes, expected at most {most:g}"
            )
        label, index, is_class = check_labels("query_label", query_label, (rows,), classes, query, self.ignore_index)
        ignored = label == self.ignore_index
        query = zero_rows(query, ignored)
        of_keys, _, is_key = check_labels("key_label", key_label, (len(key),), classes, query, -1)
        # C times the same share for all, and less for the target, as this keyword of cross-entropy has it
        smoothing = self.label_smoothing * smoothed / max(smoothed - 1, 1)
        of_classes = LF.margin_cross_entropy(
            logits, label, class_bias=self.class_bias, scale=self.scale, ignore_index=self.ignore_index,
            reduction="none", label_smoothing=min(smoothing, 1.0), masked_classes=self.masked_classes,
            return_lse=True,
        )  # fmt: skip
        assert of_classes.lse is not None
        lse = of_classes.lse.masked_fill(ignored, 0.0)  # what is not finite there would reach the keys
        log_gamma = math.log(self.gamma) if self.gamma > 0 else -math.inf
        bias = torch.full(of_keys.shape, log_gamma, dtype=of_classes.loss.dtype, device=key.device)
        sums = LF.partitioned_logsumexp(
            query, key, index.to(torch.int32), of_keys.to(torch.int32), scale=1 / self.temperature, exclude=exclude,
            key_bias=bias.masked_fill(~is_key, -math.inf), key_grad_rows=key_grad_rows,
        )  # fmt: skip
        # log-sum-exps of -inf (no keys, or gamma 0) have no slope, so that they join by a finite stand-in
        floor = torch.finfo(sums.neg.dtype).min / 4
        all_keys = quick_logaddexp(sums.neg.clamp_min(floor), sums.pos.clamp_min(floor))
        weights = self.beta + self.alpha * sums.num_pos
        pulled = torch.add(self.beta * (lse - of_classes.loss), sums.pos_sum, alpha=self.alpha)
        alone = weights <= 0
        loss = (quick_logaddexp(lse, all_keys) - pulled / weights.masked_fill(alone, 1.0)).masked_fill(alone, 0.0)
        # a class out of range, on a GPU, makes the cross-entropy NaN
        loss = torch.where(is_class, loss, 0.0 * of_classes.loss)
        return self._reduce(loss, ~ignored)

    def two_views(
        self,
        features: Tensor,
        labels: Tensor,
        logits: Tensor,
        queue_features: Tensor | None = None,
        queue_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss in the published layouts: views of a batch are queries and keys, together with a queue.

        Args:
            features: [N, V, D]; in PaCo the first view comes from the encoder that is trained, the second from its
                momentum encoder, without gradient (``torch.stack`` of both).
            labels: [N].
            logits: [N, C], of the first views: they are the queries (PaCo); or [N, V, C]: all are (GPaCo).
            queue_features: [M, D]; they receive no gradient, and are copied. Enqueue afterwards.
            queue_labels: [M].

        Returns:
            As the call: 0-dim, or with ``reduction="none"`` [N] or [N V], sample by sample.
        """
        samples, views, dim = check_embeddings("features", features, "[N, V, D]").shape
        all_views = isinstance(logits, Tensor) and logits.dim() == 3
        shape = (samples, views) if all_views else (samples,)
        check_embeddings("logits", logits, "[N, V, C]" if all_views else "[N, C]")
        if tuple(logits.shape[:-1]) != shape:
            raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected {[*shape, 'C']}")
        if (queue_features is None) != (queue_labels is None):
            raise ValueError("queue_labels: got one of queue_features and queue_labels, expected both or neither")
        of_samples = check_ids("labels", labels, (samples,), features)
        label = of_samples[:, None].expand(samples, views).flatten()
        own = zero_rows(features, of_samples == self.ignore_index).flatten(0, 1)
        # keys of ignored samples count nowhere
        key, key_label = own, label.masked_fill(label == self.ignore_index, -1)
        if queue_features is not None and queue_labels is not None:
            check_embeddings("queue_features", queue_features, "[M, D]")
            if queue_features.shape[1] != dim:
                raise ValueError(f"queue_features: got {queue_features.shape[1]} features, expected {dim} as features")
            key = torch.cat([key, queue_features.detach()])
            of_queue = check_ids("queue_labels", queue_labels, (len(queue_features),), features)
            key_label = torch.cat([key_label, of_queue])
        query, exclude = own, torch.arange(len(own), device=own.device)
        if not all_views:
            query, label, exclude = own.view(samples, views, dim)[:, 0], of_samples, exclude.view(samples, views)[:, 0]
        return self(
            query, label, key, key_label, logits.flatten(0, -2), exclude=exclude, key_grad_rows=(0, len(own))
        )  # fmt: skip

    def extra_repr(self) -> str:
        own: dict[str, Any] = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}
        own["temperature"] = shown_temperature(self.temperature)
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in own.items())]).removeprefix(", ")
