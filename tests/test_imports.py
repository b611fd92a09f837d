"""What importing does and does not do, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Makes the modules BLOCKED look as if they were not installed.
BLOCK = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_unblocked(cls, name, path=None, target=None):
    return None if name in BLOCKED or name.split(".")[0] in BLOCKED else find(name, path, target)
PathFinder.find_spec = classmethod(find_unblocked)
"""
USE = """
import torch, lt_kernels
x = torch.randn(3, 5, requires_grad=True)
lt_kernels.functional.margin_cross_entropy(x, torch.tensor([0, 1, 4])).backward()
assert x.grad.abs().sum() > 0
"""


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def blocking(*names: str) -> str:
    return f"BLOCKED = {set(names)!r}{BLOCK}"


def test_importing_loads_no_optional_package():
    code = """
import sys, torch
before = set(sys.modules)  # torch itself may import some of them
import lt_kernels
print(*{"triton", "matplotlib", "sklearn", "torchmetrics", "tqdm", "pytest"} & (set(sys.modules) - before))
"""
    assert python(code).split() == []


def test_command_line_loads_nothing_to_print_help():
    code = "import sys; from lt_kernels import cli; cli.main([]); print('lt_kernels.bench' in sys.modules)"
    assert python(code).split()[-1] == "False"


@pytest.mark.parametrize(
    "names",
    [("triton",), ("lt_kernels._C",), ("triton", "lt_kernels._C"), ("torchmetrics", "matplotlib", "sklearn", "tqdm")],
    ids=" ".join,
)
def test_works_without(names):
    python(blocking(*names) + USE)


def test_without_the_extension_native_says_why():
    code = """
import lt_kernels, torch
reason = lt_kernels.info()["backends"]["margin_cross_entropy"]["cpu"]["native"]
assert reason and "extension" in reason, reason
assert lt_kernels.info()["extension"] is None
with lt_kernels.use_backend("native"):
    try:
        lt_kernels.functional.margin_cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 4]))
    except lt_kernels.BackendUnavailableError as error:
        assert reason in str(error)
    else:
        raise SystemExit("native ran without the extension")
"""
    python(blocking("lt_kernels._C") + code)


def test_without_triton_the_backend_says_why():
    code = """
import lt_kernels
reason = lt_kernels.info()["backends"]["margin_cross_entropy"]["cuda"]["triton"]
assert reason and "triton" in reason, reason
"""
    python(blocking("triton") + code)


def test_metrics_without_torchmetrics_name_the_extra():
    code = """
from lt_kernels.metrics import ShotGroupAccuracy
try:
    ShotGroupAccuracy([3, 2, 1])
except ImportError as error:
    assert "lt_kernels[metrics]" in str(error)
else:
    raise SystemExit("no error")
"""
    python(blocking("torchmetrics") + code)


def test_backend_from_the_environment():
    assert python(
        "import lt_kernels; print(lt_kernels.info()['settings']['backend'])", LT_KERNELS_BACKEND="reference"
    ).split() == ["reference"]


def test_unknown_backend_in_the_environment_is_refused():
    code = "import lt_kernels"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "LT_KERNELS_BACKEND": "cuda"},
        check=False,
    )
    assert result.returncode != 0
    assert "LT_KERNELS_BACKEND: got 'cuda'" in result.stderr
