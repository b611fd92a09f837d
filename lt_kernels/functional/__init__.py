"""Stateless losses in the manner of ``torch.nn.functional``: validate, run one registered op, reduce."""

from .contrastive import PartitionedLogSumExp, partitioned_logsumexp, supervised_contrastive
from .experts import (
    ExpertCrossEntropyOutput,
    ExpertFusion,
    expert_cross_entropy,
    expert_divergence,
    expert_fusion,
    linear_expert_fusion,
)
from .linear import LinearPlan, TopK, linear_margin_cross_entropy, linear_topk, plan_linear
from .rows import MarginCrossEntropyOutput, margin_cross_entropy

__all__ = [
    "ExpertCrossEntropyOutput",
    "ExpertFusion",
    "LinearPlan",
    "MarginCrossEntropyOutput",
    "PartitionedLogSumExp",
    "TopK",
    "expert_cross_entropy",
    "expert_divergence",
    "expert_fusion",
    "linear_expert_fusion",
    "linear_margin_cross_entropy",
    "linear_topk",
    "margin_cross_entropy",
    "partitioned_logsumexp",
    "plan_linear",
    "supervised_contrastive",
]
