"""``LinearHead`` against its loss on dense logits, and what it owes ``nn.Linear`` and torch.nn."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import COPIES
from _refused import refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lt_kernels.functional import linear_margin_cross_entropy
from lt_kernels.losses import (
    ArcFaceLoss,
    BalancedSoftmaxLoss,
    CosFaceLoss,
    LDAMLoss,
    LinearHead,
    LogitAdjustmentLoss,
    MarginCrossEntropyBase,
    VSLoss,
)
from lt_kernels.schedules import DeferredReweighting
from lt_kernels.testing import assert_within_budget, dense_margin_cross_entropy

COUNTS = [500, 377, 120, 101, 100, 47, 20, 19, 7, 2, 900, 3, 30]
OTHER = COUNTS[::-1]
N, D, C = 21, 16, len(COUNTS)
RECIPES: dict[str, Callable[..., MarginCrossEntropyBase | None]] = {
    "cross-entropy": lambda **k: MarginCrossEntropyBase(**k),
    "logit-adjustment": lambda **k: LogitAdjustmentLoss(COUNTS, tau=1.5, **k),
    "balanced-softmax": lambda **k: BalancedSoftmaxLoss(COUNTS, **k),
    "ldam": lambda **k: LDAMLoss(COUNTS, **k),
    "vs": lambda **k: VSLoss(COUNTS, **k),
    "cosface": lambda **k: CosFaceLoss(0.2, 16.0, **k),
    "cosface-per-class": lambda **k: CosFaceLoss([1 / (n + 1) for n in COUNTS], 16.0, **k),
    "arcface": lambda **k: ArcFaceLoss(0.3, 16.0, **k),
    "arcface-from-counts": lambda **k: ArcFaceLoss.from_counts(COUNTS, scale=16.0, **k),
}
COSINE = ("ldam", "cosface", "cosface-per-class", "arcface", "arcface-from-counts")
every_recipe = pytest.mark.parametrize("name", RECIPES)
some_recipes = pytest.mark.parametrize("name", ["cross-entropy", "vs", "ldam"])


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, C, (N,), generator=generator)
    return x, target, target.roll(1)


def make_head(name: str, dtype: torch.dtype = torch.float32, seed: int = 1, **options) -> LinearHead:
    torch.manual_seed(seed)
    strategy = options.pop("strategy", "auto")
    return LinearHead(D, C, RECIPES[name](**options), dtype=torch.float64, strategy=strategy).to(dtype)


def dense_logits(x: Tensor, weight: Tensor, bias: Tensor | None, cosine: bool) -> Tensor:
    return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)) if cosine else F.linear(x, weight, bias)


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), upstream), strict=True))


def dense(head: LinearHead, x: Tensor, dtype: torch.dtype, cosine: bool, *targets) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients of the loss written with dense logits, masks and ``F.cross_entropy``, all in ``dtype``."""
    leaves = {"features": x, **dict(head.named_parameters(recurse=False))}
    leaves = {key: value.detach().to(dtype).requires_grad_() for key, value in leaves.items()}
    logits = dense_logits(leaves["features"], leaves["weight"], leaves.get("bias"), cosine)
    mixed = dict(zip(("mixed_target", "mix_lambda"), targets[1:], strict=False))
    unknown = ("empty_mean", "masked_classes")
    keywords = {name: value for name, value in head.loss.keywords().items() if name not in unknown}
    loss = dense_margin_cross_entropy(logits, targets[0], **keywords, **mixed)
    return loss, gradients(loss, leaves)


def check(head: LinearHead, x: Tensor, cosine: bool, *targets) -> None:
    """Value and all gradients within the error budget; of half precision, whose logits are rounded, a rounding more."""
    x = x.detach().requires_grad_()
    loss = head(x, *targets)
    found = gradients(loss, {"features": x, **dict(head.named_parameters(recurse=False))})
    truth, true_gradients = dense(head, x, torch.float64, cosine, *targets)
    eager, eager_gradients = dense(head, x, x.dtype, cosine, *targets)
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    roundings = torch.finfo(x.dtype).eps / torch.finfo(loss.dtype).eps if x.dtype.itemsize < 4 else None
    assert_within_budget(loss, eager, truth, "loss", roundings=roundings)
    for key, value in found.items():
        assert_within_budget(value, eager_gradients[key], true_gradients[key], f"gradient of {key}")


