"""What every loss owes torch.nn: buffers, state_dict, copies, devices, dtypes, online counts, options, documents."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
import pkgutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _loss_cases import CASES, CLASSIFIERS, CONTRASTIVE, COPIES, COUNTS, EXPERTS, OTHER, Batch, C, N, make_batch
from _refused import refused
from torch import Tensor, nn

import lt_kernels
from lt_kernels import losses
from lt_kernels.losses import LinearHead
from lt_kernels.schedules import DeferredReweighting

ROOT = Path(__file__).parents[2]
BATCH = make_batch()
SINGLE = BATCH.to(torch.float32)
BATCHES = {"fp64": BATCH, "fp32": SINGLE, "bf16": BATCH.to(torch.bfloat16), "fp16": BATCH.to(torch.float16)}


def cases(**wanted: bool) -> pytest.MarkDecorator:
    """Every case whose fields are as wanted."""
    found = {name: case for name, case in CASES.items() if all(getattr(case, k) == v for k, v in wanted.items())}
    return pytest.mark.parametrize("case", found.values(), ids=found.keys())


def same_state(loss: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(loss.state_dict()[name], value) for name, value in before.items())


def with_gradients(function: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor | None]:
    """The value, and the gradient of every floating field that it depends on."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in batch]
    value = function(Batch(*leaves))
    learned = [leaf for leaf in leaves if leaf.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, learned, allow_unused=True)]


# ------------------------------------------------------------------------------------------------------- the one list


def public_losses() -> list[str]:
    return [name for name in losses.__all__ if name.endswith("Loss")]


def test_every_loss_has_a_case():
    made = {type(case.make(COUNTS)).__name__ for case in CASES.values()}
    assert made == set(public_losses())


@pytest.mark.parametrize("name", losses.__all__)
def test_every_name_is_at_top_level(name):
    assert getattr(lt_kernels, name) is getattr(losses, name)
    assert name in lt_kernels.__all__
    assert name in dir(lt_kernels)


@pytest.mark.parametrize("name", [*public_losses(), "LinearHead", "ExpertHead"])
def test_every_loss_is_documented(name):
    module = getattr(losses, name).__module__.rpartition(".")[2]
    page = ROOT / "docs" / "losses" / f"{module}.md"
    assert f"::: lt_kernels.losses.{name}\n" in page.read_text()
    assert f"[`{name}`]({module}.md)" in (ROOT / "docs" / "losses" / "index.md").read_text()
    assert f"- {name}: losses/{module}.md\n" in (ROOT / "mkdocs.yml").read_text()
    assert name in (ROOT / "README.md").read_text()
    assert name in (ROOT / "CHANGELOG.md").read_text()


