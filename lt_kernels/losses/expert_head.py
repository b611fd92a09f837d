"""Cosine classifiers of several experts in one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as LF
from .._checks import (
    as_device,
    as_dtype,
    check_flag,
    check_floating,
    check_int,
    check_positive,
    check_tensor,
    product_dtype,
)
from .._modules import InitializedModule
from ._wrapped import as_forward, whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..functional.experts import ExpertLogits


class ExpertHead(InitializedModule):
    """E cosine classifiers, one for each expert:

        logits[e, n, c] = scale * <f_en, w_ec> / (|f_en| |w_ec|)

    The experts are one batched matrix product in training, and one matrix product in ``predict``, which does not store
    the logits as a whole. Train with a loss of several experts, such as [`BalPoELoss`][lt_kernels.losses.BalPoELoss].

    ``state_dict`` has ``weight`` [E, C, D], and ``scale`` where it is learned. Weights start uniform in [-1, 1],
    divided by their norm for each class, as in published cosine heads.

    Args:
        in_features: D.
        num_classes: C.
        num_experts: E.
        shared: whether all experts read the same features [N, D], instead of each its own.
        scale: the inverse temperature of the cosines.
        learn_scale: whether ``scale`` is a parameter, 0-dim, that starts there.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; the message names it.

    Example:
        >>> import torch
        >>> head = ExpertHead(64, 10, num_experts=3)
        >>> head
        ExpertHead(in_features=64, num_classes=10, num_experts=3, scale=30.0)
        >>> features = torch.randn(3, 8, 64)
        >>> head(features).shape
        torch.Size([3, 8, 10])
        >>> head.predict(features, topk=5).topk_indices.shape
        torch.Size([8, 5])
    """

    scale: float | Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_experts: int,
        *,
        shared: bool = False,
        scale: float = 30.0,
        learn_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes), ("num_experts", num_experts)):
            check_int(name, value, 1)
        self.shared = check_flag("shared", shared)
        check_flag("learn_scale", learn_scale)
        start = check_positive("scale", scale)
        device, dtype = as_device("device", device), as_dtype("dtype", dtype)
        self.weight = nn.Parameter(torch.empty(num_experts, num_classes, in_features, device=device, dtype=dtype))
        self._keep_start("scale", torch.tensor(start, dtype=torch.float64, device="cpu"))
        self.scale = nn.Parameter(torch.full((), start, device=device, dtype=dtype)) if learn_scale else start
        self.reset_parameters()

    def _tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale} if isinstance(self.scale, Tensor) else {}  # weights are the caller's to initialise

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        """D."""
        return self.weight.shape[2]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random directions anew; a learned scale starts where it started."""
        super().reset_parameters()
        self.weight.uniform_(-1.0, 1.0)
        self.weight.copy_(F.normalize(self.weight, dim=-1))

    @classmethod
    def from_linears(
        cls, linears: Sequence[nn.Linear], *, shared: bool = False, scale: float = 30.0, learn_scale: bool = False
    ) -> Self:
        """Make a head with copies of the weights of ``linears``, one for each expert.

        Args:
            linears: layers without bias, all of one shape. A checkpoint whose class weights are the columns of [D, C]
                needs their transposes.
            shared: as the constructor's.
            scale: as the constructor's.
            learn_scale: as the constructor's.

        Raises:
            TypeError: no ``nn.Linear``.
            ValueError: no layers, layers with a bias or of different shapes.
        """
        layers = list(linears)
        if not layers:
            raise ValueError("linears: got no layers, expected one for each expert")
        for e, layer in enumerate(layers):
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"linears[{e}]: got {type(layer).__name__}, expected an nn.Linear")
            if layer.bias is not None:
                raise ValueError(f"linears[{e}]: got a layer with a bias, expected none (cosines have no bias)")
            if layer.weight.shape != layers[0].weight.shape:
                raise ValueError(
                    f"linears[{e}]: got weight {tuple(layer.weight.shape)}, expected {tuple(layers[0].weight.shape)} "
                    "as linears[0]"
                )
        first = layers[0].weight
        head = cls(
            first.shape[1], first.shape[0], len(layers),
            shared=shared, scale=scale, learn_scale=learn_scale, device=first.device, dtype=first.dtype,
        )  # fmt: skip
        with torch.no_grad():
            head.weight.copy_(torch.stack([layer.weight for layer in layers]))
        return head

    def forward(self, features: ExpertLogits) -> Tensor:
        """Return logits [E, N, C] of ``features``: [E, N, D] or a list of E [N, D]; [N, D] if ``shared``.

        More dimensions than N are kept: logits of [E, ..., D] are [E, ..., C]. Losses of maps want the classes behind
        N, ``logits.movedim(-1, 2)``. With shared features the logits are a view of [N, E, C]. Under autocast, they
        have its dtype. Features and weight may differ in dtype, as in mixed precision: the product, and the logits, are
        in the narrower one.
        """
        f = self._features(features)
        weight = whole("weight", self.weight, f)
        dtype = product_dtype(f, weight, "weight", "features")
        # the scale multiplies the features: they are fewer than the logits
        f = (F.normalize(f, dim=-1) * self.scale).to(dtype)
        w = F.normalize(weight, dim=-1).to(dtype)
        if self.shared:
            return F.linear(f, w.flatten(0, 1)).unflatten(-1, w.shape[:2]).movedim(-2, 0)
        if f.dim() == 3:
            return torch.matmul(f, w.transpose(1, 2))
        return torch.matmul(f.flatten(1, -2), w.transpose(1, 2)).reshape(*f.shape[:-1], w.shape[1])

    def predict(
        self,
        features: ExpertLogits,
        topk: int = 1,
        log_prior_shift: Tensor | None = None,
        temperature: float = 1.0,
        expert_weight: Sequence[float] | Tensor | None = None,
    ) -> LF.ExpertFusion:
        """Return the most likely classes of the product of experts, without storing the logits as a whole.

        Args:
            features: as in ``forward``.
            topk: how many classes.
            log_prior_shift: [C], log pi_test for a known test prior, -inf to mask a class.
            temperature: the mean of the logits is divided by it (calibration).
            expert_weight: E numbers or [E], such as [`fit_expert_weights`][lt_kernels.losses.fit_expert_weights] gives;
                default 1 / E each.

        Returns:
            [`ExpertFusion`][lt_kernels.functional.ExpertFusion] without ``log_probs``; without gradients. Of features
            [E, ..., D] (or [..., D]) its ``prediction`` is [...] and its ``topk_indices`` [..., k].
        """
        fusion: LF.ExpertFusion = as_forward(
            self, "_predict", self._features(features), topk, log_prior_shift, temperature, expert_weight
        )
        return fusion

    @torch.no_grad()
    def _predict(
        self,
        features: Tensor,
        topk: int,
        log_prior_shift: Tensor | None,
        temperature: float,
        expert_weight: Sequence[float] | Tensor | None,
    ) -> LF.ExpertFusion:
        lead = features.shape[:-1] if self.shared else features.shape[1:-1]
        rows = features if len(lead) == 1 else features.flatten(0 if self.shared else 1, -2)
        fusion = LF.linear_expert_fusion(
            rows,
            whole("weight", self.weight, features),
            normalize=True,
            scale=self.scale,
            topk=topk,
            log_prior_shift=log_prior_shift,
            temperature=temperature,
            expert_weight=expert_weight,
        )
        if len(lead) == 1:
            return fusion
        values, classes = (each.reshape(*lead, topk) for each in (fusion.topk_values, fusion.topk_indices))
        return LF.ExpertFusion(classes[..., 0], values[..., 0], values, classes, None)

    def to_linears(self) -> list[nn.Linear]:
        """Copy the experts' weights into layers without bias, one for each expert; they leave out the scale."""
        layers = []
        for weight in self.weight.detach():
            layer = nn.Linear(self.in_features, self.num_classes, bias=False, device="meta")
            layer.weight = nn.Parameter(weight.clone())
            layers.append(layer)
        return layers

    def extra_repr(self) -> str:
        scale = "learned" if isinstance(self.scale, Tensor) else self.scale
        shared = ", shared=True" if self.shared else ""
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}, num_experts={self.num_experts}"
        return f"{sizes}{shared}, scale={scale}"

    def _features(self, features: ExpertLogits) -> Tensor:
        """Return the features as [E, ..., D], or [..., D] if shared."""
        if isinstance(features, (list, tuple)) and not self.shared:
            for e, each in enumerate(features):
                check_tensor(f"features[{e}]", each, "a Tensor [N, D]")
                if each.shape != features[0].shape:
                    shapes = tuple(each.shape), tuple(features[0].shape)
                    raise ValueError(f"features[{e}]: got shape {shapes[0]}, expected {shapes[1]} as features[0]")
            features = torch.stack(list(features)) if features else torch.empty(0)
        lead, least = ("", 2) if self.shared else (f"{self.num_experts}, ", 3)
        expected = f"[{lead}N, {self.in_features}] or [{lead}..., {self.in_features}]"
        features = check_floating("features", features, f"a Tensor {expected}", "a floating-point dtype")
        fits = features.dim() >= least and (self.shared or len(features) == self.num_experts)
        if not fits or features.shape[-1] != self.in_features:
            hint = "" if self.shared or features.dim() != 2 else " (features that all experts read: shared=True)"
            raise ValueError(f"features: got shape {tuple(features.shape)}, expected {expected}{hint}")
        return features
