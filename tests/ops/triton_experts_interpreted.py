"""The kernels of expert_fusion and expert_divergence in Triton's interpreter. Run by ``test_triton_experts.py``.

Truth is float64, eager is float32, both on the same rounded logits. Under interpretation a float32 result is truncated
to bfloat16, not rounded: such gradients get two roundings.
"""

from __future__ import annotations

import math

import pytest
import torch
from poison import nan_allocations
from torch import Tensor

from lt_kernels.ops import _triton_experts as common
from lt_kernels.ops.expert_divergence import reference as divergence_reference
from lt_kernels.ops.expert_divergence import triton as divergence
from lt_kernels.ops.expert_fusion import reference as fusion_reference
from lt_kernels.ops.expert_fusion import triton as fusion
from lt_kernels.ops.expert_fusion.arguments import Arguments
from lt_kernels.ops.expert_fusion.fused import fused
from lt_kernels.testing import assert_within_budget, dense_expert_divergence

INF, NAN = math.inf, math.nan
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = [("to_mean", True), ("to_mean", False), ("pairwise", True)]


@pytest.fixture(autouse=True)
def poisoned():
    with nan_allocations() as guards:
        yield guards


# --- inputs, surrounded by NaN ---------------------------------------------------------------------------------------


def window(x: Tensor, before: int = 8, after: int = 8) -> Tensor:
    """The same values inside a larger allocation of NaN, rows ``before + after`` elements further apart."""
    room = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + before + after), NAN, dtype=x.dtype)
    inside = room[..., 1:-1, before : before + x.shape[-1]]
    return inside.copy_(x)


def padded(x: Tensor) -> Tensor:
    room = torch.full((x.numel() + 16,), NAN, dtype=x.dtype)
    room[8:-8] = x.flatten()
    return room[8:-8].view(x.shape)


LAYOUTS = {
    "stacked": lambda x: [padded(x)],
    "list": lambda x: [padded(each) for each in x],
    "samples first": lambda x: [padded(x.transpose(0, 1).contiguous()).transpose(0, 1)],
    "window": lambda x: [window(x)],
    "odd window": lambda x: [window(x, 3, 2)],
    "list of windows": lambda x: [window(each, e, 3) for e, each in enumerate(x)],
    "classes first": lambda x: [padded(x.transpose(1, 2).contiguous()).transpose(1, 2)],
    "expanded": lambda x: [padded(x[:, :1]).expand(x.shape)],
}


