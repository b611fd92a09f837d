"""One module per op, each with an ``OP``: adding a module adds an op."""

from __future__ import annotations

import importlib
import pkgutil

from ... import info
from ..op import Op

_LIBRARY = list(info()["backends"])
_NAMES = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=_LIBRARY.index)

#: Every op that has a module here, in the library's order.
OPS: dict[str, Op] = {name: importlib.import_module(f"{__name__}.{name}").OP for name in _NAMES}
