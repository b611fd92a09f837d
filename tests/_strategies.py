"""Strategies of linear heads and contrastive losses, cut so finely that small cases take many chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from lt_kernels import _settings
from lt_kernels.ops.linear_margin_cross_entropy import op as linear_op
from lt_kernels.ops.linear_margin_cross_entropy import plan as linear_plan
from lt_kernels.ops.partitioned_logsumexp import plan as contrastive_plan

#: How linear heads make logits: all at once, or in chunks of rows or classes; "recompute" leaves all gradients to
#: backward.
LINEAR_MODES = ("materialize", "rows", "classes", "recompute", "materialize, recompute")
CONTRASTIVE_STRATEGIES = ("materialize", "chunked")


def strategy_of(mode: str) -> str:
    return mode if mode == "tiled" else "materialize" if "materialize" in mode else "chunked"


@contextmanager
def gradient_policy(policy: str) -> Iterator[None]:
    with mock.patch.object(_settings, "gradient_policy", policy):
        yield


@contextmanager
def linear_mode(mode: str) -> Iterator[str]:
    """Yield the strategy of a mode, with several chunks where it has chunks."""

    def cut(sizes: linear_plan.Sizes, memory_budget: int) -> linear_plan.LinearPlan:
        if mode == "classes" and sizes.divisible:
            block = 1024 if sizes.classes >= 1000 else 16 if sizes.classes > 16 else 4
            return linear_plan._by_classes(sizes, block)
        return linear_plan._by_rows(sizes, max(1, -(-sizes.rows // 3)))

    policy = "recompute" if "recompute" in mode else _settings.gradient_policy
    with mock.patch.object(linear_op, "chunk_plan", cut), gradient_policy(policy):
        yield strategy_of(mode)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Chunks of a few queries and keys."""
    sizes = {"cpu": 1600, "cuda": 1600}
    with (
        mock.patch.object(contrastive_plan, "_BLOCK_BYTES", sizes),
        mock.patch.object(contrastive_plan, "_FEWEST_KEYS", 16),
    ):
        yield


def tiled_linear_reason(width: int, positions: tuple[int, ...], soft: bool) -> str | None:
    """Return why the tiled strategy cannot run a linear head."""
    if _settings.backend != "triton" or positions or soft or width > linear_plan.LARGEST_TILED_WIDTH:
        return "tiled runs on Triton, with class indices and one loss per sample"
    return None