def draw(shape: tuple[int, int, int], dtype: torch.dtype, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    common = torch.randn(shape[1:], generator=generator) * spread
    return (common + torch.randn(shape, generator=generator)).to(dtype)


def vector(classes: int, low: float, high: float) -> Tensor:
    return padded(torch.rand(classes, generator=torch.Generator().manual_seed(classes)) * (high - low) + low)


# --- fusion ----------------------------------------------------------------------------------------------------------


def arguments(x: Tensor, layout: str = "stacked", everything: bool = False) -> Arguments:
    experts, _, classes = x.shape
    weights = [0.5 + 0.25 * e for e in range(experts)]
    if not everything:
        return Arguments(LAYOUTS[layout](x), None, None, None, weights, 1.0)
    tensor, shift = vector(experts, 0.5, 1.5), vector(classes, -3.0, 1.0)
    return Arguments(LAYOUTS[layout](x), tensor, shift, torch.tensor(1.7), weights, 0.5)


def check_fusion(a: Arguments, k: int, with_log_probs: bool = True) -> None:
    def reference(dtype: torch.dtype) -> list[Tensor]:
        b = a._replace(**{
            name: None if value is None else value.to(dtype)
            for name, value in zip(a._fields[1:4], a[1:4], strict=True)
        })  # fmt: skip
        b = b._replace(logits=[x.to(dtype) for x in a.logits])
        return [fused(b), *fusion_reference.forward(b, k, True)]

    values, classes, mass, log_probs = fusion.forward(a, k, with_log_probs)
    (u, best, _, true_mass, true_log_probs), (_, eager, _, eager_mass, eager_log_probs) = (
        reference(dtype) for dtype in (torch.float64, torch.float32)
    )
    assert classes.dtype == torch.int64
    assert all(len(set(row)) == k for row in classes.tolist())
    assert_within_budget(values, eager, best, "values")
    assert_within_budget(values, eager, u.gather(1, classes), "values of the classes")
    assert_within_budget(mass, eager_mass, true_mass, "sum of exponentials")
    if with_log_probs:
        assert_within_budget(log_probs, eager_log_probs, true_log_probs, "log-probabilities")
    else:
        assert log_probs.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fusion(layout):
    dtype = "bf16" if layout in ("list", "samples first", "odd window") else "fp32"
    for experts, classes, k in ((3, 1, 1), (3, 33, 3), (1, 129, 20), (3, 600, 1)):
        x = draw((experts, 2, classes), DTYPES[dtype])
        x = x[:, :1].expand(x.shape) if layout == "expanded" else x
        check_fusion(arguments(x, layout, everything=classes != 129), k)


@pytest.mark.parametrize("experts", [2, 6, 9])
def test_fusion_of_other_numbers_of_experts(experts):
    for layout in ("stacked", "list"):
        check_fusion(arguments(draw((experts, 2, 300), torch.float16), layout, everything=True), 1, False)


@pytest.mark.parametrize(
    ("classes", "k", "dtype"),
    [(8142, 1, "bf16"), (8142, 5, "fp32"), (8199, 3, "fp32"), (16_391, 3, "bf16"), (24_001, 20, "bf16")],
)
def test_fusion_of_wide_rows(classes, k, dtype):
    """In one part, and in several."""
    check_fusion(arguments(draw((2, 2, classes), DTYPES[dtype]), "stacked", everything=True), k)


@pytest.fixture(params=["one part", "parts"])
def parts(request, monkeypatch):
    """As the launch table has it, or in parts of two tiles of 32 lanes."""
    if request.param == "parts":

        def launch(classes, column_bytes, group, k):
            repeat = max(8 // group, 1)
            return fusion._Launch(group, repeat, 2, 1, max(-(-(classes // group) // (64 * repeat)), 1))

        monkeypatch.setattr(fusion, "_launch", launch)
    return request.param


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("before", "dtype"), [(0, "bf16"), (1, "bf16"), (4, "fp32")])
def test_fusion_reads_no_neighbouring_memory(before, dtype):
    x = draw((2, 2, 1203), DTYPES[dtype])
    check_fusion(arguments(x, everything=True)._replace(logits=[window(x, before, 3)]), 2)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("k", [1, 4, 9])
def test_fusion_takes_the_first_of_equals(k):
    """Sums of small integers, so that equal ones are: at both ends, in every tile and part, and where NaN is."""
    x = torch.randint(-2, 2, (2, 8, 1203), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 0.0
    x[:, 0, ::2] = -0.0
    x[:, 1, [5, 511, 512, 700, 1202]] = 9.0
    x[:, 2, [1200, 1201, 1202]] = 9.0
    x[:, 3] = -INF
    x[:, 4, :1200] = -INF
    x[0, 5, [650, 3, 1202]] = NAN
    x[1, 6, 1202] = NAN
    x[:, 7, [600, 601]] = INF
    a = Arguments([padded(x.to(torch.bfloat16))], None, None, None, [1.0, 2.0], 1.0)
    values, classes, mass, log_probs = fusion.forward(a, k, True)
    expected = fusion_reference.forward(a, k, True)
    assert torch.equal(classes, expected[1])
    assert torch.equal(values.nan_to_num(77.0), expected[0].nan_to_num(77.0))
    torch.testing.assert_close(mass, expected[2], equal_nan=True)
    torch.testing.assert_close(log_probs, expected[3], equal_nan=True)


@pytest.mark.usefixtures("parts")
def test_fusion_of_masked_classes():
    """Whole tiles and parts of -inf; rows far from zero."""
    x = draw((2, 3, 1403), torch.float32)
    x[:, 0, :700] = -INF
    x[0, 1, 300:] = -INF
    x[:, 2] += 1e4
    check_fusion(arguments(x), 2)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("k", [3, 9])
def test_fusion_of_no_rows_and_the_same_bits_every_time(k):
    a = arguments(draw((3, 2, 1200), torch.bfloat16), everything=True)
    for first, second in zip(fusion.forward(a, k, True), fusion.forward(a, k, True), strict=True):
        assert torch.equal(first, second)
    shapes = [tuple(value.shape) for value in fusion.forward(a._replace(logits=[a.logits[0][:, :0]]), k, True)]
    assert shapes == [(0, k), (0, k), (0,), (0, 1200)]


# --- divergence ------------------------------------------------------------------------------------------------------


def eager_divergence(
    x: Tensor, temperature: Tensor | None, kind: str, detach: bool, upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    leaf = x.to(dtype).requires_grad_()
    u = leaf if temperature is None else leaf / temperature.to(dtype)
    value = dense_expert_divergence(u, kind, detach_mean=detach, reduction="none", expert_reduction="none")
    return value.detach(), torch.autograd.grad((value * upstream.to(dtype)).sum(), leaf)[0]


def check_divergence(
    x: Tensor,
    kind: str,
    detach: bool,
    layout: str = "stacked",
    temperature: Tensor | None = None,
    logits=None,
    mixed=True,
) -> None:
    """Value and gradient; mixed: the latter after a forward pass of the reference too."""
    logits = LAYOUTS[layout](x) if logits is None else logits
    experts, rows, _ = x.shape
    upstream = torch.linspace(-1, 2, experts * rows).reshape(experts, rows)
    truth, eager = (
        eager_divergence(x, temperature, kind, detach, upstream, dtype) for dtype in (torch.float64, torch.float32)
    )
    value, saved = divergence.forward(logits, temperature, kind)
    grad = divergence.backward(upstream, saved, logits, temperature, kind, detach)
    assert value.shape == (experts, rows)
    assert saved.shape == (3 * experts + 2, rows)
    assert grad.dtype == x.dtype
    assert_within_budget(value, eager[0], truth[0], "value")
    roundings = 2.0 if x.dtype == torch.bfloat16 else None
    assert_within_budget(grad, eager[1], truth[1], "gradient", roundings=roundings)
    if not mixed or x.shape[2] == 1:  # with one class the truth is 0
        return
    _, saved = divergence_reference.forward(logits, temperature, kind)
    other = divergence.backward(upstream, saved, logits, temperature, kind, detach)
    if x.dtype == torch.float32 and kind == "to_mean":  # a rounding of the mean's maximum is in all of its exponentials
        roundings = 4.0 + float(saved[-2].abs().max())
    assert_within_budget(other, eager[1], truth[1], "gradient after another forward pass", roundings=roundings)


@pytest.mark.parametrize(("kind", "detach"), KINDS[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_divergence(layout, kind, detach):
    dtype = "bf16" if layout in ("list", "samples first", "odd window") else "fp32"
    for classes in (1, 33, 600):
        x = draw((3, 2, classes), DTYPES[dtype])
        x = x[:, :1].expand(x.shape) if layout == "expanded" else x
        check_divergence(x, kind, detach, layout, vector(classes, 0.5, 1.5) if classes != 33 else None)


@pytest.mark.parametrize(
    ("experts", "kind", "detach"), [*((e, *kind) for e in (1, 2, 6, 9) for kind in KINDS), (17, "pairwise", True)]
)
def test_divergence_of_other_numbers_of_experts(experts, kind, detach):
    layout = "stacked" if detach else "list"
    check_divergence(draw((experts, 2, 300), torch.float16), kind, detach, layout)


@pytest.mark.parametrize(("kind", "detach"), KINDS)
@pytest.mark.parametrize(("rows", "classes", "dtype"), [(2, 8142, "bf16"), (1, 20_003, "fp32")])
def test_divergence_of_wide_rows(rows, classes, dtype, kind, detach):
    check_divergence(draw((3, rows, classes), DTYPES[dtype]), kind, detach, temperature=vector(classes, 0.5, 1.5))


@pytest.mark.parametrize(("before", "dtype"), [(0, "bf16"), (1, "bf16"), (4, "bf16"), (1, "fp32"), (4, "fp32")])
@pytest.mark.parametrize(("kind", "detach"), KINDS[:1] + KINDS[2:])
def test_divergence_reads_no_neighbouring_memory(kind, detach, before, dtype):
    x = draw((2, 2, 1203), DTYPES[dtype])
    check_divergence(x, kind, detach, logits=[window(x, before, 3)], temperature=vector(1203, 0.5, 1.5))


@pytest.mark.parametrize(("kind", "detach"), KINDS)
def test_divergence_far_from_zero(kind, detach):
    check_divergence(
        draw((3, 3, 1300), torch.float32) + torch.tensor([1e3, 1.1e3, -900.0])[:, None, None], kind, detach
    )


@pytest.mark.parametrize(("kind", "detach"), KINDS)
@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_divergence_of_near_and_far_experts(spread, kind, detach):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(6, 300, generator=generator) * 5
    check_divergence(common + torch.randn(3, 6, 300, generator=generator) * spread, kind, detach, mixed=False)


@pytest.mark.parametrize(("kind", "detach"), KINDS)
def test_divergence_of_masked_classes(kind, detach):
    """Masked in all experts, in the first tile, in whole tiles, and all but one: as if they were not there."""
    x = draw((3, 4, 1403), torch.float32)
    kept = torch.ones(4, 1403, dtype=torch.bool)
    kept[0, :700] = False
    kept[1, 20:] = False
    kept[2, 512:1300] = False
    kept[3, :] = False
    kept[3, 1000] = True
    for mask in (-INF, -1e9):
        logits = [x.masked_fill(~kept, mask)]
        upstream = torch.linspace(-1, 2, 12).reshape(3, 4)
        value, saved = divergence.forward(logits, None, kind)
        grad = divergence.backward(upstream, saved, logits, None, kind, detach)
        assert not grad[:, ~kept].any()
        for row in range(4):
            few = x[:, row : row + 1, kept[row]]
            truth, eager = (
                eager_divergence(few, None, kind, detach, upstream[:, row : row + 1], dtype)
                for dtype in (torch.float64, torch.float32)
            )
            assert_within_budget(value[:, row : row + 1], eager[0], truth[0], "value")
            assert_within_budget(grad[:, row : row + 1, kept[row]], eager[1], truth[1], "gradient")


def test_a_class_masked_in_one_expert():
    x = draw((3, 3, 1403), torch.float32)
    x[1, 1, 1000] = -INF
    value, _ = divergence.forward([x], None, "pairwise")
    assert value.isinf().tolist() == [[False, True, False], [False] * 3, [False, True, False]]
    value, saved = divergence.forward([x], None, "to_mean")
    expected = divergence_reference.forward([x.double()], None, "to_mean")
    assert_within_budget(value, value, expected[0], "value")
    for detach in (True, False):
        grad = divergence.backward(torch.ones(3, 3), saved, [x], None, "to_mean", detach)
        truth = divergence_reference.backward(
            torch.ones(3, 3).double(), expected[1], [x.double()], None, "to_mean", detach
        )
        assert_within_budget(grad, truth.float(), truth, "gradient", roundings=16.0)


@pytest.mark.parametrize(("kind", "detach"), KINDS)
def test_rows_of_nan_stay_alone(kind, detach):
    x = draw((3, 6, 1403), torch.float32)
    x[1, 1, 20] = NAN
    x[0, 2, 1402] = INF
    x[:, 4] = -INF
    x[1, 5] = -INF
    value, saved = divergence.forward([x], None, kind)
    grad = divergence.backward(torch.ones(3, 6), saved, [x], None, kind, detach)
    bad = [False, True, True, False, True, True]
    assert value.isnan().any(0).tolist() == bad
    assert grad.isnan().any(2).any(0).tolist() == bad
    expected, of_reference = divergence_reference.forward([x], None, kind)
    assert torch.equal(value.isnan(), expected.isnan())
    expected = divergence_reference.backward(torch.ones(3, 6), of_reference, [x], None, kind, detach)
    assert torch.equal(grad.isnan().any(2), expected.isnan().any(2))


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_divergence_of_an_expanded_upstream_gradient_and_the_same_bits(kind):
    logits = LAYOUTS["list"](draw((3, 3, 1203), torch.bfloat16))
    value, saved = divergence.forward(logits, None, kind)
    again, _ = divergence.forward(logits, None, kind)
    assert torch.equal(value, again)
    one = divergence.backward(torch.tensor(0.7).expand(3, 3), saved, logits, None, kind, True)
    full = divergence.backward(torch.full((3, 3), 0.7), saved, logits, None, kind, True)
    assert torch.equal(one, full)
    rows = torch.tensor([1.0, -2.0, 0.5])
    one = divergence.backward(rows.expand(3, 3), saved, logits, None, kind, True)
    full = divergence.backward(rows.repeat(3, 1), saved, logits, None, kind, True)
    assert torch.equal(one, full)


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_divergence_of_no_rows(kind):
    for layout in ("stacked", "list"):
        logits = [x[..., :0, :] for x in LAYOUTS[layout](draw((3, 3, 12), torch.float32))]
        value, saved = divergence.forward(logits, None, kind)
        assert value.shape == (3, 0)
        assert saved.shape == (11, 0)
        assert divergence.backward(value, saved, logits, None, kind, True).shape == (3, 0, 12)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_groups_are_as_wide_as_the_strides_allow():
    room = torch.zeros(10**5, dtype=torch.bfloat16)
    assert room.data_ptr() % 16 == 0

    def group(shape: tuple[int, int, int], strides: tuple[int, int, int], offset: int = 0, *outputs: Tensor) -> int:
        return common.layout_of([room.as_strided(shape, strides, offset)], *outputs).group

    assert group((3, 4, 8142), (4 * 8142, 8142, 1)) == 8
    assert group((3, 3, 8142), (3 * 8142, 8142, 1)) == 2
    assert group((3, 4, 8142), (8142, 3 * 8142, 1)) == 2
    assert group((3, 4, 8192), (8192, 3 * 8192, 1)) == 8
    assert group((3, 4, 8142), (4 * 8142, 8142, 1), 1) == 1
    assert group((1, 4, 8142), (5, 8142, 1)) == 8
    assert group((3, 4, 8142), (4 * 8142, 8142, 1), 0, torch.zeros(3, 4, 8142)) == 8
    assert group((3, 4, 7000), (4 * 7004, 7004, 1), 0, torch.zeros(4, 7000)) == 4
    experts = [room[e * 33000 :][:32568].view(4, 8142) for e in range(3)]
    assert common.layout_of(experts).group == 8
    assert common.layout_of(experts).expert_stride == 0
