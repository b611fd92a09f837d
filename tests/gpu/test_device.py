"""Every device check under pytest, on each backend that has kernels for CUDA tensors."""

from __future__ import annotations

import pytest
import torch
from device_checks import CHECKS

import lt_kernels

BACKENDS = ("triton", "native")

if not torch.cuda.is_available():
    reason = f"no CUDA device is available: {len(BACKENDS) * len(CHECKS)} device checks not run"
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_device(name, backend):
    reason = lt_kernels.info()["backends"]["margin_cross_entropy"]["cuda"][backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    CHECKS[name].run(backend, "cuda")
