"""Compile every Triton kernel at every shipped configuration, without a GPU, and hold the machine code to its budget.

    python scripts/aot_gate.py --check    compile, assert, and compare with the committed tables
    python scripts/aot_gate.py --write    compile, assert, and rewrite the tables (JSON, and docs/kernels.md from them)
    python scripts/aot_gate.py --no-table compile and assert only: for another Triton than the tables were written with

What is compiled is what the launchers launch: they are called with tensors on the meta device while the kernels'
launch is replaced by a recorder, and the recorded arguments are specialised by Triton's own rules (None and 1 become
constants, multiples of 16 are marked). Targets: sm_80, sm_90, sm_100, gfx942.

"instructions per logit" is (SASS instructions on the longest path through the sm_90 kernel, predicated ones included,
NOPs not, a loop as often as it runs) * threads / logits: an upper bound of what a program costs, the rows' scalar
arithmetic included.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lt_kernels.ops._rows.options import RowOptions  # noqa: E402
from lt_kernels.ops.expert_cross_entropy import triton as experts  # noqa: E402
from lt_kernels.ops.expert_cross_entropy.arguments import Arguments as ExpertsArguments  # noqa: E402
from lt_kernels.ops.expert_cross_entropy.triton import launch as experts_launch  # noqa: E402
from lt_kernels.ops.expert_divergence import triton as divergence  # noqa: E402
from lt_kernels.ops.expert_fusion import triton as fusion  # noqa: E402
from lt_kernels.ops.expert_fusion.arguments import Arguments as FusionArguments  # noqa: E402
from lt_kernels.ops.linear_margin_cross_entropy import arguments as linear  # noqa: E402
from lt_kernels.ops.linear_margin_cross_entropy import triton as tiled  # noqa: E402
from lt_kernels.ops.linear_margin_cross_entropy.triton import tiles  # noqa: E402
from lt_kernels.ops.margin_cross_entropy import triton as kernels  # noqa: E402
from lt_kernels.ops.margin_cross_entropy.arguments import DIFFERENTIABLE, Arguments  # noqa: E402
from lt_kernels.ops.margin_cross_entropy.triton import launch as rows_launch  # noqa: E402
from lt_kernels.ops.partitioned_logsumexp import arguments as keys  # noqa: E402
from lt_kernels.ops.partitioned_logsumexp import triton as contrastive  # noqa: E402
from lt_kernels.ops.partitioned_logsumexp.triton import launch as key_launch  # noqa: E402

TABLES = ROOT / "benchmarks/results/aot"
OPS = (
    "margin_cross_entropy",
    "linear_margin_cross_entropy",
    "expert_cross_entropy",
    "expert_fusion",
    "expert_divergence",
    "partitioned_logsumexp",
)
VIEW = ROOT / "docs/kernels.md"
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Asserted limits of instructions per logit: of rows that one program keeps; and what an H200 executes (3.35e13 a
#: second) while its memory moves the 4 bytes of a bfloat16 logit and its gradient (4.3e12 a second).
ONE_TILE_BUDGET, MEMORY_BUDGET = 20.0, 31.0
#: The same of experts with their ensemble, whose second sweep is over logits in L2: a little more than memory's time.
ENSEMBLE_BUDGET = 33.0
#: The same of logits that are read alone: 2 bytes each.
READ_BUDGET = 15.6
REGISTERS_PER_BLOCK = 65536
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
#: The tensor-core instructions that products of 16-bit numbers must come to.
TENSOR_CORE = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b", "gfx942": r"\bv_mfma"}
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@dataclass
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """What Triton's just-in-time compiler would build for these arguments."""
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[Any, Any] = {}

        def specialize(value: Any, path: tuple[int, ...], exact: bool) -> Any:
            """The type of an argument, of each element of a tuple; constants and attributes noted."""
            if isinstance(value, tuple):
                types = [specialize(each, (*path, place), exact) for place, each in enumerate(value)]
                return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
            if value is None or isinstance(value, tl.constexpr) or (type(value) is int and value == 1 and exact):
                constants[path] = value
                return "constexpr"
            if isinstance(value, Tensor) or (type(value) is int and exact and value % 16 == 0):
                attributes[path] = [["tt.divisibility", 16]]
            return _type_of(value)

        exempt = set(self.kernel.do_not_specialize or ())
        for position, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[name], constants[(position,)] = "constexpr", value
            else:
                exact = name not in exempt and position not in exempt
                signature[name] = specialize(value, (position,), exact)
        return ASTSource(self.kernel, signature, constants, attributes)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of this package's Triton kernels instead of running them."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **named: Any) -> None:
                arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **named}
                options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
                launches.append(Launch(self.kernel, arguments, options))

            return launch

    originals = [
        (module, name, kernel)
        for module in [m for n, m in sys.modules.items() if re.match(r"lt_kernels\.ops\.\w+\.triton\.", n)]
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, triton.JITFunction)
    ]
    try:
        for module, name, kernel in originals:
            setattr(module, name, Recorder(kernel))
        yield launches
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


@dataclass
class Configuration:
    """A call of the backend: shape, dtype, options."""

    name: str
    classes: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # () : forward, else backward for these inputs
    with_grad: bool = True  # of a forward
    with_lse: bool = False  # of a backward: an upstream gradient of the log-sum-exp too
    padding: int = 0  # columns between rows; odd numbers leave the tensors' rows without a common alignment
    rows: int = 1024
    positions: int = 1
    transposed: bool = False
    in_place: bool = False  # the gradient over the logits
    wide: bool = False  # held to 16-byte loads and stores
    budget: float | None = None  # limit of instructions per logit

    def launches(self) -> list[Launch]:
        n, c, k = self.rows, self.classes, self.positions

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return meta(*shape, dtype=dtype) if name in self.options else None

        x = meta(n, c + self.padding, k, dtype=self.dtype)[:, :c]
        if self.transposed:
            x = meta(c, n, dtype=self.dtype).T[:, :, None]
        soft = "soft" in self.options
        options = RowOptions(
            target=meta(n, c, k, dtype=self.dtype) if soft else meta(n, k, dtype=torch.int64),
            mixed_target=option("mixed", n, k, dtype=torch.int64),
            mix_lambda=option("mixed", n, k),
            weight=option("weight", c),
            class_bias=option("class_bias", c),
            class_scale=option("class_scale", c),
            class_margin=option("margin", c),
            learned_scale=option("learned_scale"),
            coefficient=meta(2 if "mixed" in self.options else 1),
            scale=64.0 if "angular" in self.options else 1.0,
            angular="angular" in self.options,
            label_smoothing=0.1 if "smoothing" in self.options else 0.0,
        )
        a = Arguments(x, options)
        out = x if self.in_place else None
        with recording() as launches:
            if self.needs:
                needs = [name in self.needs for name in DIFFERENTIABLE]
                kernels.backward(meta(), meta(n, k) if self.with_lse else None, meta(2, n, k), a, needs, out=out)
            else:
                kernels.forward(a, "prediction" in self.options, self.with_grad, out=out)
        return launches