MODULES = [module.name for module in pkgutil.iter_modules(losses.__path__) if module.name[0] != "_"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"{losses.__name__}.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


# ----------------------------------------------------------------------------------------------------- copies and state


@cases()
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_compute_the_same_and_share_nothing(case, duplicate):
    loss = case.make(COUNTS, **case.options)
    before = case.call(loss, BATCH)
    twin = duplicate(loss)
    assert type(twin) is type(loss)
    assert twin.state_dict().keys() == loss.state_dict().keys()
    assert torch.equal(case.call(twin, BATCH), before)
    for buffer in twin.buffers():
        buffer.fill_(0.25)
    assert torch.equal(case.call(loss, BATCH), before)


@cases(from_counts=True)
def test_state_dict_round_trip(case):
    source, loss = case.make(COUNTS), case.make(OTHER)
    assert not torch.equal(case.call(loss, BATCH), case.call(source, BATCH))
    loss.load_state_dict(source.state_dict())
    assert torch.equal(case.call(loss, BATCH), case.call(source, BATCH))
    assert loss.class_counts.tolist() == COUNTS
    assert len(source.state_dict()) >= 2


STATE = {
    "logit-adjustment": {"class_counts", "class_bias"},
    "balanced-softmax": {"class_counts", "class_bias"},
    "ldam": {"class_counts", "margin"},
    "vs": {"class_counts", "class_scale", "class_bias"},
    "arcface-from-counts": {"class_counts", "margin"},
    "cosface": set(),
    "cosface-per-class": {"margin"},
    "arcface": set(),
    "balpoe": {"class_counts", "log_prior"},
    "sade": {"class_counts", "class_bias"},
    "ride": {"class_counts", "margin", "class_temperature"},
    "ncl": {"class_counts", "class_bias"},
    "supcon": set(),
    "bcl": set(),
    "paco": {"class_counts", "class_bias"},
    "gml": {"class_counts", "class_bias", "log_temperature"},
    "elm-pairwise": {"class_counts", "class_bias", "embedding_margin"},
    "elm-contrastive": {"class_counts", "class_bias", "embedding_margin"},
}


@pytest.mark.parametrize("name", CASES)
def test_state_dict_names_the_class_tensors(name):
    case = CASES[name]
    assert set(case.make(COUNTS).state_dict()) == STATE[name]
    if case.weighted:
        assert set(case.make(COUNTS, **case.options).state_dict()) == STATE[name] | {"weight"}
    learned = {key for key, _ in case.make(COUNTS).named_parameters()}
    assert learned == ({"log_temperature"} if name == "gml" else set())


REPR = {
    "logit-adjustment": "LogitAdjustmentLoss(num_classes=10)",
    "balanced-softmax": "BalancedSoftmaxLoss(num_classes=10)",
    "ldam": "LDAMLoss(num_classes=10, scale=30.0)",
    "vs": "VSLoss(num_classes=10)",
    "arcface-from-counts": "ArcFaceLoss(num_classes=10, scale=64.0)",
    "cosface": "CosFaceLoss(scale=64.0, margin=0.4)",
    "cosface-per-class": "CosFaceLoss(scale=64.0)",
    "arcface": "ArcFaceLoss(scale=64.0, margin=0.5)",
    "balpoe": "BalPoELoss(num_classes=10, taus=(0.0, 1.0, 2.0))",
    "sade": "SADELoss(num_classes=10)",
    "ride": "RIDELoss(num_classes=10, scale=30.0)",
    "ncl": "NCLLoss(num_classes=10)",
    "supcon": "SupConLoss(temperature=0.07)",
    "bcl": "BalancedContrastiveLoss(num_classes=10, temperature=0.07)",
    "paco": "PaCoLoss(num_classes=10, alpha=0.05, beta=1.0, gamma=1.0, temperature=0.2)",
    "gml": "GMLLoss(num_classes=10, scale=30.0, beta=1.0, gamma=1.0, alpha=0.0)",
    "elm-pairwise": "ELMLoss(num_classes=10, regularizer=pairwise, embedding_weight=0.1, temperature=0.1, "
    "logit_margin=logit_adjustment)",
    "elm-contrastive": "ELMLoss(num_classes=10, regularizer=contrastive, embedding_weight=0.1, temperature=0.1, "
    "logit_margin=logit_adjustment)",
}


@pytest.mark.parametrize("name", CASES)
def test_repr_names_what_differs_from_the_default(name):
    assert repr(CASES[name].make(COUNTS)) == REPR[name]
    if name != "supcon":
        assert "reduction=sum" in repr(CASES[name].make(COUNTS, reduction="sum"))


# --------------------------------------------------------------------------------------------------- devices and dtypes


@cases()
def test_to_device(case):
    loss = case.make(COUNTS, **case.options).to("meta")
    assert {tensor.device.type for tensor in loss.state_dict().values()} <= {"meta"}


@cases(from_counts=True)
def test_class_tensors_are_made_on_the_device_asked_for(case):
    loss = case.make(COUNTS, **case.options, device="meta")
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}
    assert {b.device.type for b in case.make(torch.tensor(COUNTS), **case.options).buffers()} == {"cpu"}


@cases()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_modules_keep_float32_class_tensors(case, dtype):
    loss = case.make(COUNTS, **case.options)
    value, before = case.call(loss, SINGLE), copy.deepcopy(loss.state_dict())
    nn.Sequential(loss).to(dtype)
    assert {tensor.dtype for tensor in loss.state_dict().values()} <= {torch.float32}
    assert same_state(loss, before)
    assert torch.equal(case.call(loss, SINGLE), value)


@cases()
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_results_have_the_dtype_of_the_input_not_of_the_buffers(case, batch):
    expected = torch.float64 if batch.logits.dtype == torch.float64 else torch.float32
    assert case.call(case.make(COUNTS, **case.options), batch).dtype == expected
    assert case.call(case.make(COUNTS, **case.options).double(), batch).dtype == expected


