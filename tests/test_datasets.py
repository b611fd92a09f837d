"""The shipped counts against the facts their README states, and counting from files."""

from __future__ import annotations

import doctest
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from lt_kernels import datasets
from lt_kernels.datasets import available, class_counts, class_counts_from_file, class_supercategories
from lt_kernels.priors import shot_groups

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import inat18_like

#: name: (classes, total, min, max)
FACTS = {
    "imagenet_lt": (1000, 115846, 5, 1280),
    "places_lt": (365, 62500, 5, 4980),
    "lvis_v1_images": (1203, 360952, 1, 1977),
    "lvis_v0_5_images": (1230, 201417, 1, 1145),
    "lvis_v0_5_instances": (1230, 693958, 1, 26148),
    "cifar100_lt_if100": (100, 10847, 5, 500),
    "cifar100_lt_if50": (100, 12608, 10, 500),
    "cifar100_lt_if10": (100, 19573, 50, 500),
    "cifar10_lt_if100": (10, 12406, 50, 5000),
    "inat18_val": (8142, 24426, 3, 3),
    "inat18_like": (8142, 437513, 2, 1000),
}


def test_available_names_are_the_documented_ones():
    assert available() == sorted(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_shipped_counts(name):
    counts = class_counts(name)
    assert counts.dtype == torch.int64
    assert (len(counts), counts.sum().item(), counts.min().item(), counts.max().item()) == FACTS[name]


@pytest.mark.parametrize("factor", [100, 50, 10])
def test_cifar100_lt_is_its_exponential_profile(factor):
    expected = [int(500 * factor ** -(i / 99)) for i in range(100)]
    assert class_counts(f"cifar100_lt_if{factor}").tolist() == expected


def test_imagenet_lt_split():
    assert shot_groups(class_counts("imagenet_lt")).bincount().tolist() == [385, 479, 136]


def test_synthetic_counts_meet_what_is_known_of_the_real_ones():
    counts = class_counts("inat18_like")
    totals: Counter[str] = Counter()
    for name, count in zip(class_supercategories("inat18"), counts.tolist(), strict=True):
        totals[name] += count
    assert totals == inat18_like.TOTALS
    assert totals.total() == 437_513
    assert shot_groups(counts).bincount().tolist() == [842, 4_076, 3_224]


def test_synthetic_counts_are_made_by_the_committed_tool():
    assert inat18_like.text() == inat18_like.FILE.read_text()


def test_each_call_returns_a_tensor_of_its_own():
    class_counts("cifar10_lt_if100").zero_()
    assert class_counts("cifar10_lt_if100").sum() > 0


def test_unknown_names():
    with pytest.raises(ValueError, match="name: got 'cifar', expected one of 'cifar100_lt_if10', "):
        class_counts("cifar")
    with pytest.raises(ValueError, match="name: got 'inat18', .*'inat18_like' is a synthetic stand-in"):
        class_counts("inat18")
    with pytest.raises(ValueError, match="name: got 'inat21', expected one of 'inat18'"):
        class_supercategories("inat21")


@pytest.fixture
def write(tmp_path):
    def write(content, name="list.txt"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


ANNOTATIONS = {
    "categories": [{"id": 30}, {"id": 10}, {"id": 20}, {"id": 40}],
    "annotations": [
        {"image_id": 1, "category_id": 10},
        {"image_id": 1, "category_id": 10},
        {"image_id": 1, "category_id": 30},
        {"image_id": 2, "category_id": 10},
    ],
}


class TestFromFile:
    def test_counts(self, write):
        counts = class_counts_from_file(write("5\n0\n\n 12 \n"), format="counts")
        assert counts.dtype == torch.int64
        assert counts.tolist() == [5, 0, 12]

    def test_labels(self, write):
        assert class_counts_from_file(write("2\n0\n2\n"), format="labels").tolist() == [1, 0, 2]
        assert class_counts_from_file(str(write("2\n0\n")), format="labels", num_classes=5).tolist() == [1, 0, 1, 0, 0]

    def test_path_label(self, write):
        path = write("train/a b/0.jpg 1\ntrain/c/1.jpg\t0\ntrain/c/2.jpg 1\r\n")
        assert class_counts_from_file(path, format="path_label").tolist() == [1, 2]

    def test_annotations_are_ordered_by_category_id(self, write):
        assert class_counts_from_file(write(ANNOTATIONS), format="annotations").tolist() == [3, 0, 1, 0]

    def test_images_per_category(self, write):
        path = write(ANNOTATIONS)
        assert class_counts_from_file(path, format="annotations", unit="images", num_classes=4).tolist() == [2, 0, 1, 0]

    def test_shipped_counts_survive_the_round_trip(self, write):
        counts = class_counts("cifar10_lt_if100")
        labels = torch.arange(10).repeat_interleave(counts)
        path = write("\n".join(f"img/{i}.png {label}" for i, label in enumerate(labels.tolist())))
        assert torch.equal(class_counts_from_file(path, format="path_label"), counts)

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            ("1\n-2\n", {"format": "counts"}, "line 2: got '-2', expected one integer with an integer >= 0"),
            ("1\n2.5\n", {"format": "counts"}, "line 2: got '2.5', expected one integer"),
            ("1\n2\n", {"format": "counts", "num_classes": 3}, "got 2 counts, expected num_classes=3"),
            ("1 2\n", {"format": "labels"}, "line 1: got '1 2', expected one integer"),
            ("1\n7\n", {"format": "labels", "num_classes": 5}, "got label 7, expected labels below num_classes=5"),
            ("a.jpg 1\n\n3\n", {"format": "path_label"}, "line 3: got '3', expected 'path label'"),
            ("a.jpg,1\n", {"format": "path_label"}, "line 1: got 'a.jpg,1', expected 'path label'"),
            ("a.jpg -1\n", {"format": "path_label"}, "line 1: got 'a.jpg -1', expected 'path label'"),
            ("\n", {"format": "labels"}, "got no lines, expected one integer per line"),
            ("{", {"format": "annotations"}, "got no valid JSON"),
            ("[]", {"format": "annotations"}, "got no list 'categories'"),
            ({"categories": []}, {"format": "annotations"}, "got no list 'annotations'"),
            (
                {"categories": [{"name": "a"}], "annotations": []},
                {"format": "annotations"},
                "categories[0] has no 'id', expected one",
            ),
            (
                {"categories": [{"id": 1}], "annotations": [{"category_id": 2}]},
                {"format": "annotations"},
                "got category_id 2 in an annotation, expected an id of 'categories'",
            ),
            (
                {"categories": [{"id": 1}], "annotations": [{"category_id": 1}]},
                {"format": "annotations", "unit": "images"},
                "annotations[0] has no 'image_id', expected one",
            ),
            (
                ANNOTATIONS,
                {"format": "annotations", "num_classes": 3},
                "got 4 categories, expected num_classes=3",
            ),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) and "got" in value else "",
    )
    def test_bad_content(self, write, content, options, message):
        path = write(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
            class_counts_from_file(path, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "csv"}, "format: got 'csv', expected one of 'counts', 'labels', 'path_label', 'annotations'"),
            ({"format": "annotations", "unit": "boxes"}, "unit: got 'boxes', expected 'annotations' or 'images'"),
            ({"format": "labels", "unit": "images"}, "unit: got 'images' with format='labels', expected format='ann"),
        ],
        ids=["format", "unit", "unit-of-a-text-file"],
    )
    def test_bad_options(self, write, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            class_counts_from_file(write("1\n"), **options)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.txt"):
            class_counts_from_file(tmp_path / "none.txt", format="labels")


def test_examples_in_docstrings():
    assert doctest.testmod(datasets) == doctest.TestResults(failed=0, attempted=6)
