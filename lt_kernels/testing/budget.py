"""The error budget: twice the error of plain PyTorch in the same dtype, plus a few roundings."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    what: str = "result",
    factor: float = 2.0,
    roundings: float | None = None,
) -> None:
    """Raise AssertionError unless max|actual - truth| <= factor max|eager - truth| + roundings eps max|truth|.

    Args:
        actual: the kernel's result.
        eager: plain PyTorch's result in the same dtype.
        truth: the float64 result.
        what: name used in the message.
        factor: multiple of eager's error that is allowed.
        roundings: how many roundings of ``actual``'s dtype are allowed on top, relative to the largest true value;
            default 1 for float16 and bfloat16, 4 for float32, 32 for float64 (the truth itself is then no more exact).

    Infinite and NaN entries must agree with the truth exactly in kind and place.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    a, e, t = (value.detach().double().cpu() for value in (actual, eager, truth))
    if bool(t.isfinite().all()):
        agree = not bool(a.isnan().any())
    else:
        finite, infinite = t.isfinite(), t.isinf()
        agree = torch.equal(a.isnan(), t.isnan()) and torch.equal(a[infinite], t[infinite])
        a, e, t = a[finite], e[finite], t[finite]
    if not agree:
        raise AssertionError(f"{what}: non-finite entries differ from the truth")
    if not t.numel():
        return
    if roundings is None:
        roundings = {torch.float32: 4.0, torch.float64: 32.0}.get(actual.dtype, 1.0)
    tiny = torch.finfo(actual.dtype).smallest_normal
    error = float((a - t).abs().max())
    eager_error = float((e - t).abs().nan_to_num(0.0, 0.0, 0.0).max())
    allowed = factor * eager_error + roundings * torch.finfo(actual.dtype).eps * float(t.abs().max()) + tiny
    if not error <= allowed:
        raise AssertionError(
            f"{what}: error {error:.3e} against float64 exceeds the budget {allowed:.3e} (eager: {eager_error:.3e})"
        )