@cases(weighted=True)
def test_to_float64(case):
    loss = case.make(COUNTS, **case.options).to(torch.float64)
    assert {buffer.dtype for buffer in loss.buffers()} <= {torch.float64}
    exact = case.make(COUNTS, **case.options, dtype=torch.float64)
    assert {buffer.dtype for buffer in exact.buffers()} <= {torch.float64}
    torch.testing.assert_close(case.call(loss, BATCH), case.call(exact, BATCH), rtol=1e-5, atol=1e-6)


@cases(from_counts=True)
def test_the_default_dtype_is_followed(case):
    torch.set_default_dtype(torch.float64)
    try:
        assert {tensor.dtype for tensor in case.make(COUNTS).state_dict().values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


@cases()
def test_autocast_gives_float32(case):
    loss = case.make(COUNTS)
    with torch.autocast("cpu", torch.bfloat16):
        value = case.call(loss, SINGLE)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, case.call(loss, SINGLE), rtol=0.05, atol=0.05)


@cases()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=["uint8", "int16", "int32"])
def test_labels_of_any_integer_dtype(case, dtype):
    loss = case.make(COUNTS)
    given = SINGLE._replace(target=SINGLE.target.to(dtype), key_label=SINGLE.key_label.to(dtype))
    assert torch.equal(case.call(loss, given), case.call(loss, SINGLE))


# --------------------------------------------------------------------------------------------------------------- values


@cases()
def test_results_repeat_to_the_bit_and_checks_find_nothing_wrong(case):
    loss = case.make(COUNTS)
    before = case.call(loss, SINGLE)
    lt_kernels.set_checks(True)
    try:
        assert torch.equal(case.call(loss, SINGLE), before)
    finally:
        lt_kernels.set_checks(False)
    assert before.isfinite()


@cases()
def test_reductions_agree(case):
    rows = case.call(case.make(COUNTS, reduction="none"), BATCH)
    assert rows.shape in ((N,), (N, 2))
    torch.testing.assert_close(case.call(case.make(COUNTS), BATCH), rows.mean())
    torch.testing.assert_close(case.call(case.make(COUNTS, reduction="sum"), BATCH), rows.sum())


@cases()
def test_the_mean_over_no_row_is_nan_and_the_sum_is_zero(case, backend):
    none = BATCH.rows(slice(0))
    assert case.call(case.make(COUNTS), none).isnan()
    assert case.call(case.make(COUNTS, reduction="sum"), none) == 0
    assert case.call(case.make(COUNTS, reduction="none"), none).shape[0] == 0


@cases(ignores=True)
@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_all_rows_ignored_are_no_row(case, ignore_index, backend):
    """As in ``F.cross_entropy``: NaN, with gradients that are 0; or 0, if asked for."""
    ignored = BATCH._replace(target=torch.full_like(BATCH.target, ignore_index))
    options = {"ignore_index": ignore_index}
    for empty_mean in ("nan", "zero"):
        loss = case.make(COUNTS, empty_mean=empty_mean, **options)
        value, *gradients = with_gradients(lambda b, loss=loss: case.call(loss, b), ignored)
        assert value.isnan() if empty_mean == "nan" else value == 0
        assert not any(gradient.any() for gradient in gradients if gradient is not None)  # NaN would be "any"
    assert case.call(case.make(COUNTS, reduction="sum", **options), ignored) == 0
    assert not case.call(case.make(COUNTS, reduction="none", **options), ignored).any()


@cases(ignores=True)
def test_no_rows_can_have_a_mean_of_zero(case, backend):
    assert case.call(case.make(COUNTS, empty_mean="zero"), BATCH.rows(slice(0))) == 0
    assert torch.equal(case.call(case.make(COUNTS, empty_mean="zero"), BATCH), case.call(case.make(COUNTS), BATCH))


