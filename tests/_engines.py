"""The engines that run kernels, and where they differ: everything that a test must know of them is here.

``pytest`` alone runs the reference and the kernels of the CPU. ``--engine=interpreter`` runs Triton kernels on
CPU tensors in Triton's interpreter, ``--engine=emulator`` the CUDA kernels compiled for the CPU (tests/emulator), and
``--engine=gpu`` both on a device. ``--engine=default`` and ``--engine=avx2`` run the CPU's kernels with fewer
instructions than the processor has.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

TESTS = Path(__file__).parent
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Engine:
    name: str
    backends: tuple[str, ...]
    device: str = "cpu"
    #: LTK_EMULATED_DEVICE by name: largest cluster, shared memory per block and per multiprocessor. On the small chips
    #: rows of a few thousand classes need clusters, or two passes.
    chips: tuple[tuple[str, str], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether float32 results are rounded to bfloat16; Triton's interpreter truncates them."""
        return self.name != "interpreter"

    def roundings(self, dtype: torch.dtype, otherwise: float | None = None) -> float | None:
        """Roundings allowed of a result of ``dtype``."""
        return 2.0 if dtype == torch.bfloat16 and not self.exact else otherwise


ENGINES = {
    "cpu": Engine("cpu", ("reference", "native")),
    "interpreter": Engine("interpreter", ("triton",)),
    "emulator": Engine(
        "emulator",
        ("native",),
        chips=(
            ("sm_90", "8 232448 233472"),
            ("clusters of 4 and 8 blocks", "8 16384 32768"),
            ("two passes", "1 8192 12000"),
        ),
    ),
    "gpu": Engine("gpu", ("triton", "native"), "cuda"),
    # the CPU's kernels for less than this processor has
    "default": Engine("default", ("native",)),
    "avx2": Engine("avx2", ("native",)),
}

#: Tests outside tests/kernels that an engine runs too: file and a regular expression of the tests' ids. The others say
#: nothing new there: compiled code, threads of the CPU, second backends, float64 in Triton.
_NOT_KERNELS = (
    r"(?!.*(gradcheck|too_large_for|number_of_threads|opcheck|compile|by_name|bad_input|inductor|fallback|cpu_only))"
)
_INSTRUCTIONS = {
    "test_margin_cross_entropy": "test_value_and_every_gradient",
    "test_native_contrastive": "test_values",
    "test_native_experts": "test_values",
}
GENERIC: dict[str, dict[str, str]] = {
    "default": _INSTRUCTIONS,
    "avx2": _INSTRUCTIONS,
    "interpreter": {
        "test_contract": _NOT_KERNELS + r".*((?<!linear_)margin_cross_entropy|double_backward.*expert_divergence)",
        "test_margin_cross_entropy": _NOT_KERNELS,
        "test_masked_classes": r"test_(?!linear\[(?!.*(tiled|classes)))",
        "test_linear_margin_cross_entropy": r"test_tiled_runs|test_value_and_every_gradient\[(?!.*inat18)(?=.*fp32)"
        r"(?=.*(rows|classes|recompute))(?=.*(learnable|everything|probabilities|cosine|smoothed|none))",
        "test_expert_cross_entropy": r"(test_value_and_every_gradient|test_ensemble)\[(?!.*sum-none)(?=.*fp32)"
        r".*(nine|learn|columns)|test_(no_rows|nothing_to_average|a_nan_row_stays_alone)",
        "test_expert_divergence": r".*(one_expert|only_some|masked_in_one|no_rows)",
    },
    "emulator": {
        "test_contract": _NOT_KERNELS + r".*(?<!linear_)(margin_cross_entropy|fusion|divergence|partitioned)",
        "test_margin_cross_entropy": _NOT_KERNELS,
        "test_masked_classes": r"test_(?!linear\[(?!.*classes))",
        "test_expert_fusion": r"(?!.*linear)" + _NOT_KERNELS,
        "test_expert_divergence": _NOT_KERNELS,
        "test_partitioned_logsumexp": r"(?!.*(chunks_are_bounded|many_blocks.*many rows))" + _NOT_KERNELS,
        "test_native_contrastive": r"(?!.*(threads|instruction_sets))",
    },
    "gpu": {"": r"(?!.*(gradcheck|number_of_threads|follows|dense_oracle|by_name_is|cpu_only))"},
}

ENGINE = ENGINES["cpu"]


def start(name: str | None) -> None:
    """Make ``name`` the engine of this process, before any kernel is imported."""
    global ENGINE
    name = name or "cpu"
    ENGINE = ENGINES[name]
    if name in ("default", "avx2"):
        os.environ["LT_KERNELS_CPU_CAPABILITY"] = name
    if name == "interpreter":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("triton was imported before --engine=interpreter; set TRITON_INTERPRET=1")
        os.environ["TRITON_INTERPRET"] = "1"
        import _interpreter

        _interpreter.prepare()
    if name == "emulator":
        os.environ["LTK_EMULATED_FUSED"] = "1"  # as a GPU's compiler does it
        sys.path.insert(0, str(TESTS / "emulator"))
        import emulated_cuda  # noqa: F401  installs itself as the native backend
    given = os.environ.get("LT_KERNELS_TEST_BACKENDS"), os.environ.get("LT_KERNELS_TEST_DEVICE")
    backends = tuple(given[0].split(",")) if given[0] else ENGINE.backends
    if name == "gpu" and not given[0]:
        import lt_kernels

        reasons = lt_kernels.info()["backends"]["margin_cross_entropy"]["cuda"]
        if missing := {backend: reasons[backend] for backend in backends if reasons[backend] is not None}:
            raise RuntimeError(f"--engine=gpu: {missing}; LT_KERNELS_TEST_BACKENDS chooses among {backends}")
    ENGINE = Engine(name, backends, given[1] or ENGINE.device, ENGINE.chips)


def of_backends(**given: Iterable) -> list:
    """Return what is given for the backends of this engine, in order and each once."""
    return list(dict.fromkeys(value for backend in ENGINE.backends for value in given.get(backend, ())))


def runs(file: Path, name: str | None = None) -> bool:
    """Whether this engine runs a test of a file, or any of its tests."""
    if ENGINE.name == "cpu" or file.parent.name == "kernels":
        return True
    table = GENERIC[ENGINE.name]
    pattern = table.get(file.stem, table.get(""))
    if pattern is None or file.parent.name != "ops":
        return False
    return name is None or re.match(pattern, name) is not None
