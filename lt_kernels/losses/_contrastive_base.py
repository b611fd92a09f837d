"""What the contrastive recipes share: options, reductions over the rows that count, checked labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import (
    as_int64,
    check_classes,
    check_device,
    check_floating,
    check_integers,
    check_positive,
    check_shape,
    check_values,
    is_transformed,
    with_values,
)
from .._modules import InitializedModule, at_least_float32
from ..priors import ZeroCounts
from ._class_tensors import ClassTensorLoss

if TYPE_CHECKING:
    from typing_extensions import Self

#: Most similarities of a chunk of rows where they are compared without a kernel: 16 MB in float32, a few times over.
CHUNK = 2**22


class ContrastiveOptions(TypedDict, total=False):
    """Keywords of the recipes that join a classifier and a contrastive part; see ``ContrastiveLossBase``."""

    ignore_index: int
    reduction: Literal["none", "mean", "sum"]
    empty_mean: Literal["nan", "zero"]
    zero_counts: ZeroCounts
    device: torch.device | str | None
    dtype: torch.dtype | None
    persistent: bool


class ContrastiveLossBase(ClassTensorLoss):
    """A classifier's loss together with [`partitioned_logsumexp`][lt_kernels.functional.partitioned_logsumexp].

    Its recipes take these keywords of [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase], with the
    same meanings: ``ignore_index``, ``reduction``, ``empty_mean``, ``zero_counts``, ``device``, ``dtype`` and
    ``persistent``. Class tensors are buffers, at least float32, and ``update_counts`` derives them anew.
    """

    # no weight, margin or label_smoothing: a recipe would have to say what they mean for its contrastive part

    def __init__(
        self,
        *,
        scale: float | Tensor = 1.0,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        empty_mean: Literal["nan", "zero"] = "nan",
        zero_counts: ZeroCounts = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        persistent: bool = True,
    ) -> None:
        super().__init__(
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
            empty_mean=empty_mean,
            zero_counts=zero_counts,
            device=device,
            dtype=dtype,
            persistent=persistent,
        )

    @property
    def class_sizes(self) -> dict[str, int]:
        """Refused: only the loss of one classifier joins a head."""
        raise TypeError(
            f"loss: got a {type(self).__name__}, which takes embeddings beside the logits, expected the loss of one "
            "classifier"
        )


class TemperatureLoss(InitializedModule):
    """A loss of embeddings alone. Its temperature is a number, an ``nn.Parameter`` that is trained, or a buffer."""

    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor) -> None:
        super().__init__()
        if not isinstance(temperature, Tensor):
            self.temperature = check_positive("temperature", temperature)
            return
        check_floating("temperature", temperature)
        check_shape("temperature", temperature, (), expected="a 0-dim tensor")
        check_positive("temperature", with_values("temperature", temperature).item())
        learned = isinstance(temperature, nn.Parameter)
        if temperature.requires_grad and not learned:
            raise ValueError("temperature: got a tensor that requires grad, expected an nn.Parameter, to be learned")
        self._keep_start("temperature", temperature)
        dtype = torch.promote_types(temperature.dtype, torch.float32)
        self.temperature = temperature if learned else nn.Buffer(temperature.to(dtype, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(at_least_float32(fn), recurse)


def shown_temperature(temperature: float | Tensor) -> str:
    """Return what ``repr`` says; it reads no tensor's value."""
    if isinstance(temperature, Tensor):
        return "learned" if temperature.requires_grad else "tensor"
    return str(temperature)


class Labels(NamedTuple):
    """Labels of rows, checked."""

    given: Tensor  #: as int64
    of_class: Tensor  #: int64 that indexes classes safely: 0 where it is none
    is_class: Tensor  #: bool


def check_labels(
    name: str, value: Any, shape: tuple[int, ...], classes: int, like: Tensor, none: int, what: str = "class"
) -> Labels:
    """Return checked labels.

    ``none`` is no class, even if it is the number of one. IndexError as ``check_label_values``.
    """
    label = check_label_values(name, value, shape, classes, like, none, what)
    is_class = (label >= 0) & (label < classes)
    if none >= 0:
        is_class = is_class & (label != none)
    return Labels(label, label.masked_fill(~is_class, 0), is_class)


def check_label_values(
    name: str, value: Any, shape: tuple[int, ...], classes: int, like: Tensor, none: int, what: str = "class"
) -> Tensor:
    """Return labels as int64; IndexError for one that is no class and not ``none``, on the CPU and with checks on."""
    label = check_ids(name, value, shape, like)
    return check_values(check_classes, name, label, classes, none, words=(f", or {none} for none", what))


def check_ids(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return ``value`` as int64: integers of this shape, on the device of ``like``."""
    check_integers(name, value)
    check_shape(name, value, shape)
    check_device(name, value, like)
    return as_int64(name, value)


def count_classes(label: Tensor, counted: Tensor, classes: int) -> Tensor:
    """Count the ``counted`` labels of each class, int64 [classes]; deterministic, and nothing waits for a GPU."""
    counts = torch.zeros(classes, dtype=torch.int64, device=label.device)
    return counts.scatter_add(0, label, counted.to(torch.int64))


def zero_rows(features: Tensor, rows: Tensor) -> Tensor:
    """Return features [N, ..., D] with zeros in some ``rows`` [N]: what is not finite there would reach other rows."""
    return features.masked_fill(rows.view(-1, *[1] * (features.dim() - 1)), 0.0)


def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function; backward calls it again, rather than keep what it computes on the way."""
    if not torch.compiler.is_compiling() and is_transformed():  # torch.func goes through no checkpoint
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def row_chunks(rows: int, keys: int) -> list[slice]:
    """Return slices of rows whose similarities to the keys are ``CHUNK`` at most."""
    if rows * keys <= CHUNK:  # where sizes are symbols, this is one graph for all that fit
        return [slice(0, rows)]
    step = max(CHUNK // max(keys, 1), 1)
    return [slice(start, start + step) for start in range(0, rows, step)]
