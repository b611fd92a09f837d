"""Class counts of long-tailed data sets, shipped with the package, and of a user's own lists.

The caveats of the shipped counts are in ``lt_kernels/data/class_counts/README.md``. One matters most: ``"inat18_like"``
is synthetic. iNaturalist 2018's real train counts are not shipped; load them from your own copy of the train list with
``class_counts_from_file``.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import check_choice, quoted

_FILES = {
    "cifar10_lt_if100": "cifar10_lt_if100_train.txt",
    "cifar100_lt_if10": "cifar100_lt_if10_train.txt",
    "cifar100_lt_if50": "cifar100_lt_if50_train.txt",
    "cifar100_lt_if100": "cifar100_lt_if100_train.txt",
    "imagenet_lt": "imagenet_lt_train.txt",
    "inat18_like": "inaturalist2018_like_synthetic_train.txt",
    "inat18_val": "inaturalist2018_val.txt",
    "lvis_v0_5_images": "lvis_v0_5_train_image_count.txt",
    "lvis_v0_5_instances": "lvis_v0_5_train_instance_count.txt",
    "lvis_v1_images": "lvis_v1_train_image_count.txt",
    "places_lt": "places_lt_train.txt",
}
_SUPERCATEGORY_FILES = {"inat18": "inaturalist2018_class_supercategory.txt"}

Format = Literal["counts", "labels", "path_label", "annotations"]
_FORMATS = ("counts", "labels", "path_label", "annotations")


def available() -> list[str]:
    """Return the names that ``class_counts`` knows."""
    return sorted(_FILES)


def class_counts(name: str) -> Tensor:
    """Return the samples per class of a data set, int64 [C] on the CPU.

    Args:
        name: ``"imagenet_lt"``, ``"places_lt"``, ``"cifar100_lt_if100"`` / ``50`` / ``10``, ``"cifar10_lt_if100"``,
            ``"lvis_v1_images"``, ``"lvis_v0_5_images"``, ``"lvis_v0_5_instances"`` (train splits); ``"inat18_val"``
            (the balanced validation list); ``"inat18_like"`` (SYNTHETIC: the size of iNaturalist 2018, not its counts).

    Raises:
        ValueError: another name.

    Example:
        >>> counts = class_counts("imagenet_lt")
        >>> len(counts), counts.sum().item(), counts.min().item(), counts.max().item()
        (1000, 115846, 5, 1280)
    """
    if not isinstance(name, str) or name not in _FILES:
        hint = ""
        if "inat" in str(name).lower():
            hint = (
                "; iNaturalist's train counts are not shipped: 'inat18_like' is a synthetic stand-in, "
                "class_counts_from_file(path, format='annotations') reads your own train list"
            )
        raise ValueError(f"name: got {name!r}, expected one of {quoted(available())}{hint}")
    return torch.tensor([int(line) for line in _lines(_FILES[name])], device="cpu")


def class_supercategories(name: str = "inat18") -> list[str]:
    """Return the super-category of each class: iNaturalist 2018's 14 names over its 8,142 classes.

    Raises:
        ValueError: another name than ``"inat18"``.

    Example:
        >>> names = class_supercategories("inat18")
        >>> len(names), len(set(names)), names[0]
        (8142, 14, 'Animalia')
    """
    check_choice("name", name, tuple(_SUPERCATEGORY_FILES))
    return _lines(_SUPERCATEGORY_FILES[name])


def class_counts_from_file(
    path: str | os.PathLike[str],
    *,
    format: Format,
    num_classes: int | None = None,
    unit: Literal["annotations", "images"] = "annotations",
) -> Tensor:
    """Count the samples per class in a train list of your own, int64 [C] on the CPU.

    Args:
        path: a text file (blank lines are skipped) or an annotation JSON.
        format: what it holds.
            ``"counts"``: a count per line, line i being class i.
            ``"labels"``: a class index per line.
            ``"path_label"``: ``path/to/image.jpg 17`` per line, the class index last (ImageNet-LT and Places-LT lists).
            ``"annotations"``: JSON as of COCO, LVIS and iNaturalist: ``annotations`` with a ``category_id`` each, and
            ``categories`` with an ``id`` each. Class i is the category with the i-th smallest id.
        num_classes: C; default what the file implies (the largest label + 1, or all lines or categories). Give it
            where the last classes may have no samples.
        unit: for ``"annotations"``: count each annotation, or each image once per category (``image_id``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line or an annotation that does not fit; the message names the file, the place and what it found.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("a/0.jpg 0\\na/1.jpg 0\\nb/2.jpg 2\\n")
        ...     file.flush()
        ...     class_counts_from_file(file.name, format="path_label")
        tensor([2, 0, 1])
    """
    check_choice("format", format, _FORMATS)
    check_choice("unit", unit, ("annotations", "images"), "'annotations' or 'images'")
    if unit == "images" and format != "annotations":
        raise ValueError(f"unit: got 'images' with format={format!r}, expected format='annotations'")
    path = Path(path)
    if format == "annotations":
        return _from_annotations(path, num_classes, unit)
    values = _integers(path, last_field=format == "path_label")
    if format == "counts":
        if num_classes is not None and num_classes != len(values):
            raise ValueError(f"{path}: got {len(values)} counts, expected num_classes={num_classes}")
        return torch.tensor(values, device="cpu")
    return _count(values, num_classes, str(path))


def _lines(file: str) -> list[str]:
    return (resources.files(__package__) / "data" / "class_counts" / file).read_text("utf-8").split()


def _integers(path: Path, last_field: bool) -> list[int]:
    """Return the non-negative integer of each line."""
    expected = "'path label'" if last_field else "one integer"
    values = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        fields = line.rsplit(maxsplit=1) if last_field else [line.strip()]
        if not line.strip():
            continue
        if not fields[-1].isdecimal() or (last_field and len(fields) != 2):
            raise ValueError(f"{path}, line {number}: got {line[:80]!r}, expected {expected} with an integer >= 0")
        values.append(int(fields[-1]))
    if not values:
        raise ValueError(f"{path}: got no lines, expected {expected} per line")
    return values


def _count(labels: list[int], num_classes: int | None, where: str) -> Tensor:
    if num_classes is not None and labels and max(labels) >= num_classes:
        raise ValueError(f"{where}: got label {max(labels)}, expected labels below num_classes={num_classes}")
    return torch.bincount(torch.tensor(labels, dtype=torch.int64, device="cpu"), minlength=num_classes or 0)


def _from_annotations(path: Path, num_classes: int | None, unit: str) -> Tensor:
    try:
        content = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got no valid JSON ({error}), expected an annotation file") from error
    categories = _field(path, content, "categories", "id")
    class_of = {category: index for index, category in enumerate(sorted(set(categories)))}
    if num_classes is not None and num_classes != len(class_of):
        raise ValueError(f"{path}: got {len(class_of)} categories, expected num_classes={num_classes}")
    annotated = _field(path, content, "annotations", "category_id")
    if unit == "images":
        images = _field(path, content, "annotations", "image_id")
        annotated = [category for _, category in dict.fromkeys(zip(images, annotated, strict=True))]
    labels = []
    for category in annotated:
        if category not in class_of:
            raise ValueError(f"{path}: got category_id {category!r} in an annotation, expected an id of 'categories'")
        labels.append(class_of[category])
    return _count(labels, len(class_of), str(path))


def _field(path: Path, content: Any, table: str, key: str) -> list[Any]:
    """Return ``key`` of every entry of ``content[table]``."""
    entries = content.get(table) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: got no list {table!r}, expected a JSON object with 'annotations' and 'categories'")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or key not in entry:
            raise ValueError(f"{path}: {table}[{position}] has no {key!r}, expected one")
    return [entry[key] for entry in entries]
