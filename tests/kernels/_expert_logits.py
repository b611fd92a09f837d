"""Logits of experts for the kernels of fusion and divergence, surrounded by NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from _engines import ENGINE
from _layouts import guarded, window
from torch import Tensor

#: CUDA's shapes: on the small chips several tiles, and rows that do not stay in shared memory.
SHAPES = [(1, 3, 33), (3, 3, 1), (3, 4, 129), (8, 2, 1000), (9, 2, 1000), (3, 3, 8142), (20, 2, 65)]

#: A list of one tensor [E, N, C], or of E tensors [N, C].
LAYOUTS = {
    "stacked": lambda x: [guarded(x)],
    "list": lambda x: [guarded(each) for each in x],
    "list at any address": lambda x: [guarded(each, e) for e, each in enumerate(x)],
    "samples first": lambda x: [guarded(x.transpose(0, 1).contiguous()).transpose(0, 1)],
    "classes first": lambda x: [guarded(x.transpose(1, 2).contiguous()).transpose(1, 2)],
    "window": lambda x: [window(x, 8, 8, dim=2)],
    "odd window": lambda x: [window(x, 3, 2, dim=2)],
    "list of windows": lambda x: [window(each, e, 3) for e, each in enumerate(x)],
    "rows for all": lambda x: [guarded(x[:, :1]).expand(x.shape)],
    "one for all": lambda x: [guarded(x[:1]).expand(x.shape)],
}


def drawn(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> Tensor:
    """Draw logits [E, N, C]: of experts that agree in part for Triton, independent ones for CUDA.

    Samples of two or three rows are within the budget or not by luck of eager's own error; these are known to be.
    """
    if backend == "triton":
        generator = torch.Generator().manual_seed(sum(shape))
        x = torch.randn(shape[1:], generator=generator) * 3 + torch.randn(shape, generator=generator)
    else:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    return x.to(ENGINE.device, dtype)


def repeated(x: Tensor, layout: str) -> Tensor:
    """Return the values that a layout leaves of x."""
    if layout == "rows for all":
        return x[:, :1].expand(x.shape)
    return x[:1].expand(x.shape) if layout == "one for all" else x


def vector(values: Tensor) -> Tensor:
    return guarded(values.to(ENGINE.device))


def with_barriers(backend: str) -> Iterator[list[Tensor]]:
    """Yield logits of rows that several threads, warps and blocks share."""
    shapes = ((3, 3, 129), (9, 2, 1000), (3, 2, 8142))
    for shape, dtype, layout in product(shapes, (torch.float32, torch.bfloat16), ("stacked", "list at any address")):
        yield LAYOUTS[layout](drawn(shape, dtype, backend))


def check_most_experts(forward: Callable[[list[Tensor]], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Require an error for more experts than a block's shared memory holds."""
    if ENGINE.name != "emulator":
        pytest.skip("the emulator has small chips")
    monkeypatch.setenv("LTK_EMULATED_DEVICE", "1 8192 12000")
    logits = [window(drawn((300, 1, 40), torch.float32, "native"), 0, 1, dim=2)]
    with pytest.raises(ValueError, match="logits: got 300 experts, more than a block's shared memory holds"):
        forward(logits)
