"""Named real shapes of ``expert_fusion``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from typing import NamedTuple

from .._configs import COUNTED_EXPERTS, READ_BUDGET


class Config(NamedTuple):
    """A call on the logits of several experts."""

    name: str
    classes: int
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    experts: int = 3
    rows: int = 1024
    k: int = 1
    samples_first: bool = False  # [N, E, C] in memory
    wide: bool = True  # held to 16-byte loads and stores
    budget: float | None = None  # limit of instructions per logit

    @property
    def title(self) -> str:
        return f"expert_fusion, {self.name}, E {self.experts}, C {self.classes}, {self.dtype}"

    def limit(self, kernel: str) -> float | None:
        """Return the limit of instructions per logit of a kernel."""
        return self.budget


CONFIGS: tuple[Config, ...] = (
    Config("plain", 8142, budget=READ_BUDGET),
    Config("class_shift", 8192, experts=6, options=("class_shift",), budget=READ_BUDGET),
    Config("top 5, log_probs", 8142, "float32", ("class_shift", "log_probs"), k=5),
    Config("top 5, all", 16384, options=("class_shift", "expert_weight", "learned_scale"), k=5),
    Config("top 5, log_probs", 100_000, options=("class_shift", "log_probs"), k=5),
    Config("top 20, samples first", 8142, k=20, samples_first=True, wide=False),
)
#: What the GPU counters measure.
COUNTED: tuple[Config, ...] = (Config("plain", **COUNTED_EXPERTS),)
