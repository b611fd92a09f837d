"""Named real shapes of ``expert_cross_entropy``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from functools import partial

from .._configs import COUNTED_EXPERTS, ENSEMBLE_BUDGET, MEMORY_BUDGET, ONE_TILE_BUDGET, ExpertConfig

Config = partial(ExpertConfig, "expert_cross_entropy")
_PRIOR = ("log_prior",)
_MEAN = ("log_prior", "ensemble")
CONFIGS: tuple[ExpertConfig, ...] = (
    Config("plain", 8142, budget=ONE_TILE_BUDGET),
    *(Config("log_prior", c, options=_PRIOR, budget=MEMORY_BUDGET) for c in (8142, 8192)),
    Config("log_prior", 8142, "float32", _PRIOR, budget=MEMORY_BUDGET),
    *(Config("log_prior, ensemble", 8142, options=_MEAN, experts=e, budget=ENSEMBLE_BUDGET) for e in (3, 6)),
    Config("log_prior, ensemble", 16384, "float32", _MEAN, budget=MEMORY_BUDGET),
    Config("mixed, ensemble", 8142, options=(*_MEAN, "scale", "mixed")),
    Config("bias per expert, smoothing", 8142, options=("expert_bias", "weight", "smoothing")),
    Config("class_scale, ensemble", 8142, "float32", (*_MEAN, "class_scale")),
    Config("log_prior, samples first", 8142, options=_MEAN, samples_first=True, wide=False),
    *(
        Config("the rows kernel", c, options=_PRIOR, experts=1, rows=4096, budget=MEMORY_BUDGET)
        for c in (21841, 100_000)
    ),
)
#: What the GPU counters measure.
COUNTED: tuple[ExpertConfig, ...] = tuple(
    Config("log_prior", dtype=dtype, options=_PRIOR, **COUNTED_EXPERTS) for dtype in ("bfloat16", "float32")
)
