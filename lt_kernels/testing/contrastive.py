"""The oracle, sample inputs and check of ``partitioned_logsumexp``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..functional.contrastive import SimilarityKeywords
from .budget import assert_within_budget
from .rows import Draw, converted, require_gradients

#: Arguments of ``partitioned_logsumexp`` that a sample can draw.
CONTRASTIVE_OPTIONS = ("key_bias", "key_scale", "scale", "exclude")
#: Results of ``partitioned_logsumexp`` that have gradients, in order.
_SUMS = ("neg", "pos", "pos_sum")
#: neg, pos, pos_sum and num_pos.
Sums: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


@overload
def dense_partitioned_logsumexp(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor | None = None, *,
    separate_scale: Literal[False] = False, **options: Unpack[SimilarityKeywords],
) -> Sums: ...  # fmt: skip
@overload
def dense_partitioned_logsumexp(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor | None = None, *,
    separate_scale: Literal[True], **options: Unpack[SimilarityKeywords],
) -> tuple[Sums, Sums]: ...  # fmt: skip
@overload
def dense_partitioned_logsumexp(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor | None = None, *,
    separate_scale: bool = False, **options: Unpack[SimilarityKeywords],
) -> Sums | tuple[Sums, Sums]: ...  # fmt: skip
def dense_partitioned_logsumexp(
    query: Tensor,
    key: Tensor,
    query_label: Tensor,
    key_label: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    exclude: Tensor | str | None = None,
    key_grad_rows: tuple[int, int] | None = None,
    normalized: bool = False,
    separate_scale: bool = False,
) -> Sums | tuple[Sums, Sums]:
    """Compute ``partitioned_logsumexp`` with all similarities and two masks in memory; ignore ``normalized``.

    Returns:
        (neg, pos, pos_sum, num_pos), or two such tuples with ``separate_scale``.
    """

    def fixed(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    if separate_scale:
        rest: dict[str, Any] = {"exclude": exclude, "key_grad_rows": key_grad_rows}
        vectors: dict[str, Any] = {"key_bias": key_bias, "key_scale": key_scale}
        without = {name: fixed(value) for name, value in vectors.items()}
        leaves = [fixed(query), fixed(key), query_label, key_label]
        return (
            dense_partitioned_logsumexp(query, key, query_label, key_label, scale=fixed(scale), **vectors, **rest),
            dense_partitioned_logsumexp(*leaves, **{"scale": scale, **without, **rest}),
        )
    dtype, m = query.dtype, key.shape[0]
    if key_grad_rows is not None:
        begin, end = key_grad_rows
        key = torch.cat([key[:begin].detach(), key[begin:end], key[end:].detach()])
    similarity = (scale.to(dtype) if isinstance(scale, Tensor) else scale) * (query @ key.t())
    logits = similarity if key_scale is None else key_scale.to(dtype) * similarity
    logits = logits if key_bias is None else logits + key_bias.to(dtype)
    labels_of_keys = query_label if key_label is None else key_label
    same = query_label.long()[:, None] == labels_of_keys.long()[None, :]
    allowed = torch.ones_like(same)
    if exclude is not None:
        columns = torch.arange(m, device=query.device)
        left_out = columns[: len(same)] if isinstance(exclude, str) else exclude
        allowed = left_out.long()[:, None] != columns

    def total(mask: Tensor) -> Tensor:
        masked = logits.masked_fill(~mask, -math.inf)
        none = (masked == -math.inf).all(1)  # these rows have no gradient, where autograd would make NaN
        return masked.masked_fill(none[:, None], 0.0).logsumexp(1).masked_fill(none, -math.inf)

    positive = same & allowed
    count = positive.sum(1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return total(~same & allowed), total(positive), similarity.masked_fill(~positive, 0.0).sum(1), count


@dataclass
class ContrastiveSample:
    """One call of ``partitioned_logsumexp``: positional tensors and keyword options."""

    query: Tensor
    key: Tensor  # may be the same tensor as query
    query_label: Tensor
    key_label: Tensor | None  # None: those of the queries
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The positional arguments."""
        return self.query, self.key, self.query_label, self.key_label

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by argument name, without a key that is the query."""
        named = {"query": self.query, "key": self.key, "query_label": self.query_label, "key_label": self.key_label}
        if self.key is self.query:
            del named["key"]
        return {name: value for name, value in {**named, **self.options}.items() if isinstance(value, Tensor)}

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that require gradients, by argument name."""
        return {name: value for name, value in self.tensors.items() if value.requires_grad}

    def converted(self, dtype: torch.dtype, device: torch.device | str | None = None) -> ContrastiveSample:
        """Return a copy with detached floating tensors in ``dtype``, which require gradients where these do."""

        def convert(value: Any) -> Any:
            return converted(value, dtype, device)

        query = convert(self.query)
        key = query if self.key is self.query else convert(self.key)
        options = {name: convert(value) for name, value in self.options.items()}
        return ContrastiveSample(query, key, convert(self.query_label), convert(self.key_label), options)

    def apart(self) -> ContrastiveSample:
        """Return the same call with keys that are a tensor of their own."""
        key = self.key.detach().clone().requires_grad_(self.key.requires_grad)
        labels = self.query_label if self.key_label is None else self.key_label
        return ContrastiveSample(self.query, key, self.query_label, labels, dict(self.options))