@dataclass
class LinearConfiguration:
    """A call of the tiled strategy, forward and backward: shape, dtype, options."""

    name: str
    width: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("input", "linear_weight")
    classes: int = 8142
    rows: int = 8192
    scalars: bool = False  # the kernels of rows' and classes' scalars too

    def launches(self, target: str) -> list[Launch]:
        n, c, d = self.rows, self.classes, self.width

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return meta(*shape, dtype=dtype) if name in self.options else None

        a = linear.Arguments(
            input=meta(n, d, dtype=self.dtype),
            linear_weight=meta(c, d, dtype=self.dtype),
            weight_copy=None,
            linear_bias=option("linear_bias", c, dtype=self.dtype),
            options=RowOptions(
                target=meta(n, 1, dtype=torch.int64),
                mixed_target=option("mixed", n, 1, dtype=torch.int64),
                mix_lambda=option("mixed", n, 1),
                weight=option("weight", c),
                class_bias=option("class_bias", c),
                class_scale=option("class_scale", c),
                class_margin=option("class_margin", c),
                learned_scale=option("learned_scale"),
                coefficient=meta(2 if "mixed" in self.options else 1),
                scale=30.0 if "norm" in self.options else 1.0,
                angular="angular" in self.options,
                label_smoothing=0.1 if "smoothing" in self.options else 0.0,
            ),
            normalize="norm" in self.options,
        )
        needs = [name in self.needs for name in linear.DIFFERENTIABLE]
        gpu, architecture_of = TARGETS[target], tiles.architecture_of
        tiles.architecture_of = lambda device: 0 if gpu.backend == "hip" else gpu.arch
        try:
            with recording() as launches:
                tiled.forward(a, option("norm", c), "prediction" in self.options)
                tiled.backward(meta(), None, meta(2, n, 1), a, option("norm", c), needs)
        finally:
            tiles.architecture_of = architecture_of
        return [launch for launch in launches if self.scalars or "PRECISION" in launch.arguments]


@dataclass
class ContrastiveConfiguration:
    """A call of the partitioned log-sum-exp: of tiles, forward and backward, or on a block of similarities."""

    name: str
    width: int  # 0: a block
    options: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"  # of products of float32
    rows: int = 8192
    columns: int = 16384
    kernels: tuple[str, ...] = ()  # those that are compiled; (): all
    budgets: dict[str, float] = field(default_factory=dict)  # limits of instructions per logit, by kernel

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") + (f" as {self.precision}" * (self.dtype == torch.float32))
        size = f"D {self.width}, {self.rows} x {self.columns}" if self.width else f"block, {self.rows} x {self.columns}"
        return f"keys, {self.name}, {size}, {dtype}"

    def launches(self, target: str) -> list[Launch]:
        n, m = self.rows, self.columns

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return meta(*shape, dtype=dtype) if name in self.options else None

        labels = meta(n, dtype=torch.int32), meta(m, dtype=torch.int32)
        exclude = option("exclude", n, dtype=torch.int32)
        vectors = option("key_bias", m), option("key_scale", m), option("learned_scale")
        slopes, sums = "slopes" in self.options, [f"key_{name}" in self.options for name in ("bias", "scale")]
        gpu = TARGETS[target]
        originals = key_launch.architecture_of, key_launch.product_precision
        key_launch.architecture_of = lambda device: 0 if gpu.backend == "hip" else gpu.arch
        key_launch.product_precision = lambda dtype: self.precision
        try:
            with recording() as launches:
                if self.width == 0:  # in a buffer whose rows start at multiples of 64 bytes
                    z, dz = (meta(n, triton.cdiv(m, 32) * 32, dtype=self.dtype)[:, :m] for _ in range(2))
                    block = keys.Block(z, *labels, exclude, 0, *vectors, 10.0)
                    contrastive.forward(block, slopes)
                    contrastive.backward(block, meta(keys.N_TERMS, n), [True, *sums], dz)
                else:
                    alone = "alone" in self.options
                    query = meta(n, self.width, dtype=self.dtype)
                    key = None if alone else meta(m, self.width, dtype=self.dtype)
                    a = keys.Arguments(query, key, *labels, exclude, *vectors, 10.0, 0, m, "bounded" in self.options)
                    contrastive.tiled_forward(a, slopes)
                    contrastive.tiled_backward(a, meta(keys.N_TERMS, n), [True, not alone, *sums])
        finally:
            key_launch.architecture_of, key_launch.product_precision = originals
        return [launch for launch in launches if not self.kernels or launch.kernel.__name__ in self.kernels]


@dataclass
class ExpertsConfiguration:
    """A call of expert_cross_entropy, expert_fusion or expert_divergence on the logits of several experts."""

    op: str
    name: str
    classes: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    experts: int = 3
    rows: int = 1024
    k: int = 1
    backward: bool = False
    samples_first: bool = False  # [N, E, C] in memory
    wide: bool = True  # held to 16-byte loads and stores
    budget: float | None = None  # limit of instructions per logit

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        direction = ", backward" if self.backward else ""
        return f"{self.op}, {self.name}, E {self.experts}, C {self.classes}, {dtype}{direction}"

    def launches(self) -> list[Launch]:
        e, n, c = self.experts, self.rows, self.classes

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def option(name: str, *shape: int) -> Tensor | None:
            return meta(*shape) if name in self.options else None

        x = meta(n, e, c, dtype=self.dtype).transpose(0, 1) if self.samples_first else meta(e, n, c, dtype=self.dtype)
        with recording() as launches:
            if self.op == "expert_cross_entropy":
                experts.forward(self._arguments(x), "ensemble" in self.options, True)
            elif self.op == "expert_fusion":
                a = FusionArguments(
                    [x],
                    option("expert_weight", e),
                    option("class_shift", c),
                    option("learned_scale"),
                    [1.0 / e] * e,
                    1.0,
                )
                fusion.forward(a, self.k, "log_probs" in self.options)
            elif self.backward:
                saved, temperature, kind = meta(3 * e + 2, n), option("temperature", c), self._kind
                divergence.backward(meta(e, n), saved, [x], temperature, kind, "detached" in self.options)
            else:
                divergence.forward([x], option("temperature", c), self._kind)
        return launches

    def _arguments(self, x: Tensor) -> ExpertsArguments:
        """Of expert_cross_entropy."""
        e, n, c = x.shape

        def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device="meta") if name in self.options else None

        coefficient = torch.empty(2 if "mixed" in self.options else 1, device="meta")
        options = RowOptions(
            target=torch.empty(n, 1, dtype=torch.int64, device="meta"),
            mixed_target=option("mixed", n, 1, dtype=torch.int64),
            mix_lambda=option("mixed"),
            weight=option("weight", c),
            class_bias=option("expert_bias", e, c),
            class_scale=option("class_scale", c),
            class_margin=None,
            learned_scale=None,
            coefficient=coefficient,
            scale=30.0 if "scale" in self.options else 1.0,
            label_smoothing=0.1 if "smoothing" in self.options else 0.0,
        )
        return ExpertsArguments([x], options, option("log_prior", c), coefficient, [1.0 + each for each in range(e)])

    @property
    def _kind(self) -> str:
        return "pairwise" if "pairwise" in self.options else "to_mean"


_VS = ("class_bias", "class_scale")
_MANY = ("class_bias", "class_scale", "margin", "weight", "mixed", "smoothing", "learned_scale", "prediction")
_CLASS_VECTORS = ("input", "class_bias", "class_scale", "class_margin", "learned_scale")
_HALF, _SINGLE = torch.float16, torch.float32


