"""Shot-group and balanced accuracy against scikit-learn and plain Python."""

from __future__ import annotations

import copy
import doctest
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torchmetrics import Metric, MetricCollection

from lt_kernels import metrics
from lt_kernels.metrics import ShotGroupAccuracy

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


@pytest.mark.parametrize(
    ("preds", "target", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), ValueError, "preds: got shape (2, 3), expected [N, 8, ...]"),
        (torch.zeros(2), torch.tensor([0, 1]), ValueError, "preds: got shape (2,), expected [N, 8, ...]"),
        (torch.tensor([0, 1]), torch.tensor([0]), ValueError, "target: got shape (1,), expected (2,), one class per"),
        (torch.tensor([0]), torch.tensor([0.0]), TypeError, "target: got dtype torch.float32, expected an integer"),
        ([0], torch.tensor([0]), TypeError, "preds: got list, expected a Tensor"),
        (torch.tensor([0, 1]), torch.tensor([0, 8]), IndexError, "target: row 1 has class 8, expected 0 <= class < 8"),
        (torch.tensor([0, 1]), torch.tensor([-1, 1]), IndexError, "target: row 0 has class -1, expected 0 <= class"),
        (torch.tensor([9, 1]), torch.tensor([0, 1]), IndexError, "preds: row 0 has class 9, expected 0 <= class < 8"),
    ],
    ids=["columns", "1d-logits", "lengths", "float-target", "list", "target-high", "target-negative", "pred-high"],
)
def test_bad_updates_count_nothing(preds, target, error, message):
    metric = ShotGroupAccuracy(COUNTS)
    with pytest.raises(error, match=re.escape(message)):
        metric.update(preds, target)
    assert metric.total.sum() == 0


def test_without_validation_what_is_no_class_is_left_out():
    metric = ShotGroupAccuracy(COUNTS, validate_args=False)
    metric.update(torch.tensor([0, 1, 99]), torch.tensor([0, 99, 1]))
    assert metric.total.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert values(metric)["overall"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_counts": [1, -1]}, ValueError, "class_counts: got -1 at class 1, expected counts >= 0"),
        ({"class_counts": None}, TypeError, "class_counts: got NoneType, expected a 1-D sequence"),
        (
            {"class_counts": [1, 2], "many_above": 5},
            ValueError,
            "few_below: got 20, expected at most many_above + 1 = 6",
        ),
    ],
    ids=["negative", "none", "bounds"],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ShotGroupAccuracy(**arguments)


def test_without_torchmetrics_only_construction_fails():
    code = (
        "import sys; sys.modules['torchmetrics'] = None\n"
        "from lt_kernels.metrics import ShotGroupAccuracy\n"
        "try: ShotGroupAccuracy([3, 4])\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "lt_kernels.metrics needs torchmetrics: pip install 'lt_kernels[metrics]'"


def test_examples_in_docstrings():
    assert doctest.testmod(metrics) == doctest.TestResults(failed=0, attempted=4)
