"""Which instructions the native kernels use; ``--engine=default`` and ``--engine=avx2`` run the kernels of each."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

import lt_kernels

ORDER = ["default", "avx2", "avx512"]
#: ``lt-kernels info`` with each name in the environment: processes of their own, which share the import of torch.
CODE = """
import contextlib, io, json, multiprocessing, os, sys
import torch

def info(capability):
    os.environ["LT_KERNELS_CPU_CAPABILITY"] = capability
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        from lt_kernels.cli import main
        status = main(["info"])
    return status, text.getvalue()

with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(info, sys.argv[1:], chunksize=1)))
"""


@functools.cache
def infos() -> dict[str, tuple[int, str]]:
    """Return the status and the text of ``lt-kernels info`` by the name asked for."""
    names = [*ORDER, "sse9"]
    result = subprocess.run([sys.executable, "-c", CODE, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("capability", ORDER)
def test_what_the_processor_has_runs_and_nothing_else(capability):
    best = lt_kernels.info()["extension"]["cpu_capability"]
    status, text = infos()[capability]
    if ORDER.index(capability) <= ORDER.index(best):
        assert status == 0, text
        assert capability in text
    else:
        assert status != 0
        assert f"this processor does not run '{capability}'" in text


def test_an_unknown_name_is_an_error():
    status, text = infos()["sse9"]
    assert status != 0
    assert "LT_KERNELS_CPU_CAPABILITY: got 'sse9', expected 'default', 'avx2' or 'avx512'" in text