def _configurations() -> list[Configuration]:
    one_pass = [
        *(
            Configuration("plain", c, wide=True, budget=ONE_TILE_BUDGET if c != 21841 else None)
            for c in (1000, 8142, 8192, 21841, 32768)
        ),
        *(Configuration("plain", c, _SINGLE, wide=True, budget=ONE_TILE_BUDGET) for c in (8142, 8192, 32768)),
        Configuration("plain", 8142, _HALF, wide=True, budget=ONE_TILE_BUDGET),
        *(
            Configuration("class_bias", c, options=_VS[:1], wide=True, budget=ONE_TILE_BUDGET)
            for c in (8142, 8192, 32768)
        ),
        Configuration("class_bias", 8142, _SINGLE, _VS[:1], wide=True, budget=ONE_TILE_BUDGET),
        *(Configuration("class_bias, class_scale", c, options=_VS, wide=True) for c in (8142, 16384)),
        *(
            Configuration("class_bias, prediction", c, options=(*_VS[:1], "prediction"), wide=True)
            for c in (8142, 16384)
        ),
        Configuration("class_bias, prediction", 16384, _SINGLE, (*_VS[:1], "prediction"), wide=True),
        Configuration("class_bias, class_scale, prediction", 16384, _SINGLE, (*_VS, "prediction"), wide=True),
        Configuration("weight, smoothing", 8142, options=("class_bias", "weight", "smoothing"), wide=True),
        Configuration("weight, smoothing", 16384, options=("class_bias", "weight", "smoothing"), wide=True),
        Configuration("angular", 10000, _SINGLE, ("angular", "margin"), wide=True),
        Configuration("mixed", 8142, options=("class_bias", "mixed"), wide=True),
        Configuration("mixed", 16384, _SINGLE, ("class_bias", "mixed", "margin"), wide=True),
        Configuration("smoothing", 32768, _SINGLE, ("class_bias", "smoothing"), wide=True),
        Configuration("mixed, smoothing", 16384, _SINGLE, ("class_bias", "mixed", "smoothing", "margin"), wide=True),
        Configuration("probabilities", 8142, options=("class_bias", "soft"), wide=True),
        Configuration("probabilities, prediction", 16384, _SINGLE, ("class_bias", "soft", "prediction"), wide=True),
        Configuration("all", 8142, options=_MANY, wide=True),
        Configuration("all", 8142, _SINGLE, _MANY, wide=True),
    ]
    forward_only = [
        Configuration("no gradient, class_bias", 8142, options=_VS[:1], with_grad=False, budget=ONE_TILE_BUDGET),
        Configuration("no gradient, class_bias", 8142, _HALF, _VS[:1], with_grad=False, budget=ONE_TILE_BUDGET),
        Configuration("no gradient, class_bias", 100003, options=_VS[:1], with_grad=False),
        Configuration("rows without a common alignment, class_bias", 8142, options=_VS[:1], padding=1),
    ]
    looped = [
        Configuration("plain", 32776, wide=True, rows=4096),
        Configuration("plain", 65536, wide=True, rows=4096, budget=MEMORY_BUDGET),
        Configuration("plain", 65536, _SINGLE, wide=True, rows=4096, budget=MEMORY_BUDGET),
        Configuration("class_bias", 65536, options=_VS[:1], wide=True, rows=4096, budget=MEMORY_BUDGET),
        Configuration("class_bias, prediction", 65536, _SINGLE, (*_VS[:1], "prediction"), wide=True, rows=4096),
        Configuration("smoothing", 65536, options=("class_bias", "smoothing"), wide=True, rows=4096),
        Configuration(
            "all but weights", 65536, _SINGLE, tuple(o for o in _MANY if o not in ("class_scale", "weight")), wide=True
        ),
        Configuration("class_bias", 100003, options=_VS[:1], wide=True),
        Configuration("probabilities", 65536, options=("soft", "weight", "smoothing"), wide=True),
        Configuration("all", 65536, options=_MANY, wide=True),
    ]
    backward = [
        Configuration("plain", 8142, needs=("input",), wide=True, budget=ONE_TILE_BUDGET),
        Configuration("class_bias", 8142, _SINGLE, _VS[:1], ("input",), wide=True),
        Configuration("all", 65536, options=_MANY, needs=("input",), wide=True),
        Configuration("probabilities", 8142, options=("class_bias", "soft"), needs=("input",), wide=True),
        Configuration("class_bias, log-sum-exp", 8142, options=_VS[:1], needs=("input",), with_lse=True, wide=True),
        Configuration("rows without a common alignment", 8142, needs=("input",), padding=1),
        Configuration("class_bias", 8142, options=_VS[:1], needs=("input", "class_bias"), budget=MEMORY_BUDGET),
        Configuration(
            "class_bias", 8192, options=_VS[:1], needs=("input", "class_bias"), wide=True, budget=MEMORY_BUDGET
        ),
        Configuration("class vectors", 8142, options=_MANY, needs=_CLASS_VECTORS),
        Configuration("probabilities", 8142, _SINGLE, ("soft", "weight"), ("input", "target")),
    ]
    tiles = [
        Configuration("segmentation", 150, rows=4, positions=512 * 512, wide=True, budget=MEMORY_BUDGET),
        Configuration("segmentation", 19, rows=4, positions=512 * 512, wide=True),
        Configuration(
            "segmentation, class_bias, prediction", 150, options=(*_VS[:1], "prediction"), rows=4, positions=512 * 512
        ),
        Configuration("segmentation", 150, _SINGLE, rows=4, positions=512 * 512, wide=True),
        Configuration("segmentation, all", 150, _SINGLE, _MANY, rows=4, positions=512 * 512),
        Configuration(
            "segmentation", 19, needs=("input",), rows=4, positions=512 * 512, wide=True, budget=MEMORY_BUDGET
        ),
        Configuration(
            "segmentation, class_bias", 150, options=_VS[:1], needs=("input", "class_bias"), rows=4, positions=512 * 512
        ),
        Configuration("segmentation, class vectors", 150, _HALF, _MANY, _CLASS_VECTORS, rows=4, positions=512 * 512),
        Configuration("transposed", 8142, options=_VS[:1], transposed=True, wide=True),
        Configuration("few classes", 10),
        Configuration("channels last", 19, rows=512 * 512),
        Configuration("few classes", 100, _SINGLE, _VS[:1]),
    ]
    parts = [
        Configuration("few rows", 1_000_000, rows=64, wide=True, budget=ONE_TILE_BUDGET),
        Configuration("few rows, class_bias", 100003, _SINGLE, _VS[:1], rows=16, wide=True),
        Configuration("few rows, probabilities", 65536, options=("soft", "weight", "smoothing"), rows=64, wide=True),
        Configuration("few rows, all", 65536, options=_MANY, rows=64, wide=True),
    ]
    # as linear heads have them: rows of a buffer that starts each at a multiple of 64 bytes
    in_place = [
        Configuration("in place, class_bias", 8142, options=_VS[:1], padding=18, in_place=True, wide=True),
        Configuration("in place, class_bias", 8142, _SINGLE, _VS[:1], padding=2, in_place=True, wide=True),
        Configuration(
            "in place, class_bias, prediction", 8142, options=(*_VS[:1], "prediction"), padding=18, in_place=True,
            wide=True,
        ),
        Configuration("in place, class_scale", 8142, options=_VS, padding=18, in_place=True, wide=True),
        Configuration(
            "in place, class_bias", 100_000, options=_VS[:1], rows=4096, in_place=True, wide=True
        ),
        Configuration("in place, few rows", 1_000_000, options=_VS[:1], rows=64, in_place=True, wide=True),
        Configuration(
            "in place, class_bias", 8142, options=_VS[:1], needs=("input",), padding=18, in_place=True, wide=True
        ),
        Configuration(
            "in place, class vectors", 8142, options=_MANY, needs=_CLASS_VECTORS, padding=18, in_place=True
        ),
    ]  # fmt: skip
    return [*one_pass, *forward_only, *looped, *parts, *backward, *tiles, *in_place]


_EVERY = (
    *("norm", "linear_bias", "class_bias", "class_scale", "class_margin", "learned_scale"),
    *("weight", "mixed", "smoothing", "prediction"),
)


