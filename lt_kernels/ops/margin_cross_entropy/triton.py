"""Launch table and launchers of the Triton kernels. The formulas are those of ``reference.py``.

With ``peak`` and ``mass`` the maximum and the sum of exp(u - peak) over the columns that are no target of the row
(together: ``rest`` [2, N, K], what backward needs beside the inputs), every other quantity of a row is scalar
arithmetic on the targets' own logits, and the gradient of an ordinary column is

    d loss / d x_j = a_j (slope * exp(u_j - peak) - smooth * w_j)            a_j = scale * class_scale_j

Layouts. *Rows* (``triton_rows.py``): the classes of a row are contiguous. *Tiles* (``triton_tiles.py``): any other
layout, and rows of few classes.

Bytes per logit (b = itemsize), beside class vectors and rows' scalars: forward b; forward with gradient 2b (the row
stays in registers up to 32,768 classes; beyond, its second read should hit L2); backward 2b. Exponentials are natural,
exp(u - peak): folding log2(e) into u would round u, which costs 30 roundings of a probability at scale 64.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .arguments import DIFFERENTIABLE, Arguments
from .triton_rows import _own_logits_kernel, _rows_backward_kernel, _rows_forward_kernel, _rows_statistics_kernel
from .triton_small import _mean_coefficient_kernel, _reciprocal_sum_kernel, _scale_kernel
from .triton_tiles import (
    _soft_mass_kernel,
    _terms_kernel,
    _tiles_backward_kernel,
    _tiles_forward_kernel,
)

# --- launch table ----------------------------------------------------------------------------------------------------

#: Rows of at most this many classes share a program (tiles); above, each row has its own.
_TILED_CLASSES = 128
#: Largest body that one program keeps in registers, by the number of register-hungry options (class_scale, weighted
#: smoothing, class probabilities; predictions, a second target, or any two options count as one if there is none of
#: these), and how many logits a thread then holds: what compiles without spills.
_ONE_TILE = ((32768, 64), (16384, 64), (8192, 32))
#: Logits that a thread holds of a tile where a row has several.
_PER_THREAD = 16
#: The device that sizes are weighed for, whatever runs: multiprocessors of an H200 (and H100); the part of its L2 that
#: a working set may count on (half of 50 MB: its halves may both hold what both read); its memory's bytes per second.
_MULTIPROCESSORS = 132
_L2_BYTES = 25_000_000
_BYTES_PER_SECOND = 4.3e12
#: Seconds that the two more launches of the split path cost.
_TWO_LAUNCHES = 4e-6
#: Columns of a part of a split row, at least; and parts of a row, at most (what one tile of partials merges).
_PART = 8192
_MAX_PARTS = 1024
#: Targets that one program of a mean's coefficient counts, at most.
_COUNTED = 8192
#: How many programs the class vectors' gradients are split into, about.
_PARTIAL_PROGRAMS = 1024


class _RowsLaunch(NamedTuple):
    body: str  # "tile", "loop" or "parts", see _rows_forward_kernel
    group: int
    repeat: int
    num_warps: int
    part_groups: int = 0  # of "parts": groups of a part
    parts: int = 1
    max_registers: int | None = None

    @property
    def lanes(self) -> int:
        return 32 * self.num_warps

    @property
    def block(self) -> int:
        """Columns of a tile."""
        return self.group * self.repeat * self.lanes

    @property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of the rows kernels' launch."""
        named = {"GROUP": self.group, "LANES": self.lanes, "REPEAT": self.repeat, "num_warps": self.num_warps}
        if self.max_registers is not None and torch.version.hip is None:
            named["maxnreg"] = self.max_registers
        return named


class _TilesLaunch(NamedTuple):
    repeat: int
    lanes: int
    block_k: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of the forward kernel's launch."""
        return {"REPEAT": self.repeat, "LANES": self.lanes, "BLOCK_K": self.block_k, "num_warps": self.num_warps}


class _SumsLaunch(NamedTuple):
    block_c: int
    block_k: int
    num_warps: int


