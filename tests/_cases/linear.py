"""Cases of ``linear_margin_cross_entropy``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from _cases.rows import ALL_VECTORS
from lt_kernels.testing import Sample, linear_sample_inputs

OWN = ("input", "linear_weight", "linear_bias")


@dataclass(frozen=True)
class Case:
    id: str
    rows: int = 48
    width: int = 12
    classes: int = 37
    positions: tuple[int, ...] = ()
    normalize: bool = False
    bias: bool = True
    options: tuple[str, ...] = ("class_bias",)
    keywords: dict[str, Any] = field(default_factory=dict)
    requires_grad: tuple[str, ...] = OWN
    soft: bool = False
    ignored: float = 0.0
    spread: float = 3.0

    def sample(self, dtype: torch.dtype, device: str = "cpu", **keywords: Any) -> Sample:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("id", "keywords")}
        return linear_sample_inputs(dtype=dtype, device=device, **values, **{**self.keywords, **keywords})


SMOOTHED = {"label_smoothing": 0.2}
VECTORS = {"options": ALL_VECTORS, "requires_grad": (*OWN, *ALL_VECTORS)}
EVERYTHING = {"options": ("weight", "mixed_target", *ALL_VECTORS), "requires_grad": (*OWN, *ALL_VECTORS)}
SOFT = {"soft": True, "requires_grad": (*OWN, "target")}
ANGULAR = {"margin_type": "angular", "scale": 16.0}

CASES = [
    Case("plain", bias=False, options=()),
    Case("one class", classes=1),
    Case("two classes", classes=2),
    Case("one row", rows=1, classes=300),
    Case("one feature", width=1),
    Case("odd", rows=37, width=17, classes=129),
    Case("inat18 width", rows=9, width=16, classes=8142),
    # Without the features' gradient: torch's own float32 product over 8142 classes errs by 2e-7 to 2e-6, depending on
    # the number of rows, so that chunks cannot be compared with the whole; "inat18 width" above has it.
    Case(
        "inat18 width, mixed",
        16,
        16,
        8142,
        options=("weight", "mixed_target", "class_bias", "class_scale", "margin"),
        keywords=SMOOTHED,
        ignored=0.2,
        requires_grad=OWN[1:],
    ),
    Case(
        "inat18 width, cosine",
        16,
        16,
        8142,
        normalize=True,
        options=("class_bias", "margin"),
        keywords=ANGULAR,
        requires_grad=OWN[1:],
    ),
    Case("logit adjustment"),
    Case("ignored rows", ignored=0.4),
    Case("class weights", options=("weight", "class_bias"), ignored=0.3),
    Case("smoothing", keywords=SMOOTHED, ignored=0.3),
    Case("weighted smoothing", options=("weight", "class_bias"), keywords=SMOOTHED, ignored=0.2),
    Case("number margin", rows=64, keywords={"margin": 0.4, "scale": 20.0}, spread=0.3),
    Case("vector margin and scale", options=("margin", "class_scale", "class_bias")),
    Case("learnable vectors", ignored=0.2, **VECTORS),
    Case("only vectors learn", options=ALL_VECTORS, requires_grad=ALL_VECTORS),
    Case("frozen weight", requires_grad=("input",)),
    Case("frozen features", requires_grad=("linear_weight", "linear_bias")),
    Case("only the bias learns", requires_grad=("linear_bias",)),
    Case("mixup", options=("class_bias", "mixed_target")),
    Case("mixup, two classes", classes=2, bias=False, options=("class_bias", "mixed_target"), ignored=0.3),
    Case("mixup per row", options=("class_bias", "mixed_target", "mix_lambda"), ignored=0.3),
    Case("mixup, smoothed", classes=9, options=("weight", "mixed_target"), keywords=SMOOTHED, ignored=0.3),
    Case("mixup with everything", classes=9, keywords=SMOOTHED, ignored=0.3, **EVERYTHING),
    Case("probabilities", **SOFT),
    Case("probabilities, smoothed", options=("weight", "class_bias"), keywords=SMOOTHED, **SOFT),
    Case("positions", rows=5, positions=(3, 2), ignored=0.3),
    Case("positions with everything", rows=5, classes=9, positions=(4,), keywords=SMOOTHED, ignored=0.2, **EVERYTHING),
    Case("positions, probabilities", rows=5, positions=(3,), **SOFT),
    Case("cosine", rows=64, normalize=True, keywords={"scale": 16.0}),
    Case("cosine, smoothed", rows=64, normalize=True, keywords={"scale": 16.0, **SMOOTHED}),
    Case("cosine, CosFace", rows=64, normalize=True, keywords={"scale": 16.0, "margin": 0.35}, options=()),
    Case("cosine, ArcFace", rows=64, normalize=True, options=("margin",), keywords=ANGULAR),
    Case("cosine, learnable vectors", rows=64, normalize=True, **VECTORS),
    Case("cosine, frozen weight", rows=64, normalize=True, requires_grad=("input",)),
    Case("cosine, mixup", rows=64, normalize=True, options=("mixed_target", "margin"), keywords={"scale": 16.0}),
    Case("cosine, positions", rows=9, positions=(5,), normalize=True, keywords={"scale": 16.0}),
    Case("cosine, probabilities", rows=32, normalize=True, keywords={"scale": 16.0}, **SOFT),
    Case("huge logits", rows=64, spread=1e3),
    Case("other ignore_index", ignored=0.4, keywords={"ignore_index": 3}),
]
BY_ID = {case.id: case for case in CASES}
