"""Accuracy on long-tailed data, as ``torchmetrics.Metric``: overall, many / medium / few shot, and balanced.

Needs the extra ``lt_kernels[metrics]``: without torchmetrics the module imports, and construction raises ImportError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .priors import SHOT_GROUPS, ClassVector, shot_groups

try:
    from torchmetrics import Metric
except ImportError:

    class Metric:  # type: ignore[no-redef]
        """Stands in for ``torchmetrics.Metric`` where torchmetrics is missing."""

        def __init__(self, *_: Any, **__: Any) -> None:
            raise ImportError("lt_kernels.metrics needs torchmetrics: pip install 'lt_kernels[metrics]'")


class ShotGroupAccuracy(Metric):
    """Top-1 accuracy overall, per shot group, and balanced, accumulated over batches and processes.

    ``compute()`` returns a dict of 0-dim float32 tensors:

    * ``"overall"``: share of all samples that are right.
    * ``"many"``, ``"medium"``, ``"few"``: mean recall of the classes of that group (Liu et al., *Large-Scale
      Long-Tailed Recognition in an Open World*, CVPR 2019). On a balanced test split that is the share of the
      group's samples that are right.
    * ``"balanced"``: mean recall of all classes.

    Means are over classes that have test samples; without any such class the value is NaN.

    Args:
        class_counts: TRAINING samples per class, [C]; they define the groups. Zero is allowed (few shot).
        many_above: a class with more training samples is many shot.
        few_below: a class with fewer training samples is few shot; the rest is medium shot.
        ignore_index: targets with this class are left out.
        validate_args: check the values of classes (on a GPU this waits for the device). Without it, a target that is no
            class is left out and a prediction that is no class counts as wrong.
        kwargs: of ``torchmetrics.Metric`` (``dist_sync_on_step``, ...).

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError, ValueError: bad counts or bounds; predictions and targets of the wrong dtype or shape.
        IndexError: a target or predicted class out of range.

    Example:
        >>> import torch
        >>> metric = ShotGroupAccuracy([900, 90, 10])
        >>> metric.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 2]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'overall': 0.75, 'many': 1.0, 'medium': 1.0, 'few': 0.0, 'balanced': 0.6667}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    shot_group: Tensor
    correct: Tensor
    total: Tensor

    def __init__(
        self,
        class_counts: ClassVector,
        *,
        many_above: float = 100,
        few_below: float = 20,
        ignore_index: int = -100,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        groups = shot_groups(class_counts, many_above, few_below)
        self.register_buffer("shot_group", groups, persistent=False)
        self.num_classes = len(groups)
        self.ignore_index = ignore_index
        self.validate_args = validate_args
        self.add_state("correct", default=torch.zeros_like(groups), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros_like(groups), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: logits or probabilities [N, C] or [N, C, d1, ...], floating; or classes shaped like ``target``.
            target: classes [N] or [N, d1, ...], any integer dtype.
        """
        preds, target = self._classes(preds, target)
        kept = target != self.ignore_index
        if self.validate_args:
            self._check("target", target, kept)
            self._check("preds", preds, kept)
        kept &= (target >= 0) & (target < self.num_classes)
        index = target.masked_fill(~kept, 0)
        self.total = self.total.scatter_add(0, index, kept.long())
        self.correct = self.correct.scatter_add(0, index, (kept & (preds == target)).long())

    def per_class(self) -> Tensor:
        """Recall of each class, float32 [C]; NaN for a class without test samples. Of this process's samples."""
        return (self.correct.double() / self.total).float()

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        recall = self.correct.double() / self.total

        def mean(classes: Tensor) -> Tensor:
            return recall[classes & (self.total > 0)].mean().float()

        return {
            "overall": (self.correct.sum().double() / self.total.sum()).float(),
            **{name: mean(self.shot_group == group) for group, name in enumerate(SHOT_GROUPS)},
            "balanced": mean(torch.ones_like(self.total, dtype=torch.bool)),
        }

    def _classes(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true classes as flat int64."""
        for name, value in (("preds", preds), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target: got dtype {target.dtype}, expected an integer dtype")
        if preds.is_floating_point():
            if preds.dim() < 2 or preds.shape[1] != self.num_classes:
                raise ValueError(f"preds: got shape {tuple(preds.shape)}, expected [N, {self.num_classes}, ...]")
            preds = preds.argmax(1)
        if preds.shape != target.shape:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, expected {tuple(preds.shape)}, one class per prediction"
            )
        return preds.flatten().long(), target.flatten().long()

    def _check(self, name: str, classes: Tensor, kept: Tensor) -> None:
        bad = kept & ((classes < 0) | (classes >= self.num_classes))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            got = int(classes[row])
            raise IndexError(f"{name}: row {row} has class {got}, expected 0 <= class < {self.num_classes}")