def _linear_configurations() -> list[LinearConfiguration]:
    return [
        *(LinearConfiguration("class_bias", d, options=("class_bias",)) for d in (64, 128, 256, 512)),
        LinearConfiguration("plain", 128, classes=8192),
        LinearConfiguration("plain", 96, torch.float16),
        LinearConfiguration("class_bias", 128, torch.float32, ("class_bias",)),
        LinearConfiguration("cosine, class_bias, prediction", 128, options=("norm", "class_bias", "prediction")),
        LinearConfiguration("all", 64, options=_EVERY, needs=linear.DIFFERENTIABLE),
        LinearConfiguration("all", 128, options=_EVERY, needs=linear.DIFFERENTIABLE, scalars=True),
        LinearConfiguration("all", 256, options=_EVERY, needs=linear.DIFFERENTIABLE),
    ]


def _experts_configurations() -> list[ExpertsConfiguration]:
    case = ExpertsConfiguration
    mean, prior = ("log_prior", "ensemble"), ("log_prior",)
    of_cross_entropy = [
        case("expert_cross_entropy", "plain", 8142, budget=ONE_TILE_BUDGET),
        *(case("expert_cross_entropy", "log_prior", c, options=prior, budget=MEMORY_BUDGET) for c in (8142, 8192)),
        case("expert_cross_entropy", "log_prior", 8142, _SINGLE, prior, budget=MEMORY_BUDGET),
        *(
            case("expert_cross_entropy", "log_prior, ensemble", 8142, options=mean, experts=e, budget=ENSEMBLE_BUDGET)
            for e in (3, 6)
        ),
        case("expert_cross_entropy", "log_prior, ensemble", 16384, _SINGLE, mean, budget=MEMORY_BUDGET),
        case("expert_cross_entropy", "mixed, ensemble", 8142, options=(*mean, "scale", "mixed")),
        case(
            "expert_cross_entropy", "bias per expert, smoothing", 8142, options=("expert_bias", "weight", "smoothing")
        ),
        case("expert_cross_entropy", "class_scale, ensemble", 8142, _SINGLE, (*mean, "class_scale")),
        case("expert_cross_entropy", "log_prior, samples first", 8142, options=mean, samples_first=True, wide=False),
        *(
            case(
                "expert_cross_entropy", "the rows kernel", c, options=prior, experts=1, rows=4096, budget=MEMORY_BUDGET
            )
            for c in (21841, 100_000)
        ),
    ]
    of_fusion = [
        case("expert_fusion", "plain", 8142, budget=READ_BUDGET),
        case("expert_fusion", "class_shift", 8192, experts=6, options=("class_shift",), budget=READ_BUDGET),
        case("expert_fusion", "top 5, log_probs", 8142, _SINGLE, ("class_shift", "log_probs"), k=5),
        case("expert_fusion", "top 5, all", 16384, options=("class_shift", "expert_weight", "learned_scale"), k=5),
        case("expert_fusion", "top 5, log_probs", 100_000, options=("class_shift", "log_probs"), k=5),
        case("expert_fusion", "top 20, samples first", 8142, k=20, samples_first=True, wide=False),
    ]
    of_divergence = [
        *(case("expert_divergence", "to_mean", c, budget=ONE_TILE_BUDGET) for c in (8142, 100_000)),
        case("expert_divergence", "to_mean, temperature", 8192, _SINGLE, ("temperature",), experts=6),
        case("expert_divergence", "pairwise", 8142, options=("pairwise",), budget=ONE_TILE_BUDGET),
        case(
            "expert_divergence", "pairwise, temperature, few rows", 8142, options=("temperature", "pairwise"), rows=128
        ),
        case("expert_divergence", "pairwise", 8142, _SINGLE, options=("pairwise",), experts=9),
    ]
    backward = [
        case(
            "expert_divergence", "to_mean, detached", 8142, options=("detached",), backward=True, budget=MEMORY_BUDGET
        ),
        case("expert_divergence", "to_mean, temperature", 8142, options=("temperature",), backward=True),
        case("expert_divergence", "to_mean", 100_000, experts=6, backward=True, budget=MEMORY_BUDGET),
        case("expert_divergence", "pairwise", 8142, options=("pairwise",), backward=True, budget=MEMORY_BUDGET),
        case(
            "expert_divergence",
            "pairwise, temperature",
            8192,
            _SINGLE,
            ("temperature", "pairwise"),
            experts=6,
            backward=True,
        ),
        case("expert_divergence", "pairwise", 8142, options=("pairwise",), experts=9, backward=True, wide=False),
    ]
    return [*of_cross_entropy, *of_fusion, *of_divergence, *backward]


#: Limits of instructions per logit in the loops of the contrastive kernels at D = 128, where tensor cores take as long
#: as 11 instructions for a forward tile's product (2 D operations) and as 22 for a backward tile's two. A logit's own
#: arithmetic (a multiply-add, an exponential, a comparison, what that selects, four sums) is 10 instructions in forward
#: where logits have a bound and 17 with running maxima. The limits are about a tenth above what the loops come to, with
#: Triton 3.6 where that is more: its copies of a tile's vectors to shared memory are narrow.
_BOUNDED = {
    "partitioned_logsumexp_tiled_forward_kernel": 16.0, "partitioned_logsumexp_grad_query_kernel": 16.0, "partitioned_logsumexp_grad_key_kernel": 19.5, "partitioned_logsumexp_grad_both_kernel": 27.0
}  # fmt: skip
_UNBOUNDED = {
    "partitioned_logsumexp_tiled_forward_kernel": 30.0, "partitioned_logsumexp_grad_query_kernel": 27.0, "partitioned_logsumexp_grad_key_kernel": 24.0, "partitioned_logsumexp_grad_both_kernel": 41.0
}  # fmt: skip
#: Of blocks: at the D > 256 that they are for, the products of an element (6 D operations) take tensor cores as long as
#: 65 instructions or more; and backward's traffic takes memory as long as 31.
_BLOCK = {"partitioned_logsumexp_block_forward_kernel": 40.0, "partitioned_logsumexp_block_backward_kernel": MEMORY_BUDGET}


def _contrastive_configurations() -> list[ContrastiveConfiguration]:
    case = ContrastiveConfiguration
    every = ("exclude", "key_bias", "key_scale", "learned_scale", "slopes")
    bounded = ("exclude", "bounded")

    def limits(width: int, budgets: dict[str, float]) -> dict[str, float]:
        return budgets if width == 128 else {}

    cases = [
        case(
            "bounded", 128, ("bounded",), rows=512, kernels=("partitioned_logsumexp_tiled_forward_kernel", "partitioned_logsumexp_merge_kernel"), budgets=_BOUNDED
        ),
        case("key_bias", 128, ("key_bias",), torch.float16, budgets=_UNBOUNDED),
        case("self left out", 0, ("exclude",), columns=4096, budgets=_BLOCK),
        case("all", 0, every, columns=4090),
        case("key_bias", 0, ("key_bias", "exclude"), torch.float32, "tf32", columns=4096, budgets=_BLOCK),
        case("all, few rows", 0, every, torch.float32, "tf32", rows=100, columns=4090),
    ]
    for d in (64, 128, 256):
        alone = {"columns": 8192, "kernels": ("partitioned_logsumexp_grad_both_kernel",)}
        cases += [
            case("bounded, self left out", d, bounded, columns=16390, budgets=limits(d, _BOUNDED)),
            case("all", d, every, columns=16390),
            case("queries alone, bounded", d, ("alone", *bounded), budgets=limits(d, _BOUNDED), **alone),
            case("queries alone", d, ("alone", "exclude"), budgets=limits(d, _UNBOUNDED), **alone),
        ]
        for precision in ("tf32", "ieee") if d > 64 else ():
            cases += [
                case("all", d, every, torch.float32, precision, columns=8200),
                case("queries alone", d, ("alone", "exclude"), torch.float32, precision, **alone),
            ]
    return cases


