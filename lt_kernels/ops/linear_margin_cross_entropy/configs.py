"""Named real shapes of ``linear_margin_cross_entropy``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Features [rows, width] and a weight [classes, width]."""

    rows: int
    classes: int
    width: int


#: Real linear heads, by name.
SHAPES = {
    "inat18-n256-d2048": Shape(256, 8142, 2048),
    "inat18-n512-d2048": Shape(512, 8142, 2048),
    "inat18-n1024-d2048": Shape(1024, 8142, 2048),
    "inat18-n8192-d2048": Shape(8192, 8142, 2048),
    "inat21-n512-d2048": Shape(512, 10_000, 2048),
    "inat21-n8192-d2048": Shape(8192, 10_000, 2048),
    "c100k-n512-d512": Shape(512, 100_000, 512),
    "c100k-n4096-d512": Shape(4096, 100_000, 512),
    "c100k-n256-d128": Shape(256, 100_000, 128),
    "c100k-n8192-d128": Shape(8192, 100_000, 128),
    "c1m-n64-d256": Shape(64, 1_000_000, 256),
    "c1m-n1024-d256": Shape(1024, 1_000_000, 256),
}


class Config(NamedTuple):
    """A call of the tiled strategy, forward and backward: shape, dtype, options."""

    name: str
    width: int
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    every_gradient: bool = False  # else of the features and the weight
    classes: int = 8142
    rows: int = 8192
    scalars: bool = False  # compile the kernels of rows' and classes' scalars too

    @property
    def title(self) -> str:
        return f"linear, {self.name}, D {self.width}, C {self.classes}, {self.dtype}"

    def limit(self, kernel: str) -> float | None:
        """Return no limit: tensor cores bound these kernels."""
        return None


_EVERY = (
    *("norm", "linear_bias", "class_bias", "class_scale", "class_margin", "learned_scale"),
    *("weight", "mixed", "smoothing", "prediction"),
)
CONFIGS: tuple[Config, ...] = (
    *(Config("class_bias", d, options=("class_bias",)) for d in (64, 128, 256, 512)),
    Config("plain", 128, classes=8192),
    Config("plain", 96, "float16"),
    Config("class_bias", 128, "float32", ("class_bias",)),
    Config("cosine, class_bias, prediction", 128, options=("norm", "class_bias", "prediction")),
    Config("all", 64, options=_EVERY, every_gradient=True),
    Config("all", 128, options=_EVERY, every_gradient=True, scalars=True),
    Config("all", 256, options=_EVERY, every_gradient=True),
)
