"""Accuracies and spread against scikit-learn and plain Python; calibration against numpy and torchmetrics."""

from __future__ import annotations

import copy
import doctest
import math
import pickle
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from _refused import refused
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lt_kernels import metrics
from lt_kernels.datasets import class_counts
from lt_kernels.functional import expert_fusion
from lt_kernels.metrics import (
    CalibrationError,
    ShotGroupAccuracy,
    WithinClassSpread,
    calibration_error,
    reliability_diagram,
    within_class_spread,
)
from lt_kernels.priors import shot_groups

COUNTS = [500, 101, 100, 60, 20, 19, 3, 0]  # training samples: groups 0 0 | 1 1 1 | 2 2 2
C = len(COUNTS)
GROUPS = {"many": [0, 1], "medium": [2, 3, 4], "few": [5, 6, 7]}


def sample(rows: int, classes: int = C, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right about half the time, and unbalanced targets."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target = torch.where(torch.rand(rows, generator=generator) < 0.3, 0, target)
    logits = torch.randn(rows, C, generator=generator)
    logits[torch.arange(rows), target] += 1.5
    return logits, target


def values(metric: ShotGroupAccuracy) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_against_scikit_learn_and_plain_python():
    logits, target = sample(400)
    predicted = logits.argmax(1)
    metric = ShotGroupAccuracy(COUNTS)
    metric.update(logits, target)
    recall = [(predicted[target == c] == c).double().mean().item() for c in range(C)]
    expected = {
        "overall": accuracy_score(target, predicted),
        **{name: sum(recall[c] for c in classes) / len(classes) for name, classes in GROUPS.items()},
        "balanced": balanced_accuracy_score(target, predicted),
    }
    assert values(metric) == pytest.approx(expected, rel=1e-6)
    assert metric.per_class().tolist() == pytest.approx(recall, rel=1e-6)
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in metric.compute().values())


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_classes_without_test_samples_are_left_out():
    logits, target = sample(200, classes=5)
    metric = ShotGroupAccuracy(COUNTS)
    metric.update(logits, target)
    assert values(metric)["balanced"] == pytest.approx(balanced_accuracy_score(target, logits.argmax(1)), rel=1e-6)
    assert math.isnan(values(metric)["few"])
    assert metric.per_class().isnan().tolist() == [False] * 5 + [True] * 3


#: Accuracies of ResNet-50 on iNaturalist 2018, in percent: (all, many, medium, few). The first five stand in
#: MODEL_ZOO.md of frank-xwang/RIDE-LongTailRecognition, the next three in Kang et al. (ICLR 2020), the last in Zhang et
#: al. (NeurIPS 2022), whose cross-entropy is trained for longer.
PUBLISHED = {
    "cross-entropy": (61.7, 72.2, 63.0, 57.2),
    "learnable weight scaling": (65.9, 65.0, 66.3, 65.5),
    "RIDE, 3 experts": (71.2, 70.2, 71.2, 71.6),
    "RIDE, 4 experts, distilled": (72.6, 70.9, 72.5, 73.1),
    "RIDE, 6 experts": (72.9, 71.1, 72.9, 73.3),
    "nearest class mean": (58.2, 55.5, 57.9, 59.3),
    "classifier re-training": (65.2, 69.0, 66.0, 63.2),
    "tau-normalised": (65.6, 65.6, 65.3, 65.9),
    "cross-entropy, longer": (64.7, 74.7, 66.3, 60.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_add_up_with_the_groups_of_inaturalist(name):
    """Three images of each class are tested, as many right in each group as is published: the rest must follow."""
    overall, *of_groups = PUBLISHED[name]
    counts = class_counts("inat18_like")
    target = torch.arange(len(counts)).repeat_interleave(3)
    preds = (target + 1) % len(counts)
    for group, accuracy in enumerate(of_groups):
        rows = (shot_groups(counts)[target] == group).nonzero().flatten()
        right = rows[: round(accuracy / 100 * len(rows))]
        preds[right] = target[right]
    metric = ShotGroupAccuracy(counts)
    metric.update(preds, target)
    percent = {name: 100 * value for name, value in values(metric).items()}
    assert [percent[name] for name in ("many", "medium", "few")] == pytest.approx(of_groups, abs=0.02)
    assert percent["overall"] == pytest.approx(overall, abs=0.06)
    assert percent["balanced"] == pytest.approx(percent["overall"], abs=1e-4)  # as many images of each class


def test_batches_and_orders_do_not_matter():
    logits, target = sample(300)
    whole, parts = ShotGroupAccuracy(COUNTS), ShotGroupAccuracy(COUNTS)
    whole.update(logits, target)
    for rows in torch.randperm(300, generator=torch.Generator().manual_seed(1)).split(70):
        parts.update(logits[rows], target[rows])
    assert values(parts) == values(whole)
    parts.reset()
    assert parts.total.sum() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_predicted_classes_and_integer_targets(dtype):
    logits, target = sample(100)
    by_logits, by_class = ShotGroupAccuracy(COUNTS), ShotGroupAccuracy(COUNTS)
    by_logits.update(logits.bfloat16().float(), target)
    by_class.update(logits.bfloat16().argmax(1).to(dtype), target.to(dtype))
    assert values(by_class) == values(by_logits)


def test_segmentation():
    logits, target = sample(120)
    images = logits.reshape(2, 6, 10, C).permute(0, 3, 1, 2)
    flat, pixels = ShotGroupAccuracy(COUNTS), ShotGroupAccuracy(COUNTS)
    flat.update(logits, target)
    pixels.update(images, target.reshape(2, 6, 10))
    assert values(pixels) == values(flat)


def test_ignored_targets():
    logits, target = sample(100)
    ignored = target.clone()
    ignored[::2] = 255
    some, kept = ShotGroupAccuracy(COUNTS, ignore_index=255), ShotGroupAccuracy(COUNTS)
    some.update(logits, ignored)
    kept.update(logits[1::2], target[1::2])
    assert values(some) == values(kept)


def test_custom_bounds():
    metric = ShotGroupAccuracy(COUNTS, many_above=400, few_below=100)
    assert metric.shot_group.tolist() == [0, 1, 1, 2, 2, 2, 2, 2]
    metric.update(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]))
    assert values(metric) == pytest.approx(
        {"overall": 2 / 3, "many": 1.0, "medium": 0.5, "few": math.nan, "balanced": 2 / 3}, nan_ok=True
    )