@every_recipe
class TestEqualsTheLossOfDenseLogits:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
    @pytest.mark.parametrize("strategy", ["auto", "chunked"])
    def test_mean(self, name, dtype, strategy, backend):
        x, target, _ = batch(dtype)
        check(make_head(name, dtype, strategy=strategy), x, name in COSINE, target)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_weights_smoothing_and_ignored_rows(self, name, reduction):
        x, target, _ = batch(seed=2)
        target[::4] = 5
        options = {"weight": [0.25 * (1 + c % 5) for c in range(C)], "label_smoothing": 0.1, "ignore_index": 5}
        check(make_head(name, reduction=reduction, strategy="chunked", **options), x, name in COSINE, target)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_mixup(self, name, dtype):
        x, target, other = batch(dtype, seed=3)
        check(make_head(name, dtype), x, name in COSINE, target, other, 0.3)


@every_recipe
def test_equals_the_recipe_itself(name):
    x, target, other = batch(torch.float64)
    head = make_head(name, torch.float64)
    logits = dense_logits(x, head.weight, head.bias, name in COSINE)
    torch.testing.assert_close(head(x, target), head.loss(logits, target), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(x, target, other, 0.3), head.loss(logits, target, other, 0.3), rtol=1e-12, atol=0)
    torch.testing.assert_close(head(x[0], target[0]), head.loss(logits[0], target[0]), rtol=1e-12, atol=1e-12)


class TestLeadingShapes:
    """Features [.., D] with targets [..] are the rows of their flattened batch."""

    @pytest.mark.parametrize("strategy", ["auto", "materialize", "chunked"])
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @some_recipes
    def test_class_indices_and_mixtures(self, name, reduction, strategy):
        x, target, other = batch(torch.float64)
        target[2] = -100
        head = make_head(name, torch.float64, reduction=reduction, strategy=strategy)
        share = torch.linspace(0, 1, N, dtype=torch.float64)
        for flat in ([x, target], [x, target, other, 0.3], [x, target, other, share]):
            shaped = [v.reshape(3, 1, 7, *v.shape[1:]) if isinstance(v, Tensor) else v for v in flat]
            shaped[0] = shaped[0].transpose(0, 2).contiguous().transpose(0, 2)  # rows that are not in order
            leaves = [x.detach().clone().requires_grad_() for x in (flat[0], shaped[0])]
            expected, got = head(leaves[0], *flat[1:]), head(leaves[1], *shaped[1:])
            assert got.shape == ((3, 1, 7) if reduction == "none" else ())
            torch.testing.assert_close(got.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)
            expected.sum().backward()
            got.sum().backward()
            torch.testing.assert_close(leaves[1].grad.reshape(N, D), leaves[0].grad, rtol=1e-12, atol=1e-14)

    def test_class_probabilities(self):
        x, target, _ = batch(torch.float64)
        head = make_head("vs", torch.float64, reduction="none")
        probabilities = F.one_hot(target, C).double() * 0.9 + 0.1 / C
        expected = head(x, probabilities).reshape(7, 3)
        got = head(x.reshape(7, 3, D), probabilities.reshape(7, 3, C))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    def test_further_results(self):
        x, target, _ = batch(torch.float64)
        weight = make_head("vs", torch.float64).weight.detach()
        flat = linear_margin_cross_entropy(x, weight, target, return_lse=True, return_prediction=True)
        shaped = linear_margin_cross_entropy(
            x.reshape(3, 7, D), weight, target.reshape(3, 7), return_lse=True, return_prediction=True
        )
        assert torch.equal(shaped.lse, flat.lse.reshape(3, 7))
        assert torch.equal(shaped.prediction, flat.prediction.reshape(3, 7))

    def test_no_rows(self):
        head = make_head("vs", reduction="none")
        x, target = torch.zeros(2, 0, D), torch.zeros(2, 0, dtype=torch.int64)
        assert head(x, target).shape == (2, 0)
        assert head(x).shape == (2, 0, C)

    def test_a_loss_at_each_position_takes_no_leading_shape(self):
        with pytest.raises(
            ValueError, match=r"input: got shape \(2, 3, 4\) with a loss at each position, expected \[N, D"
        ):
            linear_margin_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(5, 6, 4), torch.zeros(2, 6).long())


