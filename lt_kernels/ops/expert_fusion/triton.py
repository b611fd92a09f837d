"""Launch table and launcher of the fusion's Triton kernels.

Bytes per sample (b = itemsize), beside class vectors: E C b read once, and 4 C written where log-probabilities are
asked for. Rows of up to 16,384 classes (8192 where E b > 8) are one program's, which keeps u in registers; wider ones
are split into parts, each a program's, whose results a small kernel merges (E C b read again for log-probabilities).
Up to 8 largest classes are found in registers; for more, u is written (4 C) and torch selects. The code is unrolled
over the experts, whose number has no limit but costs compile time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._select import group_size, largest
from .._triton_experts import layout_of, row_stride
from .arguments import Arguments
from .triton_kernels import _fusion_kernel, _log_probs_kernel, _merge_kernel

#: Columns of a thread: where a column's logits of all experts are at most 8 bytes, and else. So few that u, and the
#: logits in one of its two tiles, fit into the registers that let 16 warps run together. Warps of a program, at most.
_PER_THREAD, _REGISTERS, _MOST_WARPS = (32, 16), 128, 16
#: Columns of a part of a row that is too wide for one program (more where there would be too many parts).
_PART = 8192
#: Largest number of classes that the kernels select.
_SELECTED = 8
#: Most candidates that one program merges.
_CANDIDATES = 8192


class _Launch(NamedTuple):
    group: int
    repeat: int
    tiles: int
    num_warps: int
    parts: int

    @property
    def part_groups(self) -> int:
        return 32 * self.num_warps * self.repeat * self.tiles

    @property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        named = {"GROUP": self.group, "LANES": 32 * self.num_warps, "REPEAT": self.repeat, "TILES": self.tiles}
        named["num_warps"] = self.num_warps
        return named if torch.version.hip else {**named, "maxnreg": _REGISTERS}


@functools.cache
def _launch(classes: int, column_bytes: int, group: int, k: int) -> _Launch:
    groups, per_thread = max(classes // group, 1), _PER_THREAD[column_bytes > 8]
    widest = 32 * _MOST_WARPS * per_thread
    block = max(triton.next_power_of_2(groups), 32) * group
    if block > widest:
        block = _PART
        while block < widest and triton.cdiv(groups * group, block) * k > _CANDIDATES:
            block *= 2
    warps = max(block // (32 * per_thread), 1)
    of_thread = block // (32 * warps * group)  # groups
    tiles = min(of_thread, 2)
    return _Launch(group, of_thread // tiles, tiles, warps, triton.cdiv(groups * group, block))


def forward(a: Arguments, k: int, with_log_probs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    first = a.logits[0]
    n, classes = first.shape[-2:]
    values = first.new_empty((n, k), dtype=torch.float32)
    indices = first.new_empty((n, k), dtype=torch.int64)
    mass = values.new_empty((n,))
    log_probs = values.new_empty((n, classes) if with_log_probs else (0,))
    if n == 0:
        return values, indices, mass, log_probs
    experts = layout_of(a.logits, *([log_probs] if with_log_probs else []))
    launch = _launch(classes, len(experts.tensors) * first.element_size(), experts.group, k)
    selected = k if k * launch.parts <= _CANDIDATES and k <= _SELECTED else 0
    u, columns = None, group_size(classes, k)
    if not selected:
        padded = triton.cdiv(classes, columns) * columns
        # rows of a multiple of that many columns, which begin where groups of the logits do
        step = padded + (experts.row_stride - padded) % experts.group
        u = values.new_empty((n, step))[:, :padded]
        u[:, classes:].fill_(-torch.inf)
    several = launch.parts > 1
    partial = values.new_empty((2, n, launch.parts)) if several else None
    partial_keys = values.new_empty((2, n, launch.parts, selected), dtype=torch.int32) if several and selected else None
    inputs: dict[str, Any] = {
        "x_ptrs": experts.tensors,
        "weights": tuple(map(float, a.weights)),
        "expert_weight_ptr": a.expert_weight,
        "class_shift_ptr": a.class_shift,
        "learned_scale_ptr": a.learned_scale,
        "classes": classes,
        "part_groups": launch.part_groups,
        "expert_stride": experts.expert_stride,
        "row_stride": experts.row_stride,
        "log_probs_stride": row_stride(log_probs) if with_log_probs else 0,
        "scale": a.scale,
        "HAS_SCALE": a.learned_scale is not None or a.scale != 1.0,
        **launch.constants,
    }
    with torch.cuda.device_of(first):
        _fusion_kernel[(n, launch.parts)](
            **inputs,
            values_ptr=values,
            classes_ptr=indices,
            mass_ptr=mass,
            u_ptr=u,
            log_probs_ptr=log_probs if with_log_probs and not several else None,
            partial_ptr=partial,
            partial_keys_ptr=partial_keys,
            u_stride=0 if u is None else row_stride(u),
            K=selected,
        )
        if several:
            peak = values.new_empty((n,)) if with_log_probs else None
            _merge_kernel[(n,)](
                partial,
                partial_keys,
                values,
                indices,
                mass,
                peak,
                launch.parts,
                K=selected,
                PARTS=triton.next_power_of_2(launch.parts),
                CANDIDATES=triton.next_power_of_2(max(launch.parts * selected, 32)),
                num_warps=1 if launch.parts * max(selected, 1) <= 512 else 8,
            )
            if with_log_probs:
                _log_probs_kernel[(n, launch.parts)](**inputs, peak_ptr=peak, mass_ptr=mass, log_probs_ptr=log_probs)
        if u is not None:
            best, where = largest(u, k, columns)
            values.copy_(best)
            indices.copy_(where)
    return values, indices, mass, log_probs