def spread(rows: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Put rows where they are kept; zeros elsewhere."""
    whole = rows.new_zeros(*rows.shape[:dim], len(kept), *rows.shape[dim + 1 :])
    return whole.index_copy(dim, kept.nonzero().flatten(), rows)


@cases(ignores=True)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_as_if_they_had_been_dropped(case, reduction, backend):
    """Values and gradients, whatever the ignored rows hold."""
    target = BATCH.target.clone()
    target[::3] = 255
    kept = target != 255
    loss = case.make(COUNTS, ignore_index=255, reduction=reduction)
    call = case.call
    if isinstance(loss, losses.GMLLoss | losses.PaCoLoss):  # own keys are by position

        def call(loss: nn.Module, b: Batch) -> Tensor:
            return loss(b.embeddings, b.target, b.key, b.key_label, b.logits)

    value, *gradients = with_gradients(lambda b: call(loss, b).sum(), BATCH._replace(target=target))
    expected, *of_kept = with_gradients(lambda b: call(loss, b).sum(), BATCH.rows(kept))
    torch.testing.assert_close(value, expected)
    floating = [name for name, x in zip(Batch._fields, BATCH, strict=True) if x.is_floating_point()]
    for name, gradient, left in zip(floating, gradients, of_kept, strict=True):
        if gradient is None or left is None:
            assert gradient is left, name
            continue
        if gradient.shape != left.shape:
            left = spread(left, kept, 1 if name == "experts" else 0)
        torch.testing.assert_close(gradient, left, msg=lambda text, name=name: f"{name}: {text}")
    if reduction == "none":
        assert not call(loss, BATCH._replace(target=target))[~kept].any()


@cases(weighted=True)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ignored_rows_may_hold_anything(case, reduction, bad, backend):
    target = BATCH.target.clone()
    target[::3] = 255
    kept = target != 255
    loss = case.make(COUNTS, ignore_index=255, reduction=reduction)
    holed = BATCH._replace(target=target, logits=BATCH.logits.masked_fill(~kept[:, None], bad))
    holed = holed._replace(experts=BATCH.experts.masked_fill(~kept[:, None], bad))
    torch.testing.assert_close(case.call(loss, holed), case.call(loss, BATCH.rows(kept)))


@cases(weighted=True)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixed_targets_ignore_rows_each_on_its_own(case, reduction):
    """A pair's loss is that of both targets, each with its own mean; a row that one ignores counts for the other."""
    first, second = BATCH.target.clone(), BATCH.target.roll(1)
    first[::3], second[1::4] = 255, 255
    share = torch.linspace(0, 1, N, dtype=torch.float64)
    pairs = case.make(COUNTS, ignore_index=255, reduction=reduction)
    single = case.make(COUNTS, ignore_index=255, reduction="none")
    given = BATCH.experts if case in EXPERTS.values() else BATCH.logits
    if isinstance(single, losses.NCLLoss):  # both of a pair are hard
        single = case.make(COUNTS, ignore_index=255, reduction="none", hard_factor=0.0, hard_divergence_factor=0.0)
        pairs = case.make(COUNTS, ignore_index=255, reduction=reduction, hard_factor=0.0, hard_divergence_factor=0.0)
    one, two = share * single(given, first), (1 - share) * single(given, second)
    if reduction == "none":
        expected = one + two
    elif reduction == "sum":
        expected = (one + two).sum()
    else:
        expected = one.sum() / (first != 255).sum() + two.sum() / (second != 255).sum()
    torch.testing.assert_close(pairs(given, first, second, share), expected)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_what_is_not_finite_in_ignored_rows_reaches_no_other(name, backend):
    case, target = CASES[name], BATCH.target.clone()
    target[::3] = 255
    loss, results = case.make(COUNTS, ignore_index=255), []
    for filling in (0.0, math.nan, math.inf):
        logits, embeddings, views = BATCH.logits.clone(), BATCH.embeddings.clone(), BATCH.views.clone()
        logits[::3], embeddings[::3], views[::3] = filling, filling, filling
        given = BATCH._replace(target=target, logits=logits, embeddings=embeddings, views=views)
        value, of_logits, *others = with_gradients(lambda b: case.call(loss, b), given)
        # the logits' own rows may have any gradient, as in F.cross_entropy
        results.append([value, None if of_logits is None else of_logits[target != 255], *others])
    assert results[0][0].isfinite()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@cases()
def test_compiles_to_one_graph(case):
    torch._dynamo.reset()
    loss = case.make(COUNTS, **case.options)
    compiled = torch.compile(lambda batch: case.call(loss, batch), fullgraph=True, backend="aot_eager")
    expected = with_gradients(lambda batch: case.call(loss, batch), SINGLE)
    for actual, value in zip(with_gradients(compiled, SINGLE), expected, strict=True):
        torch.testing.assert_close(actual, value)


# -------------------------------------------------------------------------------------------------------- online counts


@cases(from_counts=True)
class TestUpdateCounts:
    def test_equals_a_new_loss_and_keeps_its_tensors(self, case):
        loss = case.make(COUNTS)
        held = {name: buffer.data_ptr() for name, buffer in loss.named_buffers()}
        loss.update_counts(torch.tensor(OTHER))
        assert {name: buffer.data_ptr() for name, buffer in loss.named_buffers()} == held
        assert torch.equal(case.call(loss, BATCH), case.call(case.make(OTHER), BATCH))
        assert same_state(loss, case.make(OTHER).state_dict())

    def test_after_double_the_class_tensors_are_exact(self, case):
        loss = case.make(COUNTS).double()
        loss.update_counts(OTHER)
        exact = case.make(OTHER, dtype=torch.float64)
        if isinstance(loss, losses.GMLLoss):
            exact.load_state_dict({**exact.state_dict(), "log_temperature": loss.log_temperature})
        assert torch.equal(case.call(loss, BATCH), case.call(exact, BATCH))

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ([1, 2, 3], "class_counts: got 3 classes, expected 10"),
            ([-5, *COUNTS[1:]], "class_counts: got -5 at class 0, expected counts >= 0"),
            ([0, *COUNTS[1:]], r"class_counts: got 0 for 1 of 10 classes \(0\)"),
        ],
        ids=["length", "negative", "zero"],
    )
    def test_bad_counts_change_nothing(self, case, counts, message):
        loss = case.make(COUNTS)
        before = copy.deepcopy(loss.state_dict())
        with pytest.raises(ValueError, match=message):
            loss.update_counts(counts)
        assert same_state(loss, before)

    def test_keeps_the_policy_for_zero_counts(self, case):
        loss = case.make(COUNTS, zero_counts=1)
        loss.update_counts([0, *OTHER[1:]])
        assert torch.equal(case.call(loss, BATCH), case.call(case.make([1, *OTHER[1:]]), BATCH))

    def test_compiled_losses_see_them_without_recompiling(self, case):
        torch._dynamo.reset()
        loss = case.make(COUNTS, **case.options)
        graphs = []

        def backend(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(lambda: case.call(loss, BATCH), fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(), case.call(loss, BATCH))
        loss.update_counts(OTHER)
        torch.testing.assert_close(compiled(), case.call(case.make(OTHER, **case.options), BATCH))
        assert len(graphs) == 1


LABELS = [c for c, n in enumerate(COUNTS) for _ in range(n)]

KINDS_OF_COUNTS = {
    "mapping": dict(reversed(list(enumerate(COUNTS)))),
    "counter": Counter(reversed(LABELS)),
    "series": pd.Series(COUNTS),
    "value-counts": pd.Series(LABELS).value_counts(ascending=True),
    "list": COUNTS,
    "tuple": tuple(COUNTS),
    "numpy-int64": np.array(COUNTS),
    "numpy-float32": np.array(COUNTS, np.float32),
    "tensor-int64": torch.tensor(COUNTS),
    "tensor-int32": torch.tensor(COUNTS).int(),
}


@cases(from_counts=True)
def test_any_kind_of_counts(case):
    expected = case.make(COUNTS).state_dict()
    for kind, counts in KINDS_OF_COUNTS.items():
        assert same_state(case.make(counts), expected), kind


# ------------------------------------------------------------------------------------------------------------ bad input


@cases(from_counts=True)
@refused(
    "counts",
    ([1, -2, 3], ValueError, "class_counts: got -2 at class 1, expected counts >= 0"),
    ([1, math.nan, 3], ValueError, "class_counts: got nan at class 1, expected finite numbers"),
    ([1, 0, 3], ValueError, "class_counts: got 0 for 1 of 3 classes (1), expected counts > 0"),
    ([], ValueError, "class_counts: got no elements"),
    (np.ones((2, 3)), ValueError, "class_counts: got shape (2, 3), expected a 1-D vector [C]"),
    (["a", "b"], TypeError, "class_counts: got list"),
    (None, TypeError, "class_counts: got NoneType, expected a 1-D sequence"),
)
def test_bad_counts(case, counts, refusal):
    if counts is None and case is CASES["paco"]:
        assert case.make(None).class_counts is None  # no prior
        return
    with refusal:
        case.make(counts)


@cases()
@refused(
    "options",
    ({"reduction": "avg"}, ValueError, "reduction: got 'avg', expected"),
    ({"smoothing": 0.1}, TypeError, "smoothing"),
)
def test_bad_options(case, options, refusal):
    with refusal:
        case.make(COUNTS, **options)


@cases(ignores=True)
@refused(
    "options",
    ({"ignore_index": 1.0}, TypeError, "ignore_index: got float, expected an int"),
    ({"empty_mean": "none"}, ValueError, "empty_mean: got 'none', expected one of 'nan', 'zero'"),
    ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, expected a floating-point dtype"),
)
def test_bad_options_of_class_tensors(case, options, refusal):
    if "dtype" in options and isinstance(case.make(COUNTS), losses.SupConLoss | losses.BalancedContrastiveLoss):
        return  # they have no class tensors
    with refusal:
        case.make(COUNTS, **options)


@cases(weighted=True)
@refused(
    "options",
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5, expected a number in [0, 1]"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing: got str, expected a number"),
    ({"weight": [1, 1, math.nan, 1]}, ValueError, "weight: got nan at class 2, expected finite numbers"),
    ({"weight": torch.ones(C, 1)}, ValueError, "weight: got shape (10, 1), expected a 1-D vector [C]"),
    ({"weight": 3}, TypeError, "weight: got int, expected a 1-D sequence, array or tensor of numbers"),
)
def test_bad_weights_and_smoothing(case, options, refusal):
    with refusal:
        case.make(COUNTS, **options)


