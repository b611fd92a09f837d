"""Accuracy on long-tailed data (overall, many / medium / few shot, balanced), spread of embeddings, and calibration.

The classes are ``torchmetrics.Metric`` and need the extra ``lt_kernels[metrics]``: without torchmetrics the module
imports, and construction raises ImportError. ``reliability_diagram`` needs matplotlib.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    ClassVector,
    as_int64,
    check_classes,
    check_counted,
    check_device,
    check_flag,
    check_floating,
    check_int,
    check_integers,
    check_shape,
    check_tensor,
)
from .priors import SHOT_GROUPS, shot_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        self.ignore_index = check_int("ignore_index", ignore_index)
        self.validate_args = check_flag("validate_args", validate_args)
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
            for name, classes in (("target", target), ("preds", preds)):
                check_classes(name, classes.where(kept, 0), self.num_classes)
        kept &= (target >= 0) & (target < self.num_classes)
        index = target.masked_fill(~kept, 0)
        self.total = self.total.scatter_add(0, index, kept.long())
        self.correct = self.correct.scatter_add(0, index, (kept & (preds == target)).long())

    def per_class(self) -> Tensor:
        """Return this process's recall of each class, float32 [C]; NaN for a class without test samples."""
        return (self.correct.double() / self.total).float()

    def compute(self) -> dict[str, Tensor]:
        """Return the values that the class describes."""
        recall = self.correct.double() / self.total

        def mean(classes: Tensor) -> Tensor:
            return recall[classes & (self.total > 0)].mean().float()

        return {
            "overall": (self.correct.sum().double() / self.total.sum()).float(),
            **{name: mean(self.shot_group == group) for group, name in enumerate(SHOT_GROUPS)},
            "balanced": mean(torch.ones_like(self.total, dtype=torch.bool)),
        }

    def _classes(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted and true classes as flat int64."""
        check_tensor("preds", preds)
        check_integers("target", target, "a Tensor")
        check_device("preds", preds, self.total, " as the metric")
        check_device("target", target, self.total, " as the metric")
        if preds.is_floating_point():
            check_floating("preds", preds, kind="a floating-point dtype")
            if preds.dim() < 2:
                raise ValueError(f"preds: got shape {tuple(preds.shape)}, expected [N, {self.num_classes}, ...]")
            check_counted(self.num_classes, preds.shape[1], "preds")
            preds = preds.argmax(1)
        else:
            check_integers("preds", preds, kind="a floating dtype, or an integer one for classes")
        check_shape("target", target, preds.shape, ", one class per prediction")
        return as_int64("preds", preds).flatten(), as_int64("target", target).flatten()


class WithinClassSpread(Metric):
    """How far embeddings lie from the mean of their class, by shot group, accumulated over batches and processes.

    The spread of a class is the mean squared distance of its embeddings to their mean: for unit vectors 1 - |mean|^2,
    between 0 and 1, and half the mean squared distance between two of them. Embedding margins, such as those of
    [`ELMLoss`][lt_kernels.losses.ELMLoss], are to make it smaller for tail classes. ``compute()`` returns a dict of
    0-dim float32 tensors ``"many"``, ``"medium"``, ``"few"`` and ``"all"``: means over the classes of that group (as in
    [`ShotGroupAccuracy`][lt_kernels.metrics.ShotGroupAccuracy]) that have two samples or more, since a single one has
    no spread; NaN without any such class.

    Only sums are kept, float64 [C, D], no samples; the result does not depend on how the samples are batched.

    Args:
        class_counts: TRAINING samples per class, [C]; they define the groups. Zero is allowed (few shot).
        dim: D, the width of the embeddings.
        normalize: divide embeddings by their norm first.
        many_above: a class with more training samples is many shot.
        few_below: a class with fewer training samples is few shot; the rest is medium shot.
        ignore_index: labels of this class are left out.
        validate_args: check the values of labels (on a GPU this waits for the device). Without it, a label that is no
            class is left out.
        kwargs: of ``torchmetrics.Metric`` (``dist_sync_on_step``, ...).

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError, ValueError: bad counts, bounds or sizes; embeddings and labels of the wrong dtype, shape or device.
        IndexError: a label out of range.

    Example:
        >>> import torch
        >>> metric = WithinClassSpread([900, 90, 10], dim=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0, 2, 2]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'many': 0.5, 'medium': nan, 'few': 0.0, 'all': 0.25}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    shot_group: Tensor
    count: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(
        self,
        class_counts: ClassVector,
        dim: int,
        *,
        normalize: bool = True,
        many_above: float = 100,
        few_below: float = 20,
        ignore_index: int = -100,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_int("dim", dim, 1)
        groups = shot_groups(class_counts, many_above, few_below)
        self.register_buffer("shot_group", groups, persistent=False)
        self.num_classes, self.dim = len(groups), dim
        self.normalize = check_flag("normalize", normalize)
        self.ignore_index = check_int("ignore_index", ignore_index)
        self.validate_args = check_flag("validate_args", validate_args)
        zeros = torch.zeros(len(groups), dim, dtype=torch.float64, device=groups.device)
        self.add_state("count", default=torch.zeros_like(groups), dist_reduce_fx="sum")
        self.add_state("sums", default=zeros, dist_reduce_fx="sum")
        self.add_state("squares", default=zeros[:, 0].clone(), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            embeddings: [N, D], floating.
            labels: classes [N], any integer dtype.
        """
        check_floating("embeddings", embeddings, kind="a floating-point dtype")
        check_integers("labels", labels, "a Tensor")
        if embeddings.dim() != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings: got shape {tuple(embeddings.shape)}, expected [N, {self.dim}]")
        check_shape("labels", labels, embeddings.shape[:1], ", one per embedding")
        check_device("embeddings", embeddings, self.count, " as the metric")
        check_device("labels", labels, self.count, " as the metric")
        label = as_int64("labels", labels)
        counted = label != self.ignore_index
        is_class = (label >= 0) & (label < self.num_classes)
        if self.validate_args:
            check_classes("labels", label.where(counted, 0), self.num_classes)
        counted &= is_class
        index = label.masked_fill(~counted, 0)
        z = embeddings.detach().to(torch.float64)
        z = torch.where(counted[:, None], F.normalize(z, dim=1) if self.normalize else z, 0.0)
        self.count = self.count.scatter_add(0, index, counted.long())
        # accumulating index_put is deterministic on a GPU, which adding by index is not
        self.sums = self.sums.index_put((index,), z, accumulate=True)
        self.squares = self.squares.index_put((index,), z.square().sum(1), accumulate=True)

    def per_class(self) -> Tensor:
        """Return this process's spread of each class, float32 [C]; NaN for a class with fewer than two samples."""
        return self._spread().float()

    def compute(self) -> dict[str, Tensor]:
        """Return the values that the class describes."""
        spread = self._spread()
        measured = self.count > 1
        values = {name: spread[measured & (self.shot_group == group)] for group, name in enumerate(SHOT_GROUPS)}
        return {name: value.mean().float() for name, value in {**values, "all": spread[measured]}.items()}

    def _spread(self) -> Tensor:
        mean = self.sums / self.count[:, None]
        spread = (self.squares / self.count - mean.square().sum(1)).clamp_min(0.0)
        return spread.masked_fill(self.count < 2, torch.nan)


def within_class_spread(
    embeddings: Tensor,
    labels: Tensor,
    class_counts: ClassVector,
    *,
    normalize: bool = True,
    many_above: float = 100,
    few_below: float = 20,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Return the mean squared distance of embeddings to the mean of their class, by shot group.

    Args:
        embeddings: [N, D], floating.
        labels: classes [N], any integer dtype.
        class_counts: TRAINING samples per class, [C]; they define the groups.
        normalize: divide embeddings by their norm first.
        many_above: a class with more training samples is many shot.
        few_below: a class with fewer training samples is few shot; the rest is medium shot.
        ignore_index: labels of this class are left out.

    Returns:
        As ``compute()`` of [`WithinClassSpread`][lt_kernels.metrics.WithinClassSpread], which has the definition.

    Raises:
        ImportError, TypeError, ValueError, IndexError: as the class.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        >>> spread = within_class_spread(z, torch.tensor([0, 0, 1, 1]), [900, 10])
        >>> spread["many"].item(), spread["few"].item()
        (1.0, 0.0)
    """
    check_tensor("embeddings", embeddings, "a Tensor [N, D]")
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings: got shape {tuple(embeddings.shape)}, expected a Tensor [N, D]")
    metric = WithinClassSpread(
        class_counts, max(embeddings.shape[1], 1), normalize=normalize, many_above=many_above, few_below=few_below,
        ignore_index=ignore_index,
    ).to(embeddings.device)  # fmt: skip
    metric.update(embeddings, labels)
    return metric.compute()


class CalibrationErrors(NamedTuple):
    """How far confidence is from accuracy, both 0-dim float32."""

    ece: Tensor  #: expected calibration error: the mean over samples of their bin's gap
    mce: Tensor  #: maximum calibration error: the largest gap of a bin


class CalibrationError(Metric):
    """Expected and maximum calibration error of top-1 predictions, accumulated over batches and processes.

    Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017: samples are put into bins of
    equal width by their confidence, ((b - 1) / bins, b / bins]; the gap of a bin is that between its mean confidence
    and its accuracy. ``compute()`` returns a dict of ``"ece"`` and ``"mce"``, 0-dim float32; NaN without samples, and
    with a confidence that is NaN. Empty bins have no gap. Only sums per bin are kept, no samples.

    torchmetrics' own calibration errors store all confidences, put those on a bin's border into the next bin, and a
    confidence of exactly 1 into a bin of its own.

    Args:
        bins: how many.
        ignore_index: targets with this class are left out.
        validate_args: check the values of confidences and classes (on a GPU this waits for the device). Without it, a
            target that is no class is left out.
        kwargs: of ``torchmetrics.Metric`` (``dist_sync_on_step``, ...).

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError, ValueError: bins that are not a positive int; predictions and targets of the wrong dtype, shape or
            range.

    Example:
        >>> import torch
        >>> metric = CalibrationError()
        >>> metric.update(torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([True, True, True, False]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'ece': 0.1, 'mce': 0.1}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Tensor

    def __init__(self, bins: int = 15, *, ignore_index: int = -100, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = check_int("bins", bins, 1)
        self.ignore_index = check_int("ignore_index", ignore_index)
        self.validate_args = check_flag("validate_args", validate_args)
        self.add_state("sums", default=torch.zeros(bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: probabilities [N, C]; or confidences [N], such as
                [`expert_fusion`][lt_kernels.functional.expert_fusion] gives.
            target: classes [N], any integer dtype, for probabilities; whether the prediction was right [N], bool, for
                confidences.
        """
        check_device("preds", check_tensor("preds", preds), self.sums, " as the metric")
        counted = _confidence_and_correct(preds, target, self.ignore_index, self.validate_args)
        self.sums = self.sums + _bin_sums(*counted, self.bins)

    def compute(self) -> dict[str, Tensor]:
        """Return the values that the class describes."""
        return _errors(self.sums)._asdict()


def calibration_error(preds: Tensor, target: Tensor, bins: int = 15, *, ignore_index: int = -100) -> CalibrationErrors:
    """Return expected and maximum calibration error, as [`CalibrationError`][lt_kernels.metrics.CalibrationError].

    Args:
        preds: probabilities [N, C], or confidences [N].
        target: classes [N], any integer dtype, for probabilities; whether the prediction was right [N], bool, for
            confidences.
        bins: how many, of equal width.
        ignore_index: targets with this class are left out.

    Returns:
        ``CalibrationErrors(ece, mce)``, 0-dim float32.

    Raises:
        TypeError, ValueError: as the class.

    Example:
        >>> import torch
        >>> ece, mce = calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]))
        >>> round(ece.item(), 4), round(mce.item(), 4)
        (0.4, 0.7)
    """
    counted = _confidence_and_correct(preds, target, check_int("ignore_index", ignore_index))
    return _errors(_bin_sums(*counted, check_int("bins", bins, 1)))


def reliability_diagram(
    confidence: Tensor, correct: Tensor, path_or_axis: str | os.PathLike[str] | Axes, bins: int = 15
) -> Axes:
    """Draw accuracy against confidence, one bar for each bin, with the gaps and both calibration errors.

    Args:
        confidence: [N], of the predicted classes.
        correct: [N], bool, whether the predictions were right.
        path_or_axis: a file name to save the figure as, or matplotlib axes to draw on.
        bins: how many, of equal width.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as [`calibration_error`][lt_kernels.metrics.calibration_error].
    """
    counted = _confidence_and_correct(confidence, correct, -100, names=("confidence", "correct"))
    sums = _bin_sums(*counted, check_int("bins", bins, 1)).cpu()
    figure = None
    if isinstance(path_or_axis, (str, os.PathLike)):
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("reliability_diagram needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(4, 4), layout="constrained")
        axis = figure.add_subplot()
    elif not hasattr(path_or_axis, "bar"):
        raise TypeError(f"path_or_axis: got {type(path_or_axis).__name__}, expected a file name or matplotlib axes")
    else:
        axis = path_or_axis
    count, confident, right = sums.unbind(1)
    filled = count > 0
    accuracy = (right / count)[filled].tolist()
    gap = ((confident - right) / count)[filled].tolist()
    left = (torch.arange(bins)[filled] / bins).tolist()
    options: dict[str, Any] = {"width": 1 / bins, "align": "edge", "edgecolor": "black", "linewidth": 0.5}
    axis.bar(left, accuracy, color="tab:blue", label="accuracy", **options)
    axis.bar(left, gap, bottom=accuracy, color="tab:red", alpha=0.3, label="confidence - accuracy", **options)
    axis.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
    ece, mce = _errors(sums)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"ECE {ece:.3f}, MCE {mce:.3f}")
    axis.legend(loc="upper left")
    if figure is not None and isinstance(path_or_axis, (str, os.PathLike)):
        figure.savefig(path_or_axis, dpi=150)
    return axis


def _check_confidence(name: str, confidence: Tensor) -> None:
    bad = (confidence < 0) | (confidence > 1 + 1e-4)  # a softmax may exceed 1 by a rounding
    if bool(bad.any()):
        raise ValueError(f"{name}: got {confidence[bad][0]:g}, expected probabilities in [0, 1]")


def _confidence_and_correct(
    preds: Tensor,
    target: Tensor,
    ignore_index: int,
    validate: bool = True,
    *,
    names: tuple[str, str] = ("preds", "target"),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return confidence (float64, 0 if ignored), whether it was right and whether it counts (bool), [N] each."""
    of_preds, of_target = names
    check_tensor(of_target, target)
    check_floating(of_preds, preds, kind="a floating-point dtype")
    check_device(of_target, target, preds, f" as {of_preds}")
    dims = (1, 2) if of_preds == "preds" else (1,)
    if preds.dim() not in dims or (preds.dim() == 2 and preds.shape[1] == 0):
        expected = "probabilities [N, C] or confidences [N]" if 2 in dims else "[N]"
        raise ValueError(f"{of_preds}: got shape {tuple(preds.shape)}, expected {expected}")
    check_shape(of_target, target, preds.shape[:1], ", one per prediction")
    if preds.dim() == 1:
        if target.dtype != torch.bool:
            raise TypeError(
                f"{of_target}: got dtype {target.dtype} with confidences [N], expected bool: whether they were right"
            )
        if validate:
            _check_confidence(of_preds, preds)
        return preds.detach().double(), target, torch.ones_like(target)
    label = as_int64(of_target, check_integers(of_target, target))
    confidence, predicted = preds.detach().max(1)
    kept = label != ignore_index
    confidence = confidence.double().masked_fill(~kept, 0.0)
    if validate:
        check_classes(of_target, label.where(kept, 0), preds.shape[1])
        _check_confidence(of_preds, confidence)
    kept &= (label >= 0) & (label < preds.shape[1])
    return confidence.masked_fill(~kept, 0.0), (predicted == label) & kept, kept


def _bin_sums(confidence: Tensor, correct: Tensor, kept: Tensor, bins: int) -> Tensor:
    """Return samples, the sum of their confidences and the number of right ones by bin, [bins, 3]."""
    borders = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)[1:-1]
    index = torch.bucketize(confidence, borders)
    # a matrix product: deterministic on a GPU, which adding into bins is not
    member = (index == torch.arange(bins, device=confidence.device)[:, None]).double()
    return member @ torch.stack([kept.double(), confidence, correct.double()], 1)


def _errors(sums: Tensor) -> CalibrationErrors:
    count, confidence, right = sums.unbind(1)
    gap = (confidence - right).abs()
    total = count.sum()
    mce = torch.where(count > 0, gap / count.clamp_min(1), 0.0).max()
    return CalibrationErrors((gap.sum() / total).float(), torch.where(total > 0, mce, torch.nan).float())
