"""Cases of ``margin_cross_entropy``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from _layouts import every_other, padded, window

from lt_kernels.testing import Sample, sample_inputs

ALL_VECTORS = ("class_bias", "class_scale", "margin", "scale")


@dataclass(frozen=True)
class Case:
    id: str
    rows: int = 5
    classes: int = 33
    positions: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    requires_grad: tuple[str, ...] = ("input",)
    soft: bool = False
    ignored: float = 0.0
    spread: float = 3.0
    layout: str = "contiguous"

    def sample(self, dtype: torch.dtype, device: str = "cpu", **keywords: Any) -> Sample:
        sample = sample_inputs(
            self.rows,
            self.classes,
            self.positions,
            dtype=dtype,
            device=device,
            options=self.options,
            requires_grad=self.requires_grad,
            soft=self.soft,
            ignored=self.ignored,
            spread=self.spread,
            **{**self.keywords, **keywords},
        )
        sample.input = LAYOUTS[self.layout](sample.input.detach()).requires_grad_("input" in self.requires_grad)
        return sample


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": window,
    "padded": padded,
    "every other column": lambda x: every_other(x, 1) if x.dim() == 2 else x,
    "expanded rows": lambda x: x[:1].expand(x.shape),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}

VECTORS = {"options": ALL_VECTORS, "requires_grad": ("input", *ALL_VECTORS)}
EVERYTHING = {"options": ("weight", *ALL_VECTORS), "requires_grad": ("input", *ALL_VECTORS)}
MIXED_EVERYTHING = {"options": ("weight", "mixed_target", *ALL_VECTORS), "requires_grad": ("input", *ALL_VECTORS)}
BIAS = {"options": ("class_bias",)}
SOFT = {"soft": True, "requires_grad": ("input", "target")}
SMOOTHED = {"label_smoothing": 0.2}

# Where scale or bias round the logits themselves, eager's error in a handful of rows is a matter of luck: such cases
# have enough rows for its maximum to mean something.
CASES = [
    Case("plain"),
    Case("one class", classes=1),
    Case("two classes", classes=2),
    Case("one row", rows=1, classes=1000),
    Case("odd", rows=7, classes=129),
    Case("inat18 width", rows=3, classes=8142, **BIAS),
    Case("inat18 width, all vectors", rows=3, classes=8142, **EVERYTHING),
    # without the gradient of scale: one cancelling sum over all logits, for which float64 is no truth to float64
    Case(
        "inat18 width, mixed",
        rows=3,
        classes=8142,
        keywords=SMOOTHED,
        options=MIXED_EVERYTHING["options"],
        requires_grad=("input", "class_bias", "class_scale", "margin"),
    ),
    Case("inat18 width, probabilities", rows=3, classes=8142, keywords=SMOOTHED, options=("class_bias",), **SOFT),
    Case("inat18 width, angular", 3, 8142, keywords={"margin_type": "angular", "scale": 16.0}, options=("margin",)),
    Case("aligned width", rows=3, classes=8192, **BIAS),
    Case("few rows, many columns", rows=2, classes=40_001, **BIAS),
    Case("wide rows", rows=9, classes=33_001, **BIAS),
    Case("logit adjustment", **BIAS),
    Case("ignored rows", rows=9, ignored=0.4, **BIAS),
    Case("class weights", rows=9, options=("weight",), ignored=0.3),
    Case("smoothing", rows=9, keywords=SMOOTHED, ignored=0.3, **BIAS),
    Case("weighted smoothing", options=("weight", "class_bias"), keywords=SMOOTHED, ignored=0.2),
    Case("full smoothing", options=("weight",), keywords={"label_smoothing": 1.0}),
    Case("number margin", rows=64, keywords={"margin": 0.4, "scale": 30.0}, spread=0.3, **BIAS),
    Case("negative margin", keywords={"margin": -2.0}),
    Case("number margin and vector scale", options=("class_scale",), keywords={"margin": 0.4, "scale": 4.0}),
    Case("learnable vectors", rows=9, ignored=0.2, **VECTORS),
    Case("only vectors learn", rows=9, options=ALL_VECTORS, requires_grad=ALL_VECTORS),
    Case("angular", options=("margin",), keywords={"margin_type": "angular", "scale": 16.0}),
    Case("angular, everything learns", rows=9, keywords={"margin_type": "angular", **SMOOTHED}, **VECTORS),
    Case("angular past pi", rows=16, keywords={"margin_type": "angular", "margin": 2.5, "scale": 8.0}),
    Case("mixup", rows=9, options=("class_bias", "mixed_target")),
    Case("mixup, two classes", rows=9, classes=2, options=("class_bias", "mixed_target"), ignored=0.3),
    Case("mixup per row", rows=9, options=("class_bias", "mixed_target", "mix_lambda"), ignored=0.3),
    Case("mixup with everything", rows=9, classes=5, keywords=SMOOTHED, ignored=0.3, **MIXED_EVERYTHING),
    Case("mixup, angular", rows=9, classes=6, options=("margin", "mixed_target"), keywords={"margin_type": "angular"}),
    Case("probabilities", options=("class_bias",), **SOFT),
    Case(
        "probabilities with everything",
        rows=9,
        options=("weight", "class_bias", "class_scale", "scale"),
        soft=True,
        requires_grad=("input", "target", "class_bias", "class_scale", "scale"),
        keywords=SMOOTHED,
    ),
    Case("segmentation", rows=2, classes=19, positions=(5, 7), ignored=0.3, **BIAS),
    Case("segmentation, many pixels", rows=1, classes=7, positions=(23, 29), options=("class_bias", "weight")),
    Case("segmentation with everything", 2, 9, positions=(3, 5), keywords=SMOOTHED, ignored=0.3, **MIXED_EVERYTHING),
    Case("segmentation, probabilities", rows=2, classes=9, positions=(3, 5), **SOFT),
    Case("segmentation, channels last", rows=2, classes=19, positions=(5, 7), layout="channels last", **BIAS),
    Case("three position dimensions", rows=2, classes=5, positions=(2, 3, 2)),
    Case("transposed", rows=37, classes=29, layout="transposed", **BIAS),
    Case("transposed with everything", rows=37, classes=29, layout="transposed", **MIXED_EVERYTHING),
    Case("transposed probabilities", rows=37, classes=29, layout="transposed", **SOFT),
    Case("sliced", rows=7, classes=65, layout="sliced", **BIAS),
    Case("sliced segmentation", rows=2, classes=9, positions=(3, 5), layout="sliced"),
    Case("padded rows", rows=7, classes=65, layout="padded", **BIAS),
    Case("every other column", rows=7, classes=65, layout="every other column", **BIAS),
    Case("expanded rows", rows=7, classes=65, layout="expanded rows", **BIAS),
    Case("huge logits", spread=1e4),
    Case("peaks far from the first columns", rows=9, classes=1000, spread=300.0, **BIAS),
    Case("peaks far from the first columns, mixed", rows=9, classes=300, spread=300.0, options=("mixed_target",)),
    Case("nearly right", options=("margin",), keywords={"scale": 200.0}),
    Case("other ignore_index", rows=9, ignored=0.4, keywords={"ignore_index": 3}),
]
BY_ID = {case.id: case for case in CASES}
