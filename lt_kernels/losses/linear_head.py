"""A linear classifier together with its loss: the logits between them need not be stored."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as LF
from .._checks import (
    ClassVector,
    as_device,
    as_dtype,
    check_choice,
    check_device,
    check_flag,
    check_floating,
    check_int,
    product_dtype,
)
from ._base import MarginCrossEntropyBase
from ._class_tensors import ClassTensorLoss
from ._wrapped import as_forward, refuse_adapter, whole

if TYPE_CHECKING:
    from typing_extensions import Self

Strategy = Literal["auto", "materialize", "chunked", "tiled"]


class LinearHead(nn.Linear):
    """An ``nn.Linear`` that ends in a loss: ``head(features, target)`` is the loss of logits that need not be stored.

    It computes ``loss(F.linear(features, weight, bias), target)``, or ``loss`` of the cosines of features and class
    weights, by [`linear_margin_cross_entropy`][lt_kernels.functional.linear_margin_cross_entropy], which does not store
    the logits as a whole where they would not fit ``lt_kernels.set_memory_budget``. From a layer and a loss:

        head = LinearHead.from_linear(model.fc, LogitAdjustmentLoss(class_counts))   # instead of the loss alone
        loss = head(features, target)                              # instead of criterion(model.fc(features), target)
        logits = head(features)                                    # instead of model.fc(features), to classify

    Parameters are those of ``nn.Linear``, ``weight`` [C, D] and ``bias`` [C]. ``loss`` is a submodule: its tensors
    travel as ``loss.*`` in ``state_dict`` and stay float32 under ``.half()`` and ``.bfloat16()``. A ``state_dict``
    without any ``loss.*``, such as the one of an ``nn.Linear``, loads with ``strict=True`` and leaves them as they are.

    Args:
        in_features: D.
        out_features: C, classes.
        loss: a classifier recipe of this package; None is plain cross-entropy. It moves to the weight's device.
        bias: whether logits have a learned bias; default: unless ``normalize``.
        normalize: a cosine head; default: as the recipe takes its input (True for LDAM, CosFace and ArcFace).
        strategy: ``"auto"``, ``"materialize"``, ``"chunked"`` or ``"tiled"``; see ``linear_margin_cross_entropy``.
        device: of ``weight`` and ``bias``.
        dtype: of ``weight`` and ``bias``.

    Raises:
        TypeError: ``loss`` is no classifier recipe; ``bias`` or ``normalize`` is no bool.
        ValueError: another number of classes in the recipe's tensors than ``out_features``; a bias with ``normalize``;
            an unknown strategy.

    Warns:
        UserWarning: a cosine head whose loss has no scale: a softmax of cosines at scale 1 is nearly uniform over many
            classes, and the loss hardly falls.

    Example:
        >>> import torch
        >>> from lt_kernels.losses import LogitAdjustmentLoss
        >>> head = LinearHead(64, 3, LogitAdjustmentLoss([900, 90, 10]))
        >>> head
        LinearHead(
          in_features=64, out_features=3, bias=True
          (loss): LogitAdjustmentLoss(num_classes=3)
        )
        >>> features, target = torch.randn(8, 64), torch.randint(3, (8,))
        >>> head(features, target).backward()
        >>> classes, confidence, _ = head.predict(features)
        >>> classes.shape, confidence.shape
        (torch.Size([8, 1]), torch.Size([8, 1]))
    """

    loss: MarginCrossEntropyBase

    def __init__(
        self,
        in_features: int,
        out_features: int,
        loss: MarginCrossEntropyBase | None = None,
        *,
        bias: bool | None = None,
        normalize: bool | None = None,
        strategy: Strategy = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if loss is None:
            loss = MarginCrossEntropyBase()
        if not isinstance(loss, ClassTensorLoss):
            raise TypeError(
                f"loss: got {getattr(loss, '__name__', type(loss).__name__)}, expected None or a classifier loss of "
                "lt_kernels.losses, such as LogitAdjustmentLoss(class_counts)"
            )
        for name, value in (("bias", bias), ("normalize", normalize)):
            if value is not None:
                check_flag(name, value, "a bool or None")
        sizes = loss.class_sizes  # a loss of embeddings or of several experts refuses here
        normalize = loss.cosine if normalize is None else normalize
        if bias and normalize:
            raise ValueError("bias: got True with normalize=True, expected False (cosines have no bias)")
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_choice("strategy", strategy, get_args(Strategy))
        device, dtype = as_device("device", device), as_dtype("dtype", dtype)
        for name, classes in sizes.items():
            if classes != out_features:
                raise ValueError(
                    f"loss: got a {type(loss).__name__} with {classes} classes ({name}), expected {out_features}, "
                    "the out_features"
                )
        if normalize and isinstance(loss.scale, (int, float)) and loss.scale == 1.0:
            warnings.warn(
                f"loss: got a {type(loss).__name__} at scale 1 for cosines, whose softmax over {out_features} classes "
                "stays nearly uniform; expected a scale such as 30",
                stacklevel=2,
            )
        super().__init__(in_features, out_features, not normalize if bias is None else bias, device, dtype)
        self.normalize = normalize
        self.strategy = strategy
        self.loss = loss
        self._move_loss()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        loss: MarginCrossEntropyBase | None = None,
        *,
        normalize: bool | None = None,
        strategy: Strategy = "auto",
    ) -> Self:
        """Make a head with the parameters of ``linear``, shared and not copied.

        Args:
            linear: its ``weight`` and ``bias`` become the head's; it goes on working, and learns with the head.
            loss: as the constructor's.
            normalize: as the constructor's.
            strategy: as the constructor's.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or one with a parametrized or pruned weight (wrap the plain layer
                and parametrize the head).
            ValueError: as the constructor; ``linear`` has a bias and the head is a cosine head.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, expected an nn.Linear")
        if "weight" not in linear._parameters or "bias" not in linear._parameters:
            raise TypeError(
                f"linear: got a {type(linear).__name__} whose weight or bias is computed (parametrized or pruned), "
                "expected parameters of its own"
            )
        cosine = getattr(loss, "cosine", False) if normalize is None else normalize
        if linear.bias is not None and cosine is True:
            why = "normalize=True" if normalize else f"{type(loss).__name__} takes cosines"
            raise ValueError(
                f"linear: got a layer with a bias for a cosine head ({why}), expected nn.Linear(..., bias=False), or "
                "normalize=False"
            )
        head = cls(
            linear.in_features, linear.out_features, loss,
            bias=linear.bias is not None, normalize=normalize, strategy=strategy, device="meta",
        )  # fmt: skip
        head.weight, head.bias = linear.weight, linear.bias
        head._move_loss()
        return head.train(linear.training)

    def forward(
        self,
        features: Tensor,
        target: Tensor | None = None,
        mixed_target: Tensor | None = None,
        mix_lambda: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss of ``features``, [..., D], or without ``target`` what ``logits`` returns, [..., C].

        Args:
            features: inputs of the linear layer: float16, bfloat16, float32 or float64, any leading shape.
            target: class indices [...] of any integer dtype, or class probabilities [..., C] (not with a margin).
            mixed_target: second class indices of mixup or CutMix pairs.
            mix_lambda: share of ``target``: a number in [0, 1], or a tensor, 0-dim or like ``target``.

        Returns:
            0-dim, or like class indices with ``reduction="none"``; float32 (float64 for float64).
        """
        if target is None:
            if mixed_target is not None or mix_lambda is not None:
                raise ValueError("target: got None with mixed_target or mix_lambda, expected class indices")
            return self.logits(features)
        self.loss._check_counted(self.weight.shape[0], "weight")
        weight, bias = self._linear(features)
        keywords: dict[str, Any] = {
            name: whole(name, value, features) if isinstance(value, Tensor) else value
            for name, value in self.loss.keywords().items()
        }
        if isinstance(target, Tensor) and target.is_floating_point() and keywords["ignore_index"] < 0:
            keywords["ignore_index"] = None  # probabilities: nothing is ignored
        loss: Tensor = LF.linear_margin_cross_entropy(
            features,
            weight,
            target,
            linear_bias=bias,
            normalize=self.normalize,
            mixed_target=mixed_target,
            mix_lambda=mix_lambda,
            strategy=self.strategy,
            **keywords,
        )
        return loss

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits to classify by at test time, [..., C], the loss's ``scale`` included.

        Class biases, class scales (of VS and CDT) and margins act in training alone, as in their papers: the model has
        learned to be right without them. Differentiable; stores all logits, which ``predict`` does not. Features and
        weight may differ in dtype, as in the call: the product is in the narrower one.
        """
        logits: Tensor = as_forward(self, "_logits", features)
        return logits

    def _logits(self, features: Tensor) -> Tensor:
        weight, bias = self._linear(features)
        dtype = product_dtype(features, weight, "weight", "features")
        if self.normalize:
            features, weight = F.normalize(features, dim=-1), F.normalize(weight, dim=-1)
        bias = None if bias is None else bias.to(dtype)
        return F.linear(features.to(dtype), weight.to(dtype), bias) * self.loss.scale

    def predict(self, features: Tensor, topk: int = 1, class_shift: Tensor | None = None) -> LF.TopK:
        """Return the most likely classes of ``logits(features)``, computed block by block.

        Args:
            features: [..., D].
            topk: how many classes.
            class_shift: [C], added to the logits: log ratio of test and training prior, or ``-tau * log_prior``.

        Returns:
            [`TopK(classes, confidence, lse)`][lt_kernels.functional.linear_topk]; without gradients.
        """
        prediction: LF.TopK = as_forward(self, "_predict", features, topk, class_shift)
        return prediction

    @torch.no_grad()
    def _predict(self, features: Tensor, topk: int, class_shift: Tensor | None) -> LF.TopK:
        weight, bias = self._linear(features)
        return LF.linear_topk(
            features,
            weight,
            topk,
            linear_bias=bias,
            class_shift=class_shift,
            scale=self.loss.scale,
            normalize=self.normalize,
        )

    def update_counts(self, class_counts: ClassVector) -> None:
        """Derive the loss's class tensors anew, in place; see
        [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase]."""
        self.loss.update_counts(class_counts)

    def extra_repr(self) -> str:
        shown = [super().extra_repr()]
        if self.normalize:
            shown.append("normalize=True")
        if self.strategy != "auto":
            shown.append(f"strategy={self.strategy}")
        return ", ".join(shown)

    @property
    def base_layer(self) -> nn.Module:
        """Missing, as in every layer that wraps none; the place where peft asks for it before it wraps the head."""
        refuse_adapter(self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'base_layer'")

    def _linear(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Check ``features``; return weight and bias for the product with them."""
        check_floating("features", features, "a Tensor [..., D]")
        if features.dim() == 0 or features.shape[-1] != self.in_features:
            raise ValueError(f"features: got shape {tuple(features.shape)}, expected [..., {self.in_features}]")
        check_device("features", features, self.weight, " as the head")
        bias: Tensor | None = self.bias
        return whole("weight", self.weight, features), None if bias is None else whole("bias", bias, features)

    def _move_loss(self) -> None:
        if not self.weight.is_meta:
            self.loss.to(self.weight.device)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if any(tensor.is_meta for tensor in self.loss.buffers()):
            self._move_loss()  # the weight may have been assigned