class TestAsTorchmetrics:
    def test_forward_gives_the_batch_and_accumulates(self):
        metric = ShotGroupAccuracy(COUNTS)
        assert isinstance(metric, Metric)
        assert metric(torch.tensor([0, 0]), torch.tensor([0, 0]))["overall"] == 1
        assert metric(torch.tensor([0, 0]), torch.tensor([0, 1]))["overall"] == 0.5
        assert values(metric)["overall"] == 0.75

    def test_collection_flattens_the_names(self):
        collection = MetricCollection([ShotGroupAccuracy(COUNTS)], prefix="val/")
        collection.update(*sample(50))
        assert set(collection.compute()) == {f"val/{name}" for name in ("overall", "many", "medium", "few", "balanced")}

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies(self, duplicate):
        metric = ShotGroupAccuracy(COUNTS)
        metric.update(*sample(50))
        twin = duplicate(metric)
        assert values(twin) == values(metric)
        twin.update(*sample(50, seed=1))
        assert twin.total.sum() == 2 * metric.total.sum()

    def test_states_of_processes_are_summed(self):
        halves = [ShotGroupAccuracy(COUNTS), ShotGroupAccuracy(COUNTS)]
        whole = ShotGroupAccuracy(COUNTS)
        for seed, half in enumerate(halves):
            half.update(*sample(60, seed=seed))
            whole.update(*sample(60, seed=seed))
        for name, reduce in whole._reductions.items():
            setattr(halves[0], name, reduce(torch.stack([getattr(half, name) for half in halves])))
        assert values(halves[0]) == values(whole)


@refused(
    "preds, target",
    (torch.zeros(2, 3), torch.tensor([0, 1]), ValueError, "class_counts: got 8 classes, expected 3 as preds"),
    (torch.zeros(2), torch.tensor([0, 1]), ValueError, "preds: got shape (2,), expected [N, 8, ...]"),
    (torch.tensor([0, 1]), torch.tensor([0]), ValueError, "target: got shape (1,), expected (2,), one class per"),
    (torch.tensor([0]), torch.tensor([0.0]), TypeError, "target: got dtype torch.float32, expected an integer"),
    ([0], torch.tensor([0]), TypeError, "preds: got list, expected a Tensor"),
    (torch.tensor([0, 1]), torch.tensor([0, 8]), IndexError, "target: row 1 has class 8, expected 0 <= class < 8"),
    (torch.tensor([0, 1]), torch.tensor([-1, 1]), IndexError, "target: row 0 has class -1, expected 0 <= class"),
    (torch.tensor([9, 1]), torch.tensor([0, 1]), IndexError, "preds: row 0 has class 9, expected 0 <= class < 8"),
)
def test_bad_updates_count_nothing(preds, target, refusal):
    metric = ShotGroupAccuracy(COUNTS)
    with refusal:
        metric.update(preds, target)
    assert metric.total.sum() == 0


