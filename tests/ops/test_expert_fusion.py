"""expert_fusion and linear_expert_fusion on every backend, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from _cases.experts import LAYOUTS
from torch import Tensor

from lt_kernels.functional import expert_fusion, linear_expert_fusion
from lt_kernels.testing import assert_within_budget


def dense(logits: Tensor, weights: list[float], shift: Tensor | None, scale: float, temperature: float = 1.0) -> Tensor:
    """Log-probabilities as a user would write them, in the logits' dtype."""
    weight = torch.tensor(weights, dtype=logits.dtype, device=logits.device)
    u = scale * torch.einsum("e,enc->nc", weight, logits) / temperature
    return (u if shift is None else u + shift.to(u.dtype)).log_softmax(1)


def draw(shape: tuple[int, int, int], dtype: torch.dtype, device: str, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(device, dtype)


SHAPES = [
    *[(e, 7, 33) for e in (1, 2, 3, 6, 9)],
    *((3, 5, 1), (3, 5, 2), (3, 4, 129), (2, 3, 1000), (3, 9, 8142), (2, 3, 8192), (2, 2, 40_001)),
]


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, k, dtype, backend, device):
    logits = draw(shape, dtype, device)
    experts, _, classes = shape
    k = min(k, classes)
    weights = [0.5 + 0.25 * e for e in range(experts)]
    shift = torch.linspace(-2, 1, classes, device=device)
    result = expert_fusion(
        logits, expert_weight=weights, log_prior_shift=shift, scale=1.3, temperature=1.7, topk=k, return_log_probs=True
    )
    truth = dense(logits.double(), weights, shift, 1.3, 1.7)
    eager = dense(logits, weights, shift, 1.3, 1.7)
    check(result, eager, truth, k)
    alone = expert_fusion(logits, expert_weight=weights, log_prior_shift=shift, scale=1.3, temperature=1.7, topk=k)
    assert alone.log_probs is None
    for one, other in zip(result[:4], alone[:4], strict=True):
        torch.testing.assert_close(one, other)


def check(result, eager: Tensor, truth: Tensor, k: int) -> None:
    assert_within_budget(result.log_probs, eager, truth, "log-probabilities")
    assert result.topk_values.shape == result.topk_indices.shape == (truth.shape[0], k)
    chosen = truth.gather(1, result.topk_indices)
    best = truth.topk(k, 1).values
    slack = 8 * torch.finfo(result.topk_values.dtype).eps * truth.abs().amax(1, keepdim=True)
    assert bool((chosen >= best - slack).all())
    assert_within_budget(
        result.topk_values, eager.gather(1, result.topk_indices).exp(), chosen.exp(), "probabilities of the top k"
    )
    assert all(len(set(row)) == k for row in result.topk_indices.tolist())
    assert torch.equal(result.prediction, result.topk_indices[:, 0])
    assert torch.equal(result.confidence, result.topk_values[:, 0])


