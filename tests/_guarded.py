"""Calls of CPU kernels on tensors that end where an untouchable page begins, in a process of test_plain_calls."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap

import torch
from torch import Tensor

from lt_kernels.functional import expert_cross_entropy, margin_cross_entropy, supervised_contrastive

PAGE = mmap.PAGESIZE
kept: list[object] = []


def guarded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy whose last byte is the last one before a page without access."""
    result = values.to(dtype)
    count = result.numel() * result.element_size()
    pages = -(-count // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, 0):
        raise OSError("mprotect")
    room = (ctypes.c_char * count).from_address(start + pages * PAGE - count)
    kept.extend((memory, room))
    return torch.frombuffer(room, dtype=dtype).view(result.shape).copy_(result)


def check(rows: int, classes: int, dtype: torch.dtype) -> None:
    """Call every function on such tensors: rows, columns, experts and pairs."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    target = guarded(torch.arange(rows) % classes, torch.int64)
    vector = guarded(torch.linspace(0, 1, classes), arithmetic)
    options = {"class_bias": vector, "weight": vector, "class_scale": vector, "margin": vector, "label_smoothing": 0.1}
    values = torch.linspace(-2, 2, rows * classes)
    x = guarded(values.view(rows, classes), dtype).requires_grad_()
    columns = guarded(values.view(classes, rows), dtype).t().requires_grad_()
    soft = guarded(torch.full((rows, classes), 1 / classes), dtype)
    for logits in (x, columns):
        for reduction in ("mean", "none"):
            margin_cross_entropy(logits, target, reduction=reduction).sum().backward()
            margin_cross_entropy(logits, target, reduction=reduction, **options).sum().backward()
            margin_cross_entropy(logits, soft, reduction=reduction, class_bias=vector).sum().backward()
        expert_cross_entropy([logits, logits], target, log_prior=vector, taus=(0.0, 1.0)).backward()
        supervised_contrastive(logits, logits, target, temperature=0.5, exclude="self").backward()


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for classes in (1, 2, 7, 8, 9, 15, 17, 33, 130):
            for rows in (1, 2, 3, 11):
                check(rows, classes, dtype)
