"""The Triton kernels of the tiled strategy of linear heads.

The truth is F.linear in float64 and the rows reference on its logits, forward and backward; eager is the same in
float32. Both round the logits (a logit of 10 by 5e-7) in different ways, and with them every probability: small samples
get 16 roundings.
"""

from __future__ import annotations

import math

import _forced_launches as forced
import pytest
import torch
from _arguments import changed, converted, field
from _engines import ENGINE
from _layouts import MATRICES, guarded, window
from torch import Tensor

from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.linear_margin_cross_entropy import triton as backend
from lt_kernels.ops.linear_margin_cross_entropy.arguments import DIFFERENTIABLE, Arguments
from lt_kernels.ops.margin_cross_entropy import reference
from lt_kernels.ops.margin_cross_entropy.arguments import Arguments as RowArguments
from lt_kernels.testing import assert_within_budget

pytestmark = pytest.mark.backends("triton")

NEEDS = [name != "target" for name in DIFFERENTIABLE]
_VECTORS = ("class_bias", "class_scale", "class_margin", "learned_scale")
OPTIONS = {
    "plain": (),
    "bias": ("linear_bias",),
    "adjusted": ("class_bias",),
    "weight, margin": ("weight", "margin"),
    "cosine": ("norm", "class_bias", "class_margin", "scale"),
    "cosine, vectors": ("norm", *_VECTORS),
    "vectors": ("linear_bias", *_VECTORS),
    "smoothing": ("smoothing",),
    "smoothing, vectors": ("smoothing", "weight", "linear_bias", *_VECTORS),
    "mixed": ("mixed", "weight", "class_bias"),
    "mixed rows, all": ("mixed rows", "weight", "smoothing", "linear_bias", *_VECTORS),
    "angular": ("angular", "norm", "scale", "margin"),
    "angular, vectors": ("angular", "norm", "scale", "mixed", *_VECTORS),
}  # fmt: skip
#: N, D, C
SHAPES = {
    "1x3x1": (1, 3, 1),
    "3x16x2": (3, 16, 2),
    "17x33x7": (17, 33, 7),
    "5x64x43": (5, 64, 43),
    "40x16x35": (40, 16, 35),
}


@pytest.fixture(params=["one split", "splits"])
def small_tiles(request, monkeypatch):
    forced.linear_tiles(monkeypatch, 16, 16, 2 if request.param == "splits" else 1000)


def placed(x: Tensor) -> Tensor:
    return guarded(x.to(ENGINE.device))