def _small_launches() -> list[tuple[str, Launch]]:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def mean(rows: int, mixed: bool, weighted: bool) -> None:
        targets = [meta(rows, dtype=torch.int64) for _ in range(2)]
        kernels.mean_coefficient(
            targets[0], targets[1] if mixed else None, meta(1000) if weighted else None, -100, 1000
        )

    calls = {
        "scale bfloat16": lambda: kernels.scale_gradient_(meta(1024, 8192, dtype=torch.bfloat16), meta()),
        "scale float32": lambda: kernels.scale_gradient_(meta(1024, 8192), meta()),
        "mean of 8192 rows": lambda: mean(8192, False, False),
        "mean of 8192 rows, mixed, weight": lambda: mean(8192, True, True),
        "mean of 512 x 512 x 4 pixels": lambda: mean(512 * 512 * 4, False, False),
        "mean of 512 x 512 x 4 pixels, weight": lambda: mean(512 * 512 * 4, False, True),
    }
    found = []
    for name, call in calls.items():
        with recording() as launches:
            call()
        found += [(name, launch) for launch in launches]
    return found


def _parsed(sass: str) -> tuple[dict[str, int], list[str], list[Any], list[re.Match[str] | None]]:
    """Where labels are; the instructions; the predicate and opcode, and the label, of each."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*;)", line):
            lines.append(instruction[1])
    parts = [re.match(r"(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line).groups() for line in lines]  # type: ignore[union-attr]
    targets = [re.search(r"\((\.L_\w+)\)", line) for line in lines]
    return labels, lines, parts, targets


def _longest_path(sass: str, trips: int = 1) -> int:
    """Instructions on the longest way through, the body of each loop ``trips`` times."""
    labels, lines, parts, targets = _parsed(sass)

    def cost_from(first: int, last: int) -> int:
        """From one instruction to another or to any exit; a jump back or beyond ends the way."""
        cost = [0] * (len(lines) + 1)
        for i in reversed(range(first, last + 1)):
            predicate, opcode = parts[i]
            following, there = cost[i + 1], labels[targets[i][1]] if targets[i] else -1  # type: ignore[index]
            if opcode.startswith(("EXIT", "RET")):
                following = following if predicate else 0
            elif opcode.startswith("CALL") and there >= 0:
                following += cost[there] if first <= there <= last else cost_from(there, len(lines) - 1)
            elif opcode.startswith("BRA") and there >= 0:
                jump = cost[there] if i < there <= last else 0
                following = max(following, jump) if predicate or lines[i].count(",") > 0 else jump
            cost[i] = following + (opcode != "NOP")
        return cost[first]

    loops = [
        (labels[t[1]], i) for i, t in enumerate(targets) if t and parts[i][1].startswith("BRA") and labels[t[1]] < i
    ]
    return cost_from(0, len(lines) - 1) + (trips - 1) * sum(cost_from(*loop) for loop in loops)


def _loop_instructions(sass: str) -> int:
    """Instructions on the shortest way once round the first loop (tiles that nothing has to be looked up for)."""
    labels, lines, parts, targets = _parsed(sass)
    loops = [
        (labels[t[1]], i) for i, t in enumerate(targets) if t and parts[i][1].startswith("BRA") and labels[t[1]] < i
    ]
    first, last = min(loops, key=lambda loop: (loop[0], -loop[1]))
    far = 10**9
    cost = [far] * (last + 1)
    for i in reversed(range(first, last + 1)):
        predicate, opcode = parts[i]
        following = 0 if i == last else cost[i + 1]
        if opcode.startswith(("EXIT", "RET")):
            following = following if predicate else far
        elif opcode.startswith("BRA") and targets[i] and i < last:
            there = labels[targets[i][1]]  # type: ignore[index]
            jump = cost[there] if i < there <= last else far
            following = min(following, jump) if predicate or lines[i].count(",") > 0 else jump
        cost[i] = following + (opcode != "NOP")
    return cost[first]


def _work(launch: Launch) -> tuple[int, int]:
    """How often a program of the launch runs its loop, and how many logits it is then through with; 0 for no count."""
    a, kernel = launch.arguments, launch.kernel.__name__
    if kernel.startswith("margin_cross_entropy_rows") and a.get("BODY") != "parts":
        block = a["GROUP"] * a["LANES"] * a["REPEAT"]
        if kernel == "margin_cross_entropy_rows_forward_kernel":
            return triton.cdiv(a["classes"], block), a["classes"]
        columns = a["part_groups"] * a["GROUP"] if kernel == "margin_cross_entropy_rows_statistics_kernel" else block
        return triton.cdiv(columns, block), columns
    if kernel == "margin_cross_entropy_tiles_forward_kernel":
        return triton.cdiv(a["classes"], a["REPEAT"] * a["LANES"]), a["classes"] * a["BLOCK_K"]
    if kernel == "margin_cross_entropy_soft_mass_kernel":
        return triton.cdiv(a["classes"], a["BLOCK_C"]), a["classes"] * a["BLOCK_K"]
    if kernel == "margin_cross_entropy_tiles_backward_kernel":
        return a["blocks_per_program"], a["blocks_per_program"] * a["BLOCK_C"] * a["BLOCK_K"]
    if kernel == "expert_cross_entropy_forward_kernel":
        return triton.cdiv(a["classes"], a["GROUP"] * a["LANES"] * a["SWEEP"]), a["EXPERTS"] * a["classes"]
    if kernel in ("expert_fusion_forward_kernel", "expert_fusion_log_probs_kernel"):
        return 1, len(a["x_ptrs"]) * min(a["classes"], a["part_groups"] * a["GROUP"])
    if kernel.startswith("expert_divergence"):
        block = a["GROUP"] * a["LANES"] * a["REPEAT"]
        if kernel == "expert_divergence_forward_kernel":
            return triton.cdiv(a["classes"], block), len(a["x_ptrs"]) * a["classes"]
        return 1, len(a["x_ptrs"]) * min(a["classes"], block)
    return 1, 0


def _widths(sass: str, opcode: str) -> dict[str, int]:
    """Global accesses by width in bits."""
    counts: Counter[int] = Counter()
    for suffix in re.findall(rf"\b{opcode}\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", suffix)
        counts[int(width[1].strip("US")) if width else 32] += 1
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def _nvidia(compiled: Any, target: str, directory: Path, trips: int, in_loop: bool) -> dict[str, Any]:
    binary = directory / f"{os.getpid()}.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    def tool(*command: str) -> str:
        return subprocess.run(
            [_BIN / command[0], *command[1:], binary], check=True, capture_output=True, text=True
        ).stdout

    usage = tool("cuobjdump", "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    sass = tool("nvdisasm", "-c")
    instructions = _longest_path(sass, trips)
    if instructions < 10:
        raise RuntimeError(f"could not read the machine code: {instructions} instructions found")
    return {
        "registers": registers,
        "stack": stack + local,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "instructions": instructions,
        "loads": _widths(sass, "LDG"),
        "stores": _widths(sass, "STG"),
        "shared": compiled.metadata.shared,
        "products": len(re.findall(TENSOR_CORE[target], sass)),
        "in_loop": _loop_instructions(sass) if in_loop else 0,
    }


def _amd(compiled: Any) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"])[1])  # type: ignore[index]

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),  # scalar registers spill into lanes of vector registers, not to memory
        "shared": compiled.metadata.shared,
        "products": len(re.findall(TENSOR_CORE["gfx942"], compiled.asm["amdgcn"])),
    }


def _problems(record: dict[str, Any], configuration: Configuration | None) -> list[str]:
    """What the machine code does that it must not."""
    found = []
    sm90 = record["sm_90"]
    for target in TARGETS:
        if record[target]["stack"] or record[target]["spills"]:
            found.append(f"{target}: {record[target]['stack']} bytes of stack, {record[target]['spills']} spills")
        if target != "gfx942" and record[target]["registers"] * record["num_warps"] * 32 > REGISTERS_PER_BLOCK:
            found.append(f"{target}: {record[target]['registers']} registers x {record['num_warps']} warps do not fit")
        if record[target]["shared"] > SHARED_BYTES[target]:
            found.append(f"{target}: {record[target]['shared']} bytes of shared memory")
    wide = configuration is not None and configuration.wide and record.get("BODY") != "parts"
    if wide and record["kernel"].startswith(("margin_cross_entropy_rows", "margin_cross_entropy_tiles")):
        for kind in ("loads",) if record["kernel"] == "margin_cross_entropy_rows_statistics_kernel" else ("loads", "stores"):
            if "128" not in sm90[kind]:
                found.append(f"no 16-byte {kind}: {sm90[kind]}")
    if "budget" in record and not record["per_logit"] <= record["budget"]:
        found.append(f"{record['per_logit']} instructions per logit, at most {record['budget']}")
    return found


def _compile(name: str, launch: Launch, configuration: Configuration | None, directory: str) -> _Result:
    """Table row of one launch, and its problems."""
    record: dict[str, Any] = {"case": name, "kernel": launch.kernel.__name__, **launch.options}
    constants = ("BODY", "GROUP", "LANES", "REPEAT", "BLOCK", "BLOCK_C", "BLOCK_K")
    record.update({key: launch.arguments[key] for key in constants if key in launch.arguments})
    trips, logits = _work(launch)
    for target in TARGETS:
        record[target] = _machine_code(launch, target, directory, trips)
        record[target] = {key: value for key, value in record[target].items() if key not in ("products", "in_loop")}
    sm90 = record["sm_90"]
    if logits:
        record["per_logit"] = round(sm90["instructions"] * 32 * launch.options["num_warps"] / logits, 1)
        if configuration is not None and configuration.budget is not None:
            record["budget"] = configuration.budget
    problems = [f"{name} {record['kernel']}: {problem}" for problem in _problems(record, configuration)]
    for target in ("sm_80", "sm_100", "gfx942"):
        record[target] = {key: record[target][key] for key in ("registers", "stack", "spills")}
    return "margin_cross_entropy", record, problems


def _compile_experts(name: str, launch: Launch, configuration: ExpertsConfiguration, directory: str) -> _Result:
    """Table row of one launch, and its problems."""
    _, record, problems = _compile(name, launch, None, directory)
    kernel = record["kernel"]
    if configuration.wide and kernel != "expert_fusion_merge_kernel":
        writes = kernel in ("expert_fusion_log_probs_kernel", "expert_divergence_backward_kernel") or any(
            launch.arguments.get(out) is not None for out in ("u_ptr", "log_probs_ptr", "grad_ptr")
        )
        for kind in ("loads", "stores") if writes else ("loads",):
            if "128" not in record["sm_90"][kind]:
                problems.append(f"{name} {kernel}: no 16-byte {kind}: {record['sm_90'][kind]}")
    if configuration.budget is not None and "per_logit" in record:
        record["budget"] = configuration.budget
        if record["per_logit"] > configuration.budget:
            problems.append(
                f"{name} {kernel}: {record['per_logit']} instructions per logit, at most {configuration.budget}"
            )
    return configuration.op, record, problems


def _machine_code(launch: Launch, target: str, directory: str, trips: int = 1, in_loop: bool = False) -> dict[str, Any]:
    gpu = TARGETS[target]
    options = {key: value for key, value in launch.options.items() if key != "maxnreg" or gpu.backend == "cuda"}
    compiled = triton.compile(launch.source(), target=gpu, options=options)
    if gpu.backend == "hip":
        return _amd(compiled)
    return _nvidia(compiled, target, Path(directory), trips, in_loop)


def _compile_linear(
    op: str, name: str, launches: dict[str, Launch], configuration: LinearConfiguration | ContrastiveConfiguration,
    directory: str,
) -> _Result:  # fmt: skip
    """Table row of one kernel of a tiled strategy, which each target launches in its own way; and its problems."""
    first = next(iter(launches.values()))
    record: dict[str, Any] = {"case": name, "kernel": first.kernel.__name__}
    problems = []
    of_tiles = "PRECISION" in first.arguments
    for target, launch in launches.items():
        counted = target == "sm_90" and (of_tiles or "GROUP" in launch.arguments)
        code = _machine_code(launch, target, directory, in_loop=counted)
        recorded = ("registers", "stack", "spills", "shared", *(("products",) if of_tiles else ()))
        sizes = {key: launch.arguments[key] for key in _SIZES if key in launch.arguments}
        record[target] = {**sizes, **launch.options, **{key: code[key] for key in recorded}}
        if counted and isinstance(configuration, ContrastiveConfiguration):
            problems += _counted_problems(record, code, launch, configuration)
        if code["stack"] or code["spills"]:
            problems.append(f"{target}: {code['stack']} bytes of stack, {code['spills']} spills")
        if target != "gfx942" and code["registers"] * launch.options["num_warps"] * 32 > REGISTERS_PER_BLOCK:
            problems.append(f"{target}: {code['registers']} registers do not fit")
        if code["shared"] > SHARED_BYTES[target]:
            problems.append(f"{target}: {code['shared']} bytes of shared memory, at most {SHARED_BYTES[target]}")
        if of_tiles and configuration.dtype.itemsize == 2 and code["products"] == 0:
            problems.append(f"{target}: no tensor-core instructions")
    return op, record, [f"{name} {record['kernel']}: {problem}" for problem in problems]


_SIZES = ("BLOCK_N", "BLOCK_C", "BLOCK", "ROWS", "GROUP", "LANES")


def _counted_problems(
    record: dict[str, Any], code: dict[str, Any], launch: Launch, configuration: ContrastiveConfiguration
) -> list[str]:
    """What the sm_90 code of a kernel of the partitioned log-sum-exp does that it must not; its counts recorded."""
    a, kernel, problems = launch.arguments, record["kernel"], []
    tile = a["BLOCK_N"] * a["BLOCK_C"] if "BLOCK_N" in a else a["LANES"] * a["GROUP"] * a.get("ROWS", 1)
    record["per_logit"] = round(code["in_loop"] * 32 * launch.options["num_warps"] / tile, 1)
    record |= {"loads": code["loads"], "stores": code["stores"]}
    if kernel in configuration.budgets:
        record["budget"] = configuration.budgets[kernel]
        if record["per_logit"] > record["budget"]:
            problems.append(f"{record['per_logit']} instructions per logit, at most {record['budget']}")
    wide = ("loads",) if kernel.endswith("_forward_kernel") else ("loads", "stores")
    problems += [f"no 16-byte {kind}: {code[kind]}" for kind in wide if "128" not in code[kind]]
    return problems


_Result = tuple[str, dict[str, Any], list[str]]  # op, table row, problems


@functools.cache
def _tasks(only: str) -> list[tuple[str, Callable[[str], _Result]]]:
    """Name of every case, and what compiles it in a directory."""

    def dtype_of(c: Configuration | LinearConfiguration) -> str:
        return str(c.dtype).removeprefix("torch.")

    tasks: list[tuple[str, Callable[[str], _Result]]] = []
    for c in _configurations():
        direction = f"backward ({', '.join(c.needs)})" if c.needs else "forward" + " + gradient" * c.with_grad
        name = f"{c.name}, C {c.classes}, {dtype_of(c)}, {direction}"
        if only in name:
            tasks += [(name, functools.partial(_compile, name, launch, c)) for launch in c.launches()]
    tasks += [(name, functools.partial(_compile, name, launch, None)) for name, launch in _small_launches()]
    for linear_case in _linear_configurations():
        name = f"linear, {linear_case.name}, D {linear_case.width}, C {linear_case.classes}, {dtype_of(linear_case)}"
        if only in name:
            by_target = [linear_case.launches(target) for target in TARGETS]
            for same in zip(*by_target, strict=True):
                launches = dict(zip(TARGETS, same, strict=True))
                compiled = functools.partial(_compile_linear, OPS[1], name, launches, linear_case)
                tasks.append((name, compiled))
    for keys_case in _contrastive_configurations():
        if only in keys_case.title:
            named = {t: {each.kernel.__name__: each for each in keys_case.launches(t)} for t in TARGETS}
            for kernel in named["sm_90"]:
                launches = {target: by_name[kernel] for target, by_name in named.items() if kernel in by_name}
                if len(launches) == len(TARGETS):  # nothing to merge where another's tiles are not split
                    compiled = functools.partial(_compile_linear, OPS[-1], keys_case.title, launches, keys_case)
                    tasks.append((keys_case.title, compiled))
    for experts_case in _experts_configurations():
        if only in experts_case.title:
            name = experts_case.title
            tasks += [
                (name, functools.partial(_compile_experts, name, launch, experts_case))
                for launch in experts_case.launches()
            ]
    return [task for task in tasks if only in task[0]]


def _compile_nth(index: int, only: str, directory: str) -> _Result:
    """A task in another process: it cannot be sent there, its number can."""
    os.environ["TRITON_CACHE_DIR"] = directory
    return _tasks(only)[index][1](directory)


def build(only: str = "", jobs: int = 1) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """By op the table rows of every configuration whose name contains ``only``; and all problems."""
    count = len(_tasks(only))
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(_compile_nth, range(count), [only] * count, [directory] * count))
    rows = {op: [row for of, row, _ in results if of == op] for op in OPS}
    return rows, [problem for _, _, problems in results for problem in problems]


_PATHS = """
# Machine code of the Triton kernels

