"""The Triton kernels of a contrastive loss, in every option, against its formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _engines import ENGINE
from _layouts import guarded
from torch import Tensor
from torch.nn.functional import normalize

import lt_kernels
from lt_kernels import functional as LF
from lt_kernels.ops.contrastive_loss.arguments import DIFFERENTIABLE, SIGNATURE, Arguments
from lt_kernels.ops.contrastive_loss.op import forward

pytestmark = [pytest.mark.backends("triton"), pytest.mark.usefixtures("backend")]

#: Vectors of rows and keys that a case draws; the other names are fields of the arguments.
ROWS, KEYS = ("pos_offset", "extra", "pulled", "constant"), ("key_bias",)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "self": {"exclude_self": True},
    "int32 labels": {"exclude_self": True, "labels": torch.int32},
    "exclude": {"exclude": True},
    "key_bias": {"exclude_self": True, "key_bias": True},
    "BCL": {"exclude_self": True, "key_bias": True, "pos_offset": True},
    "PaCo": {"exclude_self": True, "key_bias": True, "extra": True, "pulled": True, "alpha": 0.05, "beta": 1.0},
    "ELM": {"pos_offset": True, "constant": True},
    "learned scale": {"exclude_self": True, "learned_scale": True},
    "no bound": {"exclude_self": True, "normalized": False},
    "some keys learn": {"key_grad_begin": 7, "key_grad_end": 40},
    "two": {"exclude_self": True, "two": True},
    "two, all": {
        **dict.fromkeys(("two", "exclude", "learned_scale", "key_bias", "pos_offset", "constant", "counted"), True),
        "reduction": "none",
    },
    "none": {"exclude_self": True, "reduction": "none"},
    "sum": {"reduction": "sum"},
    "counted": {"counted": True, "reduction": "mean_counted"},
    "positives": {"exclude_self": True, "counted": True, "reduction": "mean_positives"},
    "all": {
        **dict.fromkeys(("exclude", "learned_scale", "counted", *ROWS, *KEYS), True),
        "alpha": 0.3,
        "beta": 0.7,
        "reduction": "none",
        "key_grad_begin": 3,
        "key_grad_end": 50,
    },
}
ALONE = ("self", "no bound", "learned scale", "two", "none", "plain")
STRATEGIES = {"tiled": 2**28, "materialize": 2**28, "chunked": 2**14}


def sample(n: int, m: int, dtype: torch.dtype, alone: bool, options: dict[str, Any]) -> Arguments:
    """Return the arguments of a call; row 0 has no positive."""
    generator = torch.Generator().manual_seed(n)
    options = dict(options)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def placed(x: Tensor) -> Tensor:
        return guarded(x.to(ENGINE.device))

    labels = options.pop("labels", torch.int64)
    query, key = (placed(normalize(random(size, 24), dim=1).to(dtype)) for size in (n, m))
    of_rows = torch.randint(0, 5, (n,), generator=generator).to(labels)
    # labels that differ in their upper halves only
    of_keys = torch.randint(0, 5, (m,), generator=generator).to(labels)
    of_rows[0] = 9
    if labels == torch.int64:
        of_rows[1] = 2**32 + 3
    of_rows, of_keys = placed(of_rows), placed(of_keys)
    vectors = {
        name: placed(random(m if name in KEYS else n)) if options.pop(name, False) else None for name in (*ROWS, *KEYS)
    }
    exclude = torch.randint(-1, m, (n,), generator=generator) if options.pop("exclude", False) else None
    counted = torch.rand(n, generator=generator) < 0.7 if options.pop("counted", False) else None
    learned = torch.tensor(0.9, device=ENGINE.device) if options.pop("learned_scale", False) else None
    settings = {
        "scale": 10.0,
        "alpha": 1.0,
        "beta": 0.0,
        "key_grad_begin": 0,
        "key_grad_end": n if alone else m,
        "exclude_self": False,
        "two": False,
        "normalized": True,
        "reduction": "mean",
        "empty_is_zero": False,
    }
    return Arguments(
        query=query,
        key=None if alone else key,
        query_label=of_rows,
        key_label=of_rows if alone else of_keys,
        exclude=None if exclude is None else placed(exclude),
        counted=None if counted is None else placed(counted),
        learned_scale=learned,
        **vectors,
        **(settings | options),
    )


def dense(a: Arguments) -> Tensor:
    """Return the loss by its formulas."""
    z = a.query.double() @ a.keys.double().t()
    scale = a.scale if a.learned_scale is None else a.scale * a.learned_scale.double()
    columns = torch.arange(z.shape[1], device=z.device)
    out = torch.zeros_like(z, dtype=torch.bool)
    if a.exclude_self:
        out = columns[: len(z), None] == columns
    elif a.exclude is not None:
        out = a.exclude[:, None] == columns
    positive = (a.query_label[:, None] == a.key_label) & ~out
    u, count = scale * z, positive.sum(1)
    if a.key_bias is not None:
        u = u + a.key_bias
    if a.pos_offset is not None:
        u = u + positive * a.pos_offset[:, None]
    loss = u.masked_fill(out, -torch.inf).logsumexp(1)
    if a.two:
        weight = count.double()
        loss = loss - u.masked_fill(~positive, -torch.inf).logsumexp(1) + weight.clamp_min(1).log()
    else:
        weight = a.beta + a.alpha * count
        pulled = a.alpha * (scale * z * positive).sum(1) + (0.0 if a.pulled is None else a.pulled)
        loss = loss if a.extra is None else torch.logaddexp(loss, a.extra.double())
        loss = loss - pulled / torch.where(weight != 0, weight, 1.0)
    counted = torch.ones_like(count, dtype=torch.bool) if a.counted is None else a.counted
    some = (weight != 0) & counted
    loss = torch.where(some, loss + (0.0 if a.constant is None else a.constant), 0.0)
    numbers = {"sum": 1, "mean": len(loss), "mean_counted": counted.sum(), "mean_positives": some.sum().clamp_min(1)}
    return loss if a.reduction == "none" else loss.sum() / numbers[a.reduction]


def check(a: Arguments, strategy: str, tolerance: float) -> None:
    """Compare a loss and all its gradients."""
    names = [name for name in DIFFERENTIABLE if getattr(a, name) is not None]
    ours = {name: getattr(a, name).detach().requires_grad_() for name in names}
    true = {name: getattr(a, name).detach().double().requires_grad_() for name in names}
    flat = SIGNATURE.flatten(a._replace(**ours))
    loss, *_ = forward(*flat, a.learned_scale is not None, strategy, STRATEGIES[strategy], "triton")
    expected = dense(a._replace(**true))
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape)
    found = torch.autograd.grad(loss, list(ours.values()), upstream)
    wanted = torch.autograd.grad(expected, list(true.values()), upstream.double())
    for name, got, want in zip(names, found, wanted, strict=True):
        if name == "key":
            want = want.clone()
            want[: a.key_grad_begin], want[a.key_grad_end :] = 0.0, 0.0
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_values(case, strategy):
    check(sample(70, 150, torch.float32, False, CASES[case]), strategy, 3e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ALONE)
def test_queries_alone(case, strategy):
    check(sample(70, 70, torch.float32, True, CASES[case]), strategy, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["self", "all"])
def test_16_bit_values(case, strategy, dtype):
    check(sample(70, 150, dtype, False, CASES[case]), strategy, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(130, 64), (16, 512), (300, 600)], ids=str)
def test_many_rows_and_whole_tiles(shape):
    check(sample(*shape, torch.float32, False, {"reduction": "mean_positives"}), "tiled", 3e-6)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_the_public_function(form, labels):
    query = normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1).to(ENGINE.device)
    label = (torch.arange(40) % 7).to(labels).to(ENGINE.device)
    results = []
    for name in ("triton", "reference"):
        x = query.clone().requires_grad_()
        with lt_kernels.use_backend(name):
            loss = LF.supervised_contrastive(
                x, x, label, temperature=0.1, form=form, exclude="self", normalized=True, ignore_index=3
            )
        loss.backward()
        results.append((loss.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
