"""The compiled backend (csrc/expert_divergence)."""

from __future__ import annotations

from .. import _native
from .reference import backward, forward  # noqa: F401  TODO

_native.load()
