"""Arguments of a wrong kind, on every function that takes one of that kind: an error that names the argument."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lt_kernels as lt
from lt_kernels import functional as LF
from lt_kernels import metrics, mixing, priors, queues

COUNTS = [50, 20, 10, 5, 1]
LOGITS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 4])
VECTOR = torch.ones(5)
FEATURES = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
KEYS = F.normalize(FEATURES, dim=1)
ROWS = {
    "weight": VECTOR, "class_bias": VECTOR, "class_scale": VECTOR, "margin": VECTOR, "scale": torch.tensor(2.0),
    "mixed_target": TARGET, "mix_lambda": torch.tensor(0.5), "ignore_index": -100, "reduction": "mean",
    "margin_type": "additive", "masked_classes": False,
}  # fmt: skip
CLASS_QUEUE, FEATURE_QUEUE = lt.ClassQueue(COUNTS, 20, 3), lt.FeatureQueue(8, 3)


def method(owner: Any, name: str) -> Callable[..., Any]:
    """A method of a copy, so that a call that is not refused changes nothing for the next case."""
    return lambda **arguments: getattr(copy.deepcopy(owner), name)(**arguments)


#: Every function that takes tensors, with arguments that it accepts.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "margin_cross_entropy": (
        LF.margin_cross_entropy,
        {"input": LOGITS, "target": TARGET, "return_lse": False, "return_prediction": False, **ROWS},
    ),
    "linear_margin_cross_entropy": (
        LF.linear_margin_cross_entropy,
        {"input": FEATURES, "linear_weight": torch.ones(5, 3), "target": TARGET, "linear_bias": VECTOR,
         "normalize": False, "strategy": "auto", **ROWS},
    ),
    "linear_topk": (
        LF.linear_topk,
        {"input": FEATURES, "linear_weight": torch.ones(5, 3), "linear_bias": VECTOR, "class_shift": VECTOR,
         "normalize": False, "k": 1},
    ),
    "expert_cross_entropy": (
        LF.expert_cross_entropy,
        {"logits": LOGITS.expand(3, 4, 5), "target": TARGET, "log_prior": VECTOR, "taus": torch.ones(3),
         "expert_reduction": "mean", "return_ensemble": False, **ROWS},
    ),
    "expert_fusion": (
        LF.expert_fusion,
        {"logits": LOGITS.expand(3, 4, 5), "expert_weight": torch.ones(3), "log_prior_shift": VECTOR, "topk": 1,
         "return_log_probs": False},
    ),
    "linear_expert_fusion": (
        LF.linear_expert_fusion,
        {"input": FEATURES, "linear_weight": torch.ones(3, 5, 3), "linear_bias": torch.ones(3, 5), "normalize": False,
         "log_prior_shift": VECTOR, "topk": 1},
    ),
    "expert_divergence": (
        LF.expert_divergence,
        {"logits": LOGITS.expand(3, 4, 5), "kind": "pairwise", "temperature": VECTOR, "detach_mean": True,
         "reduction": "mean"},
    ),
    "partitioned_logsumexp": (
        LF.partitioned_logsumexp,
        {"query": KEYS, "key": KEYS.clone(), "query_label": TARGET, "key_label": TARGET, "key_bias": torch.ones(4),
         "key_scale": torch.ones(4), "exclude": torch.arange(4), "normalized": False, "strategy": "auto"},
    ),
    "supervised_contrastive": (
        LF.supervised_contrastive,
        {"query": KEYS, "key": KEYS.clone(), "query_label": TARGET, "key_label": TARGET, "temperature": 0.1,
         "form": "out", "ignore_index": -100, "reduction": "mean"},
    ),
    "ClassQueue.enqueue": (
        method(CLASS_QUEUE, "enqueue"), {"features": FEATURES, "labels": TARGET, "ids": torch.arange(4)}
    ),
    "FeatureQueue.enqueue": (method(FEATURE_QUEUE, "enqueue"), {"features": FEATURES, "labels": TARGET}),
    "ShotGroupAccuracy.update": (
        method(metrics.ShotGroupAccuracy(COUNTS), "update"), {"preds": LOGITS, "target": TARGET}
    ),
    "WithinClassSpread.update": (
        method(metrics.WithinClassSpread(COUNTS, 3), "update"), {"embeddings": FEATURES, "labels": TARGET}
    ),
    "CalibrationError.update": (
        method(metrics.CalibrationError(), "update"), {"preds": LOGITS.softmax(1), "target": TARGET}
    ),
    "calibration_error": (
        metrics.calibration_error, {"preds": LOGITS.softmax(1), "target": TARGET, "ignore_index": -100}
    ),
    "WithinClassSpread": (
        metrics.WithinClassSpread,
        {"class_counts": COUNTS, "dim": 3, "normalize": True, "ignore_index": -100, "validate_args": True},
    ),
    "ShotGroupAccuracy": (
        metrics.ShotGroupAccuracy, {"class_counts": COUNTS, "ignore_index": -100, "validate_args": True}
    ),
    "CalibrationError": (metrics.CalibrationError, {"bins": 15, "ignore_index": -100, "validate_args": True}),
    "mixup": (mixing.mixup, {"x": FEATURES, "y": TARGET, "alpha": 0.4}),
    "cutmix": (mixing.cutmix, {"x": torch.ones(4, 1, 2, 2), "y": TARGET, "alpha": 1.0}),
    "momentum_update": (
        lt.momentum_update,
        {"target": torch.nn.Linear(1, 1), "source": torch.nn.Linear(1, 1), "momentum": 0.9, "buffers": True},
    ),
    "post_hoc_logit_adjustment": (
        lt.losses.post_hoc_logit_adjustment, {"logits": LOGITS, "class_counts": COUNTS, "tau": 1.0}
    ),
    "sample_pixels": (
        lt.losses.sample_pixels,
        {"features": torch.ones(1, 3, 2, 2), "target": torch.zeros(1, 2, 2, dtype=torch.int64), "per_class": 2,
         "num_classes": 3, "ignore_index": -100},
    ),
    "log_prior": (priors.log_prior, {"class_counts": COUNTS, "tau": 1.0, "eps": 0.0, "form": "prior"}),
    "set_checks": (lt.set_checks, {"enabled": False}),
}  # fmt: skip


def arguments(fits: Callable[[Any], bool]) -> list[Any]:
    """Every (function, argument) whose accepted value ``fits``."""
    found = [(name, each) for name, (_, given) in CALLS.items() for each, value in given.items() if fits(value)]
    return [pytest.param(*pair, id="-".join(pair)) for pair in found]


def refused(name: str, argument: str, value: Any, message: str, error: Any = (TypeError, ValueError)) -> None:
    function, given = CALLS[name]
    with pytest.raises(error, match=rf"^{name}\({argument}\): got {message}|^{argument}: got {message}"):
        function(**{**given, argument: value})


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_accepted(name):
    function, given = CALLS[name]
    function(**given)


def layouts(value: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"sparse": value.to_sparse(), "nested": torch.nested.nested_tensor([value, value])}
    if value.dim() == 2:
        found["csr"] = value.to_sparse_csr()
        found["jagged"] = torch.nested.nested_tensor([value[:1], value], layout=torch.jagged)
    if value.is_floating_point() and torch.backends.mkldnn.is_available():
        found["mkldnn"] = value.to_mkldnn()
    return found


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR)")
@pytest.mark.parametrize(
    ("name", "argument"), arguments(lambda value: isinstance(value, torch.Tensor) and value.dim() > 0)
)
def test_only_dense_tensors(name, argument):
    for value in layouts(CALLS[name][1][argument]).values():
        refused(
            name, argument, value, r"a (nested tensor|tensor of layout torch\.\w+), expected a dense one", TypeError
        )


@pytest.mark.parametrize(("name", "argument"), arguments(lambda value: isinstance(value, bool)))
@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True), []], ids=str)
def test_flags_are_bools(name, argument, value):
    refused(name, argument, value, r"\w+, expected a bool", TypeError)


@pytest.mark.parametrize(("name", "argument"), arguments(lambda value: isinstance(value, str)))
@pytest.mark.parametrize("value", ["sideways", True, ["mean"], torch.ones(2)], ids=str)
def test_choices_are_one_of_the_words(name, argument, value):
    refused(name, argument, value, r".*, expected", ValueError)


@pytest.mark.parametrize(
    ("name", "argument"), arguments(lambda value: isinstance(value, int) and not isinstance(value, bool))
)
@pytest.mark.parametrize("value", [2**70, 2.5, True, "3", None, torch.tensor(3)], ids=str)
def test_integers(name, argument, value):
    takes_none = ("linear_margin_cross_entropy", "supervised_contrastive")  # nothing is ignored
    if value is None and argument == "ignore_index" and name in takes_none:
        return
    refused(name, argument, value, r"(an int of 71 bits|\w+), expected")


@pytest.mark.parametrize(("name", "argument"), arguments(lambda value: type(value) is int))
def test_integers_of_numpy(name, argument):
    """``labels.max() + 1`` of an array is no ``int``; torch's layers take it too."""
    function, accepted = CALLS[name]
    function(**{**accepted, argument: np.int64(accepted[argument])})


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_sizes_of_numpy(kind):
    head = lt.LinearHead(kind(3), kind(5), lt.LogitAdjustmentLoss(COUNTS, ignore_index=kind(7)))
    assert head.weight.shape == (5, 3)
    assert type(head.loss.ignore_index) is int
    assert head(FEATURES, torch.tensor([0, 7, 1, 7])).isfinite()
    with pytest.raises(ValueError, match="in_features: got 0, expected an int >= 1"):
        lt.LinearHead(kind(0), 5)


