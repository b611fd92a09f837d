"""The check of every provider before it is timed, against float64 and eager PyTorch in the same dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..testing import assert_within_budget
from .cases import Inputs
from .providers import Step

I = TypeVar("I", bound=Inputs)  # noqa: E741


#: The allowed multiple of eager's error: for our backends, which are released, and for others, which are compared.
_OURS, _OTHERS = 2.0, 8.0


class Agreement(ABC, Generic[I]):
    """The results of one case, or parts of them, in float64 and in same-dtype eager."""

    def __init__(self, op: str, inputs: I, eager: Step) -> None:
        self._op = op
        self._inputs = inputs
        self._choose_parts()
        self._eager = self._run(eager)
        with torch.no_grad():
            self._truth = self._true_values()

    def check(self, provider: str, step: Step) -> None:
        """Raise AssertionError unless every result is within the error budget: 2 * eager's error + eps.

        Other libraries may make 8 * eager's error: a sum in another order may be a little less exact.
        """
        actual = self._run(step)
        factor = _OURS if provider.startswith("lt") else _OTHERS
        for what, truth in self._truth.items():
            assert_within_budget(actual[what], self._eager[what], truth, f"{self._op} {provider} {what}", factor)

    def _choose_parts(self) -> None:  # an op that compares everything has nothing to choose
        """Choose the rows, samples or classes to compare, before anything is run."""

    @abstractmethod
    def _run(self, step: Step) -> dict[str, Tensor]:
        """Return the compared results of a provider, by the names of ``_true_values``."""

    @abstractmethod
    def _true_values(self) -> dict[str, Tensor]:
        """Return the same results in float64."""


class LossAgreement(Agreement[I]):
    """The loss, and a part of every gradient.

    Providers run on the whole case with ``reduction="mean"``. The loss is the mean over all rows. Only a part of each
    gradient is compared, so that float64 stays cheap for large cases.
    """

    @abstractmethod
    def _parts(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the compared part of each leaf's gradient, by the names of ``_true_values`` without "loss"."""

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
