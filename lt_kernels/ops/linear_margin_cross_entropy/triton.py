"""The tiled strategy in Triton: launch table and launchers. Formulas in ``triton_kernels.py`` and in the reference."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..margin_cross_entropy.triton import _per_row, _shared
from .arguments import DIFFERENTIABLE, Arguments
from .triton_kernels import (
    _TO_SCALE,
    _class_sums_kernel,
    _finish_kernel,
    _fold_kernel,
    _grad_factor_kernel,
    _grad_input_kernel,
    _linear_terms_kernel,
    _target_sums_kernel,
    _tiled_forward_kernel,
)

# --- launch table ----------------------------------------------------------------------------------------------------

#: Multiprocessors that the splits are made for, whatever runs: those of an H200 (and H100).
_MULTIPROCESSORS = 132
#: What starting and ending a program costs, in tiles.
_PROGRAM_COST = 2
#: Bytes of partial gradients, at most, beyond one split.
_PARTIAL_BYTES = 256 * 2**20
#: Rows that the terms are padded to a multiple of: no kernel has larger blocks of rows.
_PADDING = 128
#: Rows and classes of a tile of _target_sums_kernel.
_TARGET_SUMS = (128, 32)
#: Where the terms keep what the gradient of the scale has beside the products.
_ROW_TO_SCALE = _TO_SCALE.value


class _Launch(NamedTuple):
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    together: int = 1  # programs that run together on a multiprocessor

    @property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class _Launches(NamedTuple):
    forward: _Launch
    grad_input: _Launch
    grad_factor: _Launch


class _Tiles(NamedTuple):
    """Launches by the number of options that need registers (predictions, smoothing, mixed targets)."""

    forward: _Launch  # without any
    forward_options: _Launch
    grad_input: _Launch
    grad_factor: _Launch
    grad_input_options: _Launch | None = None  # with two


#: By machine and kind of product (of 16-bit numbers; of float32 as tf32; of float32 as such), by largest D: what
#: compiles without spills, into the shared memory that there is: 227 KB on sm_90 and sm_100, 99 KB on the smallest of
#: "ampere" (whatever has mma.sync: sm_80, 86, 89, 120), 64 KB on AMD's.
_TABLE = {
    ("hopper", "half"): {
        64: _Tiles(
            _Launch(128, 128, 8, 3, 2),
            _Launch(128, 64, 8, 3),
            _Launch(128, 64, 8, 3),
            _Launch(64, 128, 8, 3),
            _Launch(64, 64, 8, 3),
        ),
        128: _Tiles(_Launch(128, 128, 8, 2, 2), _Launch(128, 64, 8, 3), _Launch(128, 64, 8, 3), _Launch(64, 128, 8, 3)),
        256: _Tiles(
            _Launch(128, 128, 8, 2),
            _Launch(128, 64, 8, 2),
            _Launch(128, 64, 8, 2),
            _Launch(64, 128, 8, 2),
            _Launch(128, 32, 8, 2),
        ),
        512: _Tiles(_Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2), _Launch(64, 16, 8, 2), _Launch(32, 64, 8, 2)),
    },
    ("blackwell", "half"): {
        128: _Tiles(_Launch(128, 64, 8, 3), _Launch(64, 64, 8, 3), _Launch(128, 64, 8, 2), _Launch(64, 128, 8, 2)),
        256: _Tiles(_Launch(128, 64, 8, 2), _Launch(64, 64, 8, 2), _Launch(128, 64, 8, 2), _Launch(64, 128, 8, 2)),
        512: _Tiles(_Launch(64, 32, 8, 2), _Launch(64, 32, 8, 2), _Launch(64, 32, 8, 2), _Launch(32, 64, 8, 2)),
    },
    ("ampere", "half"): {
        128: _Tiles(
            _Launch(128, 64, 8, 2, 2),
            _Launch(64, 64, 8, 2),
            _Launch(128, 64, 8, 2),
            _Launch(64, 128, 8, 2),
            _Launch(64, 64, 8, 2),
        ),
        256: _Tiles(_Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2), _Launch(64, 64, 8, 2)),
        512: _Tiles(_Launch(32, 32, 8, 2), _Launch(32, 32, 8, 2), _Launch(32, 32, 8, 2), _Launch(32, 32, 8, 2)),
    },
    ("amd", "half"): {
        128: _Tiles(_Launch(64, 64, 4, 1), _Launch(64, 64, 4, 1), _Launch(64, 32, 4, 1), _Launch(32, 64, 4, 1)),
        256: _Tiles(_Launch(64, 64, 4, 1), _Launch(64, 64, 4, 1), _Launch(64, 16, 4, 1), _Launch(16, 64, 4, 1)),
        512: _Tiles(_Launch(32, 32, 4, 1), _Launch(32, 32, 4, 1), _Launch(32, 16, 4, 1), _Launch(16, 32, 4, 1)),
    },
    ("nvidia", "tf32"): {
        128: _Tiles(_Launch(64, 64, 8, 2), _Launch(64, 32, 8, 2), _Launch(32, 32, 4, 2, 2), _Launch(32, 32, 4, 2, 2)),
        256: _Tiles(_Launch(32, 32, 4, 2), _Launch(32, 32, 4, 2), _Launch(32, 32, 4, 2), _Launch(32, 32, 4, 2)),
        512: _Tiles(_Launch(16, 16, 4, 2), _Launch(16, 16, 4, 2), _Launch(16, 16, 4, 2), _Launch(16, 16, 4, 2)),
    },
    ("nvidia", "ieee"): {
        128: _Tiles(
            _Launch(32, 32, 8, 2, 2), _Launch(32, 32, 8, 2, 2), _Launch(32, 32, 8, 2, 2), _Launch(32, 32, 8, 2, 2)
        ),
        256: _Tiles(_Launch(32, 32, 8, 2), _Launch(32, 32, 8, 2), _Launch(32, 16, 8, 2), _Launch(16, 32, 8, 2)),
        512: _Tiles(_Launch(16, 16, 8, 2), _Launch(16, 16, 8, 2), _Launch(16, 16, 8, 2), _Launch(16, 16, 8, 2)),
    },
    ("amd", "ieee"): {
        128: _Tiles(_Launch(32, 32, 4, 1), _Launch(32, 32, 4, 1), _Launch(32, 32, 4, 1), _Launch(32, 32, 4, 1)),
        256: _Tiles(_Launch(32, 16, 4, 1), _Launch(32, 16, 4, 1), _Launch(32, 16, 4, 1), _Launch(16, 32, 4, 1)),
        512: _Tiles(_Launch(16, 16, 4, 1), _Launch(16, 16, 4, 1), _Launch(16, 16, 4, 1), _Launch(16, 16, 4, 1)),
    },
}


def _block_d(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def _machine(architecture: int) -> str:
    if architecture == 0:
        return "amd"
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(architecture // 10, "ampere")


@functools.cache
def _launches(width: int, itemsize: int, tf32: bool, options: int, architecture: int) -> _Launches:
    """options: how many of predictions, smoothing and mixed targets; architecture: ten times the compute capability, 0
    on AMD's."""
    machine = _machine(architecture)
    product = "half" if itemsize == 2 else "tf32" if tf32 and machine != "amd" else "ieee"
    if machine != "amd" and product != "half":
        machine = "nvidia"
    by_width = _TABLE[machine, product]
    limit = min((d for d in by_width if d >= width), default=None)
    if limit is None:
        raise ValueError(f"input: got {width} columns, expected at most {max(by_width)} for the tiled strategy")
    tiles = by_width[limit]
    forward = tiles.forward_options if options > 0 else tiles.forward
    grad_input = (options > 1 and tiles.grad_input_options) or tiles.grad_input
    return _Launches(forward, grad_input, tiles.grad_factor)


