"""Losses and heads in traced code: torch.export, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _loss_cases import CASES, COUNTS, make_batch
from torch import nn

SINGLE = make_batch().to(torch.float32)


def arguments(case: Any, batch: Any = SINGLE) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a case calls its loss with."""
    calls: list[Any] = []
    case.call(lambda *args, **keywords: calls.append((args, keywords)), batch)
    return calls[0]


def each_loss() -> Any:
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def exported(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    program = torch.export.export(module, args, keywords).module()
    torch.testing.assert_close(program(*args, **keywords), module(*args, **keywords))


@each_loss()
def test_losses_export(case):
    exported(case.make(COUNTS, **case.options), *arguments(case))
