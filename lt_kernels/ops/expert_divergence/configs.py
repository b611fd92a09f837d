"""Named real shapes of ``expert_divergence``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from functools import partial

from .._configs import COUNTED_EXPERTS, MEMORY_BUDGET, ONE_TILE_BUDGET, ExpertConfig

Config = partial(ExpertConfig, "expert_divergence")
_PAIRWISE, _TEMPERATURE = ("pairwise",), ("temperature",)
_BOTH = ("temperature", "pairwise")
CONFIGS: tuple[ExpertConfig, ...] = (
    *(Config("to_mean", c, budget=ONE_TILE_BUDGET) for c in (8142, 100_000)),
    Config("to_mean, temperature", 8192, "float32", _TEMPERATURE, experts=6),
    Config("pairwise", 8142, options=_PAIRWISE, budget=ONE_TILE_BUDGET),
    Config("pairwise, temperature, few rows", 8142, options=_BOTH, rows=128),
    Config("pairwise", 8142, "float32", _PAIRWISE, experts=9),
    Config("to_mean, detached", 8142, options=("detached",), backward=True, budget=MEMORY_BUDGET),
    Config("to_mean, temperature", 8142, options=_TEMPERATURE, backward=True),
    Config("to_mean", 100_000, experts=6, backward=True, budget=MEMORY_BUDGET),
    Config("pairwise", 8142, options=_PAIRWISE, backward=True, budget=MEMORY_BUDGET),
    Config("pairwise, temperature", 8192, "float32", _BOTH, experts=6, backward=True),
    Config("pairwise", 8142, options=_PAIRWISE, experts=9, backward=True, wide=False),
)
#: What the GPU counters measure.
COUNTED: tuple[ExpertConfig, ...] = tuple(Config("to_mean", backward=b, **COUNTED_EXPERTS) for b in (False, True))