@functools.cache
def _per_split(blocks: int, tiles: int, together: int, most: int = 64) -> int:
    """Tiles of a split, where each of ``blocks`` programs would have ``tiles``: what takes the fewest rounds of tiles
    when every multiprocessor has ``together`` programs at a time."""

    def rounds(splits: int) -> int:
        each = triton.cdiv(tiles, splits)
        programs = blocks * triton.cdiv(tiles, each)
        return triton.cdiv(programs, _MULTIPROCESSORS * together) * (each + _PROGRAM_COST)

    splits = min(range(1, min(tiles, most) + 1), key=rounds)
    return triton.cdiv(tiles, splits)


# --- launchers -------------------------------------------------------------------------------------------------------


def _architecture(device: torch.device) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _precision(dtype: torch.dtype) -> str:
    """Of the matrix products: float32 as torch's own."""
    matmul = torch.backends.cuda.matmul
    if dtype != torch.float32:
        return "ieee"
    # the older flag raises once the newer one has been set
    precision = getattr(matmul, "fp32_precision", None)
    if precision in (None, "none"):
        try:
            precision = "tf32" if matmul.allow_tf32 else "ieee"
        except RuntimeError:  # set by the newer interface, elsewhere
            precision = getattr(torch.backends, "fp32_precision", None)
    return "tf32" if precision == "tf32" else "ieee"


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _common(a: Arguments, inverse_norm: Tensor | None) -> dict[str, Any]:
    """Arguments of the kernels, by name; each takes some."""
    x, factor = _readable(a.input), _readable(a.factor)
    width, classes = x.shape[1], a.classes
    shared = _shared(a.of_rows(x[:, :, None]))  # which reads no logits
    norm = None if inverse_norm is None else inverse_norm.contiguous()
    bias = None if a.linear_bias is None else a.linear_bias.contiguous()
    o = a.options
    slope, offset = None, o.class_bias
    if norm is not None or o.class_scale is not None:
        slope = x.new_empty((classes,), dtype=torch.float32)
    if bias is not None:
        offset = x.new_empty((classes,), dtype=torch.float32)
    if slope is not None or bias is not None:
        _fold_kernel[(triton.cdiv(classes, 1024),)](
            norm, bias, o.class_bias, o.class_scale, o.learned_scale, slope, None if bias is None else offset, classes,
            o.scale, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return {
        **shared,
        "input_ptr": x,
        "factor_ptr": factor,
        "target_ptr": a.options.target.contiguous(),
        "inverse_norm_ptr": norm,
        "linear_bias_ptr": bias,
        "slope_ptr": slope,
        "offset_ptr": offset,
        "rows": x.shape[0],
        "classes": classes,
        "width": width,
        "input_stride": x.stride(0),
        "factor_stride": factor.stride(0),
        "HAS_SLOPE": shared["HAS_SCALE"] or slope is not None,
        "MIXED": a.options.mixed_target is not None,
        "PRECISION": _precision(x.dtype),
        "FULL": width == _block_d(width),
        "BLOCK_D": _block_d(width),
    }


def _launches_of(a: Arguments, arguments: dict[str, Any], with_prediction: bool = False) -> _Launches:
    options = with_prediction + arguments["SMOOTH"] + arguments["MIXED"]
    tf32 = arguments["PRECISION"] == "tf32"
    return _launches(arguments["width"], a.input.element_size(), tf32, options, _architecture(a.input.device))


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **others: Any) -> None:
    """Launch with those of ``arguments`` that the kernel takes, and the others."""
    named = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    kernel[grid](**(named | others))


