"""Losses of one classifier: each against its paper's formula in float64 PyTorch, and what is its own."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import CASES, CLASSIFIERS, COUNTS, EXPERTS, C, make_batch
from _loss_dense import check_formula, exact_dtypes
from _refused import refused
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lt_kernels
from lt_kernels.losses import (
    ArcFaceLoss,
    BalancedSoftmaxLoss,
    BalPoELoss,
    CosFaceLoss,
    LDAMLoss,
    LogitAdjustmentLoss,
    MarginCrossEntropyBase,
    VSLoss,
    post_hoc_logit_adjustment,
)

N = 12


def cosines_and_target(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(N, C, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    target = torch.randint(0, C, (N,), generator=generator)
    target[:C] = torch.arange(C)  # every class is somebody's target
    x[9, 9] = -0.95  # beyond pi - m for the rarest class: the fallback branch of ArcFace
    return x.to(dtype), target


def on_target(y: Tensor) -> Tensor:
    return F.one_hot(y, C).bool()


def logit_adjustment(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(z + 1.5 * (n / n.sum()).log(), y, reduction="none")


def logit_adjustment_code_form(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(z + ((n / n.sum()) ** 2.0 + 1e-3).log(), y, reduction="none")


def balanced_softmax(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    weighted = n * z.exp()
    return -(weighted.gather(1, y[:, None])[:, 0] / weighted.sum(1)).log()


def ldam(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    m = n**-0.25
    m = m * (0.5 / m.max())
    return F.cross_entropy(30 * torch.where(on_target(y), x - m, x), y, reduction="none")


def vs(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy((n / n.max()) ** 0.3 * z + 1.0 * (n / n.sum()).log(), y, reduction="none")


def cosface(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(64 * torch.where(on_target(y), x - 0.4, x), y, reduction="none")


def cosface_per_class(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return F.cross_entropy(16 * torch.where(on_target(y), x - 1 / n, x), y, reduction="none")


def arc(x: Tensor, y: Tensor, m: Tensor, scale: float) -> Tensor:
    theta = x.acos()
    phi = torch.where(theta > math.pi - m, x - m * torch.sin(m), torch.cos(theta + m))
    return F.cross_entropy(scale * torch.where(on_target(y), phi, x), y, reduction="none")


def arcface(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return arc(x, y, torch.full_like(n, 0.5), 64)


def arcface_from_counts(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    a = (0.5 - 0.05) / (n.min() ** -0.25 - n.max() ** -0.25)
    return arc(x, y, a * n**-0.25 + (0.5 - a * n.min() ** -0.25), 64)


RECIPES = {
    "logit-adjustment-tau1.5": (lambda **k: LogitAdjustmentLoss(COUNTS, tau=1.5, **k), logit_adjustment),
    "logit-adjustment-eps": (lambda **k: LogitAdjustmentLoss(COUNTS, tau=2, eps=1e-3, **k), logit_adjustment_code_form),
    "balanced-softmax": (lambda **k: BalancedSoftmaxLoss(COUNTS, **k), balanced_softmax),
    "ldam": (lambda **k: LDAMLoss(COUNTS, **k), ldam),
    "vs": (lambda **k: VSLoss(COUNTS, **k), vs),
    "cosface": (lambda **k: CosFaceLoss(**k), cosface),
    "cosface-per-class": (lambda **k: CosFaceLoss([1 / n for n in COUNTS], scale=16, **k), cosface_per_class),
    "arcface": (lambda **k: ArcFaceLoss(**k), arcface),
    "arcface-from-counts": (lambda **k: ArcFaceLoss.from_counts(COUNTS, **k), arcface_from_counts),
}
every_recipe = pytest.mark.parametrize(("make", "formula"), RECIPES.values(), ids=RECIPES.keys())


@every_recipe
@exact_dtypes
class TestFormula:
    def test_each_row(self, make, formula, dtype):
        x, y = cosines_and_target(dtype)
        check_formula(lambda z: make(dtype=dtype, reduction="none")(z, y), lambda z, n: formula(z, y, n), x)

    def test_mean(self, make, formula, dtype):
        x, y = cosines_and_target(dtype, seed=1)
        check_formula(lambda z: make(dtype=dtype)(z, y), lambda z, n: formula(z, y, n).mean(), x)

    def test_sum_without_ignored_rows(self, make, formula, dtype):
        x, y = cosines_and_target(dtype, seed=2)
        ignored = y.clone()
        ignored[::3] = 255
        kept = ignored != 255
        loss = make(dtype=dtype, reduction="sum", ignore_index=255)
        check_formula(lambda z: loss(z, ignored), lambda z, n: formula(z, y, n)[kept].sum(), x)

    def test_weighted_mean_divides_by_the_sum_of_weights(self, make, formula, dtype):
        x, y = cosines_and_target(dtype, seed=3)
        w = [0.25 * (1 + c % 5) for c in range(C)]
        row_weight = torch.tensor(w, dtype=torch.float64)[y]
        loss = make(dtype=dtype, weight=w)
        check_formula(
            lambda z: loss(z, y), lambda z, n: (row_weight.to(z) * formula(z, y, n)).sum() / row_weight.sum().to(z), x
        )

    def test_mixed_targets(self, make, formula, dtype):
        x, y = cosines_and_target(dtype, seed=4)
        other = y.roll(1)
        loss = make(dtype=dtype)
        check_formula(
            lambda z: loss(z, y, other, 0.3),
            lambda z, n: 0.3 * formula(z, y, n).mean() + 0.7 * formula(z, other, n).mean(),
            x,
        )


SMOOTHED = {
    "logit-adjustment": (lambda **k: LogitAdjustmentLoss(COUNTS, **k), lambda z, y, n: z + (n / n.sum()).log()),
    "balanced-softmax": (lambda **k: BalancedSoftmaxLoss(COUNTS, **k), lambda z, y, n: z + n.log()),
    "ldam": (
        lambda **k: LDAMLoss(COUNTS, **k),
        lambda z, y, n: 30 * torch.where(on_target(y), z - 0.5 * n**-0.25 / (n**-0.25).max(), z),
    ),
    "vs": (
        lambda **k: VSLoss(COUNTS, **k),
        lambda z, y, n: (n / n.max()) ** 0.3 * z + (n / n.sum()).log(),
    ),
    "cosface": (lambda **k: CosFaceLoss(**k), lambda z, y, n: 64 * torch.where(on_target(y), z - 0.4, z)),
    "arcface": (
        lambda **k: ArcFaceLoss(margin=0.2, **k),
        lambda z, y, n: 64 * torch.where(on_target(y), (z.acos() + 0.2).cos(), z),
    ),
}


@pytest.mark.parametrize(("make", "shifted"), SMOOTHED.values(), ids=SMOOTHED.keys())
@exact_dtypes
def test_label_smoothing_acts_on_the_shifted_logits(make, shifted, dtype):
    x, y = cosines_and_target(dtype, seed=5)
    loss = make(dtype=dtype, label_smoothing=0.1)
    check_formula(lambda z: loss(z, y), lambda z, n: F.cross_entropy(shifted(z, y, n), y, label_smoothing=0.1), x)


@pytest.mark.parametrize("name", ["logit-adjustment-tau1.5", "balanced-softmax", "vs"])
def test_class_probabilities_of_one_class_are_that_class(name):
    x, y = cosines_and_target(torch.float64)
    loss = RECIPES[name][0](dtype=torch.float64)
    torch.testing.assert_close(loss(x, F.one_hot(y, C).double()), loss(x, y))


def test_logit_adjustment_with_tau_1_is_balanced_softmax_and_with_tau_0_cross_entropy():
    x, y = cosines_and_target(torch.float64)
    adjusted = LogitAdjustmentLoss(COUNTS, dtype=torch.float64)(x, y)
    torch.testing.assert_close(adjusted, BalancedSoftmaxLoss(COUNTS, dtype=torch.float64)(x, y))
    torch.testing.assert_close(LogitAdjustmentLoss(COUNTS, tau=0.0, dtype=torch.float64)(x, y), F.cross_entropy(x, y))


def test_ldam_default_numbers_are_the_published_ones():
    loss = LDAMLoss(COUNTS)
    assert loss.scale == 30
    assert loss.margin.max() == 0.5
    assert loss.margin.argmax() == C - 1
    assert loss.weight is None


def test_arcface_margins_meet_their_bounds():
    margin = ArcFaceLoss.from_counts(COUNTS, margin_bounds=(0.1, 0.7), dtype=torch.float64).margin
    assert margin[0].item() == pytest.approx(0.1, abs=1e-12)
    assert margin[-1].item() == pytest.approx(0.7, abs=1e-12)
    assert (margin.diff() > 0).all()


def test_segmentation_logits():
    x, y = cosines_and_target(torch.float64)
    loss = LogitAdjustmentLoss(COUNTS, dtype=torch.float64)
    images, labels = x.T.reshape(1, C, 3, 4), y.reshape(1, 3, 4)
    torch.testing.assert_close(loss(images, labels), loss(x, y))


def test_a_masked_class_leaves_the_softmax():
    x, y = cosines_and_target(torch.float64)
    counts = [*COUNTS[:-1], 0]
    rows = y != C - 1
    masked = LogitAdjustmentLoss(counts, zero_counts="mask", dtype=torch.float64)
    without = LogitAdjustmentLoss(counts[:-1], dtype=torch.float64)
    torch.testing.assert_close(masked(x[rows], y[rows]), without(x[rows, :-1], y[rows]))
    assert masked(x[9:10], y[9:10]).item() == math.inf


class TestPostHoc:
    def test_formula(self):
        x, _ = cosines_and_target(torch.float64)
        n = torch.tensor(COUNTS, dtype=torch.float64)
        torch.testing.assert_close(post_hoc_logit_adjustment(x, COUNTS, 0.7), x - 0.7 * (n / n.sum()).log())

    @pytest.mark.parametrize("shape", [(C,), (4, C), (4, C, 3), (2, C, 3, 5)], ids=str)
    def test_class_dimension(self, shape):
        x = torch.zeros(shape)
        adjusted = post_hoc_logit_adjustment(x, COUNTS).movedim(min(1, len(shape) - 1), -1)
        expected = -(torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)).log().float()
        torch.testing.assert_close(adjusted, expected.expand_as(adjusted))

    def test_bfloat16_logits_give_float32(self):
        assert post_hoc_logit_adjustment(torch.zeros(2, C, dtype=torch.bfloat16), COUNTS).dtype == torch.float32

    def test_a_masked_class_is_never_predicted(self):
        adjusted = post_hoc_logit_adjustment(torch.zeros(1, 3), [5, 0, 5], zero_counts="mask")
        assert adjusted[0, 1].item() == -math.inf
        assert adjusted.argmax(1).item() != 1

    @pytest.mark.parametrize(
        ("logits", "error", "message"),
        [
            (torch.zeros(2, 3), ValueError, "class_counts: got 10 classes, expected 3 as logits"),
            (torch.zeros(()), ValueError, r"logits: got shape \(\), expected \[N, 10\]"),
            (torch.zeros(2, C, dtype=torch.int64), TypeError, "logits: got dtype torch.int64, expected a floating"),
            ([0.0] * C, TypeError, "logits: got list, expected a floating"),
        ],
        ids=["columns", "scalar", "integers", "list"],
    )
    def test_bad_logits(self, logits, error, message):
        with pytest.raises(error, match=message):
            post_hoc_logit_adjustment(logits, COUNTS)


# -------------------------------------------------------------------------------------------------- what is their own

X, Y = (x[:8] for x in cosines_and_target(torch.float64))


def test_losses_with_different_numbers_compile_in_one_process():
    torch._dynamo.reset()  # from the second value on, torch.compile takes a number as symbolic
    for loss in (LogitAdjustmentLoss(COUNTS), CosFaceLoss(0.3, 20.0), CosFaceLoss(0.2, 9.0, label_smoothing=0.1)):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X, Y), loss(X, Y))


@pytest.mark.parametrize("cls", [CosFaceLoss, ArcFaceLoss], ids=["cosface", "arcface"])
def test_a_margin_given_as_a_parameter_is_learned(cls):
    margin = nn.Parameter(torch.full((C,), 0.2))
    loss = cls(margin, scale=4.0)
    assert [name for name, _ in loss.named_parameters()] == ["margin"]
    loss(X.float(), Y).backward()
    assert margin.grad is not None
    assert (margin.grad[Y] > 0).all()  # a larger margin is a larger loss, for every class that is a target
    assert torch.equal(cls(margin.tolist(), scale=4.0)(X.float(), Y), loss(X.float(), Y))


def test_a_recipe_without_counts_to_derive_from_says_so():
    with pytest.raises(NotImplementedError, match="MarginCrossEntropyBase derives nothing from class counts"):
        MarginCrossEntropyBase()._set_counts(COUNTS)


@refused(
    "make",
    (lambda: LogitAdjustmentLoss(COUNTS, tau=float("nan")), ValueError, "tau: got nan, expected a finite number"),
    (lambda: LogitAdjustmentLoss(COUNTS, tau="1"), TypeError, "tau: got str, expected a number"),
    (lambda: LogitAdjustmentLoss(COUNTS, eps=-1.0), ValueError, "eps: got -1.0, expected a number >= 0"),
    (lambda: LDAMLoss(COUNTS, max_margin=-0.5), ValueError, "max_margin: got -0.5, expected a number >= 0"),
    (lambda: LDAMLoss(COUNTS, scale=0.0), ValueError, "scale: got 0.0, expected a number > 0"),
    (lambda: VSLoss(COUNTS, gamma=float("inf")), ValueError, "gamma: got inf, expected a finite number"),
    (lambda: CosFaceLoss(margin=float("nan")), ValueError, "margin: got nan, expected a finite number"),
    (lambda: CosFaceLoss(margin=[0.1, float("inf")]), ValueError, "margin: got inf at class 1, expected finite"),
    (lambda: CosFaceLoss(margin="big"), TypeError, "margin: got str, expected a 1-D sequence"),
    (lambda: ArcFaceLoss.from_counts(COUNTS, (0.5, 0.1)), ValueError, "margin_bounds: got (0.5, 0.1), expected lower"),
    (lambda: ArcFaceLoss.from_counts(COUNTS, 0.5), ValueError, "margin_bounds: got 0.5, expected (lower, upper)"),
    (lambda: ArcFaceLoss.from_counts(COUNTS, power=0.0), ValueError, "power: got 0.0, expected a number > 0"),
)
def test_bad_hyperparameters(make, refusal):
    with refusal:
        make()


@pytest.mark.parametrize("name", [name for name, case in CLASSIFIERS.items() if case.from_counts])
@refused(
    "x, y",
    (X[:, :3], Y, ValueError, "class_counts: got 10 classes, expected 3 as input"),
    (X, Y + C, IndexError, "target: row 0 has class"),
    (X, Y[:3], ValueError, "target: got class indices of shape (3,), expected (8,)"),
    (X.long(), Y, TypeError, "input: got dtype torch.int64"),
)
def test_bad_calls(name, x, y, refusal):
    with refusal:
        CLASSIFIERS[name].make(COUNTS)(x, y)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes_in_the_last_dimension_are_an_error_that_says_what_to_do(name):
    loss = CLASSIFIERS[name].make(COUNTS)
    x, y = X.reshape(2, 4, C), Y.reshape(2, 4)
    with pytest.raises(ValueError, match=r"expected \(2, 10\) for logits .*logits.movedim\(-1, 1\), or logits.flatten"):
        loss(x, y)
    torch.testing.assert_close(loss(x.movedim(-1, 1), y), loss(X, Y))
    torch.testing.assert_close(loss(x.flatten(0, -2), y.flatten()), loss(X, Y))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in ("logit-adjustment", "balanced-softmax", "vs", "balpoe", "sade", "ncl")
        for target in ("indices", "probabilities", "mixup")
        if (name, target) != ("ncl", "probabilities")  # which NCL refuses
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_and_mixup_beside_masked_classes(smoothing, target, name):
    """Recipes with a prior of 0: the loss of the other classes by themselves."""
    case = CASES[name]
    y = torch.tensor([0, 1, 3, 4])
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(*(3,) * (name in EXPERTS), 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    given, other = (F.one_hot(y, 5) * 0.9 + 0.02, None) if target == "probabilities" else (y, y.flip(0))
    mixed = {"mixed_target": other, "mix_lambda": 0.3} if target == "mixup" else {}
    kept = torch.tensor([0, 1, 3, 4])
    position = torch.tensor([0, 1, -1, 2, 3])
    results = []
    for counts, columns in (([90, 9, 0, 3, 1], torch.arange(5)), ([90, 9, 3, 1], kept)):
        options = {"zero_counts": "mask", "label_smoothing": smoothing, "dtype": torch.float64}
        if name == "ncl":
            options["hard_classes"] = 2
        loss = case.make(counts, **options)
        t, m = given, dict(mixed)
        if len(columns) == 4:
            t = given[:, kept] if given.is_floating_point() else position[given]
            m |= {"mixed_target": position[other]} if mixed else {}
        value = loss(z[..., columns], t, **m)
        results.append((value, *torch.autograd.grad(value, z)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


PRIORS = ("logit-adjustment", "balanced-softmax", "vs", "sade", "ncl")
ABSENT = [*COUNTS[:-1], 0]


@pytest.mark.parametrize("name", PRIORS)
class TestWhetherClassesMayBeMasked:
    """Known without reading a tensor in the call: True wherever ``class_bias`` may be -inf, after whatever happens."""

    def test_built_updated_and_reset(self, name):
        make = CASES[name].make
        for counts, options, masks in ((COUNTS, {}, False), (ABSENT, {"zero_counts": 1}, False),
                                       (ABSENT, {"zero_counts": "mask"}, True)):  # fmt: skip
            for device in ("cpu", "meta"):
                loss = make(counts, device=device, **options)
                assert loss.masked_classes is loss.keywords()["masked_classes"] is masks
                loss = loss.to_empty(device="cpu")
                assert loss.masked_classes is bool((loss.class_bias == -math.inf).any()) is masks
                for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
                    assert copied.masked_classes is masks
                loss.reset_parameters()
                assert loss.masked_classes is masks
        loss = make(COUNTS, zero_counts="mask")
        assert loss.masked_classes  # a count may become 0 in graphs that were captured
        loss.update_counts(ABSENT)
        assert loss.masked_classes

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
    def test_loaded(self, assign, device, name):
        make, call = CASES[name].make, CASES[name].call
        masked, plain = make(ABSENT, zero_counts="mask"), make(COUNTS)
        loss = make(COUNTS, device=device, label_smoothing=0.1)
        if device == "meta" and not assign:
            loss = loss.to_empty(device="cpu")
        loss.load_state_dict(masked.state_dict(), assign=assign)
        assert loss.masked_classes
        batch = make_batch()._replace(target=torch.arange(len(make_batch().target)) % (C - 1))
        assert call(loss, batch).isfinite()
        partial = {"class_counts": plain.class_counts}
        loss.load_state_dict(partial, strict=False, assign=assign)
        assert loss.masked_classes  # by the bias that it still has
        loss.load_state_dict(plain.state_dict(), assign=assign)
        assert not loss.masked_classes
        loss.load_state_dict(masked.state_dict(), assign=assign)
        loss.update_counts(COUNTS)
        assert not loss.masked_classes
        assert call(loss, batch).isfinite()

    def test_written_by_hand(self, name):
        """Replaced, or said so: as if it had been there. In place alone: infinite or NaN, never another number."""
        make, call = CASES[name].make, CASES[name].call
        batch = make_batch()._replace(target=torch.arange(len(make_batch().target)) % (C - 1))
        results = []
        for way in ("replaced", "told", "in place"):
            loss = make(COUNTS, label_smoothing=0.1)
            bias = loss.class_bias.clone()
            bias[..., -1] = -math.inf
            if way == "replaced":
                loss.class_bias = bias
            else:
                loss.class_bias.copy_(bias)
                assert not loss.masked_classes
            if way == "told":
                loss.masked_classes = True
            results.append(call(loss, batch))
        assert results[0].isfinite()
        assert torch.equal(results[0], results[1])
        assert not results[2].isfinite()
        lt_kernels.set_checks(True)
        try:
            with pytest.raises(ValueError, match="class_bias: got -inf for class 9 with masked_classes=False"):
                call(loss, batch)
        finally:
            lt_kernels.set_checks(False)

    def test_compiled(self, name):
        """A checkpoint with masked classes compiles anew; counts under ``zero_counts="mask"`` do not."""
        make, call = CASES[name].make, CASES[name].call
        batch = make_batch()._replace(target=torch.arange(len(make_batch().target)) % (C - 1))
        masked = make(ABSENT, zero_counts="mask", label_smoothing=0.1)
        counter = CompileCounterWithBackend("eager")
        for options, frames in (({}, 2), ({"zero_counts": "mask"}, 1)):
            torch._dynamo.reset()
            counter.clear()
            loss = make(COUNTS, label_smoothing=0.1, **options)
            compiled = torch.compile(lambda batch, loss=loss: call(loss, batch), backend=counter, fullgraph=True)
            torch.testing.assert_close(compiled(batch), call(loss, batch))
            if options:
                loss.update_counts(ABSENT)
            else:
                loss.load_state_dict(masked.state_dict())
            value = compiled(batch)
            assert value.isfinite()
            torch.testing.assert_close(value, call(masked, batch))
            assert counter.frame_count == frames


def test_priors_of_experts_mask_through_their_class_bias():
    """BalPoE's log prior is finite: only ``zero_counts="mask"`` has a bias, and then it may mask."""
    assert BalPoELoss(COUNTS).class_bias is None
    assert BalPoELoss(ABSENT, zero_counts="mask").masked_classes
