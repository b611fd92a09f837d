"""Named real shapes of ``partitioned_logsumexp``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from typing import NamedTuple

from .._configs import MEMORY_BUDGET


class Shape(NamedTuple):
    """Queries [rows, width] and keys [keys, width]."""

    rows: int
    keys: int
    width: int = 128


#: Real batches of contrastive losses, by name.
SHAPES = {
    "supcon-2x64x128": Shape(128, 128),
    "supcon-2x256x128": Shape(512, 512),
    "supcon-512x16384x128": Shape(512, 16_384),
    "supcon-512x16384x128-frozen": Shape(512, 16_384),  # the keys learn nothing
    "moco-256x65536x128": Shape(256, 65_536),
    "paco-64x16398x128": Shape(64, 8256),
    "bcl-512x8654x1024": Shape(512, 8654, 1024),
    "gml-128x16384x1024-c8142": Shape(128, 16_384, 1024),
}


class Config(NamedTuple):
    """A call on tiles, forward and backward, or on a block of similarities in memory."""

    name: str
    width: int  # 0: a block
    options: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    precision: str = "ieee"  # how products of float32 are rounded
    rows: int = 8192
    columns: int = 16384
    kernels: tuple[str, ...] = ()  # those that are compiled; (): all
    budgets: tuple[tuple[str, float], ...] = ()  # limits of instructions per logit, by kernel

    @property
    def title(self) -> str:
        dtype = self.dtype + f" as {self.precision}" * (self.dtype == "float32")
        size = f"D {self.width}, {self.rows} x {self.columns}" if self.width else f"block, {self.rows} x {self.columns}"
        return f"keys, {self.name}, {size}, {dtype}"

    def limit(self, kernel: str) -> float | None:
        """Return the limit of instructions per logit of a kernel."""
        return dict(self.budgets).get(kernel)


def _kernel(name: str) -> str:
    return f"partitioned_logsumexp_{name}_kernel"


def _limits(**limits: float) -> tuple[tuple[str, float], ...]:
    return tuple((_kernel(name), limit) for name, limit in limits.items())


#: Limits in the loops at D = 128, where tensor cores take as long as 11 instructions for a forward tile's product
#: (2 D operations) and as 22 for a backward tile's two. A logit's own arithmetic (a multiply-add, an exponential, a
#: comparison and its selection, four sums) is 10 instructions in forward where logits have a bound, and 17 with running
#: maxima. The limits are about a tenth above the loops' counts, with Triton 3.6 where that is more: its copies of a
#: tile's vectors to shared memory are narrow.
_BOUNDED = _limits(tiled_forward=16.0, grad_query=16.0, grad_key=19.5, grad_both=27.0)
_UNBOUNDED = _limits(tiled_forward=30.0, grad_query=27.0, grad_key=24.0, grad_both=41.0)
#: Limits of blocks. At the D > 256 that they are for, the products of an element (6 D operations) take tensor cores as
#: long as 65 instructions or more; backward's traffic takes memory as long as 31.
_BLOCK = _limits(block_forward=40.0, block_backward=MEMORY_BUDGET)
_EVERY = ("exclude", "key_bias", "key_scale", "learned_scale", "slopes")
_TILED_FORWARD = tuple(map(_kernel, ("tiled_forward", "merge")))
_GRAD_BOTH = (_kernel("grad_both"),)


def _at_width(d: int) -> list[Config]:
    bounded, unbounded = (_BOUNDED, _UNBOUNDED) if d == 128 else ((), ())
    alone = Config("queries alone", d, ("alone", "exclude"), columns=8192, kernels=_GRAD_BOTH, budgets=unbounded)
    configs = [
        Config("bounded, self left out", d, ("exclude", "bounded"), columns=16390, budgets=bounded),
        Config("all", d, _EVERY, columns=16390),
        alone._replace(name="queries alone, bounded", options=("alone", "exclude", "bounded"), budgets=bounded),
        alone,
    ]
    for precision in ("tf32", "ieee") if d > 64 else ():
        configs += [
            Config("all", d, _EVERY, "float32", precision, columns=8200),
            alone._replace(dtype="float32", precision=precision, budgets=()),
        ]
    return configs


_FEW, _MANY, _WIDTH = SHAPES["supcon-512x16384x128"]
CONFIGS: tuple[Config, ...] = (
    Config("bounded", _WIDTH, ("bounded",), rows=_FEW, columns=_MANY, kernels=_TILED_FORWARD, budgets=_BOUNDED),
    Config("key_bias", 128, ("key_bias",), "float16", budgets=_UNBOUNDED),
    Config("self left out", 0, ("exclude",), columns=4096, budgets=_BLOCK),
    Config("all", 0, _EVERY, columns=4090),
    Config("key_bias", 0, ("key_bias", "exclude"), "float32", "tf32", columns=4096, budgets=_BLOCK),
    Config("all, few rows", 0, _EVERY, "float32", "tf32", rows=100, columns=4090),
    *(config for d in (64, 128, 256) for config in _at_width(d)),
)