@pytest.mark.parametrize("classes", [33, 8142])
@pytest.mark.parametrize("layout", [*LAYOUTS, "list", "odd list"])
def test_layouts(layout, classes, backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        logits = draw((3, 7, classes), dtype, device)
        given = list(logits.clone()) if layout == "list" else LAYOUTS.get(layout, LAYOUTS["window"])(logits)
        if layout == "odd list":  # rows of each expert at another distance from a multiple of 16 bytes
            given = [F.pad(x, (e, 3))[:, e : e + classes] for e, x in enumerate(logits)]
        values = logits[:1].expand(3, -1, -1) if layout == "one for all" else logits
        truth, eager = (dense(values.to(kind), [1 / 3] * 3, None, 1.0) for kind in (torch.float64, dtype))
        check(expert_fusion(given, topk=4, return_log_probs=True), eager, truth, 4)


def test_tensors_for_numbers(backend, device):
    logits = draw((3, 7, 33), torch.float32, device)
    numbers = expert_fusion(logits, expert_weight=(0.2, 0.5, 0.3), scale=3.0, topk=2)
    tensors = expert_fusion(
        logits,
        expert_weight=torch.tensor([0.2, 0.5, 0.3], device=device),
        scale=torch.tensor(3.0, device=device),
        topk=2,
    )
    for one, other in zip(numbers[:4], tensors[:4], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("k", [1, 2, 5, 40])
@pytest.mark.parametrize("classes", [50, 8142])
def test_the_first_of_equals_and_nan(classes, k, backend, device):
    logits = torch.zeros(2, 4, classes, device=device)
    logits[:, 1, [7, 31]] = 1.0
    logits[:, 2, classes - 1] = 1.0
    logits[1, 3, [20, 9]] = math.nan
    result = expert_fusion(logits, topk=k)
    rest = [i for i in range(classes) if i not in (7, 31)]
    assert result.topk_indices[0].tolist() == list(range(k))
    assert result.topk_indices[1].tolist() == [7, 31, *rest][:k]
    assert result.topk_indices[2].tolist() == [classes - 1, *range(classes - 1)][:k]
    assert result.topk_indices[3, :2].tolist() == [9, 20][: min(k, 2)]
    assert result.confidence.isnan().tolist() == [False, False, False, True]


def test_masks_and_infinities(backend, device):
    logits = draw((3, 4, 33), torch.float32, device)
    shift = torch.zeros(33, device=device)
    shift[3:30] = -math.inf
    result = expert_fusion(logits, log_prior_shift=shift, topk=10, return_log_probs=True)
    truth = (logits.double().mean(0) + shift.double()).log_softmax(1)
    assert_within_budget(result.log_probs, (logits.mean(0) + shift).log_softmax(1), truth, "masked")
    assert bool((result.topk_values[:, 6:] == 0).all())
    assert result.topk_indices[:, 6:].tolist() == [[3, 4, 5, 6]] * 4
    logits[0, 2, 5] = math.inf
    logits[1, 3] = -math.inf
    result = expert_fusion(logits, return_log_probs=True)
    assert result.confidence.isnan().tolist() == [False, False, True, True]
    assert result.prediction[2] == 5


def test_no_rows(backend, device):
    result = expert_fusion(torch.zeros(3, 0, 5, device=device), topk=2, return_log_probs=True)
    assert [tuple(value.shape) for value in result] == [(0,), (0,), (0, 2), (0, 2), (0, 5)]


def test_nothing_is_differentiable(backend, device):
    logits = draw((3, 4, 33), torch.float32, device).requires_grad_()
    assert not any(value.requires_grad for value in expert_fusion(logits, return_log_probs=True))


def test_offsets_beyond_32_bits(backend, device):
    storage = torch.empty(2**31 + 20_000, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((2, 1, 8142), (2**31 + 11, 8142, 1), 3)
    x.copy_(draw((2, 1, 8142), torch.bfloat16, device))
    for one, other in zip(expert_fusion(x, topk=3)[:4], expert_fusion(x.clone(), topk=3)[:4], strict=True):
        assert torch.equal(one, other)


# -------------------------------------------------------------------------------------------------------- linear heads


@pytest.mark.parametrize("shared", [False, True], ids=["own features", "shared features"])
@pytest.mark.parametrize("normalize", [False, True], ids=["linear", "cosine"])
def test_linear_heads(normalize, shared, backend, device):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 129, 16, generator=generator, dtype=torch.float64).to(device)
    b = None if normalize else torch.randn(3, 129, generator=generator, dtype=torch.float64).to(device)
    x = torch.randn(3, 40, 16, generator=generator, dtype=torch.float64).to(device)
    x = x[0] if shared else x
    weights = [0.5, 0.2, 0.3]
    shift = torch.linspace(-1, 1, 129, dtype=torch.float64, device=device)

    def logits(kind: torch.dtype) -> Tensor:
        f, v = x.to(kind), w.to(kind)
        if normalize:
            f, v = F.normalize(f, dim=-1), F.normalize(v, dim=-1)
        z = f @ v.mT
        return z if b is None else z + b.to(kind)[:, None]

    for dtype in (torch.float32, torch.bfloat16):
        rounded = [t if t is None else t.to(dtype) for t in (x, w, b)]
        x, w, b = (t if t is None else t.double() for t in rounded)
        result = linear_expert_fusion(
            rounded[0],
            rounded[1],
            linear_bias=rounded[2],
            normalize=normalize,
            expert_weight=weights,
            log_prior_shift=shift.float(),
            scale=8.0,
            temperature=1.7,
            topk=3,
        )
        truth = dense(logits(torch.float64), weights, shift.float().double(), 8.0, 1.7)
        eager = dense(logits(dtype), weights, shift, 8.0, 1.7)
        chosen = truth.gather(1, result.topk_indices)
        assert_within_budget(
            result.topk_values, eager.gather(1, result.topk_indices).exp(), chosen.exp(), "probabilities"
        )
        assert result.log_probs is None
        listed = linear_expert_fusion(
            list(rounded[0]) if not shared else rounded[0], rounded[1], linear_bias=rounded[2], normalize=normalize
        )
        stacked = linear_expert_fusion(rounded[0], rounded[1], linear_bias=rounded[2], normalize=normalize)
        assert all(torch.equal(one, other) for one, other in zip(listed[:4], stacked[:4], strict=True))


@pytest.mark.parametrize("inner", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "tensor"])
def test_maps_are_rows_at_every_position(as_list, inner, dtype, backend, device):
    rows = torch.randn(3, 24, 50, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    maps = rows.unflatten(1, (2, 3, 4)).movedim(-1, 2)
    maps = maps if inner else maps.contiguous()
    options = {"expert_weight": (0.5, 0.2, 0.3), "topk": 3, "return_log_probs": True}
    actual = expert_fusion(list(maps.unbind(0)) if as_list else maps, **options)
    expected = expert_fusion(rows, **options)
    for name in ("prediction", "confidence"):
        assert torch.equal(getattr(actual, name), getattr(expected, name).view(2, 3, 4)), name
    for name in ("topk_values", "topk_indices", "log_probs"):
        assert torch.equal(getattr(actual, name), getattr(expected, name).view(2, 3, 4, -1).movedim(-1, 1)), name


# ----------------------------------------------------------------------------------------------------------- bad input

X = torch.randn(3, 4, 5)
BAD = {
    "logits": ({"logits": X[0]}, ValueError, r"logits: got shape \(4, 5\), expected \[E, N, C\]"),
    "weights": ({"expert_weight": (1.0, 2.0)}, ValueError, r"expert_weight: got 2 values, expected 3"),
    "a weight": ({"expert_weight": (1.0, 2.0, "x")}, TypeError, r"expert_weight\[2\]: got str, expected a number"),
    "weights' type": ({"expert_weight": 1.0}, TypeError, r"expert_weight: got float, expected 3 numbers or a Tensor"),
    "weights' shape": ({"expert_weight": torch.ones(2)}, ValueError, r"expert_weight: got shape \(2,\), expected \[3"),
    "weights' dtype": ({"expert_weight": torch.ones(3).long()}, TypeError, r"expert_weight: got dtype torch.int64"),
    "weights' device": ({"expert_weight": torch.ones(3, device="meta")}, ValueError, r"expert_weight: got device meta"),
    "shift": ({"log_prior_shift": torch.zeros(4)}, ValueError, r"log_prior_shift: got shape \(4,\), expected \[5\]"),
    "temperature": ({"temperature": 0.0}, ValueError, r"temperature: got 0.0, expected a number > 0"),
    "scale": ({"scale": math.inf}, ValueError, r"scale: got inf, expected a finite number"),
    "k": ({"topk": 6}, ValueError, r"topk: got 6, expected 1 to 5, the number of classes"),
    "k's type": ({"topk": 1.0}, TypeError, r"topk: got float, expected an int"),
    "log_probs": ({"return_log_probs": 1}, TypeError, r"return_log_probs: got int, expected a bool"),
}
W, D = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
BAD_LINEAR = {
    "weight": ({"linear_weight": W[0]}, ValueError, r"linear_weight: got shape \(5, 8\), expected \[E, C, D\]"),
    "weight's type": ({"linear_weight": [W]}, TypeError, r"linear_weight: got list, expected a Tensor \[E, C, D\]"),
    "weight's dtype": ({"linear_weight": W.long()}, TypeError, r"linear_weight: got dtype torch.int64, expected one"),
    "experts": ({"input": D[:2]}, ValueError, r"input: got 2 experts, expected 3 as linear_weight"),
    "features": ({"input": D[:, :, :7]}, ValueError, r"input: got 7 features, expected 8 as linear_weight"),
    "a list": ({"input": [D[0], D[1], D[2, :3]]}, ValueError, r"input\[2\]: got shape \(3, 8\), expected \[N, D\]"),
    "vector": ({"input": D[0, 0]}, ValueError, r"input: got shape \(8,\), expected \[E, N, D\]"),
    "bias": ({"linear_bias": torch.zeros(5)}, ValueError, r"linear_bias: got shape \(5,\), expected \[3, 5\]"),
    "cosine bias": (
        {"linear_bias": torch.zeros(3, 5), "normalize": True},
        ValueError,
        r"linear_bias: got a tensor with normalize=True",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        expert_fusion(**{"logits": X, **changes})


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_bad_input_of_linear_heads(name):
    changes, error, message = BAD_LINEAR[name]
    with pytest.raises(error, match=message):
        linear_expert_fusion(**{"input": D, "linear_weight": W, **changes})