@pytest.mark.parametrize("name", ["cross-entropy", "logit-adjustment", "vs"])
def test_class_probabilities(name):
    x, target, _ = batch(torch.float64)
    head = make_head(name, torch.float64)
    probabilities = F.one_hot(target, C).double() * 0.9 + 0.1 / C
    expected = head.loss(F.linear(x, head.weight, head.bias), probabilities)
    torch.testing.assert_close(head(x, probabilities), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:loss. got a MarginCrossEntropyBase at scale 1")
@pytest.mark.parametrize(
    ("loss", "options", "bias", "normalize"),
    [
        (None, {}, True, False),
        (None, {"bias": False}, False, False),
        (None, {"normalize": True}, False, True),
        (LogitAdjustmentLoss(COUNTS), {}, True, False),
        (LDAMLoss(COUNTS), {}, False, True),
        (LDAMLoss(COUNTS), {"normalize": False}, True, False),
        (CosFaceLoss(), {"bias": False}, False, True),
        (ArcFaceLoss(), {}, False, True),
    ],
)
def test_defaults_of_bias_and_normalize(loss, options, bias, normalize):
    head = LinearHead(D, C, loss, **options)
    assert (head.bias is not None) == bias
    assert head.normalize == normalize
    assert isinstance(head, nn.Linear)


class TestScaleOfCosines:
    """Cosines lie in [-1, 1]: a loss that does not scale them cannot tell many classes apart."""

    @pytest.mark.parametrize("loss", [lambda: None, lambda: VSLoss(COUNTS), lambda: LDAMLoss(COUNTS, scale=1)])
    @pytest.mark.parametrize("make", [LinearHead, lambda d, c, *a, **k: LinearHead.from_linear(PLAIN, *a, **k)])
    def test_one_warns_once(self, loss, make, recwarn):
        head = make(D, C, loss(), normalize=True)
        x, target, _ = batch()
        for _ in range(2):
            head(x, target)
            head.predict(x)
        (warned,) = recwarn.list
        assert warned.category is UserWarning
        assert re.match(r"loss: got a \w+ at scale 1 for cosines, .* expected a scale", str(warned.message))

    @pytest.mark.parametrize("name", RECIPES)
    def test_the_defaults_of_recipes_do_not(self, name, recwarn):
        LinearHead(D, C, RECIPES[name]())
        LinearHead(D, C, RECIPES[name](), normalize=False)
        assert not recwarn.list


PLAIN = nn.Linear(D, C, bias=False)


def test_no_loss_is_cross_entropy():
    x, target, _ = batch()
    head = LinearHead(D, C)
    torch.testing.assert_close(head(x, target), F.cross_entropy(F.linear(x, head.weight, head.bias), target))
    assert set(head.state_dict()) == {"weight", "bias"}


class TestInference:
    @every_recipe
    def test_logits_are_the_plain_ones_times_the_scale(self, name):
        x = batch()[0]
        head = make_head(name)
        expected = dense_logits(x, head.weight, head.bias, name in COSINE) * head.loss.scale
        torch.testing.assert_close(head.logits(x), expected)
        torch.testing.assert_close(head.logits(x.reshape(3, 7, D)).reshape(N, C), expected)
        torch.testing.assert_close(head.logits(x[0]), expected[0])

    @every_recipe
    def test_a_call_without_target_returns_the_logits(self, name):
        x = batch()[0].reshape(3, 7, D)
        head = make_head(name)
        for mode in (True, False):
            assert torch.equal(head.train(mode)(x), head.logits(x))
        head(x).sum().backward()
        assert head.weight.grad.abs().sum() > 0

    @every_recipe
    def test_predict(self, name):
        x = batch()[0]
        head = make_head(name)
        shift = torch.randn(C, generator=torch.Generator().manual_seed(2))
        for k, class_shift in ((1, None), (4, shift)):
            u = head.logits(x) + (0.0 if class_shift is None else class_shift)
            classes, confidence, lse = head.predict(x, k, class_shift)
            torch.testing.assert_close(confidence, u.softmax(1).topk(k)[0])
            assert torch.equal(classes, u.topk(k)[1])
            torch.testing.assert_close(lse, u.logsumexp(1))
            assert not confidence.requires_grad

    @some_recipes
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize("narrow", ["features", "weight"])
    def test_features_and_weight_of_two_dtypes_as_in_the_call(self, name, dtype, narrow):
        x, target, _ = batch()
        head = make_head(name)
        x, head = (x.to(dtype), head) if narrow == "features" else (x, head.to(dtype))
        logits = head.logits(x)
        assert logits.dtype == dtype
        tolerance = 8 * head.loss.scale * torch.finfo(dtype).eps
        torch.testing.assert_close(
            head.loss(logits / head.loss.scale, target), head(x, target), rtol=tolerance, atol=tolerance
        )
        same = logits.float().softmax(1).gather(1, head.predict(x).classes)
        torch.testing.assert_close(same, head.predict(x).confidence, rtol=tolerance, atol=tolerance)
        logits.sum().backward()
        assert head.weight.grad.dtype == head.weight.dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert head.logits(x).dtype == torch.bfloat16

    def test_dtypes_without_a_product_are_named(self):
        x = batch(torch.float64)[0]
        with pytest.raises(TypeError, match=r"weight: got dtype torch.float32, expected torch.float64 as features"):
            make_head("vs").logits(x)

    @pytest.mark.parametrize("lead", [(), (5,), (3, 7), (1, 7, 3), (2, 0)], ids=str)
    def test_predict_has_the_leading_shape_of_the_features(self, lead):
        head, x = make_head("ldam"), torch.randn(*lead, D)
        flat, got = head.predict(x.reshape(-1, D), 3), head.predict(x, 3)
        assert [tuple(v.shape) for v in got] == [(*lead, 3), (*lead, 3), lead]
        for ours, theirs in zip(got, flat, strict=True):
            assert torch.equal(ours.flatten(), theirs.flatten())


class TestFromLinear:
    def test_shares_the_parameters(self):
        linear = nn.Linear(D, C).eval()
        head = LinearHead.from_linear(linear, LogitAdjustmentLoss(COUNTS), strategy="chunked")
        assert head.weight is linear.weight
        assert head.bias is linear.bias
        assert (head.strategy, head.training) == ("chunked", False)
        x, target, _ = batch()
        head(x, target).backward()
        assert linear.weight.grad is head.weight.grad is not None
        torch.testing.assert_close(head(x, target), LogitAdjustmentLoss(COUNTS)(linear(x), target))

    def test_without_bias(self):
        linear = nn.Linear(D, C, bias=False)
        assert LinearHead.from_linear(linear).bias is None
        assert LinearHead.from_linear(linear, CosFaceLoss()).normalize
        assert LinearHead.from_linear(linear, CosFaceLoss()).weight is linear.weight

    def test_keeps_dtype_and_frozen_parameters(self):
        linear = nn.Linear(D, C, dtype=torch.bfloat16).requires_grad_(False)
        head = LinearHead.from_linear(linear, VSLoss(COUNTS))
        assert head.weight.dtype == torch.bfloat16
        assert head.loss.class_scale.dtype == torch.float32
        assert not head.weight.requires_grad

    @refused(
        "linear, loss",
        (nn.Conv2d(1, 1, 1), None, TypeError, "linear: got Conv2d, expected an nn.Linear"),
        (nn.Linear(D, C), CosFaceLoss(), ValueError, "linear: got a layer with a bias for a cosine head (CosFaceLoss"),
        (nn.Linear(D, C + 1), LogitAdjustmentLoss(COUNTS), ValueError, "loss: got a LogitAdjustmentLoss with 13"),
        (parametrizations.weight_norm(nn.Linear(D, C)), None, TypeError, "whose weight or bias is computed"),
        (prune.identity(nn.Linear(D, C), "weight"), None, TypeError, "whose weight or bias is computed"),
    )
    def test_bad_input(self, linear, loss, refusal):
        with refusal:
            LinearHead.from_linear(linear, loss)


class Model(nn.Module):
    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.head = head


class TestStateDict:
    @some_recipes
    def test_round_trip(self, name):
        source, head = make_head(name), make_head(name, seed=2)
        if name != "cross-entropy":
            source.update_counts(OTHER)
        x, target, _ = batch()
        assert not torch.equal(source(x, target), head(x, target))
        head.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(source(x, target), head(x, target))
        for key, value in source.state_dict().items():
            assert torch.equal(head.state_dict()[key], value)

    def test_keys(self):
        assert list(make_head("vs").state_dict()) == [
            "weight", "bias", "loss.class_counts", "loss.class_scale", "loss.class_bias",
        ]  # fmt: skip

    @pytest.mark.parametrize("assign", [False, True])
    def test_of_a_linear_layer(self, assign):
        linear, head = nn.Linear(D, C), make_head("vs")
        held, bias = head.loss.class_bias, head.loss.class_bias.clone()
        state = linear.state_dict()
        head.load_state_dict(state, strict=True, assign=assign)
        assert torch.equal(head.weight, linear.weight)
        assert torch.equal(head.loss.class_bias, bias)
        assert head.loss.class_bias.data_ptr() == held.data_ptr()
        assert set(state) == {"weight", "bias"}  # the caller's own is left alone

    @pytest.mark.parametrize("assign", [False, True])
    def test_of_a_linear_layer_in_a_larger_model(self, assign):
        plain, model = Model(nn.Linear(D, C)), Model(make_head("vs"))
        bias = model.head.loss.class_bias.clone()
        model.load_state_dict(plain.state_dict(), strict=True, assign=assign)
        assert torch.equal(model.head.weight, plain.head.weight)
        assert torch.equal(model.head.loss.class_bias, bias)

    def test_a_learned_margin_keeps_its_value(self):
        head = LinearHead(D, C, CosFaceLoss(nn.Parameter(torch.full((C,), 0.25))))
        head.load_state_dict(nn.Linear(D, C, bias=False).state_dict(), strict=True)
        assert head.loss.margin.tolist() == [0.25] * C
        assert {name for name, _ in head.named_parameters()} == {"weight", "loss.margin"}
        x, target, _ = batch()
        head(x, target).backward()
        assert (head.loss.margin.grad[target] != 0).all()

    def test_what_does_not_fit_is_said(self):
        state = make_head("vs").state_dict()
        del state["loss.class_bias"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"loss.class_bias"'):
            make_head("vs").load_state_dict(state)
        with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
            make_head("vs").load_state_dict({"weight": torch.zeros(C, D)})
        with pytest.raises(RuntimeError, match=r"Unexpected key.*\"other\""):
            make_head("vs").load_state_dict({**nn.Linear(D, C).state_dict(), "other": torch.zeros(1)})


@some_recipes
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_compute_the_same_and_share_nothing(name, duplicate):
    x, target, _ = batch()
    head = make_head(name)
    before = head(x, target)
    twin = duplicate(head)
    assert type(twin) is LinearHead
    assert torch.equal(twin(x, target), before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.fill_(0.25)
    assert torch.equal(head(x, target), before)


@every_recipe
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16], ids=["half", "bfloat16"])
def test_half_precision_casts_the_weight_alone(name, cast):
    head = make_head(name, weight=[0.1] * C)
    before = {key: value.clone() for key, value in head.loss.state_dict().items()}
    cast(nn.Sequential(head))
    assert head.weight.dtype in (torch.float16, torch.bfloat16)
    assert {value.dtype for value in head.loss.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, before[key]) for key, value in head.loss.state_dict().items())
    x, target, _ = batch(head.weight.dtype)
    loss = head(x, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.weight.grad.dtype == head.weight.dtype


def test_devices():
    head = make_head("vs").to("meta")
    assert {tensor.device.type for tensor in (*head.parameters(), *head.buffers())} == {"meta"}
    loss = VSLoss(COUNTS)
    assert LinearHead(D, C, loss, device="meta").loss.class_bias.device.type == "cpu"  # meta holds no values


def test_update_counts_and_deferred_reweighting():
    x, target, _ = batch()
    head = make_head("ldam")
    head.update_counts(OTHER)
    torch.testing.assert_close(head.loss.margin, LDAMLoss(OTHER).margin)
    schedule = DeferredReweighting(head.loss, OTHER, switch_epoch=2)
    cosines = dense_logits(x, head.weight, None, True)
    for epoch in (0, 2):
        schedule.step(epoch)
        expected = LDAMLoss(OTHER, weight=schedule.weight(epoch))(cosines, target)
        torch.testing.assert_close(head(x, target), expected)
    assert "loss.weight" in head.state_dict()


class TestTraining:
    @some_recipes
    def test_autocast(self, name):
        x, target, _ = batch()
        head = make_head(name)
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(x, target)
            logits = dense_logits(x, head.weight, head.bias, name in COSINE)
        loss.backward()
        assert loss.dtype == torch.float32
        assert head.weight.grad.dtype == torch.float32
        torch.testing.assert_close(loss, head.loss(logits.float(), target), rtol=0.02, atol=0.02)

    @some_recipes
    def test_activation_checkpointing(self, name):
        x, target, _ = batch()
        head, twin = make_head(name), make_head(name)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        head(x1 * 2, target).backward()
        checkpoint(lambda v: twin(v * 2, target), x2, use_reentrant=False).backward()
        assert torch.equal(x1.grad, x2.grad)
        assert torch.equal(head.weight.grad, twin.weight.grad)

    @pytest.mark.parametrize("strategy", ["materialize", "chunked"])
    @some_recipes
    def test_gradient_accumulation(self, name, strategy):
        x, target, _ = batch(torch.float64)
        head = make_head(name, torch.float64, strategy=strategy)
        head(x, target).backward()
        whole = head.weight.grad
        head.zero_grad()
        for rows in (slice(0, 8), slice(8, N)):
            share = (rows.stop - rows.start) / N
            (head(x[rows], target[rows]) * share).backward()
        torch.testing.assert_close(head.weight.grad, whole, rtol=1e-12, atol=1e-14)

    def test_a_retained_graph(self):
        x, target, _ = batch()
        head = make_head("vs", strategy="chunked")
        loss = head(x, target)
        loss.backward(retain_graph=True)
        once = head.weight.grad.clone()
        loss.backward()
        torch.testing.assert_close(head.weight.grad, 2 * once)

    @some_recipes
    def test_an_optimiser_learns(self, name):
        x, target, _ = batch()
        head = make_head(name)
        optimiser = torch.optim.SGD(head.parameters(), lr=0.5)
        losses = []
        for _ in range(5):
            optimiser.zero_grad()
            loss = head(x, target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    def test_a_frozen_head(self):
        x, target, _ = batch()
        head = make_head("vs").requires_grad_(False)
        x.requires_grad_()
        head(x, target).backward()
        assert x.grad is not None
        assert head.weight.grad is None

    def test_parametrized_and_pruned_weights(self):
        x, target, _ = batch()
        head = parametrizations.weight_norm(make_head("vs"))
        torch.testing.assert_close(head(x, target), head.loss(head.logits(x), target))
        head(x, target).backward()
        assert all(p.grad is not None for p in head.parameters())
        pruned = prune.random_unstructured(make_head("vs"), "weight", amount=0.5)
        pruned(x, target).backward()
        assert bool((pruned.weight_orig.grad[pruned.weight_mask == 0] == 0).all())

    @some_recipes
    def test_compiles_without_graph_breaks(self, name):
        torch._dynamo.reset()
        x, target, _ = batch()
        head, twin = make_head(name), make_head(name)
        compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
        loss = compiled(x, target)
        torch.testing.assert_close(loss, twin(x, target))
        loss.backward()
        twin(x, target).backward()
        torch.testing.assert_close(head.weight.grad, twin.weight.grad)

    @some_recipes
    def test_compiled_inference(self, name):
        torch._dynamo.reset()
        x, head = batch()[0], make_head(name)
        logits = torch.compile(head, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(logits, head.logits(x))
        predict = torch.compile(lambda x: head.predict(x, 3), fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (N, 5):
            for ours, theirs in zip(predict(x[:n]), head.predict(x[:n], 3), strict=True):
                assert torch.equal(ours, theirs)

    def test_distributed_data_parallel(self, tmp_path):
        if not torch.distributed.is_available():
            pytest.skip("torch was built without torch.distributed")
        x, target, _ = batch()
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            head, twin = make_head("vs"), make_head("vs")
            model = nn.parallel.DistributedDataParallel(head)
            for _ in range(2):
                model(x, target).backward()
                twin(x, target).backward()
            torch.testing.assert_close(head.weight.grad, twin.weight.grad)
        finally:
            torch.distributed.destroy_process_group()


def test_repr_shows_the_loss_and_what_differs_from_the_default():
    assert repr(LinearHead(4, 3, LDAMLoss([3, 2, 1]), strategy="chunked")) == (
        "LinearHead(\n  in_features=4, out_features=3, bias=False, normalize=True, strategy=chunked\n"
        "  (loss): LDAMLoss(num_classes=3, scale=30.0)\n)"
    )


@refused(
    "options",
    ({"loss": nn.CrossEntropyLoss()}, TypeError, "loss: got CrossEntropyLoss, expected None or a classifier loss"),
    ({"loss": LDAMLoss}, TypeError, "loss: got LDAMLoss, expected None or a classifier loss"),
    ({"loss": VSLoss([3, 2, 1])}, ValueError, "loss: got a VSLoss with 3 classes (class_counts), expected 13"),
    ({"loss": CosFaceLoss([0.1, 0.2])}, ValueError, "loss: got a CosFaceLoss with 2 classes (margin), expected 13"),
    ({"loss": CosFaceLoss(weight=[1, 2])}, ValueError, "loss: got a CosFaceLoss with 2 classes (weight), expected 13"),
    ({"loss": LDAMLoss(COUNTS), "bias": True}, ValueError, "bias: got True with normalize=True, expected False"),
    ({"bias": 1}, TypeError, "bias: got int, expected a bool or None"),
    ({"normalize": "yes"}, TypeError, "normalize: got str, expected a bool or None"),
    ({"strategy": "fast"}, ValueError, "strategy: got 'fast', expected one of 'auto', 'materialize'"),
)
def test_bad_options(options, refusal):
    with refusal:
        LinearHead(D, C, **options)


X, Y, _ = batch()


@refused(
    "arguments",
    ((X[:, :3], Y), ValueError, "features: got shape (21, 3), expected [..., 16]"),
    (
        (X[None], Y),
        ValueError,
        "target: got class indices of shape (21,), expected (1, 21)",
    ),
    ((X[0, 0], Y), ValueError, "features: got shape (), expected [..., 16]"),
    ((X, None, Y, 0.5), ValueError, "target: got None with mixed_target or mix_lambda, expected class indices"),
    ((X, None, None, 0.5), ValueError, "target: got None with mixed_target or mix_lambda, expected class indices"),
    ((X, Y[:3]), ValueError, "target: got class indices of shape (3,), expected (21,)"),
    ((X, Y + C), IndexError, "target: row 0 has class"),
    ((X, Y, Y), ValueError, "mix_lambda: got None with mixed_target, expected both or neither"),
    ((X, torch.ones(N, C)), ValueError, "margin: got a margin with class-probability"),
)
def test_bad_calls(arguments, refusal):
    with refusal:
        make_head("ldam")(*arguments)
