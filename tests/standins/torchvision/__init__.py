"""Stand in for torchvision where it is not installed: the names that timm imports, and nothing behind them.

timm needs torchvision for image transforms and data sets, and imports it whole. Models, Mixup and losses run without.
Tests put the folder above on PYTHONPATH of the one process that runs timm; see ``test_examples.py``.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType

from torch import nn


class _Missing:
    """Refuse to be made: the real class is needed here."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise ImportError("this torchvision is a stand-in without transforms, data sets and operators")


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class FrozenBatchNorm2d(nn.Module):
    """Only compared with: timm asks of each layer whether it is one."""


def _module(name: str, *missing: str, **names: object) -> ModuleType:
    module = ModuleType(f"{__name__}.{name}")
    module.__dict__.update({one: type(one, (_Missing,), {}) for one in missing}, **names)
    sys.modules[module.__name__] = module
    return module


_functional = _module("transforms.functional", InterpolationMode=InterpolationMode)
_misc = _module("ops.misc", FrozenBatchNorm2d=FrozenBatchNorm2d)
transforms = _module("transforms", "ToTensor", functional=_functional, InterpolationMode=InterpolationMode)
datasets = _module("datasets", "CIFAR10", "CIFAR100", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder")
ops = _module("ops", misc=_misc)
