"""The gradient of the logits written where it is asked for: arguments, layouts and the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from _layouts import padded, surroundings_are_nan, window
from torch import Tensor

from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.margin_cross_entropy.arguments import Arguments

# ------------------------------------------------------------------------------------------------------------- layouts


def _every_other(x: Tensor) -> Tensor:
    """Neither classes nor positions are contiguous: kernels work on a temporary."""
    return x.new_full((x.shape[0], 2 * x.shape[1], 2 * x.shape[2]), math.nan)[:, ::2, ::2]


#: A tensor like x with memory of its own, strided somehow; what is around it is NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.empty_like,
    "channels last": lambda x: x.new_empty(x.transpose(1, 2).shape).transpose(1, 2),
    "samples contiguous": lambda x: x.new_empty(x.permute(1, 2, 0).shape).permute(2, 0, 1),
    "padded rows": lambda x: padded(x, -x.shape[1] % 16),
    "window": window,
    "every other": _every_other,
}


def strided(layout: str, values: Tensor) -> Tensor:
    return LAYOUTS[layout](values).copy_(values)


# ------------------------------------------------------------------------------------------------------------- options


def _options(n: int, c: int, k: int, dtype: torch.dtype, device: str) -> dict[str, dict]:
    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (torch.rand(*shape, dtype=torch.float64) * (high - low) + low).to(device, dtype)

    def labels() -> Tensor:
        index = torch.randint(c, (n, k))
        index.view(-1)[0] = c - 1
        index.view(-1)[-1] = 0
        index[torch.rand(n, k) < 0.2] = -100
        return index.to(device)

    mixed = {"mixed_target": labels(), "mix_lambda": uniform(n, k)}
    weight, bias, class_scale = uniform(c, low=0.2, high=2.0), uniform(c).log(), uniform(c, low=0.5)
    vectors = {
        "class_bias": bias,
        "class_scale": class_scale,
        "class_margin": uniform(c, high=0.5),
        "learned_scale": torch.tensor(1.7, dtype=dtype, device=device),
    }
    soft = torch.randn(n, c, k, dtype=torch.float64).softmax(1).to(device, dtype)
    angular = {"angular": True, "scale": 16.0, "class_scale": uniform(c, low=0.01, high=0.1)}
    return {
        "plain": {},
        "class_bias": {"class_bias": bias},
        "mixed": {**mixed, "coefficient": uniform(2)},
        "smoothing, weight": {"weight": weight, "label_smoothing": 0.2, "class_bias": bias},
        "mixed, smoothing, vectors": {**mixed, **vectors, "weight": weight, "label_smoothing": 0.1},
        "angular": {**angular, "margin": 0.3},
        "angular, vectors": {**vectors, **angular, "margin": 0.1},
        "vectors": {**vectors, "margin": 0.2, "scale": 3.0},
        "probabilities": {"target": soft, "weight": weight, "label_smoothing": 0.1, "class_scale": class_scale},
    } | {"": {"target": labels()}}


OPTIONS = [name for name in _options(1, 1, 1, torch.float32, "cpu") if name]


def arguments(shape: tuple[int, int, int], option: str, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    torch.default_generator.manual_seed(sum(shape))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = _options(*shape, compute, device)
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(device, dtype)
    return Arguments(x, RowOptions(drawn[""]["target"])._replace(**drawn[option]))


def needs_of(a: Arguments) -> list[bool]:
    """Return which gradients a call can have."""
    vectors = ("class_bias", "class_scale", "class_margin", "learned_scale")
    return [True, a.options.soft, *(getattr(a.options, name) is not None for name in vectors)]


# --------------------------------------------------------------------------------------------------------------- check


def _every_call(
    module: ModuleType, a: Arguments, rest: Tensor, buffer: Callable[[], tuple[Tensor, Tensor | None]]
) -> Iterator[tuple[str, Tensor]]:
    """Outputs of every kind of call; ``buffer`` gives the logits and ``out`` of the next one."""

    def call(name: str, function: Callable[..., list[Tensor] | tuple[Tensor, ...]]) -> Iterator[tuple[str, Tensor]]:
        x, out = buffer()
        values = function(a._replace(input=x), out)
        if out is not None:
            assert any(value is out for value in values), name
            assert surroundings_are_nan(out), name
        yield from ((f"{name}[{i}]", value) for i, value in enumerate(values))

    for predict in (False, True):
        yield from call(
            f"forward, prediction {predict}", lambda b, out, predict=predict: module.forward(b, predict, True, out=out)
        )
    torch.default_generator.manual_seed(1)
    per_row, per_lse = (torch.randn(rest.shape[1:], dtype=rest.dtype).to(rest.device) for _ in range(2))
    possible = needs_of(a)
    only = [True] + [False] * 5
    for name, needs, upstream in (
        ("backward", only, (per_row.mean(), None)),
        ("backward, per row", only, (per_row, per_lse)),
        ("backward, all", possible, (per_row, per_lse)),
    ):
        yield from call(
            name,
            lambda b, out, needs=needs, upstream=upstream: module.backward(*upstream, rest, b, needs, out=out),
        )


def check_in_place(
    module: ModuleType,
    a: Arguments,
    layout: str,
    exact: bool = True,
    orders: Iterable[Callable[[], AbstractContextManager[None]]] = (nullcontext,),
) -> None:
    """Over the logits as into another tensor of the same strides, bit for bit; ``exact``: and as without ``out``.

    The calls in place are repeated in all ``orders`` of threads or programs.
    """

    def without() -> tuple[Tensor, None]:
        return strided(layout, a.input), None

    def twin() -> tuple[Tensor, Tensor]:
        return strided(layout, a.input), strided(layout, torch.zeros_like(a.input))

    def in_place() -> tuple[Tensor, Tensor]:
        x = strided(layout, a.input)
        return x, x

    with torch.no_grad():
        rest = module.forward(a, False, False)[3]
        plain, separate = (list(_every_call(module, a, rest, buffer)) for buffer in (without, twin))
        for order in orders:
            with order():
                found = list(_every_call(module, a, rest, in_place))
            for (name, expected), (_, other), (_, over) in zip(plain, separate, found, strict=True):
                assert over.shape == expected.shape, name
                assert torch.equal(over, other), f"{name}: in place differs from into another tensor"
                if exact:
                    assert torch.equal(over, expected), f"{name}: in place differs from without out"
                else:
                    torch.testing.assert_close(over, expected, msg=lambda text, name=name: f"{name}: {text}")
