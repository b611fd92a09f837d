"""Cases of ``partitioned_logsumexp``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from _layouts import window
from torch import Tensor

from lt_kernels.testing import CONTRASTIVE_OPTIONS, ContrastiveSample, contrastive_sample_inputs

ALL_VECTORS = ("key_bias", "key_scale", "scale")


@dataclass(frozen=True)
class Case:
    id: str
    rows: int = 24
    width: int = 8
    keys: int | None = 41  # None: the queries are the keys
    classes: int = 5
    options: tuple[str, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    requires_grad: tuple[str, ...] = ("query", "key")
    label_dtype: torch.dtype = torch.int64
    unlabelled: float = 0.0
    masked: float = 0.0
    disjoint: bool = False
    normalized: bool = False
    spread: float = 3.0
    layout: str = "contiguous"

    def sample(self, dtype: torch.dtype, device: str = "cpu", **keywords: Any) -> ContrastiveSample:
        names = ("id", "keywords", "layout")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in names}
        sample = contrastive_sample_inputs(dtype=dtype, device=device, **values, **{**self.keywords, **keywords})
        if self.layout != "contiguous":
            change, same = LAYOUTS[self.layout], sample.key is sample.query
            sample.query = change(sample.query.detach()).requires_grad_("query" in self.requires_grad)
            sample.key = change(sample.key.detach()).requires_grad_("key" in self.requires_grad)
            sample.key = sample.query if same else sample.key
        return sample


LAYOUTS = {
    "window": window,
    "transposed": lambda x: x.t().contiguous().t(),
    "one for all": lambda x: x[:1].expand(x.shape),
}

COSINES: dict[str, Any] = {"normalized": True, "keywords": {"scale": 1 / 0.07}}
SELF: dict[str, Any] = {"exclude": "self"}
LEARNED: dict[str, Any] = {"options": ALL_VECTORS, "requires_grad": ("query", "key", *ALL_VECTORS)}
EVERYTHING: dict[str, Any] = {**LEARNED, "options": CONTRASTIVE_OPTIONS}

CASES = [
    Case("plain"),
    Case("odd", 37, 17, 129, classes=7),
    Case("supcon", 32, 16, None, normalized=True, keywords={"scale": 1 / 0.07, **SELF}),
    Case("everything", 37, 17, 129, unlabelled=0.1, masked=0.1, **EVERYTHING),
    Case("everything with itself", 37, 17, None, **EVERYTHING),
    # how many keys and queries there are
    Case("no rows", rows=0),
    Case("no keys", keys=0),
    Case("no rows with itself", rows=0, keys=None),
    Case("one row", rows=1, width=16, keys=300, keywords={"seed": 5}),
    Case("one key", keys=1, classes=2),
    Case("one of each", rows=1, width=3, keys=1, classes=1),
    Case("one row with itself", rows=1, width=8, keys=None, classes=1),
    Case("one row alone", rows=1, width=8, keys=None, classes=1, keywords=SELF),
    Case("one feature", width=1),
    Case("wide", rows=9, width=515, keys=33),
    Case("8142 keys", 16, 32, 8142, classes=100),
    Case("8142 keys, everything", 16, 32, 8142, classes=100, unlabelled=0.1, masked=0.1, **EVERYTHING),
    Case("few rows, many keys", 3, 16, 40_001, classes=50),
    Case("many rows, few keys", 1025, 24, 9, classes=3),
    # which of them are positive
    Case("no positives", disjoint=True),
    Case("no positives with everything", disjoint=True, **EVERYTHING),
    Case("all positives", classes=1),
    Case("all positives with everything", classes=1, **EVERYTHING),
    Case("a class of its own each", rows=16, keys=None, classes=10_000, keywords=SELF),
    Case("many classes", keys=64, classes=10_000),
    Case("unlabelled keys", unlabelled=0.5),
    Case("masked keys", masked=0.5),
    Case("masked keys with biases", masked=0.3, options=("key_bias",), requires_grad=("query", "key", "key_bias")),
    Case("every key masked", masked=1.1),
    Case("32-bit labels", label_dtype=torch.int32),
    Case("8-bit labels", label_dtype=torch.int8),
    Case("excluded keys", options=("exclude",)),
    Case("own key excluded", rows=24, keys=41, keywords=SELF),
    Case("the only key excluded", rows=4, keys=1, classes=1, keywords={"exclude": torch.tensor([0, -1, 0, -1])}),
    # options
    Case("biases", options=("key_bias",)),
    Case("scales", options=("key_scale",)),
    Case("biases that learn", options=("key_bias",), requires_grad=("query", "key", "key_bias")),
    Case("scales that learn", options=("key_scale",), requires_grad=("query", "key", "key_scale")),
    Case("number as scale", keywords={"scale": 0.37}),
    Case("negative scale", keywords={"scale": -0.8}),
    Case("scale of zero", keywords={"scale": 0.0}),
    Case("scale that learns", options=("scale",), requires_grad=("query", "key", "scale")),
    Case("separate scale", **EVERYTHING, keywords={"separate_scale": True}),
    Case("separate scale with itself", keys=None, **LEARNED, keywords={"separate_scale": True, **SELF}),
    Case("rows of keys", keywords={"key_grad_rows": (5, 17)}),
    Case("rows of keys with everything", keywords={"key_grad_rows": (30, 41)}, **EVERYTHING),
    Case("rows of keys with itself", keys=None, keywords={"key_grad_rows": (3, 11), **SELF}),
    Case("no rows of keys", keywords={"key_grad_rows": (7, 7)}),
    # what learns
    Case("frozen keys", requires_grad=("query",)),
    Case("frozen queries", requires_grad=("key",)),
    Case("only the scale learns", options=ALL_VECTORS, requires_grad=("scale",)),
    Case("only biases learn", options=ALL_VECTORS, requires_grad=("key_bias",)),
    Case("only scales learn", options=ALL_VECTORS, requires_grad=("key_scale",)),
    Case("only vectors learn", options=ALL_VECTORS, requires_grad=ALL_VECTORS),
    # values
    Case("cosines", 40, 32, 70, **COSINES),
    Case("cosines, everything", 40, 32, 70, normalized=True, unlabelled=0.1, masked=0.1, **EVERYTHING),
    Case("cold cosines", 40, 32, 70, normalized=True, keywords={"scale": 100.0}),
    Case("cosines beside biases", 40, 32, 70, options=("key_bias",), masked=0.2, **COSINES),
    Case("huge logits", rows=64, spread=1e3),
    Case("huge logits with itself", rows=64, keys=None, spread=1e3, keywords=SELF),
    # where they are
    Case("window", layout="window", width=13),
    Case("transposed", layout="transposed", width=13),
    Case("one for all", layout="one for all", width=13),
    Case("window with itself", keys=None, layout="window", width=13, keywords=SELF),
]
BY_ID = {case.id: case for case in CASES}


def vectors(n: int, m: int, d: int, dtype=torch.float32, device="cpu", classes: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        values = F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)
        return values.to(device, dtype).requires_grad_()

    labels = [torch.randint(0, classes, (size,), generator=generator).to(device) for size in (n, m)]
    return unit(n), unit(m), *labels
