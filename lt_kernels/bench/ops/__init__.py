"""One module per op, each with an ``OP``: adding a module adds an op."""

from __future__ import annotations

import importlib
import pkgutil

from ..op import Op

_FOUND: list[Op] = [
    importlib.import_module(f"{__name__}.{module.name}").OP for module in pkgutil.iter_modules(__path__)
]

#: Every op that has a module here, by ``rank``.
OPS: dict[str, Op] = {op.name: op for op in sorted(_FOUND, key=lambda op: (op.rank, op.name))}
