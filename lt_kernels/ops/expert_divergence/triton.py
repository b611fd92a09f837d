"""Launch table and launchers of the divergences' Triton kernels.

Bytes per sample (b = itemsize), beside class vectors and rows' scalars: forward E C b, backward 2 E C b. A thread holds
the same columns of all experts at once, at most 64 logits: more than 8 experts of 16-bit logits leave it fewer than 16
bytes of each. The code is unrolled over the experts, whose number has no limit but costs compile time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._experts import empty_gradient, shape_of
from .._triton_experts import contiguous_rows, layout_of, row_stride
from .triton_kernels import _divergence_backward_kernel, _divergence_forward_kernel

#: Logits of all experts that a thread holds at once.
_PER_THREAD = 64
#: Warps that keep the device busy that sizes are weighed for, whatever runs: 132 multiprocessors, 12 on each.
_BUSY_WARPS = 132 * 12


class _Launch(NamedTuple):
    group: int
    repeat: int
    num_warps: int

    @property
    def block(self) -> int:
        return 32 * self.num_warps * self.repeat * self.group

    @property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "GROUP": self.group, "LANES": 32 * self.num_warps, "REPEAT": self.repeat, "num_warps": self.num_warps,
        }  # fmt: skip


def _power_of_two(limit: int) -> int:
    """The largest one up to ``limit``, at least 1."""
    return 1 << (max(limit, 1).bit_length() - 1)


@functools.cache
def _tile(experts: int, group: int) -> tuple[int, int]:
    """Columns of a group, at most ``group``, and groups of a thread: at most 16 columns."""
    group = min(group, _power_of_two(_PER_THREAD // experts))
    return group, min(_power_of_two(_PER_THREAD // (experts * group)), max(16 // group, 1))


@functools.cache
def _forward_launch(experts: int, rows: int, classes: int, group: int) -> _Launch:
    """Few warps for each row, as their sums are brought together at its end; more where there are few rows."""
    group, repeat = _tile(experts, group)
    warps = min(_power_of_two(classes // 4096), 8)
    while warps < 8 and rows * warps < _BUSY_WARPS and classes >= 1024 * warps:
        warps *= 2
    return _Launch(group, repeat, warps)


@functools.cache
def _backward_launch(experts: int, classes: int, group: int) -> _Launch:
    group, repeat = _tile(experts, group)
    return _Launch(group, repeat, min(_power_of_two(triton.cdiv(classes, 32 * repeat * group)), 4))


def forward(logits: list[Tensor], temperature: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """See ``op.py``."""
    e, n, classes = shape_of(logits)
    value = logits[0].new_empty((e, n), dtype=torch.float32)
    saved = value.new_empty((3 * e + 2, n))
    if n == 0:
        return value, saved
    experts = layout_of(logits)
    launch = _forward_launch(e, n, classes, experts.group)
    with torch.cuda.device_of(logits[0]):
        _divergence_forward_kernel[(n,)](
            experts.tensors,
            temperature,
            value,
            saved,
            classes,
            experts.expert_stride,
            experts.row_stride,
            PAIRWISE=kind == "pairwise",
            **launch.constants,
        )
    return value, saved


def backward(
    grad: Tensor, saved: Tensor, logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool
) -> Tensor:
    """Gradient of the logits [E, N, C]; see ``op.py``."""
    e, n, classes = shape_of(logits)
    gradient = empty_gradient(logits)
    if n == 0:
        return gradient
    out = gradient if contiguous_rows(gradient) else gradient.new_empty(gradient.shape)
    experts = layout_of(logits, out)
    launch = _backward_launch(e, classes, experts.group)
    grad = grad.to(torch.float32)
    with torch.cuda.device_of(logits[0]):
        _divergence_backward_kernel[(n, triton.cdiv(classes // launch.group * launch.group, launch.block) or 1)](
            experts.tensors,
            temperature,
            grad,
            saved.contiguous(),
            out,
            classes,
            experts.expert_stride,
            experts.row_stride,
            grad.stride(0),
            grad.stride(1),
            out.stride(0) if e > 1 else 0,
            row_stride(out),
            PAIRWISE=kind == "pairwise",
            DETACH=detach,
            **launch.constants,
        )
    return gradient if out is gradient else gradient.copy_(out)
