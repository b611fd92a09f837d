"""Launch table and launcher of the Triton kernel. The formulas are those of ``margin_cross_entropy``, row by row.

One program per sample reads the row of each expert once, keeps it in registers and writes its gradient: per logit
(b = itemsize) b bytes, and 2b with gradients. Where registers allow, the next expert's row is on its way meanwhile.
Targets, and what depends on their classes, are loaded once for all experts, and so is the log prior, which stays in
registers too unless there are many options (then it comes out of the cache for each expert). The ensemble is a second
sweep over the sample's rows, which are still in the cache.

Rows that registers do not hold are left to the rows kernel, expert by expert, and their ensemble to the fusion's kernel
(``looped.py``). A loop over tiles that visits all experts of a sample would read the prior once, but what it reads
twice, all experts' rows of every program, does not stay in L2 where one expert's rows do; and it needs more
instructions for a bfloat16 logit than fit into the time that memory takes. The same goes for logits whose classes are
not contiguous.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._experts import empty_gradient, shape_of
from .._triton_experts import Layout, contiguous_rows, layout_of, row_stride
from ..margin_cross_entropy.triton import _PER_THREAD, _RowsLaunch, _shared, _tile_of
from .arguments import Arguments
from .looped import ensemble_of
from .looped import forward as _looped
from .triton_kernels import _experts_forward_kernel

# --- launch table ----------------------------------------------------------------------------------------------------

#: Experts of a launch, at most: the kernel has the code of each.
_MOST_EXPERTS = 6
#: Widest rows, and how many logits a thread then holds, without options that need registers of their own and with one.
_ONE_TILE = ((16384, 64), (8192, 32))
#: Widest rows, and experts of a launch at most, of which the next one's row is on its way while one is summed up and
#: written; and how many logits and registers a thread then has. A multiprocessor has 16 warps so, of two programs.
#: With 64 logits a thread has 230 registers and a multiprocessor 8 warps, which wait for memory at every expert.
_AHEAD, _MOST_AHEAD = 8192, 3
_AHEAD_PER_THREAD, _AHEAD_REGISTERS = 32, 128


class _Shape(NamedTuple):
    launch: _RowsLaunch
    keep: bool  # the log prior in registers
    ahead: bool  # whether the next expert's row is loaded ahead


@functools.cache
def _launch(classes: int, itemsize: int, group: int, options: int) -> _Shape | None:
    """Of rows that a program keeps in registers; None if it cannot.

    options: how many need registers of their own; with two of them the rows kernel does better.
    """
    block = max(triton.next_power_of_2(max(classes // group, 1)) * group, 512)
    if options >= len(_ONE_TILE) or block > _ONE_TILE[options][0]:
        return None
    keep = options == 0 and itemsize == 2 and group == 8
    if options == 0 and block <= _AHEAD and group * itemsize == 16:
        tile = _tile_of(block, group, _AHEAD_PER_THREAD)
        return _Shape(_RowsLaunch("tile", group, *tile, max_registers=_AHEAD_REGISTERS), keep, True)
    return _Shape(_RowsLaunch("tile", group, *_tile_of(block, group, _ONE_TILE[options][1])), keep, False)


# --- launcher --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Experts of one launch."""

    which: slice
    layout: Layout
    shape: _Shape


def _options(a: Arguments) -> int:
    """How many options need registers: what is read for every column beside one prior or bias; two others are one."""
    o = a.options
    smooth, mixed = o.label_smoothing > 0, o.mixed_target is not None
    two_biases = o.class_bias is not None and a.log_prior is not None
    return (
        (o.class_scale is not None) + (smooth and o.weight is not None) + two_biases + (o.angular + smooth + mixed) // 2
    )


def _parts(a: Arguments, outputs: list[Tensor]) -> list[_Part] | None:
    """The launches of a call; None if the kernel does not take it. outputs: the gradient, if there is one."""
    experts, _, classes = shape_of(a.logits)
    tensors = [*a.logits, *outputs]
    if not all(contiguous_rows(x) for x in tensors) or len({row_stride(x) for x in a.logits}) > 1:
        return None
    group, itemsize, options = layout_of(a.logits, *outputs).group, a.logits[0].element_size(), _options(a)
    shape = _launch(classes, itemsize, group, options)
    most = _MOST_AHEAD if shape is not None and shape.ahead else _MOST_EXPERTS
    per_launch = triton.cdiv(experts, triton.cdiv(experts, most))
    parts = []
    for first in range(0, experts, per_launch):
        which = slice(first, min(first + per_launch, experts))
        logits = a.logits[which] if len(a.logits) == experts else [a.logits[0][which]]
        layout = layout_of(logits, *(grad[which] for grad in outputs))
        shape = _launch(classes, itemsize, layout.group, options)
        if shape is None:
            return None
        parts.append(_Part(which, layout, shape))
    return parts


def forward(a: Arguments, with_ensemble: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    experts, n, _ = shape_of(a.logits)
    first = a.logits[0]
    outputs = [empty_gradient(a.logits)] if with_grad else []
    parts = _parts(a, outputs) if n > 0 else []
    if parts is None:
        del outputs
        return _looped(a, with_ensemble, with_grad, "triton")
    loss = first.new_empty((experts, n), dtype=torch.float32)
    rest = loss.new_empty((experts, 2, n))
    ensemble_loss = loss.new_empty((n if with_ensemble else 0,))
    prediction = loss.new_empty((n if with_ensemble else 0,), dtype=torch.int64)
    ensemble = with_ensemble and len(parts) == 1
    log_prior, class_bias, taus = a.log_prior, a.options.class_bias, a.taus
    if log_prior is None and class_bias is not None and class_bias.dim() == 1:
        log_prior, class_bias, taus = class_bias, None, [1.0] * experts  # a bias of all is a prior with taus of 1
    own_biases = class_bias if class_bias is not None and class_bias.dim() == 2 else None
    shared = _shared(a._replace(log_prior=None, options=a.options._replace(class_bias=None)).rows()[0])
    del shared["SOFT"]
    with torch.cuda.device_of(first):
        for which, layout, (launch, keep, ahead) in parts:
            grad = outputs[0][which] if with_grad else None
            arguments: dict[str, Any] = shared | {
                "logits_ptrs": layout.tensors,
                "target_ptr": a.options.target.contiguous(),
                "log_prior_ptr": log_prior,
                "class_bias_ptr": class_bias if own_biases is None else own_biases[which],
                "ensemble_coefficient_ptr": a.ensemble_coefficient if ensemble else None,
                "loss_ptr": loss[which],
                "rest_ptr": rest[which],
                "ensemble_loss_ptr": ensemble_loss if ensemble else None,
                "ensemble_prediction_ptr": prediction if ensemble else None,
                "grad_ptr": grad,
                "expert_stride": layout.expert_stride,
                "row_stride": layout.row_stride,
                "grad_expert_stride": 0 if grad is None else grad.stride(0),
                "grad_row_stride": 0 if grad is None else row_stride(grad),
                "taus": tuple(taus[which]),
            }
            _experts_forward_kernel[(n,)](
                **arguments,
                EXPERTS=len(layout.tensors),
                OWN_BIAS=own_biases is not None,
                KEEP=keep and log_prior is not None and class_bias is None,
                AHEAD=ahead,
                SWEEP=max(_PER_THREAD // launch.group, 1),
                **launch.constants,
            )
    if with_ensemble and not ensemble and n > 0:
        ensemble_loss, prediction = ensemble_of(a, "triton")
    return loss, rest, ensemble_loss, prediction, outputs[0] if with_grad else first.new_empty((0,))