def contrastive_sample_inputs(
    rows: int,
    width: int,
    keys: int | None,
    *,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    options: Iterable[str] = (),
    requires_grad: Iterable[str] = ("query", "key"),
    label_dtype: torch.dtype = torch.int64,
    unlabelled: float = 0.0,
    masked: float = 0.0,
    disjoint: bool = False,
    normalized: bool = False,
    spread: float = 3.0,
    seed: int = 0,
    **keywords: Any,
) -> ContrastiveSample:
    """Draw inputs for ``partitioned_logsumexp``: queries ``[rows, width]`` and keys ``[keys, width]``.

    Args:
        keys: number of keys; None makes the queries the keys, with the queries' labels.
        classes: number of labels.
        options: names from ``CONTRASTIVE_OPTIONS``; ``"scale"`` is a 0-dim tensor, ``"exclude"`` holds -1 or a key.
        requires_grad: which arguments require gradients.
        unlabelled: share of keys with the label -1, which no query has.
        masked: share of keys with the label -1 and a ``key_bias`` of -inf.
        disjoint: no key has a query's label.
        normalized: vectors of norm 1; passed on.
        spread: standard deviation of the similarities, unless ``normalized``.
        keywords: passed on to the operator.
    """
    draw = Draw(seed)
    uniform, integers = draw.uniform, draw.integers

    def vectors(count: int) -> Tensor:
        x = draw.normal(count, width)
        return F.normalize(x, dim=1) if normalized else x * (spread / width**0.5) ** 0.5

    options = tuple(options)
    unknown = set(options) - set(CONTRASTIVE_OPTIONS)
    if unknown:
        raise ValueError(f"options: got {sorted(unknown)}, expected some of {CONTRASTIVE_OPTIONS}")
    m = rows if keys is None else keys
    query = vectors(rows)
    key = query if keys is None else vectors(m)
    query_label = integers(0, classes, (rows,))
    key_label = integers(0, classes, (m,)) if keys is not None else None
    drawn: dict[str, Any] = {
        "key_bias": uniform(m, low=1e-4, high=1.0).log(),
        "key_scale": uniform(m, low=0.5, high=1.5),
        "scale": torch.tensor(1.7, dtype=torch.float64),
        "exclude": integers(-1, max(m, 1), (rows,)) if m > 0 else torch.full((rows,), -1),
    }
    chosen = {name: drawn[name] for name in options}
    if key_label is not None:
        key_label = key_label + classes * disjoint
        none = uniform(m) < unlabelled
        if masked > 0:
            hidden = uniform(m) < masked
            chosen["key_bias"] = chosen.get("key_bias", torch.zeros(m, dtype=torch.float64)).masked_fill(
                hidden, -math.inf
            )
            none = none | hidden
        key_label = key_label.masked_fill(none, -1).to(label_dtype)
    given = {**chosen, **({"normalized": True} if normalized else {}), **keywords}
    sample = ContrastiveSample(query, key, query_label.to(label_dtype), key_label, given).converted(dtype, device)
    require_gradients({"query": sample.query, "key": sample.key, **sample.options}, requires_grad)
    return sample


def check_partitioned_logsumexp(
    function: Callable[..., Any],
    sample: ContrastiveSample,
    *,
    through: Sequence[str] = _SUMS,
    factor: float = 2.0,
    roundings: float | None = None,
    dense: Callable[..., Any] = dense_partitioned_logsumexp,
) -> None:
    """Hold every result of ``function``, and every gradient of ``sample``, to the error budget.

    Args:
        function: called as ``partitioned_logsumexp(query, key, query_label, key_label, **options)``.
        sample: its tensors that require gradients are the ones checked.
        through: the results that have an upstream gradient, different for every query and result. A result of -inf has
            one too, which must reach nothing.
        roundings: as in ``assert_within_budget``; default 256 for float64, where exponentials of large logits magnify
            the roundings of the truth as well.
        dense: the definition; called like ``function``, once in float64 and once in the sample's dtype.
    """

    def run(function: Callable[..., Any], sample: ContrastiveSample) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        result = function(*sample.arguments, **sample.options)
        parts = result if isinstance(result[0], tuple) else (result,)
        values, outputs, upstream = {}, [], []
        for position, part in enumerate(parts):
            for name, value, (low, high) in zip(_SUMS, part, ((-1.0, 2.0), (1.5, -0.5), (0.3, -0.2)), strict=False):
                values[f"{name} of part {position}" if len(parts) > 1 else name] = value
                if name in through and value.requires_grad:
                    outputs.append(value)
                    upstream.append(torch.linspace(low, high, len(value), dtype=value.dtype, device=value.device))
        leaves = sample.differentiable if outputs else {}
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True) if leaves else ()
        pairs = zip(leaves.items(), grads, strict=True)
        gradients = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}
        return {**values, "num_pos": parts[0][3]}, gradients

    if roundings is None and sample.query.dtype == torch.float64:
        roundings = 256.0
    truth, true_grads = run(dense, sample.converted(torch.float64))
    eager, eager_grads = run(dense, sample.converted(sample.query.dtype))
    actual, grads = run(function, sample)
    expected = torch.float64 if sample.query.dtype == torch.float64 else torch.float32
    for name, value in actual.items():
        assert value.dtype == expected, f"{name}: dtype {value.dtype}, expected {expected}"
        assert_within_budget(value, eager[name], truth[name], name, factor, roundings)
    assert grads.keys() == true_grads.keys(), f"gradients of {sorted(grads)}, expected {sorted(true_grads)}"
    for name, grad in grads.items():
        assert_within_budget(grad, eager_grads[name], true_grads[name], f"gradient of {name}", factor, roundings)
