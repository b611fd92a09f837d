"""The check of every provider before it is timed, against float64 and eager PyTorch in the same dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..testing import assert_within_budget
from .cases import Inputs
from .providers import Step

#: The allowed multiple of eager's error: for our backends, which are released, and for others, which are compared.
_OURS, _OTHERS = 2.0, 8.0
#: Gradients of at most so many logits, or of one row, are compared.
CHECKED_LOGITS = 2**22
#: Float64 losses are made in pieces of about this many logits.
_LOGITS_AT_ONCE = 2**25


class Agreement(ABC):
    """The results of one case, or parts of them, in float64 and in same-dtype eager."""

    def __init__(self, op: str, inputs: Inputs, eager: Step) -> None:
        self._op = op
        self._inputs = inputs
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

    @abstractmethod
    def _run(self, step: Step) -> dict[str, Tensor]:
        """Return the compared results of a provider, by the names of ``_true_values``."""

    @abstractmethod
    def _true_values(self) -> dict[str, Tensor]:
        """Return the same results in float64."""


class LossAgreement(Agreement):
    """Compares the loss and every gradient. The truth is ``_losses`` in float64, some rows at a time.

    Providers run on the whole case with ``reduction="mean"``.
    """

    @abstractmethod
    def _losses(self, inputs: Inputs, rows: Tensor) -> Tensor:
        """Return the losses of some rows of float64 inputs; their mean over all rows is the loss."""

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
        return {"loss": loss.detach(), **self._compared(gradients)}

    def _compared(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the compared gradients of the leaves, by the names of ``_true_values``."""
        return {f"gradient of {name}": gradient for name, gradient in gradients.items()}

    def _true_values(self) -> dict[str, Tensor]:
        inputs, count = self._inputs.converted(torch.float64), self._inputs.target.numel()
        total = inputs.log_prior.new_zeros(())
        with torch.enable_grad():
            for rows in _pieces(inputs):
                part = self._losses(inputs, rows).sum() / count
                part.backward()
                total += part.detach()
        gradients = {name: leaf.grad for name, leaf in inputs.leaves.items() if leaf.grad is not None}
        return {"loss": total, **self._compared(gradients)}


class LogitsAgreement(LossAgreement):
    """Compares the loss, and the gradient of rows spread evenly from the first to the last.

    A row is the C logits of one sample or pixel, of all experts where there are several. The compared rows have at most
    ``CHECKED_LOGITS`` logits together, so that float64 stays cheap.
    """

    def __init__(self, op: str, inputs: Inputs, eager: Step) -> None:
        self._rows = spread(inputs.target.numel(), len(_pieces(inputs, CHECKED_LOGITS)[0]), inputs.target.device)
        super().__init__(op, inputs, eager)

    @abstractmethod
    def _losses_of(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the losses of some rows.

        Args:
            logits: theirs, float64 [E, n, C].
            rows: which they are.
        """

    def _losses(self, inputs: Inputs, rows: Tensor) -> Tensor:
        return self._losses_of(_rows_of(inputs.leaves, rows).double(), rows)

    def _compared(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"gradient": _rows_of(gradients, self._rows)}

    def _true_values(self) -> dict[str, Tensor]:
        count = self._inputs.target.numel()
        total = torch.stack([self._losses(self._inputs, rows).sum() for rows in _pieces(self._inputs)]).sum()
        with torch.enable_grad():
            some = _rows_of(self._inputs.leaves, self._rows).detach().double().requires_grad_()
            (gradient,) = torch.autograd.grad(self._losses_of(some, self._rows).sum(), some)
        return {"loss": total / count, "gradient": gradient / count}


def spread(size: int, checked: int, device: torch.device) -> Tensor:
    """Return at most ``checked`` indices, evenly from the first to the last of ``size``."""
    return torch.linspace(0, size - 1, max(1, min(size, checked)), dtype=torch.float64, device=device).long()


def _pieces(inputs: Inputs, most: int = _LOGITS_AT_ONCE) -> tuple[Tensor, ...]:
    """Return every row, in pieces of about ``most`` logits."""
    rows = inputs.target.numel()
    at_once = max(1, most // (inputs.case.logits // rows))
    return torch.arange(rows, device=inputs.target.device).split(at_once)


def _rows_of(leaves: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Return rows of [N, C, ...] tensors, [E, n, C]."""
    flat = [leaf.flatten(2) if leaf.dim() > 2 else leaf[:, :, None] for leaf in leaves.values()]
    return torch.stack([each[rows // each.shape[2], :, rows % each.shape[2]] for each in flat])