@pytest.mark.parametrize(("name", "argument"), arguments(lambda value: isinstance(value, float)))
@pytest.mark.parametrize("value", [10**400, math.nan, math.inf, True, "3", None, 1j], ids=lambda value: str(value)[:9])
def test_numbers(name, argument, value):
    refused(name, argument, value, r"(an int of 1329 bits|\w+), expected")


INTEGER_TENSORS = arguments(
    lambda value: isinstance(value, torch.Tensor) and value.dim() > 0 and value.dtype == torch.int64
)
READ = [each for each in INTEGER_TENSORS if each.values[0] not in ("mixup", "cutmix")]  # these hand classes on


@pytest.mark.parametrize(("name", "argument"), READ)
@pytest.mark.parametrize("value", [2**64 - 100, 2**64 - 1, 2**63], ids=["-100 wrapped", "-1 wrapped", "2^63"])
def test_unsigned_integers_do_not_wrap(name, argument, value):
    wrong = torch.full(CALLS[name][1][argument].shape, value, dtype=torch.uint64)
    refused(name, argument, wrong, rf"{value}, expected", (IndexError, ValueError))


@pytest.mark.parametrize(("name", "argument"), INTEGER_TENSORS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_classes_and_labels_are_integers(name, argument, kind):
    if (name, argument, kind) == ("linear_margin_cross_entropy", "target", torch.float32):
        return  # probabilities, which this call's ignore_index does not go with
    message = r"(dtype torch\.\w+|class probabilities \(dtype torch.float32\) of shape .*), expected"
    refused(name, argument, CALLS[name][1][argument].to(kind), message)


@pytest.mark.parametrize(
    ("name", "argument", "label"),
    [
        *[("ClassQueue.enqueue", "labels", label) for label in (5, -2)],
        *[("FeatureQueue.enqueue", "labels", label) for label in (2**31, -2)],
        ("ClassQueue.enqueue", "ids", -2),
        *[(f"{metric}.update", "target", label) for metric in ("ShotGroupAccuracy", "CalibrationError")
          for label in (5, -1)],
        *[("calibration_error", "target", label) for label in (5, -1)],
        *[("WithinClassSpread.update", "labels", label) for label in (5, -1)],
    ],
)  # fmt: skip
def test_labels_that_no_class_has(name, argument, label):
    function, given = CALLS[name]
    with pytest.raises(IndexError, match=rf"^{argument}: row 1 has (class|id) {label}, expected"):
        function(**{**given, argument: torch.tensor([0, label, 1, 2])})


@pytest.mark.parametrize("name", ["linear_margin_cross_entropy", "linear_topk", "linear_expert_fusion"])
def test_a_linear_bias_has_a_dtype_that_fits_its_weight(name):
    function, given = CALLS[name]
    function(**{**given, "linear_bias": given["linear_bias"].bfloat16()})
    refused(name, "linear_bias", given["linear_bias"].double(), r"dtype torch.float64, expected torch.float32 as")


@pytest.mark.parametrize(
    "make",
    [lt.ArcFaceLoss, lambda margin: lt.losses.MarginCrossEntropyBase(margin=margin, margin_type="angular")],
    ids=["ArcFace", "base"],
)
@pytest.mark.parametrize(
    "form",
    [float, torch.tensor, lambda angle: torch.nn.Parameter(torch.tensor(angle)), lambda angle: [0.1, angle]],
    ids=["number", "tensor", "parameter", "by class"],
)
@pytest.mark.parametrize("angle", [28.6, -0.1], ids=["degrees", "negative"])
def test_angles_are_radians(make, form, angle):
    make(form(0.5))
    with pytest.raises(ValueError, match=rf"^margin: got {angle}.*, expected an(gles| angle) in \[0, pi\]"):
        make(form(angle))


@pytest.mark.parametrize("bounds", [(3.0, 30.0), (-0.1, 0.5)])
def test_bounds_of_angles_are_radians(bounds):
    with pytest.raises(ValueError, match=r"^margin_bounds: got .*, expected angles in \[0, pi\]"):
        lt.ArcFaceLoss.from_counts(COUNTS, margin_bounds=bounds)


@pytest.mark.parametrize("option", [{"zero_counts": "drop"}, {"zero_counts": -1}, {"device": "gpu"}, {"dtype": "half"},
                                    {"dtype": torch.int64}, {"persistent": 1}], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "loss", [lt.CosFaceLoss, lambda **options: lt.LDAMLoss(COUNTS, **options)], ids=["without counts", "with counts"]
)
def test_options_of_losses(loss, option):
    with pytest.raises((TypeError, ValueError), match=rf"^{next(iter(option))}: got .*, expected"):
        loss(**option)


@pytest.mark.parametrize("labels", [-1, 0])
def test_rows_of_no_class_leave_an_empty_slot(labels):
    queue = queues.FeatureQueue(2, 3)
    queue.enqueue(torch.ones(1, 3), torch.tensor([labels]))
    assert queue.labels.tolist() == [labels, -1]
