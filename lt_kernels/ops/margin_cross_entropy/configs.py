"""Named real shapes of ``margin_cross_entropy``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .._configs import MEMORY_BUDGET, ONE_TILE_BUDGET


class Shape(NamedTuple):
    """Logits [rows, classes, *positions]."""

    rows: int
    classes: int
    positions: tuple[int, ...] = ()  # e.g. height and width of a segmentation map


#: Real classification heads and batches, by name.
SHAPES = {
    "inat18-n64": Shape(64, 8142),
    "inat18-n256": Shape(256, 8142),
    "inat18-n512": Shape(512, 8142),
    "inat18-n2048": Shape(2048, 8142),
    "inat18-n8192": Shape(8192, 8142),
    "aligned-n512": Shape(512, 8192),
    "aligned-n8192": Shape(8192, 8192),
    "inat21-n512": Shape(512, 10_000),
    "inat21-n8192": Shape(8192, 10_000),
    "imagenet-lt-n512": Shape(512, 1000),
    "imagenet-lt-n8192": Shape(8192, 1000),
    "lvis-n512": Shape(512, 1203),
    "lvis-n8192": Shape(8192, 1203),
    "imagenet21k-n512": Shape(512, 21_841),
    "imagenet21k-n8192": Shape(8192, 21_841),
    "c65536-n256": Shape(256, 65_536),
    "c65536-n4096": Shape(4096, 65_536),
    "c100k-n256": Shape(256, 100_000),
    "c100k-n4096": Shape(4096, 100_000),
    "c1m-n64": Shape(64, 1_000_000),
    "c1m-n512": Shape(512, 1_000_000),
    "seg-n16": Shape(16, 150, positions=(512, 512)),  # maps with the classes of ADE20K
}


class Config(NamedTuple):
    """A call of the operator: shape, dtype, options."""

    name: str
    classes: int
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # (): forward, else backward for these inputs
    with_grad: bool = True  # a forward that computes the gradient
    with_lse: bool = False  # a backward with an upstream gradient of the log-sum-exp
    padding: int = 0  # columns between rows; an odd number leaves the rows without a common alignment
    rows: int = 1024
    positions: int = 1
    transposed: bool = False
    in_place: bool = False  # the gradient overwrites the logits
    wide: bool = False  # held to 16-byte loads and stores
    shares_memory: bool = False  # sums pass through the memory of the results: held to a barrier
    budget: float | None = None  # limit of instructions per logit

    @property
    def title(self) -> str:
        direction = f"backward ({', '.join(self.needs)})" if self.needs else "forward" + " + gradient" * self.with_grad
        return f"{self.name}, C {self.classes}, {self.dtype}, {direction}"

    def limit(self, kernel: str) -> float | None:
        """Return the limit of instructions per logit of a kernel."""
        return self.budget


_VS = ("class_bias", "class_scale")
_BIAS = ("class_bias",)
_MANY = ("class_bias", "class_scale", "class_margin", "weight", "mixed", "smoothing", "learned_scale", "prediction")
_CLASS_VECTORS = ("input", "class_bias", "class_scale", "class_margin", "learned_scale")
_HALF, _SINGLE = "float16", "float32"

_ONE_PASS = (
    *(
        Config("plain", c, wide=True, budget=ONE_TILE_BUDGET if c != 21841 else None)
        for c in (1000, 8142, 8192, 21841, 32768)
    ),
    *(Config("plain", c, _SINGLE, wide=True, budget=ONE_TILE_BUDGET) for c in (8142, 8192, 32768)),
    Config("plain", 8142, _HALF, wide=True, budget=ONE_TILE_BUDGET),
    *(Config("class_bias", c, options=_BIAS, wide=True, budget=ONE_TILE_BUDGET) for c in (8142, 8192, 32768)),
    Config("class_bias", 8142, _SINGLE, _BIAS, wide=True, budget=ONE_TILE_BUDGET),
    *(Config("class_bias, class_scale", c, options=_VS, wide=True) for c in (8142, 16384)),
    *(Config("class_bias, prediction", c, options=(*_BIAS, "prediction"), wide=True) for c in (8142, 16384)),
    Config("class_bias, prediction", 16384, _SINGLE, (*_BIAS, "prediction"), wide=True),
    Config("class_bias, class_scale, prediction", 16384, _SINGLE, (*_VS, "prediction"), wide=True),
    *(Config("weight, smoothing", c, options=(*_BIAS, "weight", "smoothing"), wide=True) for c in (8142, 16384)),
    Config("angular", 10000, _SINGLE, ("angular", "class_margin"), wide=True),
    Config("mixed", 8142, options=(*_BIAS, "mixed"), wide=True),
    Config("mixed", 16384, _SINGLE, (*_BIAS, "mixed", "class_margin"), wide=True),
    Config("smoothing", 32768, _SINGLE, (*_BIAS, "smoothing"), wide=True),
    Config("mixed, smoothing", 16384, _SINGLE, (*_BIAS, "mixed", "smoothing", "class_margin"), wide=True),
    Config("probabilities", 8142, options=(*_BIAS, "soft"), wide=True),
    Config("probabilities, prediction", 16384, _SINGLE, (*_BIAS, "soft", "prediction"), wide=True),
    Config("all", 8142, options=_MANY, wide=True),
    Config("all", 8142, _SINGLE, _MANY, wide=True),
)
_FORWARD_ONLY = (
    Config("no gradient, class_bias", 8142, options=_BIAS, with_grad=False, budget=ONE_TILE_BUDGET),
    Config("no gradient, class_bias", 8142, _HALF, _BIAS, with_grad=False, budget=ONE_TILE_BUDGET),
    Config("no gradient, class_bias", 100003, options=_BIAS, with_grad=False),
    Config("rows without a common alignment, class_bias", 8142, options=_BIAS, padding=1),
)
_LOOPED = (
    Config("plain", 32776, wide=True, rows=4096),
    Config("plain", 65536, wide=True, rows=4096, budget=MEMORY_BUDGET),
    Config("plain", 65536, _SINGLE, wide=True, rows=4096, budget=MEMORY_BUDGET),
    Config("class_bias", 65536, options=_BIAS, wide=True, rows=4096, budget=MEMORY_BUDGET),
    Config("class_bias, prediction", 65536, _SINGLE, (*_BIAS, "prediction"), wide=True, rows=4096),
    Config("smoothing", 65536, options=(*_BIAS, "smoothing"), wide=True, rows=4096),
    Config("all but weights", 65536, _SINGLE, tuple(o for o in _MANY if o not in ("class_scale", "weight")), wide=True),
    Config("class_bias", 100003, options=_BIAS, wide=True),
    Config("probabilities", 65536, options=("soft", "weight", "smoothing"), wide=True),
    Config("all", 65536, options=_MANY, wide=True),
)
_PARTS = (
    Config("few rows", 1_000_000, rows=64, wide=True, budget=ONE_TILE_BUDGET),
    Config("few rows, class_bias", 100003, _SINGLE, _BIAS, rows=16, wide=True),
    Config("few rows, probabilities", 65536, options=("soft", "weight", "smoothing"), rows=64, wide=True),
    Config("few rows, all", 65536, options=_MANY, rows=64, wide=True),
)
_BACKWARD = (
    Config("plain", 8142, needs=("input",), wide=True, budget=ONE_TILE_BUDGET),
    Config("class_bias", 8142, _SINGLE, _BIAS, ("input",), wide=True),
    Config("all", 65536, options=_MANY, needs=("input",), wide=True),
    Config("probabilities", 8142, options=(*_BIAS, "soft"), needs=("input",), wide=True),
    Config("class_bias, log-sum-exp", 8142, options=_BIAS, needs=("input",), with_lse=True, wide=True),
    Config("rows without a common alignment", 8142, needs=("input",), padding=1),
    Config("class_bias", 8142, options=_BIAS, needs=("input", "class_bias"), budget=MEMORY_BUDGET),
    Config("class_bias", 8192, options=_BIAS, needs=("input", "class_bias"), wide=True, budget=MEMORY_BUDGET),
    Config("class vectors", 8142, options=_MANY, needs=_CLASS_VECTORS),
    Config("probabilities", 8142, _SINGLE, ("soft", "weight"), ("input", "target")),
)
_SEGMENTATION = (
    Config("segmentation", 150, wide=True, budget=MEMORY_BUDGET),
    Config("segmentation", 19, wide=True),
    Config("segmentation, class_bias, prediction", 150, options=(*_BIAS, "prediction")),
    Config("segmentation", 150, _SINGLE, wide=True),
    Config("segmentation, all", 150, _SINGLE, _MANY, shares_memory=True),
    Config("segmentation, probabilities", 150, options=("soft",), wide=True, shares_memory=True),
    Config("segmentation", 19, needs=("input",), wide=True, budget=MEMORY_BUDGET),
    Config("segmentation, class_bias", 150, options=_BIAS, needs=("input", "class_bias")),
    Config("segmentation, class vectors", 150, _HALF, _MANY, _CLASS_VECTORS),
)
_TILES = (
    *(config._replace(rows=4, positions=512 * 512) for config in _SEGMENTATION),
    Config("transposed", 8142, options=_BIAS, transposed=True, wide=True),
    Config(
        "transposed, few rows, probabilities", 8142, options=("soft",), rows=64, transposed=True, shares_memory=True
    ),
    Config("few classes", 10),
    Config("channels last", 19, rows=512 * 512),
    Config("few classes", 100, _SINGLE, _BIAS),
)
#: As linear heads have them: rows of a buffer in which each starts at a multiple of 64 bytes.
_IN_PLACE = (
    Config("in place, class_bias", 8142, options=_BIAS, padding=18, in_place=True, wide=True),
    Config("in place, class_bias", 8142, _SINGLE, _BIAS, padding=2, in_place=True, wide=True),
    Config(
        "in place, class_bias, prediction", 8142, options=(*_BIAS, "prediction"), padding=18, in_place=True, wide=True
    ),
    Config("in place, class_scale", 8142, options=_VS, padding=18, in_place=True, wide=True),
    Config("in place, class_bias", 100_000, options=_BIAS, rows=4096, in_place=True, wide=True),
    Config("in place, few rows", 1_000_000, options=_BIAS, rows=64, in_place=True, wide=True),
    Config("in place, class_bias", 8142, options=_BIAS, needs=("input",), padding=18, in_place=True, wide=True),
    Config("in place, class vectors", 8142, options=_MANY, needs=_CLASS_VECTORS, padding=18, in_place=True),
)
CONFIGS: tuple[Config, ...] = (*_ONE_PASS, *_FORWARD_ONLY, *_LOOPED, *_PARTS, *_BACKWARD, *_TILES, *_IN_PLACE)


def _counted(shape: Shape, dtype: str = "bfloat16", **options: Any) -> Config:
    rows, classes, positions = shape
    return Config("class_bias", classes, dtype, _BIAS, rows=rows, positions=math.prod(positions), **options)


_INAT18, _WIDE, _ODD = SHAPES["inat18-n8192"], SHAPES["c65536-n4096"], Shape(4096, 100_003)
#: What the GPU counters measure: real batches, the most telling first.
COUNTED: tuple[Config, ...] = (
    _counted(_INAT18),
    _counted(_INAT18, _SINGLE),
    _counted(_WIDE),
    _counted(_ODD),
    _counted(_INAT18, needs=("input",)),
    _counted(_INAT18, with_grad=False),
    _counted(_WIDE, _SINGLE),
    _counted(_ODD, _SINGLE),
    _counted(Shape(256, 1_000_000)),
    _counted(SHAPES["aligned-n8192"]),
    _counted(_INAT18, _SINGLE, needs=("input",)),
    _counted(_WIDE, needs=("input",)),
    _counted(SHAPES["seg-n16"]),
)


class SmallConfig(NamedTuple):
    """A call of a kernel beside the loss: the gradient times a factor, or the coefficient of a mean."""

    title: str
    rows: int
    classes: int = 1000
    dtype: str = "float32"
    scales: bool = False  # scale the gradient, else count for a mean
    options: tuple[str, ...] = ()
    wide: bool = False
    shares_memory: bool = False

    def limit(self, kernel: str) -> float | None:
        """Return no limit: these kernels do not visit logits one by one."""
        return None


SMALL_CONFIGS = (
    SmallConfig("scale bfloat16", 1024, 8192, "bfloat16", scales=True),
    SmallConfig("scale float32", 1024, 8192, scales=True),
    SmallConfig("mean of 8192 rows", 8192),
    SmallConfig("mean of 8192 rows, mixed, weight", 8192, options=("mixed", "weight")),
    SmallConfig("mean of 512 x 512 x 4 pixels", 512 * 512 * 4),
    SmallConfig("mean of 512 x 512 x 4 pixels, weight", 512 * 512 * 4, options=("weight",)),
)
