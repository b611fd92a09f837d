"""Functions whose derivatives of every order are finite where those of torch's own overflow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _settings


def softplus(z: Tensor) -> Tensor:
    """Return log(1 + exp(z)), exact for every z (``F.softplus`` is the identity from 20 on)."""
    return -F.logsigmoid(-z)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp(a) + exp(b))."""
    difference = (a - b).masked_fill(a.isinf() & (a == b), 0.0)
    return torch.where(difference >= 0, a + softplus(-difference), b + softplus(difference))


def quick_logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.logaddexp(a, b)``, one kernel, or ``logaddexp`` on the reference backend, if asked for by name."""
    return logaddexp(a, b) if _settings.backend == "reference" else torch.logaddexp(a, b)
