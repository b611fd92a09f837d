"""What the benchmarks of experts share: inputs, the copy they are held against, agreement of losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from . import agreement
from .cases import Case, ExpertCase, ExpertInputs
from .providers import Step
from .records import Record

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
#: The cases that targets are about, one for each device.
CPU_CASE, GPU_CASE = "inat18-e3-n512", "inat18-e3-n8192"
#: Float64 results are made in pieces of about this many logits, and at most so many have their gradients compared
#: (those of one sample at least).
CHECKED_LOGITS = 2**22


def make_inputs(case: ExpertCase, dtype: torch.dtype, device: str) -> ExpertInputs:
    return case.inputs(dtype, device)


def make_copy(inputs: ExpertInputs) -> tuple[Callable[[], object], int]:
    """A copy of all logits into an existing buffer, and the bytes it reads and writes."""
    source = inputs.stacked.detach()
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source), 2 * source.numel() * source.element_size()


def memory(record: Record) -> float | None:
    """Peak memory of forward and backward in multiples of the logits' bytes."""
    # the bytes of forward and backward are those of the logits and their gradient
    return None if record.peak_bytes is None else 2 * record.peak_bytes / record.bytes_moved


def samples_at_once(inputs: ExpertInputs) -> int:
    """How many samples have ``CHECKED_LOGITS`` logits."""
    experts, _, classes = inputs.stacked.shape
    return max(1, CHECKED_LOGITS // (experts * classes))


class Agreement(agreement.LossAgreement[ExpertInputs]):
    """Compares the loss, and all experts' gradients of samples that are spread evenly from the first to the last."""

    def __init__(self, op: str, inputs: ExpertInputs, eager: Step) -> None:
        samples, device = len(inputs.target), inputs.target.device
        checked = min(samples, samples_at_once(inputs))
        self._samples = torch.linspace(0, samples - 1, checked, dtype=torch.float64, device=device).long()
        super().__init__(op, inputs, eager)

    @abstractmethod
    def _losses(self, logits: Tensor, samples: Tensor) -> Tensor:
        """Float64 losses of some samples, whose sum over all is the number of samples times the loss.

        Args:
            logits: theirs, float64 [E, n, C].
            samples: which they are.
        """

    def _parts(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"gradient": torch.stack([gradient[self._samples] for gradient in gradients.values()])}

    def _true_values(self) -> dict[str, Tensor]:
        logits, count = self._inputs.stacked.detach(), len(self._inputs.target)
        pieces = torch.arange(count, device=logits.device).split(samples_at_once(self._inputs))
        total = torch.stack([self._losses(logits[:, piece].double(), piece).sum() for piece in pieces]).sum()
        with torch.enable_grad():
            some = logits[:, self._samples].double().requires_grad_()
            (gradient,) = torch.autograd.grad(self._losses(some, self._samples).sum(), some)
        return {"loss": total / count, "gradient": gradient / count}


def headlines_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    """For ``Provider.left_out``: what is compiled takes longer to compile than to measure."""
    if device == "cpu" and device not in case.headline:
        return "on a CPU it is measured in headline cases only"
    return None
