"""The experts' cross-entropy in eager PyTorch: the definition that the other backends are held to.

For expert e with logits x_e, target y and the options of ``margin_cross_entropy``:

    loss_e = margin_cross_entropy(x_e, y, class_bias=tau_e * log_prior + class_bias, ...)
    ensemble: lse(zbar) - zbar_y,   zbar = scale * mean over e of x_e
"""

from __future__ import annotations

from torch import Tensor

from .arguments import Arguments
from .looped import forward as _looped


def forward(a: Arguments, with_ensemble: bool, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    return _looped(a, with_ensemble, with_grad, "reference")