@cases(from_counts=True)
@refused(
    "options",
    ({"persistent": 1}, TypeError, "persistent: got int, expected a bool"),
    ({"zero_counts": "skip"}, ValueError, "zero_counts: got 'skip', expected 'error', 'mask' or a positive"),
    ({"zero_counts": 0}, ValueError, "zero_counts: got 0, expected 'error', 'mask' or a positive number"),
)
def test_bad_options_with_counts(case, options, refusal):
    with refusal:
        case.make(COUNTS, **options)


@pytest.mark.parametrize("name", ["bcl", *(name for name, case in CASES.items() if case.from_counts)])
@pytest.mark.parametrize("counts", [COUNTS[1:], [*COUNTS, 5]], ids=["fewer", "more"])
def test_counts_of_another_number_of_classes_are_named(name, counts):
    """By what the caller gave: class_counts, not the class tensors made of them."""
    with pytest.raises(ValueError, match=rf"^class_counts: got {len(counts)} classes, expected 10 as"):
        CASES[name].call(CASES[name].make(counts), BATCH._replace(target=BATCH.target % 9))


@cases(weighted=True)
def test_weights_by_class(case):
    by_class = {c: c + 1.0 for c in reversed(range(C))}
    expected = case.call(case.make(COUNTS, **case.options), BATCH)
    for weight in (by_class, pd.Series(by_class)):
        assert torch.equal(case.call(case.make(COUNTS, **{**case.options, "weight": weight}), BATCH), expected)
    del by_class[4]
    with pytest.raises(ValueError, match="weight: got nothing for class 4, expected a number for each of 10 classes"):
        case.make(COUNTS, weight=by_class)