def sample(
    rows: int,
    width: int,
    classes: int,
    options: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ignored: float = 0.0,
    spread: float = 3.0,
) -> tuple[Arguments, Tensor | None]:
    """Arguments and inverse_norm, every tensor surrounded by NaN."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return placed(torch.rand(shape, generator=generator) * (high - low) + low)

    def labels() -> Tensor:
        index = torch.randint(0, classes, (rows, 1), generator=generator)
        return index.masked_fill(torch.rand(rows, 1, generator=generator) < ignored, -100).to(ENGINE.device)

    def option(name: str, value: Tensor) -> Tensor | None:
        return value if name in options else None

    norm, angular = "norm" in options, "angular" in options
    x = torch.randn(rows, width, generator=generator)
    w = torch.randn(classes, width, generator=generator) * (spread / width**0.5)
    if norm:
        x = torch.nn.functional.normalize(x, dim=1) * 0.95
    x, w = (window(matrix.to(ENGINE.device, dtype)) for matrix in (x, w))
    mixed = "mixed" in options or "mixed rows" in options
    bias = option("linear_bias", placed(torch.randn(classes, generator=generator).to(dtype)))
    row_options = RowOptions(
        target=labels(),
        mixed_target=labels() if mixed else None,
        mix_lambda=uniform(rows, 1) if "mixed rows" in options else uniform() if mixed else None,
        weight=option("weight", uniform(classes, low=0.2, high=2.0)),
        class_bias=option("class_bias", placed(uniform(classes, low=1e-4).log())),
        class_scale=option("class_scale", uniform(classes, low=0.5, high=1.0 if angular else 1.5)),
        class_margin=option("class_margin", uniform(classes, high=0.5)),
        learned_scale=option("learned_scale", torch.tensor(1.7, device=ENGINE.device)),
        coefficient=torch.tensor([0.3, 0.2][: 1 + mixed], device=ENGINE.device) if "weight" in options else None,
        scale=16.0 if "scale" in options else 1.0,
        margin=0.3 if "margin" in options else 0.0,
        angular=angular,
        ignore_index=-100,
        label_smoothing=0.2 if "smoothing" in options else 0.0,
    )
    a = Arguments(x, w, None, bias, row_options, norm)
    return a, placed(1 / w.float().norm(dim=1)) if norm else None


def dense(
    a: Arguments, norm: Tensor | None, dtype: torch.dtype, grad_loss: Tensor, grad_lse: Tensor | None
) -> dict[str, Tensor]:
    """Compute everything from logits in memory."""
    a = converted(a, dtype)
    factor = a.linear_weight if norm is None else a.linear_weight * norm.to(dtype)[:, None]
    x = torch.nn.functional.linear(a.input, factor, a.linear_bias)
    rows = RowArguments(x[:, :, None], a.options)
    loss, lse, prediction, rest, _ = reference.forward(rows, True, False)
    upstream = None if grad_lse is None else grad_lse.to(dtype)
    dx, _, *vectors = reference.backward(grad_loss.to(dtype), upstream, rest, rows, [True, False, *[True] * 4])
    dx = dx[:, :, 0]
    scaled = dx if norm is None else dx * norm.to(dtype)
    grads = (dx @ factor, scaled.T @ a.input, dx.sum(0), dx.new_empty((0,)), *vectors)
    return {"loss": loss, "lse": lse, "prediction": prediction, "rest": rest, **dict(zip(DIFFERENTIABLE, grads))}  # noqa: B905


def possible(a: Arguments, needs: list[bool] = NEEDS) -> list[bool]:
    """Return which of ``needs`` a call can have."""
    return [need and field(a, name) is not None for need, name in zip(needs, DIFFERENTIABLE, strict=True)]


def check(
    a: Arguments,
    norm: Tensor | None = None,
    grad_loss: Tensor | None = None,
    grad_lse: Tensor | None = None,
    roundings: float = 16.0,
    needs: list[bool] | None = None,
) -> None:
    """Hold the value and the gradients of ``needs`` to the truth."""
    grad_loss = torch.tensor(0.7, device=ENGINE.device) if grad_loss is None else grad_loss
    truth, eager = (dense(a, norm, dtype, grad_loss, grad_lse) for dtype in (torch.float64, torch.float32))
    loss, lse, prediction, rest = backend.forward(a, norm, True)
    for name, actual in {"loss": loss, "lse": lse, "maximum": rest[0], "mass": rest[1]}.items():
        expected, plain = (
            {**values, "maximum": values["rest"][0], "mass": values["rest"][1]}[name] for values in (truth, eager)
        )
        assert_within_budget(actual, plain, expected, name, roundings=16.0)
        assert actual.dtype == torch.float32
    assert torch.equal(prediction, truth["prediction"])
    needs = possible(a, needs or NEEDS)
    grads = backend.backward(grad_loss, grad_lse, rest, a, norm, needs)
    for name, need, grad in zip(DIFFERENTIABLE, needs, grads, strict=True):
        if need:
            assert grad.dtype == field(a, name).dtype
            assert_within_budget(grad, eager[name], truth[name], f"gradient of {name}", roundings=roundings)
        else:
            assert grad.shape == (0,)


@pytest.mark.usefixtures("small_tiles")
class TestSmallTiles:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("option", OPTIONS)
    def test_value_and_gradients(self, option, shape):
        check(*sample(*SHAPES[shape], OPTIONS[option], seed=1, ignored=0.3 if SHAPES[shape][0] > 3 else 0.0))

    @pytest.mark.parametrize("option", OPTIONS)
    def test_upstream_gradients(self, option):
        a, norm = sample(17, 16, 35, OPTIONS[option], seed=2, ignored=0.3)
        generator = torch.Generator().manual_seed(3)
        grad_loss, grad_lse = (torch.randn(17, 1, generator=generator).to(ENGINE.device) for _ in range(2))
        check(a, norm, grad_loss, grad_lse)
        check(a, norm, grad_loss[:1].expand(17, 1), grad_lse[:1].expand(17, 1))

    @pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "target"])
    def test_one_gradient_at_a_time(self, name):
        for option in ("mixed rows, all", "angular, vectors"):
            a, norm = sample(17, 16, 35, OPTIONS[option], seed=4)
            if field(a, name) is not None:
                check(a, norm, needs=[name == other for other in DIFFERENTIABLE])

    def test_masked_classes(self):
        """Whole tiles and splits of -inf, among them all columns but the targets'."""
        for masked in (slice(0, 40), slice(1, 70)):
            for option in ("mixed", "cosine, vectors"):
                a, norm = sample(6, 16, 70, (*OPTIONS[option], "class_bias"), seed=5)
                bias = a.options.class_bias
                bias[masked] = -math.inf
                allowed = bias.isfinite().nonzero()[:, 0]
                for target in (a.options.target, a.options.mixed_target):
                    if target is not None:
                        target[:, 0] = allowed[torch.arange(6) % len(allowed)]
                check(a, norm)

    def test_a_masked_target(self):
        a, _ = sample(3, 16, 40, ("class_bias",), seed=5)
        target = a.options.target[:, 0]
        a.options.class_bias[target[1]] = -math.inf
        loss = backend.forward(a, None, False)[0]
        assert torch.equal(loss[:, 0].isinf(), target == target[1])

    @pytest.mark.parametrize("option", ["plain", "mixed", "smoothing", "cosine"])
    @pytest.mark.parametrize("target", [-1, 40, 2**40])
    def test_a_bad_target_makes_its_row_nan_and_no_other(self, target, option):
        a, norm = sample(20, 16, 40, OPTIONS[option], seed=6)
        a.options.target[1] = target
        loss, _, _, rest = backend.forward(a, norm, False)
        grad_input, *_ = backend.backward(loss.new_ones(()), None, rest, a, norm, [True, *[False] * 7])
        expected = torch.arange(20, device=ENGINE.device) == 1
        assert torch.equal(loss[:, 0].isnan(), expected)
        assert torch.equal(grad_input.isnan().all(1), expected)
        assert torch.equal(grad_input.isnan().any(1), expected)

    def test_all_ignored(self):
        for option in ("plain", "mixed rows, all"):
            a, norm = sample(18, 16, 40, OPTIONS[option], seed=7, ignored=1.0)
            check(a, norm)

    def test_no_weight_at_all(self):
        """A mean over no weight: NaN, as in torch."""
        a, _ = sample(3, 16, 40, seed=7, ignored=1.0)
        loss = backend.forward(changed(a, coefficient=a.input.new_tensor([math.inf])), None, False)[0]
        assert bool(loss.isnan().all())

    def test_huge_logits(self):
        for option in ("cosine", "angular"):
            a, norm = sample(20, 33, 60, OPTIONS[option], seed=8)
            check(changed(a, scale=64.0), norm)
        check(*sample(20, 33, 60, ("linear_bias",), seed=8, spread=60.0))

    def test_prediction_of_ties(self):
        x = torch.zeros(5, 16, device=ENGINE.device)
        x[1:, 0] = 1.0
        w = torch.zeros(70, 16, device=ENGINE.device)
        w[[15, 16, 40, 69], 0] = 2.0
        a = sample(5, 16, 70)[0]._replace(input=x, linear_weight=w)
        assert backend.forward(a, None, True)[2].flatten().tolist() == [0, 15, 15, 15, 15]
        x[2, 0] = math.nan
        w[33, 0] = math.nan
        assert backend.forward(a, None, True)[2].flatten().tolist() == [0 if x[2, 0] == 0 else 33, 33, 0, 33, 33]

    @pytest.mark.parametrize("option", ["mixed rows, all", "cosine"])
    def test_the_same_bits_every_time(self, option):
        def run() -> list[Tensor]:
            a, norm = sample(20, 16, 50, OPTIONS[option], seed=9)
            *outputs, rest = backend.forward(a, norm, True)
            needs = possible(a)
            return [*outputs, rest, *backend.backward(rest.new_ones(()), None, rest, a, norm, needs)]

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("option", ["plain", "cosine, vectors", "mixed rows, all"])
    def test_sixteen_bits(self, option, dtype):
        check(*sample(17, 33, 50, OPTIONS[option], dtype, seed=10), roundings=4.0)

    def test_weight_of_another_dtype(self):
        a, _ = sample(17, 16, 50, ("linear_bias",), torch.bfloat16, seed=11)
        a = a._replace(linear_weight=a.linear_weight.float(), weight_copy=a.linear_weight)
        check(a, roundings=64.0 * 2**10)  # the logits' gradient is a bfloat16 number


