"""The options of a row's loss, written once: every operator and backend takes them by these names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowOptions(NamedTuple):
    """Everything but the logits that the loss of N x K rows depends on.

    Class vectors are [C], contiguous, in the compute dtype: float32, or float64 for float64 logits. ``functional``
    validates; an out-of-range target is the backend's to catch.
    """

    target: Tensor  # [N, K] int64 classes, or [N, C, K] floating class probabilities
    mixed_target: Tensor | None = None  # [N, K] int64
    mix_lambda: Tensor | None = None  # 0-dim or [N, K], the share of `target`
    weight: Tensor | None = None  # [C]
    # [C], label smoothing of each class times its weight, 0 where class_bias masks it; None: label_smoothing / C each
    smooth_weight: Tensor | None = None
    class_bias: Tensor | None = None  # [C]
    class_scale: Tensor | None = None  # [C]
    class_margin: Tensor | None = None  # [C], added to `margin`
    learned_scale: Tensor | None = None  # 0-dim, multiplies `scale`
    coefficient: Tensor | None = None  # [1], or [2] with mixed_target: factor of each target's term
    scale: float = 1.0
    margin: float = 0.0
    angular: bool = False
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def soft(self) -> bool:
        """Whether the targets are class probabilities."""
        return self.target.is_floating_point()

    @property
    def masks(self) -> bool:
        """Whether classes of no weight may have logits of -inf: they then add 0."""
        probabilities = self.soft and self.class_bias is not None and self.weight is not None
        return probabilities or self.smooth_weight is not None

    @property
    def learns(self) -> bool:
        """Whether an option receives a gradient."""
        options = (self.target, self.class_bias, self.class_scale, self.class_margin, self.learned_scale)
        return any(option is not None and option.requires_grad for option in options)


class Slot(NamedTuple):
    """One target of a row; every field is one value per row: [N, K] in eager code, a scalar or a block in a kernel."""

    column: Tensor  # class; where there is none 0 in eager code and -1 in kernels
    valid: Tensor  # bool: not ignored
    factor: Tensor  # k_t; where ignored 0, or NaN if the mean is over no weight at all, as in torch
    weight: Tensor  # w_y
    smooth_weight: Tensor  # its factor in label smoothing
    plain: Tensor  # u_y
    shifted: Tensor  # v_t
    cosine: Tensor  # class_scale_y * x_y
    phi: Tensor
    dphi_dc: Tensor
    dphi_dm: Tensor


#: Options that can receive a gradient, in the order of backward's results.
DIFFERENTIABLE = ("target", "class_bias", "class_scale", "class_margin", "learned_scale")