Written by `python scripts/aot_gate.py --write`, like the tables in `benchmarks/results/aot`. Compiled ahead of time
with Triton {triton}, not run: no GPU is needed for it. Nothing on this page has been measured on one.

## How wide rows are visited

Rows of up to 32,768 classes stay in the registers of one program (16,384 with class_scale, with label smoothing and
class weights, with class probabilities, for predictions, with a mixed target, or with any two options beside
class_bias, scale and margin; 8192 with two of the first three): each logit is read once and its gradient written
once. Wider rows are read twice where a gradient is computed. Either one program *loops* over a row, so that the
second read, last tile first, finds in L2 what the first one left there; or rows are split into *parts* of 8192
classes, each with a program of its own, merged in order by a small kernel before the gradient's programs start. Which
of the two depends on the sizes alone, never on the device: on what should take less time on 132 multiprocessors that
share 25 MB of L2. The number in each cell is the traffic that this estimate counts with, in units of the logits' own
bytes: 2 is the floor, and 3 means that nothing is left in L2 for the second read.
"""

_CODE = """
## Registers, instructions, widths

Per logit: SASS instructions on the longest path through the kernel, loops as often as they run, x threads / logits of
the program. Of the branches for the alignment of a class vector the longest counts. Loads and stores: how many of each
width in bits. No kernel uses a stack or spills.

