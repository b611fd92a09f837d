"""Named real shapes of ``expert_cross_entropy``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from typing import NamedTuple

from .._configs import COUNTED_EXPERTS, ENSEMBLE_BUDGET, MEMORY_BUDGET, ONE_TILE_BUDGET


class Config(NamedTuple):
    """A forward call, with the gradient, on the logits of several experts."""

    name: str
    classes: int
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    experts: int = 3
    rows: int = 1024
    samples_first: bool = False  # [N, E, C] in memory
    wide: bool = True  # held to 16-byte loads and stores
    budget: float | None = None  # limit of instructions per logit

    @property
    def title(self) -> str:
        return f"expert_cross_entropy, {self.name}, E {self.experts}, C {self.classes}, {self.dtype}"

    def limit(self, kernel: str) -> float | None:
        """Return the limit of instructions per logit of a kernel."""
        return self.budget


_PRIOR = ("log_prior",)
_MEAN = ("log_prior", "ensemble")
CONFIGS: tuple[Config, ...] = (
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
COUNTED: tuple[Config, ...] = tuple(
    Config("log_prior", dtype=dtype, options=_PRIOR, **COUNTED_EXPERTS) for dtype in ("bfloat16", "float32")
)
