"""Bad input: tables of arguments, the error that each must raise, and its message."""

from __future__ import annotations

import re
from typing import Any

import pytest


def refused(names: str, *table: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Parametrize over ``names`` and ``refusal``, the context in which the error must occur.

    Args:
        table: rows of values for ``names``, the error and what its message contains, from which the id is made.
    """
    rows = [
        pytest.param(
            *values,
            pytest.raises(error, match=re.escape(message)),
            id=message.partition(", expected")[0].replace(": got ", "="),
        )
        for *values, error, message in table
    ]
    return pytest.mark.parametrize(f"{names}, refusal", rows)
