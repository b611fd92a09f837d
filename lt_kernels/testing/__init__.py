"""Hold a kernel to float64 truth: oracles, the error budget, sample inputs.

The rule (``assert_within_budget``): a result passes if its error against float64 is at most twice the error that plain
PyTorch makes in the same dtype, plus a few roundings of the result's own dtype. Nothing is compared with a fixed
tolerance.

Example:
    >>> sample = sample_inputs(8, 10, dtype=torch.float32, options=("class_bias", "margin"))
    >>> check_margin_cross_entropy(margin_cross_entropy, sample)
"""

from __future__ import annotations

from .budget import assert_within_budget
from .contrastive import (
    CONTRASTIVE_OPTIONS,
    ContrastiveSample,
    check_partitioned_logsumexp,
    contrastive_sample_inputs,
    dense_partitioned_logsumexp,
)
from .experts import (
    check_expert_cross_entropy,
    dense_expert_cross_entropy,
    dense_expert_divergence,
    expert_sample_inputs,
)
from .linear import check_linear_margin_cross_entropy, dense_linear_margin_cross_entropy, linear_sample_inputs
from .rows import TENSOR_OPTIONS, Sample, check_margin_cross_entropy, dense_margin_cross_entropy, sample_inputs

__all__ = [
    "CONTRASTIVE_OPTIONS",
    "TENSOR_OPTIONS",
    "ContrastiveSample",
    "Sample",
    "assert_within_budget",
    "check_expert_cross_entropy",
    "check_linear_margin_cross_entropy",
    "check_margin_cross_entropy",
    "check_partitioned_logsumexp",
    "contrastive_sample_inputs",
    "dense_expert_cross_entropy",
    "dense_expert_divergence",
    "dense_linear_margin_cross_entropy",
    "dense_margin_cross_entropy",
    "dense_partitioned_logsumexp",
    "expert_sample_inputs",
    "linear_sample_inputs",
    "sample_inputs",
]
