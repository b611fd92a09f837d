"""Arguments of the backends by field name, however they are nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import torch
from torch import Tensor

NUMBERS = {"scale": 1.0, "margin": 0.0, "angular": False, "ignore_index": -100, "label_smoothing": 0.0}


def _is_named(value: Any) -> bool:
    return hasattr(value, "_fields")


def made(kind: Any, **values: Any) -> Any:
    """Return a NamedTuple of ``kind``; a field that is not given is None, or the number that changes nothing."""
    hints = get_type_hints(kind)
    fields = {}
    for name in kind._fields:
        if _is_named(hints[name]):
            fields[name] = made(hints[name], **values)
        else:
            fields[name] = values.get(name, NUMBERS.get(name))
    return kind(**fields)


def field(a: Any, name: str) -> Any:
    """Return a field of a NamedTuple or of one inside it."""
    if name in a._fields:
        return getattr(a, name)
    inner = next(value for value in a if _is_named(value) and name in value._fields)
    return getattr(inner, name)


def changed(a: Any, **values: Any) -> Any:
    """Return a NamedTuple with other values of some fields."""
    new = {name: value for name, value in values.items() if name in a._fields}
    for name, inner in zip(a._fields, a, strict=True):
        if _is_named(inner) and (own := {key: value for key, value in values.items() if key in inner._fields}):
            new[name] = inner._replace(**own)
    return a._replace(**new)


def mapped(function: Callable[[Tensor], Tensor], a: Any) -> Any:
    """Return a NamedTuple or list with ``function`` applied to every tensor."""
    if isinstance(a, Tensor):
        return function(a)
    if _is_named(a):
        return type(a)(*(mapped(function, value) for value in a))
    return [mapped(function, value) for value in a] if isinstance(a, list) else a


def converted(a: Any, dtype: torch.dtype) -> Any:
    """Return a NamedTuple, list or tensor with every floating tensor in ``dtype``."""
    return mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, a)


def flat(a: Any) -> Iterator[Any]:
    """Yield the fields in the order of the operator's schema."""
    for value in a:
        if _is_named(value):
            yield from flat(value)
        else:
            yield value