def _block_of_rows(width: int) -> dict[str, int]:
    """Launch of the kernels of rows' scalars, which read the vectors of a row and of its targets."""
    return {"BLOCK": max(min(4096 // _block_d(width), 64), 8), "num_warps": 4}


def forward(a: Arguments, inverse_norm: Tensor | None, with_prediction: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp and prediction [N, 1], and rest [2, N, 1]. inverse_norm: [C] float32."""
    n, classes = a.input.shape[0], a.classes
    loss, lse = (a.input.new_empty((n, 1), dtype=torch.float32) for _ in range(2))
    rest = loss.new_empty((2, n, 1))
    prediction = loss.new_empty((n, 1) if with_prediction else (0,), dtype=torch.int64)
    if n == 0:
        return loss, lse, prediction, rest
    with torch.cuda.device_of(a.input):
        arguments = _common(a, inverse_norm)
        width = arguments["width"]
        launch = _launches_of(a, arguments, with_prediction).forward
        blocks, tiles = triton.cdiv(n, launch.block_n), triton.cdiv(classes, launch.block_c)
        per_split = _per_split(blocks, tiles, launch.together)
        splits = triton.cdiv(tiles, per_split)
        kinds = (4 if arguments["SMOOTH"] else 2) + with_prediction
        arguments |= {
            "partial_ptr": loss.new_empty((kinds, splits, n)),
            "partial_column_ptr": loss.new_empty((splits, n), dtype=torch.int32) if with_prediction else None,
            "tiles_per_split": per_split,
            "splits": splits,
            "loss_ptr": loss,
            "lse_ptr": lse,
            "prediction_ptr": prediction if with_prediction else None,
            "rest_ptr": rest,
        }
        _launch(_tiled_forward_kernel, (blocks, splits), arguments, **launch.constants)
        finish = _block_of_rows(width)
        _launch(_finish_kernel, (triton.cdiv(n, finish["BLOCK"]),), arguments, **finish)
    return loss, lse, prediction, rest


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    rest: Tensor,
    a: Arguments,
    inverse_norm: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of ``DIFFERENTIABLE``; [0] where not needed. linear_weight's is that through the products alone: of
    what ``inverse_norm`` owes to it the caller takes care. Upstream: 0-dim or [N, 1]."""
    n, classes = a.input.shape[0], a.classes
    sources = [a.input, a.linear_weight, a.linear_bias, *(getattr(a.options, name) for name in DIFFERENTIABLE[3:])]
    needs = [need and name != "target" for need, name in zip(needs, DIFFERENTIABLE, strict=True)]
    if n == 0:
        return [torch.zeros_like(t) if need else rest.new_empty((0,)) for t, need in zip(sources, needs, strict=True)]
    grads = [rest.new_empty((0,)) for _ in needs]
    if not any(needs):
        return grads
    per_loss, grad_loss_stride = _per_row(grad_loss, rest.shape[1:])
    per_lse, grad_lse_stride = _per_row(grad_lse, rest.shape[1:])
    with torch.cuda.device_of(a.input):
        arguments = _common(a, inverse_norm)
        width, padded = arguments["width"], triton.cdiv(n, _PADDING) * _PADDING
        launches = _launches_of(a, arguments)
        mixed = a.options.mixed_target is not None
        arguments |= {
            "rest_ptr": rest,
            "grad_loss_ptr": per_loss,
            "grad_lse_ptr": per_lse,
            "grad_loss_stride": grad_loss_stride,
            "grad_lse_stride": grad_lse_stride,
            "terms_ptr": rest.new_empty((10 if mixed else 7, padded)),
            "columns_ptr": rest.new_empty((1 + mixed, padded), dtype=torch.int32),
            "padded": padded,
        }
        rows = _block_of_rows(width)
        _launch(_linear_terms_kernel, (triton.cdiv(padded, rows["BLOCK"]),), arguments, **rows)
        if needs[0]:
            launch = launches.grad_input
            blocks, tiles = triton.cdiv(n, launch.block_n), triton.cdiv(classes, launch.block_c)
            per_split = _per_split(blocks, tiles, launch.together, _most_splits(n * width))
            grad = _partial_gradients(triton.cdiv(tiles, per_split), a.input, a.input.dtype)
            arguments |= {"grad_ptr": grad, "tiles_per_split": per_split}
            _launch(_grad_input_kernel, (blocks, len(grad)), arguments, **launch.constants)
            grads[0] = _merged(grad, a.input.dtype)
        if any(needs[1:]):
            _class_gradients(a, needs, grads, arguments, launches.grad_factor)
    return grads


def _class_gradients(
    a: Arguments, needs: list[bool], grads: list[Tensor], arguments: dict[str, Any], launch: _Launch
) -> None:
    """Everything but the gradient of the input, into ``grads``."""
    n, classes, rest = a.input.shape[0], a.classes, arguments["rest_ptr"]
    _, need_weight, need_linear, _, need_bias, need_scale, need_margin, need_learned = needs
    product = need_scale or need_learned
    through = need_linear or need_bias or (product and a.linear_bias is not None)
    extra = need_bias and a.options.angular
    arguments |= {
        "grad_ptr": None,
        "sums_ptr": None,
        "target_sums_ptr": None,
        "splits": 0,
        "target_splits": 0,
        "SUM_THROUGH": through,
        "SUM_PRODUCT": product,
        "SUM_BIAS": extra,
        "SUM_MARGIN": need_margin,
    }
    if need_weight or through or product:
        blocks, tiles = triton.cdiv(n, launch.block_n), triton.cdiv(classes, launch.block_c)
        per_split = _per_split(tiles, blocks, launch.together, _most_splits(classes * a.input.shape[1]))
        splits = triton.cdiv(blocks, per_split)
        grad = _partial_gradients(splits, a.factor, a.linear_weight.dtype) if need_weight else None
        sums = rest.new_empty((splits, through + product, classes)) if through or product else None
        arguments |= {"grad_ptr": grad, "blocks": blocks, "blocks_per_split": per_split}
        arguments |= {"sums_ptr": sums, "splits": splits}
        _launch(_grad_factor_kernel, (tiles, splits), arguments, **launch.constants)
        if grad is not None:
            grads[1] = _merged(grad, a.linear_weight.dtype)
    if extra or need_margin:
        block_n, block_c = _TARGET_SUMS
        blocks, tiles = triton.cdiv(n, block_n), triton.cdiv(classes, block_c)
        per_split = _per_split(tiles, blocks, 8)
        splits = triton.cdiv(blocks, per_split)
        target_sums = rest.new_empty((splits, extra + need_margin, classes))
        own = {"sums_ptr": target_sums, "blocks": blocks, "blocks_per_split": per_split}
        blocks_of = {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4}
        _launch(_target_sums_kernel, (tiles, splits), arguments | own, **blocks_of)
        arguments |= {"target_sums_ptr": target_sums, "target_splits": splits}
    if through or product or need_margin:
        outputs = {"linear_bias": 2, "class_bias": 4, "class_scale": 5, "class_margin": 6}
        for name, position in outputs.items():
            if needs[position]:
                like: Any = a.linear_bias if name == "linear_bias" else getattr(a.options, name)
                grads[position] = like.new_empty((classes,))
            arguments[f"grad_{name}_ptr"] = grads[position] if needs[position] else None
        to_scale = rest.new_empty((classes,)) if need_learned else None
        _launch(
            _class_sums_kernel, (triton.cdiv(classes, 256),), arguments | {"to_scale_ptr": to_scale}, BLOCK=256,
            num_warps=4,
        )  # fmt: skip
        if to_scale is not None:
            grads[7] = a.options.scale * (to_scale.sum() + arguments["terms_ptr"][_ROW_TO_SCALE].sum())


def _most_splits(elements: int) -> int:
    """As many as partial gradients of that many elements may have."""
    return max(1, min(64, _PARTIAL_BYTES // (4 * elements)))


def _partial_gradients(splits: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the splits of a [N, D] or [C, D] gradient go: one is the gradient itself."""
    return like.new_empty((splits, *like.shape), dtype=dtype if splits == 1 else torch.float32)


def _merged(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the splits, in a fixed order."""
    return (partial[0] if len(partial) == 1 else partial.sum(0)).to(dtype)
