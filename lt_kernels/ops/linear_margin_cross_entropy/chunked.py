"""Linear heads by matrix products into a buffer and the rows kernel on it, whole or chunk by chunk.

*By rows*: the logits of some rows are computed into a buffer, the rows kernel turns them into their gradient in place,
and two products make the features' gradient of these rows and add to the weight's. *By classes*: a first sweep
over blocks of classes collects each row's statistics (``rest``, the targets' own logits), a second one computes the
logits again and writes each block of the weight's gradient once.

A cosine head's weight is never normalised in memory: 1 / |w_j| joins class_scale (or multiplies the buffer, where the
rows kernel has to see the cosines themselves), and ``products.project_`` corrects the weight's gradient. In float16,
whose range 1 / |w_j| soon leaves, gradients stay those of the cosines until they are in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .._gemm import products
from .._rows.options import RowOptions
from .._rows.row_terms import RowTerms, Slot
from ..margin_cross_entropy.arguments import Arguments as RowArguments
from .arguments import DIFFERENTIABLE, Arguments

_ROW_NEEDS = 6  # gradients of the rows kernel: input, target, class_bias, class_scale, class_margin, learned_scale


class Forward(NamedTuple):
    loss: Tensor  # [N, K]
    lse: Tensor  # [N, K]
    prediction: Tensor  # [N, K] or [0]
    rest: Tensor  # [2, N, K]


class Head:
    """One call: its arguments with the weight's norms folded in."""

    def __init__(self, a: Arguments, rows: ModuleType, with_prediction: bool = False) -> None:
        self.a, self.rows = a, rows
        self.n, self.k, self.classes = a.input.shape[0], a.positions, a.classes
        self.columns = self.classes * self.k
        self.inverse_norm = a.inverse_norms()
        self.narrow = a.normalize and a.input.dtype == torch.float16
        # Whether the buffer is multiplied by 1 / |w|: class_scale cannot carry what differs between positions, and a
        # prediction is taken from the raw logits.
        self.cosines = self.narrow or (a.normalize and (with_prediction or self.k > 1))
        self.class_scale = a.options.class_scale
        if self.inverse_norm is not None and not self.cosines:
            self.class_scale = (
                self.inverse_norm if a.options.class_scale is None else a.options.class_scale * self.inverse_norm
            )

    def buffer(self, rows: int, columns: int) -> Tensor:
        return products.buffer(rows, columns, self.a.input.dtype, self.a.input.device)

    def logits(self, out: Tensor, rows: slice, columns: slice) -> None:
        a = self.a
        bias = None if a.linear_bias is None else a.linear_bias[columns]
        products.logits_into(out, a.input[rows], a.factor[columns], bias)
        if self.cosines:
            assert self.inverse_norm is not None
            out.mul_(self.inverse_norm[columns])

    def of_products(self, dl: Tensor, columns: slice) -> None:
        """Turn the gradient of the buffer's logits into that of the products they are made of."""
        if self.cosines and not self.narrow:
            assert self.inverse_norm is not None
            dl.mul_(self.inverse_norm[columns])

    def times_weight(self, total: Tensor | None, dl: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
        """total + dl times the weight of ``columns``, what ``of_products`` made dl a gradient of."""
        factor = self.a.factor[columns]
        if not self.narrow:
            return products.added(total, dl, factor, dtype)
        assert self.inverse_norm is not None
        inverse = self.inverse_norm[columns]
        for part in products.blocks(factor):
            directions = (factor[part] * inverse[part, None]).to(factor.dtype)
            total = products.added(total, dl[:, part], directions, torch.float32)
        assert total is not None
        return total.to(dtype)

    def row_arguments(self, z: Tensor, rows: slice) -> RowArguments:
        """The rows kernel's arguments for the logits z [n, C * K] of ``rows``."""
        o = self.a.options
        share = o.mix_lambda
        options = o._replace(
            target=o.target[rows],
            mixed_target=None if o.mixed_target is None else o.mixed_target[rows],
            mix_lambda=share if share is None or share.dim() == 0 else share[rows],
            class_scale=self.class_scale,
        )
        return RowArguments(z.unflatten(1, (self.classes, self.k)), options)


class Gradients:
    """What backward collects."""

    def __init__(self, head: Head, needs: list[bool]) -> None:
        a = head.a
        self.head = head
        self.needs = dict(zip(DIFFERENTIABLE, needs, strict=True))
        self.values = {name: a.input.new_empty((0,)) for name in DIFFERENTIABLE}
        self.weight: Tensor | None = None  # of the weight, as far as it has come
        if self.needs["linear_bias"]:
            self.values["linear_bias"] = torch.zeros(head.columns, dtype=torch.float64, device=a.input.device)
        if self.needs["target"]:
            self.values["target"] = torch.empty_like(a.options.target)
        for name in DIFFERENTIABLE[4:]:
            if self.needs[name]:  # added up in float64: thousands of chunks lose no digits
                self.values[name] = torch.zeros_like(getattr(a.options, name), dtype=torch.float64)

    def add_rows(self, dl: Tensor, rows: slice, scale_: Callable[[Tensor], None] | None = None) -> None:
        """From the gradient dl [n, C * K] of the logits of ``rows``. scale_: of all rows, to be applied to results."""
        a, head = self.head.a, self.head
        whole = dl.shape[0] == head.n
        if self.needs["input"]:
            if rows.start == 0:
                self.values["input"] = products.empty_like(a.input)
            value = self.values["input"][rows]
            if head.narrow:
                value.copy_(head.times_weight(None, dl, slice(None), a.input.dtype))
            else:
                torch.mm(dl, a.factor, out=value)
            if scale_ is not None:
                scale_(value)
        if self.needs["linear_weight"]:
            x, dtype = a.input[rows], a.linear_weight.dtype
            if not whole and dtype.itemsize < 4:  # several chunks add up in float32
                dtype = torch.float32
            self.weight = products.added(self.weight, dl.t(), x, dtype)
            if scale_ is not None:
                scale_(self.weight)
        if self.needs["linear_bias"]:
            column_sums = dl.sum(0, dtype=a.compute_dtype)
            if scale_ is not None:
                scale_(column_sums)
            self.values["linear_bias"] += column_sums

    def add_row_gradients(self, grads: list[Tensor], rows: slice) -> None:
        """From what the rows kernel's backward returned for ``rows``: all but the logits' gradient."""
        if self.needs["target"]:
            self.values["target"][rows] = grads[1]
        for name, grad in zip(DIFFERENTIABLE[4:], grads[2:], strict=True):
            if self.needs[name]:
                self.values[name] += grad

    def finished(self) -> list[Tensor]:
        a, head = self.head.a, self.head
        if head.n == 0:
            self.values["input"] = torch.zeros_like(a.input) if self.needs["input"] else self.values["input"]
            self.weight = torch.zeros_like(a.linear_weight) if self.needs["linear_weight"] else None
        if head.inverse_norm is not None:
            if self.weight is not None:
                products.project_(self.weight, a.linear_weight, head.inverse_norm, head.narrow)
            if self.needs["class_scale"] and not head.cosines:
                self.values["class_scale"] *= head.inverse_norm
        if self.weight is not None:
            same = self.weight.dtype == a.linear_weight.dtype
            self.values["linear_weight"] = (
                self.weight if same else products.empty_like(a.linear_weight).copy_(self.weight)
            )
            self.weight = None
        if self.needs["linear_bias"]:
            assert a.linear_bias is not None
            self.values["linear_bias"] = self.values["linear_bias"].to(a.linear_bias.dtype)
        for name in DIFFERENTIABLE[4:]:
            if self.needs[name]:
                self.values[name] = self.values[name].to(getattr(a.options, name).dtype)
        return list(self.values.values())


def _forward_like(a: Arguments, with_prediction: bool) -> Forward:
    loss = torch.empty(a.options.target.shape[0], a.positions, dtype=a.compute_dtype, device=a.input.device)
    prediction = loss.new_empty(loss.shape if with_prediction else (0,), dtype=torch.int64)
    return Forward(loss, torch.empty_like(loss), prediction, loss.new_empty((2, *loss.shape)))


# --- by rows (materialize: one chunk, which is kept) -----------------------------------------------------------------


def forward_rows(
    head: Head, chunk: int, with_prediction: bool, gradients: Gradients | None
) -> tuple[Forward, list[Tensor]]:
    """Results, and the gradients for an upstream gradient of 1 if asked for."""
    results = _forward_like(head.a, with_prediction)
    room = head.buffer(min(chunk, head.n), head.columns)
    for rows in products.slices(head.n, chunk):
        z = room[: rows.stop - rows.start]
        head.logits(z, rows, slice(None))
        part = forward_logits(head, z, rows, with_prediction, gradients is not None)
        for name, value in part._asdict().items():
            whole = getattr(results, name)
            if name == "rest":
                whole[:, rows] = value
            elif value.numel() > 0:
                whole[rows] = value
        if gradients is not None:
            head.of_products(z, slice(None))
            gradients.add_rows(z, rows)
    return results, [] if gradients is None else gradients.finished()


def forward_logits(head: Head, z: Tensor, rows: slice, with_prediction: bool, with_grad: bool) -> Forward:
    """The rows kernel on logits z [n, C * K], which become their own gradient where ``with_grad``."""
    arguments = head.row_arguments(z, rows)
    out = arguments.input if with_grad else None
    return Forward(*head.rows.forward(arguments, with_prediction, with_grad, out=out)[:4])


def backward_rows(
    head: Head, chunk: int, logits: Tensor | None, overwrite: bool, grad_loss: Tensor, grad_lse: Tensor | None,
    rest: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients from the upstream ones. logits: all of them, where they were kept; else they are computed again."""
    gradients = Gradients(head, needs)
    row_needs = [any(needs[:3]), *needs[3:]]
    room = head.buffer(min(chunk, head.n), head.columns) if logits is None or not overwrite else logits

    def part(upstream: Tensor | None, rows: slice) -> Tensor | None:
        return upstream if upstream is None or upstream.dim() == 0 else upstream[rows]

    for rows in products.slices(head.n, chunk):
        dl = room[: rows.stop - rows.start]
        if logits is None:
            head.logits(dl, rows, slice(None))
        z = dl if logits is None else logits  # kept logits are one chunk
        upstream = part(grad_loss, rows)
        assert upstream is not None
        grads = head.rows.backward(
            upstream, part(grad_lse, rows), rest[:, rows], head.row_arguments(z, rows), row_needs,
            out=dl.unflatten(1, (head.classes, head.k)),
        )  # fmt: skip
        gradients.add_row_gradients(grads, rows)
        if row_needs[0]:
            head.of_products(dl, slice(None))
            gradients.add_rows(dl, rows)
    return gradients.finished()


# --- by classes -------------------------------------------------------------------------------------------------------


class _Blocks:
    """Sweeps over blocks of classes. One loss per sample, class-index targets."""

    def __init__(self, head: Head, block: int) -> None:
        self.head, self.block = head, block
        self.room = head.buffer(head.n, min(block, head.classes))
        o = head.a.options
        self.plain = RowOptions(o.target)._replace(
            mix_lambda=None if o.mix_lambda is None else o.mix_lambda.new_full((), 0.5),
            class_bias=o.class_bias,
            class_scale=head.class_scale,
            learned_scale=o.learned_scale,
            scale=o.scale,
        )

    def __iter__(self):  # type: ignore[no-untyped-def]
        for columns in products.slices(self.head.classes, self.block):
            z = self.room[:, : columns.stop - columns.start]
            self.head.logits(z, slice(None), columns)
            yield columns, z

    def local(self, target: Tensor, columns: slice) -> Tensor:
        """Targets as columns of a block, -100 elsewhere."""
        inside = (target >= columns.start) & (target < columns.stop) & (target != self.head.a.options.ignore_index)
        return torch.where(inside, target - columns.start, -100)

    def arguments(self, z: Tensor, columns: slice, targets: list[Tensor]) -> RowArguments:
        options = self.plain._replace(
            target=targets[0],
            mixed_target=targets[1] if len(targets) > 1 else None,
            mix_lambda=self.plain.mix_lambda if len(targets) > 1 else None,
            class_bias=None if self.plain.class_bias is None else self.plain.class_bias[columns],
            class_scale=None if self.plain.class_scale is None else self.plain.class_scale[columns],
        )
        return RowArguments(z[:, :, None], options)


def _targets(a: Arguments) -> list[Tensor]:
    return [target for target in (a.options.target, a.options.mixed_target) if target is not None]


def _terms(head: Head, raw: list[Tensor]) -> RowTerms:
    """raw: each target's own raw logit, [N, 1]."""
    values = iter(raw)
    options = head.a.options._replace(class_scale=head.class_scale)
    return RowTerms(options, head.classes, head.a.compute_dtype, lambda index: next(values))


def forward_classes(head: Head, block: int, with_prediction: bool) -> Forward:
    a = head.a
    results = _forward_like(a, with_prediction)
    rest = results.rest.zero_()
    raw = [torch.zeros_like(results.loss) for _ in _targets(a)]
    best = torch.full_like(results.loss, -math.inf) if with_prediction else None
    weighted = torch.zeros_like(results.loss)  # sum of smooth_weight_j u_j
    sweep = _Blocks(head, block)
    for columns, z in sweep:
        local = [sweep.local(target, columns) for target in _targets(a)]
        arguments = sweep.arguments(z, columns, local)
        part = Forward(*head.rows.forward(arguments, with_prediction, False)[:4])
        products.merge(rest, part.rest[0], part.rest[1])
        for value, target in zip(raw, local, strict=True):
            value.copy_(torch.where(target >= 0, z.gather(1, target.clamp_min(0)), value))
        if best is not None:
            here = z.gather(1, part.prediction).to(best.dtype)
            better = (here > best) | (here.isnan() & ~best.isnan())
            if columns.start == 0:
                better = torch.ones_like(better)
            results.prediction.copy_(torch.where(better, part.prediction + columns.start, results.prediction))
            best = torch.where(better, here, best)
        if a.options.label_smoothing > 0:
            weighted += _weighted_sum(head, z, columns)
    terms = _terms(head, raw)

    def smooth_sum(slot: Slot) -> Tensor:
        """sum_j smooth_weight_j (D - u_j) with v_y in place of u_y."""
        moved = torch.where(slot.shifted == slot.plain, 0.0, slot.shifted - slot.plain)  # both may be -inf
        u = weighted + terms.weigh(slot.smooth_weight, moved)
        return terms.smooth_weight.sum() * (rest[0] + terms.total(slot, rest)) - u

    results.loss.copy_(terms.loss(rest, smooth_sum))
    results.lse.copy_(terms.lse(rest))
    return results


def _smoothing_slopes(head: Head, columns: slice) -> tuple[Tensor, Tensor]:
    """smooth_weight_j, and it times d/d(x_j) of u_j, for a block; each [c]."""
    a = head.a
    scale = a.options.scale if a.options.learned_scale is None else a.options.scale * a.options.learned_scale
    weight = torch.ones(columns.stop - columns.start, dtype=a.compute_dtype, device=a.input.device)
    if (given := a.options.weight if a.options.smooth_weight is None else a.options.smooth_weight) is not None:
        weight = given[columns]
    slope = scale * weight
    return weight, slope if head.class_scale is None else slope * head.class_scale[columns]


def _weighted_sum(head: Head, z: Tensor, columns: slice) -> Tensor:
    weight, slope = _smoothing_slopes(head, columns)
    total = torch.cat([torch.mv(z[rows].to(slope.dtype), slope) for rows in products.blocks(z)] or [z.sum(1)])
    if head.a.options.class_bias is not None:
        bias = head.a.options.class_bias[columns]
        total = total + torch.dot(weight, bias.masked_fill(weight == 0, 0.0) if head.a.options.masks else bias)
    return total[:, None]


def backward_classes(
    head: Head, block: int, grad_loss: Tensor, grad_lse: Tensor | None, rest: Tensor, needs: list[bool]
) -> list[Tensor]:
    """No class vector learns here: see ``plan.Sizes.divisible``."""
    a = head.a
    gradients = Gradients(head, needs)
    terms = _terms(head, _target_logits(head))
    zero = torch.zeros_like(rest[0])
    slopes = terms.slopes(rest, grad_loss.expand_as(zero), zero if grad_lse is None else grad_lse.expand_as(zero))
    at_targets = _at_targets(terms, slopes.targets)
    total = None  # the features' gradient, added up in float32 at least
    if gradients.needs["linear_weight"]:
        gradients.weight = products.empty_like(a.linear_weight)
    nowhere = torch.full_like(a.options.target, -100)
    ones = torch.stack([rest[0], torch.ones_like(rest[0])])
    sweep = _Blocks(head, block)
    for columns, z in sweep:
        arguments = sweep.arguments(z, columns, [nowhere])
        head.rows.backward(
            zero[0, 0] if zero.numel() else zero.new_zeros(()), slopes.slope, ones, arguments,
            [True] + [False] * (_ROW_NEEDS - 1), out=arguments.input,
        )  # fmt: skip
        if a.options.label_smoothing > 0:
            _, slope = _smoothing_slopes(head, columns)
            for rows in products.blocks(z):
                z[rows].sub_(slopes.smooth[rows] * slope)
        for target, value in zip(_targets(a), at_targets, strict=True):
            local = sweep.local(target, columns)
            index = local.clamp_min(0)
            z.scatter_(1, index, torch.where(local >= 0, value.to(z.dtype), z.gather(1, index)))
        head.of_products(z, columns)
        if gradients.needs["input"]:
            total = head.times_weight(total, z, columns, a.compute_dtype)
        if gradients.weight is not None:
            products.product_into(gradients.weight[columns], z.t(), a.input)
        if gradients.needs["linear_bias"]:
            gradients.values["linear_bias"][columns] = z.sum(0, dtype=a.compute_dtype)
    if total is not None:
        gradients.values["input"] = total.to(a.input.dtype)
    return gradients.finished()


def _target_logits(head: Head) -> list[Tensor]:
    """Each target's own raw logit, rounded as in the buffer, [N, 1]."""
    a = head.a
    raw = []
    for target in _targets(a):
        index = target[:, 0].masked_fill(target[:, 0] == a.options.ignore_index, 0).clamp(0, head.classes - 1)
        z = (a.input.to(a.compute_dtype) * a.factor[index].to(a.compute_dtype)).sum(1)
        if a.linear_bias is not None:
            z = z + a.linear_bias[index]
        if head.cosines:
            assert head.inverse_norm is not None
            z = z * head.inverse_norm[index]
        raw.append(z.to(a.input.dtype).to(a.compute_dtype)[:, None])
    return raw


def _at_targets(terms: RowTerms, targets: list[tuple[Slot, Tensor, Tensor]]) -> list[Tensor]:
    """d/d(x_y) of each target's column, [N, 1]."""
    values = []
    for slot, plain, dv in targets:
        value = plain + dv * slot.dphi_dc
        for other, _, other_dv in targets:
            if other is not slot:  # the same column twice: both replace what was there
                both = slot.valid & other.valid & (slot.column == other.column)
                value = value + torch.where(both, other_dv * other.dphi_dc, 0.0)
        values.append(terms.scale * terms.class_scale[slot.column] * value)
    return values