def test_without_validation_what_is_no_class_is_left_out():
    metric = ShotGroupAccuracy(COUNTS, validate_args=False)
    metric.update(torch.tensor([0, 1, 99]), torch.tensor([0, 99, 1]))
    assert metric.total.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert values(metric)["overall"] == 0.5


@refused(
    "arguments",
    ({"class_counts": [1, -1]}, ValueError, "class_counts: got -1 at class 1, expected counts >= 0"),
    ({"class_counts": None}, TypeError, "class_counts: got NoneType, expected a 1-D sequence"),
    ({"class_counts": [1, 2], "many_above": 5}, ValueError, "few_below: got 20, expected at most many_above + 1 = 6"),
)
def test_bad_construction(arguments, refusal):
    with refusal:
        ShotGroupAccuracy(**arguments)


def embedded(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [rows, 5] and labels; classes 1 and 6 have no sample and one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (rows,), generator=generator)
    labels[(labels == 1) | (labels == 6)] = 0
    labels[0] = 6
    return torch.randn(rows, 5, generator=generator), labels


def spread_in_numpy(embeddings: torch.Tensor, labels: torch.Tensor, normalize: bool = True) -> dict[str, float]:
    z, y = embeddings.double().numpy(), labels.numpy()
    if normalize:
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
    of_class = {}
    for c in np.unique(y):
        members = z[y == c]
        if len(members) > 1:
            of_class[c] = np.mean(np.sum((members - members.mean(0)) ** 2, 1))
    groups = {name: [of_class[c] for c in classes if c in of_class] for name, classes in GROUPS.items()}
    return {name: float(np.mean(each)) for name, each in {**groups, "all": list(of_class.values())}.items()}


