"""Cases of the expert operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from _layouts import window

from _cases.rows import ALL_VECTORS, SMOOTHED
from lt_kernels.testing import Sample, expert_sample_inputs


@dataclass(frozen=True)
class Case:
    id: str
    experts: int = 3
    rows: int = 7
    classes: int = 33
    options: tuple[str, ...] = ("log_prior",)
    keywords: dict[str, Any] = field(default_factory=dict)
    requires_grad: tuple[str, ...] = ("input",)
    ignored: float = 0.0
    spread: float = 3.0
    layout: str = "stacked"

    def sample(self, dtype: torch.dtype, device: str = "cpu", **keywords: Any) -> Sample:
        sample = expert_sample_inputs(
            self.experts,
            self.rows,
            self.classes,
            dtype=dtype,
            device=device,
            options=self.options,
            requires_grad=self.requires_grad,
            ignored=self.ignored,
            spread=self.spread,
            **{**self.keywords, **keywords},
        )
        sample.input = LAYOUTS[self.layout](sample.input.detach()).requires_grad_("input" in self.requires_grad)
        return sample


LAYOUTS = {
    "stacked": lambda x: x,
    "samples first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # [N, E, C] in memory
    "classes first": lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "window": lambda x: window(x, dim=2),
    "one for all": lambda x: x[:1].expand(x.shape),
}

#: Class vectors that learn, with a prior of its own for each expert.
VECTORS = {
    "options": (*(v for v in ALL_VECTORS if v != "class_bias"), "log_prior", "class taus", "expert_bias"),
    "requires_grad": ("input", "class_scale", "margin", "scale", "log_prior", "taus", "class_bias"),
}
MIXED_VECTORS = {**VECTORS, "options": ("weight", "mixed_target", *VECTORS["options"])}
SHARED = {"options": (*ALL_VECTORS, "log_prior"), "requires_grad": ("input", *ALL_VECTORS)}

# As in rows.py: where bias rounds the logits themselves, a case has enough rows for eager's error to mean something.
CASES = [
    Case("plain", options=()),
    Case("balpoe"),
    Case("one expert", experts=1),
    Case("six experts", experts=6),
    Case("nine experts", experts=9, rows=5),
    Case("one class", classes=1),
    Case("two classes", classes=2),
    Case("one row", rows=1, classes=1000),
    Case("odd", rows=5, classes=129),
    Case("inat18 width", rows=24, classes=8142),
    Case("inat18 width, mixed", rows=24, classes=8142, options=("log_prior", "mixed_target")),
    Case("inat18 width, everything", rows=24, classes=8142, keywords=SMOOTHED, ignored=0.2, **MIXED_VECTORS),
    Case(
        "inat18 width, angular",
        rows=24,
        classes=8142,
        options=("margin", "expert_bias"),
        keywords={"margin_type": "angular", "scale": 16.0},
    ),
    Case("few rows, many columns", experts=2, rows=2, classes=40_001),
    Case("class bias", options=("class_bias",)),
    Case("bias per expert", options=("expert_bias",)),
    Case("bias and prior", rows=64, options=("class_bias", "log_prior")),
    Case("bias per expert and prior", rows=64, options=("expert_bias", "log_prior")),
    Case("taus that learn", options=("log_prior", "taus"), requires_grad=("input", "taus", "log_prior")),
    Case("taus per class", options=("log_prior", "class taus"), requires_grad=("input", "taus")),
    Case("prior that learns", requires_grad=("input", "log_prior")),
    Case("ignored rows", rows=16, ignored=0.4),
    Case("class weights", rows=16, options=("weight", "log_prior"), ignored=0.3),
    Case("smoothing", rows=64, options=("weight", "log_prior"), keywords=SMOOTHED, ignored=0.3),
    Case("cosines", rows=64, keywords={"scale": 30.0, "margin": 0.3}, spread=0.3),
    Case("angular", options=("margin", "log_prior"), keywords={"margin_type": "angular", "scale": 16.0}, rows=64),
    Case("mixup", options=("log_prior", "mixed_target"), rows=16),
    Case("mixup per row", options=("log_prior", "mixed_target", "mix_lambda"), rows=16, ignored=0.3),
    Case("mixup with everything", 3, 16, 9, keywords=SMOOTHED, ignored=0.3, **MIXED_VECTORS),
    Case("vectors that learn", rows=16, ignored=0.2, **SHARED),
    Case("only vectors learn", rows=16, options=SHARED["options"], requires_grad=ALL_VECTORS),
    Case("samples first", rows=16, layout="samples first"),
    Case("samples first, inat18 width", rows=16, classes=8142, layout="samples first"),
    Case("classes first", rows=37, classes=29, layout="classes first"),
    Case("window", rows=7, classes=65, layout="window", options=("log_prior", "mixed_target")),
    Case("one for all", rows=7, classes=65, layout="one for all"),
    Case("huge logits", spread=1e3),
    Case("other ignore_index", rows=16, ignored=0.4, keywords={"ignore_index": 3}),
]
BY_ID = {case.id: case for case in CASES}
