"""``ExpertHead`` against cosines written out, and what it owes torch.nn."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import EXPERTS
from _refused import refused
from torch import Tensor, nn

from lt_kernels.losses import BalPoELoss, ExpertHead
from lt_kernels.testing import assert_within_budget

E, N, D, C = 3, 9, 16, 13
COUNTS = [500, 377, 120, 101, 100, 47, 20, 19, 7, 2, 900, 3, 30]
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["own-features", "shared-features"])


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> ExpertHead:
    torch.manual_seed(seed)
    return ExpertHead(D, C, E, dtype=torch.float64, **options).to(dtype)


def batch(shared: bool, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (N, D) if shared else (E, N, D)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return features, torch.randint(0, C, (N,), generator=generator)


def cosines(features: Tensor, weight: Tensor, scale: Tensor | float) -> Tensor:
    each = features.expand(len(weight), *features.shape) if features.dim() == 2 else features
    return torch.stack([scale * F.linear(F.normalize(f), F.normalize(w)) for f, w in zip(each, weight, strict=True)])


def run(function, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    upstream = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


@shared_or_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_logits_and_gradients(shared, dtype):
    head = make(dtype, shared=shared, learn_scale=True)
    features, _ = batch(shared, dtype)
    leaves = [features, head.weight, head.scale]

    def ours(f: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight, "scale": scale}, (f,))

    truth = run(cosines, [leaf.double() for leaf in leaves])
    for what, a, e, t in zip(
        ("logits", "features", "weight", "scale"), run(ours, leaves), run(cosines, leaves), truth, strict=True
    ):
        assert_within_budget(a, e, t, what)


@shared_or_not
def test_a_fixed_scale(shared):
    head = make(torch.float64, shared=shared, scale=16.0)
    features, _ = batch(shared, torch.float64)
    torch.testing.assert_close(head(features), cosines(features, head.weight, 16.0))
    assert head(features).shape == (E, N, C)


@shared_or_not
@pytest.mark.parametrize("lead", [(9,), (3, 3), (3, 1, 3), (2, 0)], ids=str)
def test_features_of_any_leading_shape(shared, lead):
    head, experts = make(torch.float64, shared=shared), () if shared else (E,)
    features = torch.randn(*experts, *lead, D, dtype=torch.float64)
    rows = features.reshape(*experts, -1, D)
    assert head(features).shape == (E, *lead, C)
    torch.testing.assert_close(head(features).reshape(E, -1, C), head(rows))
    got, expected = head.predict(features, 4), head.predict(rows, 4)
    assert got.prediction.shape == got.confidence.shape == lead
    assert torch.equal(got.topk_indices.reshape(-1, 4), expected.topk_indices)
    assert torch.equal(got.prediction.flatten(), expected.prediction)
    torch.testing.assert_close(got.topk_values.reshape(-1, 4), expected.topk_values)
    torch.testing.assert_close(got.confidence.flatten(), expected.confidence)


@shared_or_not
@pytest.mark.parametrize("name", EXPERTS)
def test_a_loss_of_tokens_and_the_error_that_says_how(name, shared):
    head = make(torch.float64, shared=shared)
    features = torch.randn(*(() if shared else (E,)), 4, 2, D, dtype=torch.float64)
    target = torch.randint(0, C, (4, 2))
    logits, loss = head(features), EXPERTS[name].make(COUNTS)
    expected = loss(logits.flatten(1, -2), target.flatten())
    torch.testing.assert_close(loss(logits.movedim(-1, 2), target), expected)
    message = r"expected \(4, 13\) for logits .*, whose classes are dimension 2 .*logits.movedim\(-1, 2\), or"
    with pytest.raises(ValueError, match=message):
        loss(logits, target)
    with pytest.raises(ValueError, match=r"whose classes are dimension 1 .*logits.movedim\(-1, 1\), or"):
        loss(list(logits), target)


def test_a_list_of_features():
    head, (features, _) = make(), batch(False)
    assert torch.equal(head(list(features)), head(features))
    for ours, theirs in zip(head.predict(list(features)), head.predict(features), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@shared_or_not
@pytest.mark.parametrize("learn_scale", [False, True])
def test_predict_is_the_fusion_of_the_logits(shared, learn_scale):
    head = make(torch.float64, shared=shared, scale=5.0, learn_scale=learn_scale)
    features, _ = batch(shared, torch.float64)
    shift = torch.linspace(-2, 1, C, dtype=torch.float64)
    shift[3] = -math.inf
    weight = torch.tensor([0.2, 0.5, 0.4], dtype=torch.float64)
    result = head.predict(features, 4, shift, 1.7, weight)
    p = (torch.einsum("e,enc->nc", weight, head(features)) / 1.7 + shift).softmax(1)
    values, classes = p.topk(4)
    torch.testing.assert_close(result.topk_values, values)
    assert torch.equal(result.topk_indices, classes)
    assert torch.equal(result.prediction, classes[:, 0])
    assert not result.confidence.requires_grad
    plain = head.predict(features)
    torch.testing.assert_close(plain.confidence, head(features).mean(0).softmax(1).amax(1))


@shared_or_not
def test_trains_with_a_loss_of_experts(shared):
    head = make(shared=shared)
    features, target = batch(shared)
    loss, optimizer = BalPoELoss(COUNTS), torch.optim.SGD(head.parameters(), 0.5)
    before = loss(head(features), target).item()
    for _ in range(50):
        optimizer.zero_grad()
        value = loss(head(features), target)
        value.backward()
        optimizer.step()
    assert value.item() < before / 2
    assert (head.predict(features).prediction == target).float().mean() > 0.5


@shared_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_and_autocast(shared, dtype):
    head, (features, target) = make(shared=shared), batch(shared)
    exact = head(features)
    tolerance = 30 * 4 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        logits = head(features)
        prediction = head.predict(features)
        BalPoELoss(COUNTS)(logits, target).backward()
    assert logits.dtype == dtype
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(prediction.confidence, exact.mean(0).softmax(1).amax(1), rtol=tolerance, atol=tolerance)
    head.to(dtype)
    assert head(features.to(dtype)).dtype == dtype
    torch.testing.assert_close(head(features.to(dtype)).float(), exact, rtol=0, atol=tolerance)
    assert head.predict(features.to(dtype)).confidence.dtype == torch.float32


@shared_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("narrow", ["features", "weight"])
@pytest.mark.parametrize("learn_scale", [False, True], ids=["fixed", "learned"])
def test_features_and_weight_of_two_dtypes(shared, dtype, narrow, learn_scale):
    head, (features, target) = make(shared=shared, learn_scale=learn_scale), batch(shared)
    exact = head(features).detach()
    features, head = (features.to(dtype), head) if narrow == "features" else (features, head.to(dtype))
    logits = head(features)
    assert logits.dtype == dtype
    tolerance = 30 * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=tolerance)
    confidence = exact.mean(0).softmax(1).amax(1)
    torch.testing.assert_close(head.predict(features).confidence, confidence, rtol=tolerance, atol=tolerance)
    BalPoELoss(COUNTS)(logits, target).backward()
    assert head.weight.grad.dtype == head.weight.dtype


@shared_or_not
def test_compiles(shared):
    torch._dynamo.reset()
    head, (features, _) = make(shared=shared, learn_scale=True), batch(shared)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), head(features))


def test_no_rows():
    assert make()(torch.zeros(E, 0, D)).shape == (E, 0, C)
    assert make(shared=True)(torch.zeros(0, D)).shape == (E, 0, C)
    assert make().predict(torch.zeros(E, 0, D), topk=2).topk_indices.shape == (0, 2)


def test_state_dict():
    assert set(make().state_dict()) == {"weight"}
    assert set(make(learn_scale=True).state_dict()) == {"weight", "scale"}
    head, twin = make(seed=0, learn_scale=True), make(seed=1, learn_scale=True, scale=1.0)
    twin.load_state_dict(head.state_dict())
    features, _ = batch(False)
    assert torch.equal(twin(features), head(features))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate):
    head, (features, _) = make(learn_scale=True), batch(False)
    twin = duplicate(head)
    assert torch.equal(twin(features), head(features))
    assert twin.weight.data_ptr() != head.weight.data_ptr()


def test_initial_weights_are_random_directions():
    head = ExpertHead(64, 500, 2)
    torch.testing.assert_close(head.weight.norm(dim=-1), torch.ones(2, 500))
    assert head.weight.mean().abs() < 0.01
    assert head.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    before = head.weight.detach().clone()
    head.reset_parameters()
    assert not torch.equal(head.weight, before)


def test_device_and_dtype():
    head = ExpertHead(D, C, E, learn_scale=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}


def test_linears_there_and_back():
    layers = [nn.Linear(D, C, bias=False) for _ in range(E)]
    head = ExpertHead.from_linears(layers, scale=2.0)
    assert (head.in_features, head.num_classes, head.num_experts, head.scale) == (D, C, E, 2.0)
    for layer, twin in zip(layers, head.to_linears(), strict=True):
        assert torch.equal(twin.weight, layer.weight)
        assert twin.bias is None
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
    half = [layer.to(torch.bfloat16) for layer in layers]
    assert ExpertHead.from_linears(half, shared=True, learn_scale=True).weight.dtype == torch.bfloat16


@refused(
    "linears",
    ([], ValueError, "linears: got no layers, expected one for each expert"),
    ([nn.Linear(4, 3)], ValueError, "linears[0]: got a layer with a bias, expected none (cosines have no bias)"),
    ([nn.Identity()], TypeError, "linears[0]: got Identity, expected an nn.Linear"),
    (
        [nn.Linear(4, 3, bias=False), nn.Linear(4, 2, bias=False)],
        ValueError,
        "linears[1]: got weight (2, 4), expected (3, 4) as linears[0]",
    ),
)
def test_bad_linears(linears, refusal):
    with refusal:
        ExpertHead.from_linears(linears)


def test_repr():
    assert repr(make()) == "ExpertHead(in_features=16, num_classes=13, num_experts=3, scale=30.0)"
    assert repr(make(shared=True, learn_scale=True)) == (
        "ExpertHead(in_features=16, num_classes=13, num_experts=3, shared=True, scale=learned)"
    )


@refused(
    "change",
    ({"in_features": 0}, ValueError, "in_features: got 0, expected an int >= 1"),
    ({"num_classes": 2.0}, TypeError, "num_classes: got float, expected an int"),
    ({"num_experts": -1}, ValueError, "num_experts: got -1, expected an int >= 1"),
    ({"shared": 1}, TypeError, "shared: got int, expected a bool"),
    ({"learn_scale": None}, TypeError, "learn_scale: got NoneType, expected a bool"),
    ({"scale": 0.0}, ValueError, "scale: got 0.0, expected a number > 0"),
    ({"scale": "30"}, TypeError, "scale: got str, expected a number"),
)
def test_bad_construction(change, refusal):
    arguments = {"in_features": 4, "num_classes": 3, "num_experts": 2, **change}
    with refusal:
        ExpertHead(**arguments)


@pytest.mark.parametrize("call", ["__call__", "predict"])
@refused(
    "shared, features",
    (
        False,
        torch.zeros(N, D),
        ValueError,
        "features: got shape (9, 16), expected [3, N, 16] or",
    ),
    (False, torch.zeros(2, N, D), ValueError, "features: got shape (2, 9, 16), expected [3, N, 16]"),
    (False, torch.zeros(E, N, 4), ValueError, "features: got shape (3, 9, 4), expected [3, N, 16]"),
    (False, torch.zeros(E, N, D).long(), TypeError, "features: got dtype torch.int64, expected a floating"),
    (False, "abc", TypeError, "features: got str, expected a Tensor [3, N, 16]"),
    (False, [], ValueError, "features: got shape (0,), expected [3, N, 16]"),
    (False, [torch.zeros(N, D), None], TypeError, "features[1]: got NoneType, expected a Tensor [N, D]"),
    (
        False,
        [torch.zeros(N, D), torch.zeros(4, D)],
        ValueError,
        "features[1]: got shape (4, 16), expected (9, 16) as features[0]",
    ),
    (True, torch.zeros(D), ValueError, "features: got shape (16,), expected [N, 16] or [..., 16]"),
    (False, torch.zeros(E, D), ValueError, "features: got shape (3, 16), expected [3, N, 16]"),
    (True, [torch.zeros(N, D)] * 3, TypeError, "features: got list, expected a Tensor [N, 16]"),
)
def test_bad_features(call, shared, features, refusal):
    with refusal:
        getattr(make(shared=shared), call)(features)