class TestWithinClassSpread:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_against_numpy(self, normalize):
        z, y = embedded(200)
        expected = pytest.approx(spread_in_numpy(z, y, normalize), rel=1e-6)
        metric = WithinClassSpread(COUNTS, 5, normalize=normalize)
        for part in (slice(0, 3), slice(3, 150), slice(150, None)):
            metric.update(z[part], y[part].int())
        assert values(metric) == expected
        functional = within_class_spread(z, y, COUNTS, normalize=normalize)
        assert {name: value.item() for name, value in functional.items()} == expected
        assert metric.per_class().isnan().tolist() == [c in (1, 6) for c in range(C)]

    def test_a_common_offset_costs_no_digits(self):
        z, y = embedded(200)
        far = within_class_spread(1e3 + z, y, COUNTS, normalize=False)
        assert far["all"].item() == pytest.approx(spread_in_numpy(1e3 + z, y, False)["all"], rel=1e-5)

    def test_groups_without_a_measured_class_are_nan(self):
        result = within_class_spread(torch.randn(3, 4), torch.tensor([0, 0, 2]), COUNTS)
        assert result["many"] > 0
        assert result["medium"].isnan()
        assert result["few"].isnan()
        assert all(value.isnan() for value in WithinClassSpread(COUNTS, 4).compute().values())

    def test_ignored_and_invalid_labels(self):
        z, y = embedded(200)
        expected = spread_in_numpy(z, y)
        more, of_more = torch.cat([z, torch.full((3, 5), torch.nan)]), torch.cat([y, torch.full((3,), -1)])
        metric = WithinClassSpread(COUNTS, 5, ignore_index=-1)
        metric.update(more, of_more)
        assert values(metric) == pytest.approx(expected, rel=1e-6)
        lenient = WithinClassSpread(COUNTS, 5, validate_args=False)
        lenient.update(more, of_more + 100 * (of_more == -1))
        assert values(lenient) == pytest.approx(expected, rel=1e-6)
        with pytest.raises(IndexError, match="labels: row 200 has class -1, expected 0 <= class < 8"):
            within_class_spread(more, of_more, COUNTS)

    def test_as_a_metric(self):
        metric = WithinClassSpread(COUNTS, 5)
        assert isinstance(metric, Metric)
        metric.update(*embedded(100))
        twin = pickle.loads(pickle.dumps(metric))
        assert values(twin) == pytest.approx(values(metric), nan_ok=True)
        halves, whole = [WithinClassSpread(COUNTS, 5), WithinClassSpread(COUNTS, 5)], WithinClassSpread(COUNTS, 5)
        for seed, half in enumerate(halves):
            half.update(*embedded(60, seed))
            whole.update(*embedded(60, seed))
        for name, reduce in whole._reductions.items():
            setattr(halves[0], name, reduce(torch.stack([getattr(half, name) for half in halves])))
        assert values(halves[0]) == pytest.approx(values(whole), nan_ok=True)
        metric.reset()
        assert metric.sums.abs().sum() == 0

    @refused(
        "embeddings, labels",
        (torch.zeros(2, 4), torch.tensor([0, 1]), ValueError, "embeddings: got shape (2, 4), expected [N, 5]"),
        (torch.zeros(2, 5).long(), torch.tensor([0, 1]), TypeError, "embeddings: got dtype torch.int64, expected a f"),
        (None, torch.tensor([0, 1]), TypeError, "embeddings: got NoneType, expected a Tensor"),
        (torch.zeros(2, 5), torch.tensor([0]), ValueError, "labels: got shape (1,), expected (2,), one per embedding"),
        (torch.zeros(2, 5), torch.zeros(2), TypeError, "labels: got dtype torch.float32, expected an integer dtype"),
        (torch.zeros(2, 5), torch.tensor([0, 8]), IndexError, "labels: row 1 has class 8, expected 0 <= class < 8"),
        (torch.zeros(2, 5, device="meta"), torch.tensor([0, 1]), ValueError, "embeddings: got device meta, expected"),
    )
    def test_bad_updates_count_nothing(self, embeddings, labels, refusal):
        metric = WithinClassSpread(COUNTS, 5)
        with refusal:
            metric.update(embeddings, labels)
        assert metric.count.sum() == 0

    def test_bad_construction(self):
        with pytest.raises(ValueError, match="dim: got 0, expected an int >= 1"):
            WithinClassSpread(COUNTS, 0)
        with pytest.raises(TypeError, match="dim: got float, expected an int"):
            WithinClassSpread(COUNTS, 5.0)
        with pytest.raises(ValueError, match="class_counts: got -1"):
            WithinClassSpread([1, -1], 5)
        with pytest.raises(ValueError, match=re.escape("embeddings: got shape (3,), expected a Tensor [N, D]")):
            within_class_spread(torch.zeros(3), torch.zeros(3).long(), COUNTS)


