"""Stand in for torchvision where it is not installed: what timm needs while it is imported, and nothing behind it.

timm needs torchvision for image transforms and data sets, and imports it whole. Models, Mixup and losses run without.
Tests put the folder above on PYTHONPATH of the one process that runs timm, see ``test_guides.py``. torchmetrics, which
looks for torchvision, is content too.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType

from torch import nn


class _Missing:
    """Refuse to be made: the real class is needed here."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise ImportError(f"torchvision is a stand-in here, without {type(self).__name__}")


def _missing(name: str) -> type:
    """Make the class of a name that nobody has defined."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Missing,), {})


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class FrozenBatchNorm2d(nn.Module):
    """Only compared with: timm asks of each layer whether it is one."""


def _module(name: str, **names: object) -> ModuleType:
    module = ModuleType(f"{__name__}.{name}")
    module.__dict__.update(names, __getattr__=_missing)
    sys.modules[module.__name__] = module
    return module


_functional = _module("transforms.functional", InterpolationMode=InterpolationMode)
_misc = _module("ops.misc", FrozenBatchNorm2d=FrozenBatchNorm2d)
transforms = _module("transforms", functional=_functional, InterpolationMode=InterpolationMode)
datasets, models, ops = _module("datasets"), _module("models"), _module("ops", misc=_misc)
