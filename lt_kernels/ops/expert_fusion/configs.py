"""Named real shapes of ``expert_fusion``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from functools import partial

from .._configs import COUNTED_EXPERTS, READ_BUDGET, ExpertConfig

Config = partial(ExpertConfig, "expert_fusion")
CONFIGS: tuple[ExpertConfig, ...] = (
    Config("plain", 8142, budget=READ_BUDGET),
    Config("class_shift", 8192, experts=6, options=("class_shift",), budget=READ_BUDGET),
    Config("top 5, log_probs", 8142, "float32", ("class_shift", "log_probs"), k=5),
    Config("top 5, all", 16384, options=("class_shift", "expert_weight", "learned_scale"), k=5),
    Config("top 5, log_probs", 100_000, options=("class_shift", "log_probs"), k=5),
    Config("top 20, samples first", 8142, k=20, samples_first=True, wide=False),
)
#: What the GPU counters measure.
COUNTED: tuple[ExpertConfig, ...] = (Config("plain", **COUNTED_EXPERTS),)
