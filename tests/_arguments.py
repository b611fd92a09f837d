"""Arguments of the backends by field name, at whatever depth the field is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _is_named(value: Any) -> bool:
    return hasattr(value, "_fields")


def field(a: Any, name: str) -> Any:
    """Return a field of a NamedTuple or of one inside it."""
    if name in a._fields:
        return getattr(a, name)
    return getattr(next(value for value in a if _is_named(value) and name in value._fields), name)


def changed(a: Any, **values: Any) -> Any:
    """Return a NamedTuple with other values of some fields."""
    new = {name: value for name, value in values.items() if name in a._fields}
    for name, inner in zip(a._fields, a, strict=True):
        if _is_named(inner) and (own := {key: value for key, value in values.items() if key in inner._fields}):
            new[name] = inner._replace(**own)
    return a._replace(**new)


def converted(a: Any, dtype: torch.dtype) -> Any:
    """Return a tensor, list or NamedTuple with every floating tensor in ``dtype``."""
    if isinstance(a, Tensor):
        return a.to(dtype) if a.is_floating_point() else a
    if _is_named(a):
        return type(a)(*(converted(value, dtype) for value in a))
    return [converted(value, dtype) for value in a] if isinstance(a, list) else a
