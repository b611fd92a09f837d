"""Weights that change with the epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._checks import ClassVector, check_int
from ._modules import InitializedModule
from .priors import ClassPrior, ZeroCounts


class DeferredReweighting:
    """Deferred re-weighting (DRW): plain training first, class-balanced weights from ``switch_epoch`` on.

    Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019, with the weights
    of Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019:

        w_c = (1 - beta) / (1 - beta^n_c), normalised to mean 1

    with beta 0 (all weights 1) before the switch. The schedule owns the ``weight`` buffer of ``loss`` from its
    construction on: it sets it to ones at once and changes it in place afterwards, so compiled graphs, captured graphs
    and ``.to()`` keep working.

    Args:
        loss: any module with a ``weight`` buffer for its class weights: every classifier loss of this library,
            ``nn.CrossEntropyLoss``. Build the schedule before ``loss.load_state_dict`` when resuming.
        class_counts: training samples per class: [C], or a mapping or Series by class.
        switch_epoch: first epoch with the class-balanced weights (published: 160 of 200 on CIFAR).
        beta: of the effective number.
        zero_counts: what a class without samples means, see [`priors`][lt_kernels.priors]; ``"mask"``: weight 0.

    Raises:
        TypeError: ``loss`` has no ``weight`` buffer; counts that are not numbers; an epoch that is not an int.
        ValueError: bad counts, ``beta`` outside [0, 1), a negative epoch, another number of classes than ``loss`` has.

    Example:
        >>> from lt_kernels.losses import LDAMLoss
        >>> class_counts = [900, 90, 10]
        >>> loss = LDAMLoss(class_counts)
        >>> schedule = DeferredReweighting(loss, class_counts, switch_epoch=160)
        >>> for epoch in (0, 160):
        ...     schedule.step(epoch)
        ...     print(loss.weight)
        tensor([1., 1., 1.])
        tensor([0.0310, 0.2980, 2.6710])
    """

    def __init__(
        self,
        loss: nn.Module,
        class_counts: ClassVector,
        *,
        switch_epoch: int,
        beta: float = 0.9999,
        zero_counts: ZeroCounts = "error",
    ) -> None:
        if not isinstance(loss, nn.Module) or "weight" not in loss._buffers:
            raise TypeError(f"loss: got {type(loss).__name__}, expected a module with a `weight` buffer (or None)")
        self.loss = loss
        self.switch_epoch = check_int("switch_epoch", switch_epoch, 0, expected="an epoch >= 0")
        self.beta = beta
        self.epoch = 0
        self._prior = ClassPrior(class_counts, zero_counts=zero_counts, device="cpu", dtype=torch.float64)
        self._prior.class_balanced_weight(beta)  # a bad beta fails here, not at the switch
        self._apply()

    def weight(self, epoch: int) -> Tensor:
        """Return the class weights at ``epoch``, [C], in the default dtype on the CPU."""
        beta = self.beta if check_int("epoch", epoch, 0, expected="an epoch >= 0") >= self.switch_epoch else 0.0
        return self._prior.class_balanced_weight(beta).to(torch.get_default_dtype())

    def step(self, epoch: int) -> None:
        """Set the weights of ``epoch``; call it at the start of each epoch, counted from 0."""
        self.epoch = check_int("epoch", epoch, 0, expected="an epoch >= 0")
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, settings and counts as plain Python values."""
        return {
            "epoch": self.epoch,
            "switch_epoch": self.switch_epoch,
            "beta": self.beta,
            "class_counts": self._prior.class_counts.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over epoch, settings and counts, and set the weights.

        Raises:
            ValueError: keys missing or unknown, or another number of classes.
        """
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(f"state_dict: got keys {sorted(state_dict)}, expected {sorted(self.state_dict())}")
        prior = ClassPrior(state_dict["class_counts"], zero_counts="mask", device="cpu", dtype=torch.float64)
        if len(prior) != len(self._prior):
            raise ValueError(f"state_dict: got {len(prior)} classes, expected {len(self._prior)}")
        self._prior = prior
        self.epoch, self.switch_epoch, self.beta = (state_dict[key] for key in ("epoch", "switch_epoch", "beta"))
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        weight, held = self.weight(self.epoch), self.loss.weight
        name = "class_counts" if held is None else "weight"
        sized = getattr(self.loss, name, None)
        if sized is not None and len(sized) != len(weight):
            raise ValueError(f"class_counts: got {len(weight)} classes, expected {len(sized)} as loss.{name}")
        if isinstance(self.loss, InitializedModule):
            self.loss._keep_start("weight", weight)
        if isinstance(held, Tensor):
            held.copy_(weight)
            return
        held_by_loss = [*self.loss.parameters(), *self.loss.buffers()]  # state_dict may leave buffers out
        tensors = [tensor for tensor in held_by_loss if tensor.is_floating_point()]
        self.loss.weight = weight.to(tensors[0]) if tensors else weight