def _group(itemsize: int, aligned: bool) -> int:
    return 16 // itemsize if aligned else 1


def _tile_of(block: int, group: int, per_thread: int) -> tuple[int, int]:
    """Groups of a thread, and warps, of a tile of ``block`` columns."""
    warps = max(block // (32 * per_thread), 1)
    return max(block // (32 * warps * group), 1), warps


def _one_tile(classes: int, group: int, hungry_options: int) -> _RowsLaunch | None:
    """The launch that keeps a row in registers, if it fits."""
    largest, per_thread = _ONE_TILE[min(hungry_options, 2)]
    block = max(triton.next_power_of_2(max(classes // group, 1)) * group, 512)
    return _RowsLaunch("tile", group, *_tile_of(block, group, per_thread)) if block <= largest else None


def _traffic(working_set: float, with_grad: bool) -> float:
    """How often the bytes of the logits cross the memory bus: read, written, and read again where L2 lost them."""
    return 2 + max(0.0, 1 - _L2_BYTES / working_set) if with_grad else 1


def _rows_body(rows: int, row_bytes: int, with_grad: bool) -> str:
    """How to visit rows that no program can keep: whole ("loop") or in parts ("parts"), by what they cost in time.

    "loop": a program for each row, so time is in whole waves of rows, one row per multiprocessor. The second read of a
    wave's rows comes out of L2 as far as they fit there together: 132 rows of 100,000 bfloat16 logits are 26 MB and do;
    132 of 1,000,000 do not, and then hardly matter. "parts": every multiprocessor has work whatever the number of rows,
    but all rows are read before any is read again, and there are two more launches.
    """
    wave = _MULTIPROCESSORS * row_bytes
    total = rows * row_bytes
    loop = triton.cdiv(rows, _MULTIPROCESSORS) * wave * _traffic(wave, with_grad)
    parts = total * _traffic(total, with_grad) + _TWO_LAUNCHES * _BYTES_PER_SECOND
    return "parts" if parts < loop else "loop"


def _loop_warps(row_bytes: int, options: int) -> tuple[int, int | None]:
    """Warps and registers of a looping program: as few warps as keep the rows of all programs that run together in L2,
    but no more than fill a multiprocessor. 32 warps leave each thread 64 registers, enough for what is simple. With one
    or two options more, 16 warps fill one (and are told so: the compiler would rather spill than have a program run
    alone). With many, arithmetic takes longer than memory anyhow."""
    if options > 2:
        return 8, 255
    for warps in (8, 16):
        if _MULTIPROCESSORS * (32 // warps) * row_bytes <= _L2_BYTES:
            return warps, None
    return (32, None) if options == 0 else (16, 128)


@functools.cache
def _rows_launch(
    rows: int, classes: int, itemsize: int, aligned: bool, hungry_options: int = 0, options: int = 0,
    with_grad: bool = True, arrays: int = 1,
) -> _RowsLaunch:  # fmt: skip
    """Sizes and options alone decide, so that no bit depends on the device. options: how many there are beside
    class_bias, scale and margin; arrays: how many tensors like the logits are read."""
    group = _group(itemsize, aligned)
    launch = _one_tile(classes, group, hungry_options)
    if launch is not None:
        return launch
    row_bytes = classes * itemsize * arrays
    repeat = max(_PER_THREAD // group, 1)
    if _rows_body(rows, row_bytes, with_grad) == "loop":
        warps, registers = _loop_warps(row_bytes if with_grad else 0, options)
        return _RowsLaunch("loop", group, repeat, warps, max_registers=registers)
    part = max(_PART, triton.next_power_of_2(triton.cdiv(classes, _MAX_PARTS)))
    return _RowsLaunch("parts", group, repeat, 8, part // group, triton.cdiv(classes, part))


@functools.cache
def _rows_backward_launch(classes: int, itemsize: int, aligned: bool) -> _RowsLaunch:
    """No reduction, so a row may be split over programs of at most 4096 columns."""
    group = _group(itemsize, aligned)
    block = min(max(triton.next_power_of_2(max(classes // group, 1)) * group, 512), 4096)
    repeat, warps = _tile_of(block, group, 32)
    return _RowsLaunch(
        "parts", group, repeat, warps, block // group, triton.cdiv(max(classes // group, 1) * group, block)
    )


@functools.cache
def _tiles_launch(classes: int, positions: int, classes_contiguous: bool, itemsize: int) -> _TilesLaunch:
    """Of the forward kernel: a thread reads 16 bytes along the contiguous axis, and has all its rows' classes but for
    what other lanes have."""
    vector = 16 // itemsize
    if classes_contiguous and classes <= _TILED_CLASSES:  # a row for each thread
        block_k = min(triton.next_power_of_2(positions), 128)
        return _TilesLaunch(min(vector, triton.next_power_of_2(classes)), 1, block_k, max(block_k // 32, 1))
    if classes_contiguous:
        return _TilesLaunch(1, 256, min(triton.next_power_of_2(positions), 4), 4)
    block_k = min(triton.next_power_of_2(positions), 128)
    vector = min(vector, block_k)
    # The fewer lanes, the less is done twice. But a multiprocessor runs some 16 warps, and the second read should find
    # their rows in L2: with 128 rows of 150 bfloat16 logits for every 4 warps they are 20 MB.
    warps = triton.next_power_of_2(max(16 * _MULTIPROCESSORS * block_k * classes * itemsize // _L2_BYTES, 1))
    warps = warps if warps <= 8 else 4
    lanes = 32 * warps * vector // block_k
    # Of 32 logits a thread at most, the tile that leaves the fewest lanes without a class.
    repeats = [r for r in (1, 2, 4, 8) if r * vector <= 32]
    repeat = min(reversed(repeats), key=lambda r: triton.cdiv(classes, r * lanes) * (r + 1))
    return _TilesLaunch(repeat, lanes, block_k, warps)


@functools.cache
def _sums_launch(classes: int, positions: int, classes_contiguous: bool) -> _SumsLaunch:
    """Of the kernels that add up rows or classes: long side along the contiguous axis."""
    if classes_contiguous:
        block_c = min(triton.next_power_of_2(classes), 1024)
        block_k = min(triton.next_power_of_2(positions), 2048 // block_c)
    else:
        block_k = min(triton.next_power_of_2(positions), 128)
        block_c = min(triton.next_power_of_2(classes), 2048 // block_k)
    return _SumsLaunch(block_c, block_k, 4)


def _blocks_per_program(blocks: int, class_tiles: int) -> int:
    """Blocks of rows that one program of the class vectors' gradients adds up."""
    return triton.cdiv(blocks, min(blocks, max(1, _PARTIAL_PROGRAMS // class_tiles)))


# --- launchers -------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How the kernels see one call: its shape, and strides by kernel argument."""

    rows: bool  # the rows kernels, else the tiles kernels
    samples: int
    positions: int
    aligned: bool  # whether the groups of all tensors begin on 16 bytes together
    pointers_aligned: bool  # whether the tensors do
    classes_contiguous: bool
    strides: dict[str, int]

    def common_alignment(self, classes: int, itemsize: int) -> int:
        """Elements, at most 16 bytes of them, that all rows' starts and lengths are multiples of."""
        steps = [stride for name, stride in self.strides.items() if not name.endswith("_c")]
        return math.gcd(16 // itemsize, classes, *steps) if self.classes_contiguous and self.pointers_aligned else 1

    def strides_in(self, align: int) -> dict[str, int]:
        """The strides in units of ``align`` elements, but for those of classes."""
        return {name: s if name.endswith("_c") else s // align for name, s in self.strides.items()}


def _readable(x: Tensor) -> Tensor:
    """x [N, C, K] itself where its classes or its rows are contiguous, else a contiguous copy."""
    _, classes, k = x.shape
    row_stride = x.stride(0) if k == 1 else x.stride(2)
    return x if classes == 1 or x.stride(1) == 1 or row_stride == 1 else x.contiguous()


def _layout(named: dict[str, Tensor], rows: bool = True) -> _Layout:
    """named: the [N, C, K] tensors of a kernel, input first; rows: whether the rows kernels may be used."""
    x = named["input"]
    n, classes, k = x.shape
    strides = {name: t.stride() for name, t in named.items()}
    contiguous = classes == 1 or x.stride(1) == 1
    rows = rows and classes > _TILED_CLASSES and all(s[1] == 1 for s in strides.values())
    samples, positions, aligned = n, k, False
    pointers_aligned = all(t.data_ptr() % 16 == 0 for t in named.values())
    if rows:
        if k > 1 and all(s[0] == k * s[2] for s in strides.values()):  # channels last: one row after another
            samples, positions, strides = n * k, 1, {name: (s[2], s[1], 0) for name, s in strides.items()}
        group = 16 // x.element_size()
        starts = {(s[0] % group, s[2] % group if positions > 1 else 0) for s in strides.values()}
        aligned = len(starts) == 1 and pointers_aligned
    elif k == 1:
        samples, positions, strides = 1, n, {name: (0, s[1], s[0]) for name, s in strides.items()}
    by_argument = {
        f"{name}_stride_{axis}": stride
        for name, three in strides.items()
        for axis, stride in zip("nck", three, strict=True)
        if axis != "c" or not rows
    }
    return _Layout(rows, samples, positions, aligned, pointers_aligned, contiguous, by_argument)


def _shared(a: Arguments) -> dict[str, Any]:
    """Arguments that every kernel takes, beside input and target."""
    o = a.options
    margin = o.class_margin
    if margin is not None:
        margin = margin + o.margin
        if o.angular:
            margin = torch.stack([margin, margin.cos(), margin.sin()])
    soft, smooth = o.target.is_floating_point(), o.label_smoothing > 0
    mixed, share = o.mixed_target, o.mix_lambda
    return {
        "mixed_target_ptr": None if mixed is None else mixed.contiguous(),
        "mix_lambda_ptr": None if share is None else share.contiguous(),
        "weight_ptr": o.weight,
        "weight_total_ptr": o.weight.sum() if smooth and o.weight is not None and not soft else None,
        "class_bias_ptr": o.class_bias,
        "class_scale_ptr": o.class_scale,
        "margin_ptr": margin,
        "learned_scale_ptr": o.learned_scale,
        "coefficient_ptr": o.coefficient,
        "classes": a.input.shape[1],
        "mix_lambda_stride": 0 if share is None or share.dim() == 0 else 1,
        "scale": o.scale,
        "margin": o.margin,
        "cos_margin": math.cos(o.margin),
        "sin_margin": math.sin(o.margin),
        "ignore_index": o.ignore_index,
        "label_smoothing": o.label_smoothing,
        "HAS_SCALE": o.learned_scale is not None or o.scale != 1.0,
        "ANGULAR": o.angular,
        "SMOOTH": smooth,
        "SOFT": soft,
    }


def forward(
    a: Arguments, with_prediction: bool, with_grad: bool, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``. ``out``: where grad_input is written; it may be ``a.input`` itself."""
    n, classes, k = a.input.shape
    soft = a.options.target.is_floating_point()
    loss, lse = (a.input.new_empty((n, k), dtype=torch.float32) for _ in range(2))
    rest = loss.new_empty((2, n, k))
    prediction = loss.new_empty((n, k) if with_prediction else (0,), dtype=torch.int64)
    grad = a.input.new_empty((0,))
    if with_grad:
        grad = torch.empty_like(a.input) if out is None else out
    if n * k == 0:
        return loss, lse, prediction, rest, grad
    x = _readable(a.input)
    target = a.options.target if soft else a.options.target.contiguous()
    named = {"input": x, **({"target": target} if soft else {}), **({"grad": grad} if with_grad else {})}
    layout = _layout(named)
    arguments = {
        "input_ptr": x,
        "target_ptr": target,
        "loss_ptr": loss,
        "lse_ptr": lse,
        "prediction_ptr": prediction if with_prediction else None,
        "rest_ptr": rest,
        "grad_ptr": grad if with_grad else None,
        "positions": layout.positions,
        **_shared(a),
    }
    axes = "nk" if layout.rows else "nck"
    arguments.update({f"{name}_stride_{axis}": 0 for name in ("target", "grad") for axis in axes}, **layout.strides)
    with torch.cuda.device_of(x):
        if layout.rows:
            _rows_forward(a, layout, arguments, n * k, _in_place(x, out))
        else:
            tiles = _tiles_launch(classes, layout.positions, layout.classes_contiguous, x.element_size())
            blocks = layout.samples * triton.cdiv(layout.positions, tiles.block_k)
            constants = tiles.constants
            if with_prediction and torch.version.hip is None:
                constants["maxnreg"] = 255  # else the compiler may spill to have more programs run together
            _tiles_forward_kernel[(blocks,)](**arguments, rows=n * k, **constants)
    return loss, lse, prediction, rest, grad


def _in_place(x: Tensor, out: Tensor | None) -> bool:
    """Whether the gradient takes the place of the logits that the kernels read: they may be a copy of the input."""
    return out is not None and out.data_ptr() == x.data_ptr()


def _rows_forward(a: Arguments, layout: _Layout, arguments: dict[str, Any], rows: int, in_place: bool) -> None:
    """Launch the rows kernels of a forward pass."""
    soft, predict = arguments["SOFT"], arguments["prediction_ptr"] is not None
    hungry = [a.options.class_scale is not None, a.options.weight is not None and a.options.label_smoothing > 0, soft]
    mixed = a.options.mixed_target is not None
    options = sum([*hungry, predict, a.options.angular, mixed, a.options.label_smoothing > 0])
    launch = _rows_launch(
        rows, a.input.shape[1], a.input.element_size(), layout.aligned,
        max(sum(hungry), int(predict or mixed or options > 1)), options, arguments["grad_ptr"] is not None, 1 + soft,
    )  # fmt: skip
    arguments |= {"partial_ptr": None, "partial_column_ptr": None, "soft_mass_ptr": None, "parts": launch.parts}
    if launch.body != "parts":
        _rows_forward_kernel[(rows,)](**arguments, BODY=launch.body, PARTS=1, IN_PLACE=in_place, **launch.constants)
        return
    rest = arguments["rest_ptr"]
    arguments["partial_ptr"] = rest.new_empty((5 if predict else 4, rows, launch.parts))
    if predict:
        arguments["partial_column_ptr"] = rest.new_empty((rows, launch.parts), dtype=torch.int32)
    names = _rows_statistics_kernel.arg_names
    _rows_statistics_kernel[(rows, launch.parts)](
        **{name: arguments[name] for name in names if name in arguments},
        part_groups=launch.part_groups,
        **launch.constants,
    )
    grad, arguments["grad_ptr"] = arguments["grad_ptr"], None
    if soft:
        arguments["soft_mass_ptr"] = rest.new_empty((rows,))
    finish = {"BODY": "parts", "PARTS": triton.next_power_of_2(launch.parts), "LANES": 32, "REPEAT": 1}
    finish["IN_PLACE"] = False
    _rows_forward_kernel[(rows,)](**arguments, **finish, GROUP=launch.group, num_warps=1)
    if grad is not None:
        upstream = {"grad_ptr": grad, "grad_loss_ptr": None, "grad_lse_ptr": None}
        _rows_backward(layout, arguments | upstream | {"grad_loss_stride": 0, "grad_lse_stride": 0}, rows, in_place)


def _rows_backward(layout: _Layout, arguments: dict[str, Any], rows: int, in_place: bool) -> None:
    """Launch the rows kernel of a backward pass; ``arguments`` may hold more than it takes."""
    input, own = arguments["input_ptr"], None
    if in_place and not arguments["SOFT"]:
        # A row has several programs: all need the targets' own logits, which one of them writes over.
        own = arguments["rest_ptr"].new_empty((1 if arguments["mixed_target_ptr"] is None else 2, rows))
        names = _own_logits_kernel.arg_names
        _own_logits_kernel[(triton.cdiv(rows, 128),)](
            **{name: arguments[name] for name in names if name in arguments},
            own_ptr=own,
            rows=rows,
            BLOCK=128,
            num_warps=4,
        )
    arguments = arguments | {"own_ptr": own}
    launch = _rows_backward_launch(input.shape[1], input.element_size(), layout.aligned)
    names = _rows_backward_kernel.arg_names
    _rows_backward_kernel[(rows, launch.parts)](
        **{name: arguments[name] for name in names if name in arguments}, **launch.constants
    )


def _per_row(upstream: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int]:
    """The upstream gradient and the step between rows: 0 for one value for all rows."""
    if upstream is None:
        return None, 0
    upstream = upstream.to(torch.float32)
    if all(stride == 0 for stride in upstream.stride()):
        return upstream, 0
    return upstream.expand(shape).contiguous(), 1


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    rest: Tensor,
    a: Arguments,
    needs: list[bool],
    *,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of ``DIFFERENTIABLE``, each like its input; [0] where not needed. Upstream: 0-dim or [N, K].

    ``out``: as in ``forward``.
    """
    n, classes, k = a.input.shape
    soft, summed = a.options.target.is_floating_point(), needs[2:]
    sources = [a.input, *(getattr(a.options, name) for name in DIFFERENTIABLE[1:])]
    if n * k == 0:
        grads = [torch.zeros_like(t) if need else rest.new_empty((0,)) for t, need in zip(sources, needs, strict=True)]
        return grads if out is None or not needs[0] else [out, *grads[1:]]
    grads = [rest.new_empty((0,)) for _ in needs]
    rest = rest.contiguous()
    x = _readable(a.input)
    target = a.options.target if soft else a.options.target.contiguous()
    named = {"input": x, **({"target": target} if soft else {})}
    if needs[0]:
        named["grad"] = grads[0] = torch.empty_like(a.input) if out is None else out
    if needs[1]:
        named["grad_target"] = grads[1] = torch.empty_like(a.options.target)
    layout = _layout(named, rows=not any(needs[1:]))
    per_loss, grad_loss_stride = _per_row(grad_loss, rest.shape[1:])
    per_lse, grad_lse_stride = _per_row(grad_lse, rest.shape[1:])
    shared = _shared(a)
    with torch.cuda.device_of(x):
        arguments = {
            "input_ptr": x,
            "target_ptr": target,
            "rest_ptr": rest,
            "soft_mass_ptr": _soft_mass(a) if soft else None,
            "grad_loss_ptr": per_loss,
            "grad_lse_ptr": per_lse,
            "positions": layout.positions,
            "grad_loss_stride": grad_loss_stride,
            "grad_lse_stride": grad_lse_stride,
            **shared,
        }
        if layout.rows:
            strides = {f"{name}_stride_{axis}": 0 for name in ("target", "grad") for axis in "nk"} | layout.strides
            _rows_backward(layout, {**arguments, **strides, "grad_ptr": grads[0]}, n * k, _in_place(x, out))
            return grads
        terms = rest.new_empty((10, n, k))
        columns = rest.new_empty((2, n, k), dtype=torch.int32)
        _terms_kernel[(triton.cdiv(n * k, 128),)](
            **arguments,
            **{name: stride for name, stride in layout.strides.items() if name.startswith("input")},
            terms_ptr=terms,
            columns_ptr=columns,
            rows=n * k,
            BLOCK=128,
            num_warps=4,
        )
        tiles = _sums_launch(classes, layout.positions, layout.classes_contiguous)
        blocks = layout.samples * triton.cdiv(layout.positions, tiles.block_k)
        class_tiles = triton.cdiv(classes, tiles.block_c)
        per_program = _blocks_per_program(blocks, class_tiles) if any(summed) else 1
        programs = triton.cdiv(blocks, per_program)
        partial = rest.new_empty((programs, sum(summed), classes)) if any(summed) else None
        names = ("target", "grad", "grad_target")
        align = layout.common_alignment(classes, x.element_size())
        strides = {f"{name}_stride_{axis}": 0 for name in names for axis in "nck"} | layout.strides_in(align)
        _tiles_backward_kernel[(programs, class_tiles)](
            x,
            target,
            a.options.weight,
            a.options.class_bias,
            a.options.class_scale,
            a.options.learned_scale,
            rest,
            terms,
            columns,
            grads[0] if needs[0] else None,
            grads[1] if needs[1] else None,
            partial,
            n * k,
            classes,
            layout.positions,
            blocks,
            per_program,
            **strides,
            scale=a.options.scale,
            label_smoothing=a.options.label_smoothing,
            HAS_SCALE=shared["HAS_SCALE"],
            SMOOTH=shared["SMOOTH"],
            SOFT=soft,
            MIXED=a.options.mixed_target is not None,
            ALIGN=align,
            NEED_BIAS=needs[2],
            NEED_SCALE=needs[3],
            NEED_MARGIN=needs[4],
            NEED_LEARNED=needs[5],
            IN_PLACE=_in_place(x, out),
            BLOCK_C=tiles.block_c,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps,
        )
    if partial is not None:
        for kind, position in enumerate(position for position in range(2, len(needs)) if needs[position]):
            # each a tensor of its own: compiled code counts on what the fake says, outputs that begin on 16 bytes
            grads[position] = partial[:, kind].sum(0)
        if needs[5]:
            grads[5] = a.options.scale * grads[5].sum()
    return grads


def _soft_mass(a: Arguments) -> Tensor:
    """Sum of the soft weights of every row, [N, K]."""
    n, classes, k = a.input.shape
    mass = a.input.new_empty((n, k), dtype=torch.float32)
    layout = _layout({"input": a.options.target}, rows=False)
    tiles = _sums_launch(classes, layout.positions, layout.classes_contiguous)
    align = layout.common_alignment(classes, a.options.target.element_size())
    strides = layout.strides_in(align)
    _soft_mass_kernel[(layout.samples * triton.cdiv(layout.positions, tiles.block_k),)](
        a.options.target,
        a.options.weight,
        mass,
        classes,
        layout.positions,
        strides["input_stride_n"],
        strides["input_stride_c"],
        strides["input_stride_k"],
        a.options.label_smoothing,
        SMOOTH=a.options.label_smoothing > 0,
        ALIGN=align,
        BLOCK_C=tiles.block_c,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
    )
    return mass


def scale_gradient_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor (0-dim, on the device), reading and writing nothing where it is 1. Any dense ``grad``."""
    elements, block = grad.numel(), 4096
    with torch.cuda.device_of(grad):
        if elements > 0:
            programs = min(triton.cdiv(elements, block), 1024)
            _scale_kernel[(programs,)](grad, factor, elements, BLOCK=block, num_warps=8)


def mean_coefficient(
    target: Tensor,
    mixed_target: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """1 / total weight of the targets that are not ignored, [1], or [2] with ``mixed_target``; inf where there is none.

    One launch up to 8192 targets, else two. Targets out of range count as the nearest class.
    """
    targets = [target.contiguous()] + ([] if mixed_target is None else [mixed_target.contiguous()])
    rows = target.numel()
    coefficient = target.new_empty((len(targets),), dtype=dtype)
    block = min(max(triton.next_power_of_2(rows), 128), _COUNTED)
    parts = max(triton.cdiv(rows, block), 1)
    partial = None
    if parts > 1:
        partial = target.new_empty((len(targets), parts), dtype=torch.int32 if weight is None else torch.float32)
    with torch.cuda.device_of(target):
        _mean_coefficient_kernel[(parts, len(targets))](
            targets[0], None if mixed_target is None else targets[1], weight, partial, coefficient, rows, classes,
            ignore_index, BLOCK=block, num_warps=max(block // 256, 1),
        )  # fmt: skip
        if partial is not None:
            block = min(triton.next_power_of_2(parts), 1024)
            _reciprocal_sum_kernel[(len(targets),)](
                partial, coefficient, parts, WEIGHTED=weight is not None, BLOCK=block, num_warps=max(block // 256, 1)
            )
    return coefficient
