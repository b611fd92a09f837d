"""The configurations of ``contrastive_loss`` that are compiled and held to their limits, as data."""

from __future__ import annotations

from typing import NamedTuple

from .._configs import MEMORY_BUDGET


class Config(NamedTuple):
    """A call on tiles or on a block of similarities in memory, forward and backward."""

    name: str
    width: int  # 0: a block
    options: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    precision: str = "ieee"  # how products of float32 are rounded
    rows: int = 512
    columns: int = 16384
    kernels: tuple[str, ...] = ()  # those that are compiled; (): all
    budgets: tuple[tuple[str, float], ...] = ()  # limits of instructions per logit, by kernel

    @property
    def title(self) -> str:
        dtype = self.dtype + f" as {self.precision}" * (self.dtype == "float32")
        size = f"D {self.width}, {self.rows} x {self.columns}" if self.width else f"block, {self.rows} x {self.columns}"
        return f"contrastive, {self.name}, {size}, {dtype}"

    def limit(self, kernel: str) -> float | None:
        """Return the limit of instructions per logit of a kernel."""
        return dict(self.budgets).get(kernel)


def _kernel(name: str) -> str:
    return f"contrastive_loss_{name}_kernel"


def _limits(**limits: float) -> tuple[tuple[str, float], ...]:
    return tuple((_kernel(name), limit) for name, limit in limits.items())


#: Limits in the loops at D = 128. A logit's own arithmetic where there is a bound: forward a multiply-add, an
#: exponential, a comparison and its selection, and three sums (7); backward the same with one multiply-add for the
#: sums, and half a conversion (5.5). Labels of int64 take one comparison more. The rest is the tile's: a thread has 32
#: logits of one in backward, with the labels and terms of 16 columns.
_TILES = tuple(_kernel(name) for name in ("tiled_forward", "gradients", "both"))
_FORWARD, _GRADIENTS = (_kernel("tiled_forward"),), (_kernel("gradients"),)
_EVERY = ("exclude", "key_bias", "pos_offset", "learned_scale", "rows", "none")
_PACO = ("self", "key_bias", "pos_offset", "rows")
_BLOCK = _limits(block_forward=40.0, block_backward=MEMORY_BUDGET)


def _at_width(d: int) -> list[Config]:
    configs = [
        Config("all", d, _EVERY, columns=16390),
        Config("bounded, two softmaxes", d, ("bounded", "self", "two"), kernels=_TILES),
        Config("queries alone, bounded", d, ("bounded", "self", "alone"), columns=512, kernels=_TILES),
        Config("queries alone, two softmaxes", d, ("self", "alone", "two", "none"), columns=512, kernels=_TILES),
    ]
    if d == 128:
        configs += [
            Config("all", d, _EVERY, "float32", precision, columns=16390, kernels=_TILES)
            for precision in ("tf32", "ieee")
        ]
    return configs


#: SupCon's sweeps, which have one softmax and a bound.
_SUPCON = ("bounded", "self")
CONFIGS: tuple[Config, ...] = (
    Config("SupCon", 128, _SUPCON),
    Config("SupCon forward, int32", 128, ("bounded", "int32"), kernels=_FORWARD, budgets=_limits(tiled_forward=9.9)),
    Config("SupCon forward, int64", 128, ("bounded",), kernels=_FORWARD, budgets=_limits(tiled_forward=10.5)),
    Config(
        "SupCon, queries, int32",
        128,
        ("bounded", "int32", "queries"),
        kernels=_GRADIENTS,
        budgets=_limits(gradients=9.5),
    ),
    Config("SupCon, queries, int64", 128, ("bounded", "queries"), kernels=_GRADIENTS, budgets=_limits(gradients=10.5)),
    Config(
        "SupCon, keys, int32", 128, ("bounded", "int32", "keys"), kernels=_GRADIENTS, budgets=_limits(gradients=10.5)
    ),
    Config("SupCon, keys, int64", 128, ("bounded", "keys"), kernels=_GRADIENTS, budgets=_limits(gradients=10.8)),
    Config("PaCo", 128, _PACO),
    Config("PaCo", 0, _PACO, "float32", "tf32", budgets=_BLOCK),
    Config("all", 0, (*_EVERY, "two"), rows=100, columns=4090),
    *(config for d in (64, 128, 256) for config in _at_width(d)),
)
