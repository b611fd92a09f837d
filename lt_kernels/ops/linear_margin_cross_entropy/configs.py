"""Named real shapes of ``linear_margin_cross_entropy``, as data: readable without Triton and without a GPU."""

from __future__ import annotations

from typing import NamedTuple


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