def judged(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences and whether they were right: overconfident ones, a few of exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(rows, generator=generator).sqrt()
    confidence[:3] = torch.tensor([0.0, 1.0, 1.0])
    return confidence, torch.rand(rows, generator=generator) < confidence**2


def in_numpy(confidence: torch.Tensor, correct: torch.Tensor, bins: int) -> tuple[float, float]:
    """ECE and MCE of bins (low, high], the first with 0."""
    p, right = confidence.double().numpy(), correct.numpy()
    borders = np.linspace(0, 1, bins + 1)
    ece = mce = 0.0
    for low, high in pairwise(borders):
        inside = (p > low) & (p <= high) | (p == 0) & (low == 0)
        if inside.any():
            gap = abs(p[inside].mean() - right[inside].mean())
            ece, mce = ece + gap * inside.mean(), max(mce, gap)
    return ece, mce


class TestCalibration:
    @pytest.mark.parametrize("bins", [1, 4, 15])
    def test_against_numpy(self, bins):
        confidence, correct = judged(500)
        expected = in_numpy(confidence, correct, bins)
        assert [value.item() for value in calibration_error(confidence, correct, bins)] == pytest.approx(expected)
        metric = CalibrationError(bins)
        metric.update(confidence, correct)
        assert [value.item() for value in metric.compute().values()] == pytest.approx(expected)
        assert list(metric.compute()) == ["ece", "mce"]
        assert all(value.dtype == torch.float32 and value.dim() == 0 for value in metric.compute().values())

    def test_against_torchmetrics_where_no_confidence_is_on_a_border(self):
        confidence, correct = (value[3:] for value in judged(500))
        ours = calibration_error(confidence, correct)
        for value, norm in zip(ours, ("l1", "max"), strict=True):
            theirs = binary_calibration_error(confidence, correct.long(), n_bins=15, norm=norm)
            torch.testing.assert_close(value, theirs)
        probabilities, target = sample(400)
        probabilities = probabilities.softmax(1)
        for value, norm in zip(calibration_error(probabilities, target), ("l1", "max"), strict=True):
            theirs = multiclass_calibration_error(probabilities, target, C, n_bins=15, norm=norm)
            torch.testing.assert_close(value, theirs)

    def test_a_confidence_on_a_border_belongs_to_the_bin_below(self):
        confidence = torch.tensor([0.5, 0.5, 0.75, 1.0], dtype=torch.float64)
        correct = torch.tensor([True, False, True, False])
        ece, mce = calibration_error(confidence, correct, 2)  # gaps: 0 | (1.75 - 1) / 2
        assert (ece.item(), mce.item()) == (0.1875, 0.375)

    def test_probabilities_and_their_confidence_say_the_same(self):
        logits, target = sample(300)
        p = logits.softmax(1)
        expected = calibration_error(p.amax(1), p.argmax(1) == target)
        assert calibration_error(p, target) == expected
        fused = expert_fusion([logits, logits])
        torch.testing.assert_close(calibration_error(fused.confidence, fused.prediction == target), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtypes(self, dtype):
        confidence, correct = judged(200)
        expected = in_numpy(confidence.to(dtype), correct, 15)
        ours = calibration_error(confidence.to(dtype), correct)
        assert [value.item() for value in ours] == pytest.approx(expected)

    def test_batches_orders_and_processes_do_not_matter(self):
        confidence, correct = judged(300)
        whole, halves = CalibrationError(), [CalibrationError(), CalibrationError()]
        whole.update(confidence, correct)
        for i, rows in enumerate(torch.randperm(300, generator=torch.Generator().manual_seed(1)).split(70)):
            halves[i % 2].update(confidence[rows], correct[rows])
        for name, reduce in whole._reductions.items():
            setattr(halves[0], name, reduce(torch.stack([getattr(half, name) for half in halves])))
        for value, expected in zip(halves[0].compute().values(), whole.compute().values(), strict=True):
            torch.testing.assert_close(value, expected)
        whole.reset()
        assert whole.sums.sum() == 0
        assert whole.sums.shape == (15, 3)  # sums, not samples

    def test_collection_and_copies(self):
        collection = MetricCollection([CalibrationError(), ShotGroupAccuracy(COUNTS)], prefix="val/")
        logits, target = sample(50)
        collection.update(logits.softmax(1), target)
        assert {"val/ece", "val/mce", "val/overall"} <= set(collection.compute())
        for twin in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
            assert twin.compute() == collection.compute()

    def test_ignored_targets(self):
        logits, target = sample(100)
        p, ignored = logits.softmax(1), target.clone()
        ignored[::2] = 255
        p[0] = math.nan
        expected = calibration_error(p[1::2], target[1::2])
        assert calibration_error(p, ignored, ignore_index=255) == expected
        metric = CalibrationError(ignore_index=255)
        metric.update(p, ignored)
        assert tuple(metric.compute().values()) == expected

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_nothing_and_nan_are_nan(self):
        assert all(value.isnan() for value in CalibrationError().compute().values())
        assert all(value.isnan() for value in calibration_error(torch.zeros(0, 4), torch.zeros(0).long()))
        assert all(
            value.isnan() for value in calibration_error(torch.tensor([0.5, math.nan]), torch.tensor([True, False]))
        )

    def test_perfect_calibration(self):
        confidence = torch.full((4,), 0.75)
        ece, mce = calibration_error(confidence, torch.tensor([True, True, True, False]))
        assert ece == mce == 0

    BAD = (
        ({"preds": [0.5]}, TypeError, "preds: got list, expected a Tensor"),
        ({"preds": torch.tensor([1])}, TypeError, "preds: got dtype torch.int64, expected a floating-point dtype"),
        ({"preds": torch.zeros(1, 2, 3)}, ValueError, "preds: got shape (1, 2, 3), expected probabilities [N, C] or"),
        ({"preds": torch.tensor([1.5])}, ValueError, "preds: got 1.5, expected probabilities in [0, 1]"),
        ({"preds": torch.tensor([-0.5])}, ValueError, "preds: got -0.5, expected probabilities in [0, 1]"),
        ({"target": torch.tensor([1])}, TypeError, "target: got dtype torch.int64 with confidences [N], expected bool"),
        ({"target": torch.tensor([True] * 2)}, ValueError, "target: got shape (2,), expected (1,), one per prediction"),
        ({"preds": torch.tensor([[0.5, 0.5]])}, TypeError, "target: got dtype torch.bool, expected an integer dtype"),
    )

    @pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message.split(",")[0] for *_, message in BAD])
    def test_bad_updates_count_nothing(self, change, error, message):
        arguments = {"preds": torch.tensor([0.5]), "target": torch.tensor([True]), **change}
        metric = CalibrationError()
        for function in (calibration_error, metric.update):
            with pytest.raises(error, match=re.escape(message)):
                function(**arguments)
        assert metric.sums.sum() == 0

    @pytest.mark.parametrize(
        ("bins", "error", "message"),
        [(0, ValueError, "bins: got 0, expected an int >= 1"), (2.0, TypeError, "bins: got float, expected an int")],
        ids=["zero", "float"],
    )
    def test_bad_bins(self, bins, error, message):
        confidence, correct = judged(10)
        for function in (
            lambda: CalibrationError(bins),
            lambda: calibration_error(confidence, correct, bins),
            lambda: reliability_diagram(confidence, correct, "never.png", bins),
        ):
            with pytest.raises(error, match=re.escape(message)):
                function()