@pytest.mark.parametrize("option", ["plain", "mixed rows, all", "cosine, vectors"])
@pytest.mark.parametrize("shape", [(130, 33, 123), (17, 128, 507), (3, 256, 123), (3, 300, 40), (129, 16, 7)])
def test_shipped_tiles(option, shape):
    check(*sample(*shape, OPTIONS[option], seed=12, ignored=0.2))


def test_inat18():
    """Many tiles, in splits as the launch table has them."""
    check(*sample(3, 16, 8142, ("class_bias", "norm", "scale"), torch.bfloat16, seed=13), roundings=4.0)


@pytest.mark.parametrize("layout", MATRICES)
def test_layouts(layout, monkeypatch):
    forced.linear_tiles(monkeypatch, 16, 16)
    a, norm = sample(17, 16, 35, ("class_bias",), seed=14)
    check(a._replace(input=MATRICES[layout](a.input)), norm)
    if layout != "expanded":  # whose predictions are ties
        check(a._replace(linear_weight=MATRICES[layout](a.linear_weight)), norm)


@pytest.mark.parametrize("option", ["plain", "mixed rows, all"])
def test_no_rows(option):
    a, norm = sample(0, 16, 35, OPTIONS[option])
    loss, lse, prediction, rest = backend.forward(a, norm, True)
    assert loss.shape == lse.shape == prediction.shape == (0, 1)
    assert rest.shape == (2, 0, 1)
    needs = possible(a)
    for name, need, grad in zip(DIFFERENTIABLE, needs, backend.backward(loss, None, rest, a, norm, needs), strict=True):
        if need:
            assert torch.equal(grad, torch.zeros_like(field(a, name)))