The limits in the table are asserted: {one_tile:.0f} for cross-entropy and logit adjustment of rows that one program
keeps, {memory:.0f} for others: what an H200 can execute while its memory moves a bfloat16 logit and its gradient. The
rest is recorded, not held to a limit: it does more for each logit (class_scale and weights are loaded for every column;
predictions and probabilities add sums of their own), or pads (21,841 classes fill 32,768 lanes), or has rows of too few
classes to share their scalar arithmetic.
"""


_TILED = """
## Tiles of linear heads

The tiled strategy of `linear_margin_cross_entropy`: a tile of logits is a matrix product of a block of rows with a
block of classes, and is not stored. Tiles (rows x classes), warps and pipeline stages depend on the GPU, the dtype and
D; every cell is one kernel compiled for one GPU: tile, warps, stages; registers; kilobytes of shared memory;
tensor-core instructions in the code (HMMA, HGMMA, UTCHMMA, v_mfma). The kernels of rows' and classes' scalars have
warps and registers alone. Asserted for all: no stack, no spills, shared memory within the GPU's (163, 227, 227 and
64 KB); for 16-bit numbers, tensor-core instructions. Products of float32 that may not be rounded to tf32 have none on
NVIDIA's.
"""

_LOSSES = """
## Losses of several experts

`expert_cross_entropy` has one program per sample, which visits the experts' rows one after another; a logit is one of
one expert. Rows of up to 16,384 classes stay in its registers (8192 with one of: class_scale, weighted smoothing, two
kinds of bias, or two of smoothing, a mixed target and angular margins): each logit is read once and its gradient
written once. The log prior is read once per sample and stays in registers beside the row where the logits have 16 bits,
are read 16 bytes at a time, and none of these options is used; else each expert reads it again, from the cache. The
ensemble is a second sweep over the sample's rows, out of the cache. Wider rows, rows with more options, logits whose
classes are not contiguous, and the experts of a list whose rows are not the same distance apart go through the rows
kernel, expert by expert, whose second read finds one expert's rows in L2 where it would not find all experts'; their
ensemble is a read of its own, by the fusion's kernel. Few rows with very many classes are among them. Up to 8192
classes the next expert's row is loaded while one is summed up and written; then a launch takes {ahead} experts at most,
else {most}, and the ensemble of more is a read of its own.

Asserted: no stack, no spills, and 16-byte loads and stores wherever the rows of all experts begin at the same place
within 16 bytes. The last column is what 4096 samples should take on an H200, the longer of bytes (4.3e12 a second) and
instructions (3.35e13 a second): a prediction, not yet measured.
"""

_EXPERTS = """
## Logits of several experts

`expert_fusion` and `expert_divergence` hold the same columns of all experts at once; a logit is one of one expert.
Asserted: no stack, no spills; 16-byte loads, and 16-byte stores of what is as long as the logits, wherever the rows of
all experts begin at the same place within 16 bytes. Those of 8142 bfloat16 logits in [N, E, C] (samples first) do not,
and get 4 bytes; nine experts leave a thread 8 bytes of each in bfloat16. The limit of {read} is what an H200 can
execute while its memory reads a bfloat16 logit. The divergences' forward pass is above it: it has an exponential and a
product for each logit, one exponential more for all experts' mean, and a selection for what -inf would make of them.
"""


_KEYS = """
## Contrastive keys

