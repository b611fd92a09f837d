"""The Triton backend of margin_cross_entropy."""

from .backward import backward
from .forward import forward
from .mean import mean_coefficient, row_weights, scale_gradient_

__all__ = ["backward", "forward", "mean_coefficient", "row_weights", "scale_gradient_"]
