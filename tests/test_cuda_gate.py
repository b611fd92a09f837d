"""What the CUDA build and its compile gate decide, without a GPU; ``.ci/run`` runs the whole gate (``make cuda``)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt_kernels.ops import _native

ROOT = Path(__file__).parent.parent


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gate = load("scripts/cuda_gate.py")


def record(**changes):
    kernel = "rows_forward_kernel<BFloat16, 128, 8, false>"
    good = {"kernel": kernel, "architecture": "sm_90", "registers": 80, "stack": 0, "spills": 0}
    return {**good, "loads": {"128": 8, "32": 2}, "stores": {"128": 8, "16": 1}, **changes}


def test_a_good_kernel_has_no_problems():
    assert gate.problems(record()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 4}, "4 bytes of spills"),
        ({"loads": {"64": 16}}, "no 128-bit loads"),
        ({"stores": {"16": 64}}, "no 128-bit stores"),
        ({"kernel": "panels_kernel<Half, 4, true, false>", "stores": {"16": 4}}, "no 64-bit loads"),
        ({"kernel": "divergence_forward_kernel<Half>", "loads": {"16": 4}}, "no 128-bit loads"),
        ({"kernel": "divergence_backward_kernel<Half>", "stores": {"16": 4}}, "no 128-bit stores"),
    ],
)
def test_the_gate_finds(changes, expected):
    assert any(expected in problem for problem in gate.problems(record(**changes)))


def test_the_gate_covers_every_source():
    """setup.py builds every file whose name begins with cuda."""
    built = set((ROOT / "csrc").rglob("cuda*.c*"))
    assert built == {*gate.SOURCES, *gate.HOST_SOURCES} - {ROOT / "csrc/library.cpp"}


def test_widths_of_machine_code():
    sass = "LDG.E.128 R4, [R2]; LDG.E.U16 R1, [R8]; LDGSTS.E.BYPASS.128 [R3]; LDG.E R5, [R8]; STG.E.64 [R8], R2"
    assert gate.widths(sass, r"(?:LDG|LDGSTS)") == {"128": 2, "32": 1, "16": 1}
    assert gate.widths(sass, "STG") == {"64": 1}


def test_without_nvcc_the_gate_says_so(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    script = "import runpy, shutil, sys; shutil.which = lambda *a, **k: None; sys.argv = ['gate', '--check']; "
    script += f"runpy.run_path({str(ROOT / 'scripts/cuda_gate.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("SKIPPED: nvcc was not found")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),  # machine code runs on later chips of the same major version
        ("8.6", (8, 0), False),
        ("9.0", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("10.0+PTX", (9, 0), False),
        ("8.0 9.0 10.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("Hopper", (9, 0), True),  # left to torch's builder
    ],
)
def test_which_gpus_a_build_runs_on(architectures, capability, runs):
    assert _native.runs_on(architectures.split(), capability) is runs


def build(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_asking_for_cuda_without_it_is_an_error():
    result = build(LT_KERNELS_BUILD="cuda")
    assert result.returncode != 0
    assert "LT_KERNELS_BUILD=cuda: torch was built without CUDA" in result.stderr


def test_an_architecture_that_is_too_old_is_an_error():
    result = build(LT_KERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="7.5;8.0")
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST names 7.5" in result.stderr


def test_an_unknown_build_is_an_error():
    result = build(LT_KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "got 'gpu', expected" in result.stderr