def test_without_torchmetrics_only_construction_fails():
    code = (
        "import sys; sys.modules['torchmetrics'] = sys.modules['matplotlib'] = None\n"
        "import torch\n"
        "from lt_kernels.metrics import CalibrationError, ShotGroupAccuracy, calibration_error, reliability_diagram\n"
        "print(calibration_error(torch.tensor([0.5]), torch.tensor([True])).ece.item())\n"
        "one, right = torch.ones(1), torch.ones(1).bool()\n"
        "diagram = lambda: reliability_diagram(one, right, 'never.png')\n"
        "for call in (lambda: ShotGroupAccuracy([3, 4]), CalibrationError, diagram):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "0.5",
        *["lt_kernels.metrics needs torchmetrics: pip install 'lt_kernels[metrics]'"] * 2,
        "reliability_diagram needs matplotlib: pip install matplotlib",
    ]


class TestReliabilityDiagram:
    def test_bars_are_the_bins(self):
        confidence, correct = judged(2000)
        axis = Figure().add_subplot()
        assert reliability_diagram(confidence, correct, axis, bins=5) is axis
        accuracy, gap = axis.containers
        for low, bar, rest in zip((0.0, 0.2, 0.4, 0.6, 0.8), accuracy, gap, strict=True):
            inside = (confidence.double() > low) & (confidence.double() <= low + 0.2) | (confidence == low)
            assert bar.get_x() == pytest.approx(low)
            assert bar.get_height() == pytest.approx(correct[inside].double().mean().item())
            top = rest.get_y() + rest.get_height()
            assert top == pytest.approx(confidence[inside].double().mean().item())
        ece, mce = calibration_error(confidence, correct, 5)
        assert axis.get_title() == f"ECE {ece:.3f}, MCE {mce:.3f}"

    @pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "path"])
    def test_saves_a_figure(self, kind, tmp_path):
        path = tmp_path / "diagram.png"
        reliability_diagram(*judged(100), kind(path))
        assert path.read_bytes()[:4] == b"\x89PNG"

    def test_empty_bins_have_no_bar(self):
        axis = reliability_diagram(torch.full((4,), 0.95), torch.ones(4, dtype=torch.bool), Figure().add_subplot())
        assert [len(bars) for bars in axis.containers] == [1, 1]

    @refused(
        "change",
        ({"confidence": torch.ones(2, 2)}, ValueError, "confidence: got shape (2, 2), expected [N]"),
        ({"confidence": torch.tensor([2.0])}, ValueError, "confidence: got 2, expected probabilities in [0, 1]"),
        ({"correct": torch.tensor([1])}, TypeError, "correct: got dtype torch.int64"),
        ({"correct": None}, TypeError, "correct: got NoneType, expected a Tensor"),
        ({"path_or_axis": 3}, TypeError, "path_or_axis: got int, expected a file name or matplotlib axes"),
    )
    def test_bad_arguments(self, change, refusal):
        arguments = {"confidence": torch.tensor([0.5]), "correct": torch.tensor([True]), "path_or_axis": "never.png"}
        with refusal:
            reliability_diagram(**{**arguments, **change})


def test_examples_in_docstrings():
    assert doctest.testmod(metrics) == doctest.TestResults(failed=0, attempted=19)
