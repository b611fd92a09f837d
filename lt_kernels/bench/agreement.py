"""What every provider is held to before it is timed: float64 truth and eager PyTorch in the same dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..testing import assert_within_budget
from .cases import Inputs
from .providers import Step

I = TypeVar("I", bound=Inputs)  # noqa: E741


#: Multiple of eager's error: what our backends may make, and what others may: they are compared, not released.
_OURS, _OTHERS = 2.0, 8.0


class Agreement(ABC, Generic[I]):
    """The results of one case, or parts of them, as float64 and same-dtype eager have them."""

    def __init__(self, op: str, inputs: I, eager: Step) -> None:
        self._op = op
        self._inputs = inputs
        self._eager = self._run(eager)
        with torch.no_grad():
            self._truth = self._true_values()

    def check(self, provider: str, step: Step) -> None:
        """AssertionError unless every result is within the error budget: 2 * eager's error + eps.

        For other libraries 8 * eager's error: a sum in another order may be a little less exact.
        """
        actual = self._run(step)
        factor = _OURS if provider.startswith("lt") else _OTHERS
        for what, truth in self._truth.items():
            assert_within_budget(actual[what], self._eager[what], truth, f"{self._op} {provider} {what}", factor)

    @abstractmethod
    def _run(self, step: Step) -> dict[str, Tensor]:
        """What is compared of a provider's results, by the names of ``_true_values``."""

    @abstractmethod
    def _true_values(self) -> dict[str, Tensor]:
        """The same in float64."""


class LossAgreement(Agreement[I]):
    """The loss, and a part of every gradient.

    Providers run on the whole case with ``reduction="mean"``. The loss is that of all rows; of the gradients a part is
    compared, so that float64 stays cheap where cases are large.
    """

    @abstractmethod
    def _parts(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is compared of each leaf's gradient, by the names of ``_true_values``; beside it they have "loss"."""

    def _run(self, step: Step) -> dict[str, Tensor]:
        inputs = self._inputs
        inputs.drop_gradients()
        loss = step()
        loss.backward()
        gradients = {}
        for name, leaf in inputs.leaves.items():
            assert leaf.grad is not None, f"no gradient of {name}"
            assert leaf.grad.shape == leaf.shape, f"gradient of {name}: shape {tuple(leaf.grad.shape)}"
            gradients[name] = leaf.grad
        inputs.drop_gradients()
        assert isinstance(loss, Tensor), "no loss"
        return {"loss": loss.detach(), **self._parts(gradients)}
