"""What the operators' ``configs.py`` share: limits of instructions per logit, shapes, and calls on experts' logits.

An H200 executes 3.35e13 instructions a second and moves 4.3e12 bytes a second.
"""

from __future__ import annotations

from typing import NamedTuple

#: Rows that one program keeps.
ONE_TILE_BUDGET = 20.0
#: What an H200 executes while its memory moves the 4 bytes of a bfloat16 logit and its gradient.
MEMORY_BUDGET = 31.0
#: What it executes while its memory reads the 2 bytes of a bfloat16 logit.
READ_BUDGET = 15.6
#: Experts with their ensemble: the second sweep reads logits from L2, so a little more than memory's time.
ENSEMBLE_BUDGET = 33.0


class ExpertConfig(NamedTuple):
    """A call of ``op`` on the logits of several experts."""

    op: str
    name: str
    classes: int
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    experts: int = 3
    rows: int = 1024
    k: int = 1  # classes that expert_fusion selects
    backward: bool = False
    samples_first: bool = False  # [N, E, C] in memory
    wide: bool = True  # held to 16-byte loads and stores
    budget: float | None = None  # limit of instructions per logit

    @property
    def title(self) -> str:
        direction = ", backward" if self.backward else ""
        return f"{self.op}, {self.name}, E {self.experts}, C {self.classes}, {self.dtype}{direction}"

    def limit(self, kernel: str) -> float | None:
        """Return the limit of instructions per logit of a kernel."""
        return self.budget


class ExpertShape(NamedTuple):
    """Logits of several experts, [rows, classes] each."""

    rows: int
    classes: int
    experts: int = 3


#: Real batches and heads of several experts, by name.
EXPERT_SHAPES = {
    "inat18-e3-n512": ExpertShape(512, 8142),
    "inat18-e3-n2731": ExpertShape(2731, 8142),  # as many logits as 8192 rows of a classifier
    "inat18-e3-n8192": ExpertShape(8192, 8142),
    "inat18-e6-n512": ExpertShape(512, 8142, experts=6),
    "c100k-e3-n64": ExpertShape(64, 100_000),
    "c100k-e3-n256": ExpertShape(256, 100_000),
    "imagenet-lt-e3-n512": ExpertShape(512, 1000),
    "imagenet-lt-e3-n8192": ExpertShape(8192, 1000),
}
#: The one that the GPU counters measure, as fields of a configuration.
COUNTED_EXPERTS = EXPERT_SHAPES["inat18-e3-n2731"]._asdict()