@cases(from_counts=True, weighted=True)
def test_weights_of_other_classes(case):
    with pytest.raises(ValueError, match="weight: got 3 classes, expected 10"):
        case.make(COUNTS, weight=[1, 2, 3])


@pytest.mark.parametrize("name", [name for name in CASES if name != "supcon"])  # its labels are any integers
def test_a_class_out_of_range_is_named(name):
    case = CASES[name]
    with pytest.raises(IndexError, match=r"(target|labels|query_label): row 0 has class 1\d, expected 0 <= class < 10"):
        case.call(case.make(COUNTS), BATCH._replace(target=BATCH.target + C))


REFUSED = {name: case for name, case in {**EXPERTS, **CONTRASTIVE}.items() if case.from_counts}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_of_one_classifier_refuses_the_others(name):
    loss = REFUSED[name].make(COUNTS)
    takes = "the logits of several experts" if name in EXPERTS else "embeddings beside the logits"
    with pytest.raises(TypeError, match=f"loss: got a {type(loss).__name__}, which takes {takes}"):
        LinearHead(4, C, loss)


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in EXPERTS])
def test_a_schedule_of_weights_refuses_a_loss_without_them(name):
    with pytest.raises(TypeError, match="expected a module with a `weight` buffer"):
        DeferredReweighting(REFUSED[name].make(COUNTS), COUNTS, switch_epoch=1)


@pytest.mark.parametrize("name", [name for name, case in CLASSIFIERS.items() if not case.from_counts])
def test_update_counts_needs_a_loss_built_from_counts(name):
    with pytest.raises(RuntimeError, match=r"update_counts: got a (CosFace|ArcFace)Loss that was built without"):
        CASES[name].make(COUNTS).update_counts(COUNTS)