`partitioned_logsumexp`, in tiles (D <= 256; cells as above) and on blocks of similarities in memory (D > 256; warps and
registers). Of the queries' labels and what they leave out the worst is compiled: a last tile that is not full, columns
left out. Per logit: SASS instructions once round the sm_90 loop over the tiles that need no column to be looked up, x
threads / logits of a tile. Tensor cores take as long as 11 instructions for the product of a forward tile at D = 128,
and as 22 for both of a backward tile. The limits are what the loops come to and about a tenth.
"""


def _view(tables: dict[str, dict[str, Any]]) -> str:
    """The tables as Markdown."""
    table, linear_table = tables["margin_cross_entropy"], tables["linear_margin_cross_entropy"]
    paths, code = _PATHS.format(**table), _CODE.format(one_tile=ONE_TILE_BUDGET, memory=MEMORY_BUDGET)
    lines = [
        *paths.strip().splitlines(),
        "",
        "| rows x classes | bfloat16 | float32 |",
        "|---|---|---|",
        *_paths(),
        "",
        *code.strip().splitlines(),
        "",
        *_code_lines(table["rows"]),
        "",
        *_LOSSES.format(most=experts_launch.MOST_EXPERTS, ahead=experts_launch.MOST_AHEAD).strip().splitlines(),
        "",
        *_with_prediction(_code_lines(tables["expert_cross_entropy"]["rows"]), tables["expert_cross_entropy"]["rows"]),
        "",
        *_EXPERTS.format(read=READ_BUDGET).strip().splitlines(),
        "",
        *_code_lines([row for op in ("expert_fusion", "expert_divergence") for row in tables[op]["rows"]]),
    ]
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    lines += ["", *_TILED.strip().splitlines(), ""]
    lines += [f"| case | kernel | {' | '.join(targets)} |", "|---" * (2 + len(targets)) + "|"]
    for row in linear_table["rows"]:
        cells = [row["case"].removeprefix("linear, "), _short(row["kernel"])]
        lines.append(f"| {' | '.join([*cells, *(_tile_cell(row[target]) for target in targets)])} |")
    lines += ["", *_KEYS.strip().splitlines(), ""]
    lines += [f"| case | kernel | per logit | {' | '.join(targets)} |", "|---" * (3 + len(targets)) + "|"]
    for row in tables["partitioned_logsumexp"]["rows"]:
        per_logit = f"{row.get('per_logit', '-')}" + (f" (<= {row['budget']})" if "budget" in row else "")
        cells = [row["case"].removeprefix("keys, "), _short(row["kernel"]), per_logit]
        lines.append(f"| {' | '.join([*cells, *(_tile_cell(row[target]) for target in targets)])} |")
    return "\n".join(lines) + "\n"


def _code_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of kernels."""
    lines = [
        "| case | kernel | warps | registers sm_80 / 90 / 100 / gfx942 | per logit | loads | stores | shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sm90 = row["sm_90"]
        registers = " / ".join(str(row[target]["registers"]) for target in ("sm_80", "sm_90", "sm_100", "gfx942"))
        loads, stores = (", ".join(f"{n}x{width}" for width, n in sm90[kind].items()) for kind in ("loads", "stores"))
        cells = [row["case"], _short(row["kernel"]), row["num_warps"], registers]
        cells += [
            f"{row.get('per_logit', '-')}" + (f" (<= {row['budget']})" if "budget" in row else ""),
            loads,
            stores,
            sm90["shared"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _with_prediction(lines: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a table of losses of experts with one column more: microseconds for 4096 samples."""
    cells = [" predicted |", "---|"]
    for row in rows:
        e, c, dtype = re.search(r"E (\d+), C (\d+), (\w+)", row["case"]).groups()  # type: ignore[union-attr]
        logits = 4096 * int(e) * int(c)
        read_and_written = 2 * logits * getattr(torch, dtype).itemsize / 4.3e12
        cells.append(f" {max(read_and_written, logits * row['per_logit'] / 3.35e13) * 1e6:.0f} us |")
    return [line + cell for line, cell in zip(lines, cells, strict=True)]


def _short(kernel: str) -> str:
    return kernel.strip("_").removesuffix("_kernel")


def _tile_cell(code: dict[str, Any]) -> str:
    if "products" not in code:
        return f"{code['num_warps']} warps; {code['registers']}"
    tile = f"{code['BLOCK_N']}x{code['BLOCK_C']}, {code['num_warps']}, {code['num_stages']}"
    return f"{tile}; {code['registers']}; {code['shared'] / 1024:.0f}; {code['products']}"


def _paths() -> list[str]:
    """How the launch table visits rows, with the estimate that it goes by."""

    def cell(rows: int, classes: int, itemsize: int) -> str:
        launch, row_bytes = rows_launch.rows_launch(rows, classes, itemsize, True), classes * itemsize
        if launch.body == "tile":
            return f"one tile, {launch.num_warps} warps, 2.0"
        together = rows if launch.body == "parts" else 132
        return f"{launch.body}, {launch.num_warps} warps, {rows_launch.traffic(together * row_bytes, True):.1f}"

    sizes = [(n, c) for c in (8142, 32768, 65536, 100_000, 1_000_000) for n in (64, 256, 4096)]
    return [f"| {n} x {c:,} | {cell(n, c, 2)} | {cell(n, c, 4)} |" for n, c in sizes]


def _text(table: dict[str, Any]) -> str:
    """One row a line, so that differences can be read."""
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    return f'{{"triton": {json.dumps(table["triton"])}, "rows": [\n{rows}\n]}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compare with the committed table")
    mode.add_argument("--write", action="store_true", help="rewrite the committed table")
    mode.add_argument("--no-table", action="store_true", help="compile and assert only")
    parser.add_argument("--only", default="", metavar="TEXT", help="check only cases whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compiler processes (default 2)")
    parser.add_argument("--tables", type=Path, default=TABLES, help="another folder than the committed one")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write takes no --only: the tables are written whole")

    rows, problems = build(options.only, options.jobs)
    count = sum(map(len, rows.values()))
    if count == 0:
        print(f"aot gate: nothing was checked (no case contains {options.only!r})")
        return 1
    tables = {op: {"triton": triton.__version__, "rows": rows[op]} for op in OPS}
    print(f"aot gate: {count} kernels compiled for {', '.join(TARGETS)} with Triton {triton.__version__}")
    for problem in problems:
        print(f"FAILED  {problem}")
    if options.write:
        options.tables.mkdir(parents=True, exist_ok=True)
        for op, table in tables.items():
            (options.tables / f"{op}.json").write_text(_text(table))
        if options.tables == TABLES:
            VIEW.write_text(_view(tables))
        print(f"wrote {options.tables}")
    elif options.check:
        problems += _differences(tables, options.tables, options.only)
    return 1 if problems else 0


def _differences(tables: dict[str, dict[str, Any]], folder: Path, only: str) -> list[str]:
    """Print how the tables differ from the committed ones; nothing if those were written with another Triton."""
    found: list[str] = []
    whole: dict[str, dict[str, Any]] = {}
    for op, table in tables.items():
        if not table["rows"]:
            continue
        path = folder / f"{op}.json"
        if not path.exists():
            print(f"FAILED  no committed table at {path}: run with --write")
            found.append("no table")
            continue
        whole[op] = committed = json.loads(path.read_text())
        if committed["triton"] != table["triton"]:
            print(f"table not compared: it was written with Triton {committed['triton']}, this is {table['triton']}")
            continue
        committed = committed | {"rows": [row for row in committed["rows"] if only in row["case"]]}
        both = (_text(t).splitlines() for t in (committed, table))
        found += difflib.unified_diff(*both, f"committed {op}", "now", n=0, lineterm="")
    if found:
        print("\n".join(found))
        print("FAILED  the machine code differs from the committed table: read the lines above, then run with --write")
    if not only and len(whole) == len(OPS) and folder == TABLES and VIEW.exists() and VIEW.read_text() != _view(whole):
        found.append("view")
        print(f"FAILED  {VIEW} is not what the committed tables say: run with --write")
    return found


if __name__ == "__main__":
    sys.exit(main())
