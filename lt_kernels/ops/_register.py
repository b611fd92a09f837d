"""Registration of functional operators under ``torch.ops.lt_kernels``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

NAMESPACE = "lt_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define one operator for every device (its backends choose the kernels) and return its qualified name."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    return qualified


def register_autograd(qualified: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give an operator its gradient."""
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)


def register_no_double_backward(qualified: str) -> None:
    """Make differentiating a backward operator a clear error."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"{qualified} has no derivative: lt_kernels losses are differentiable once. For second derivatives "
            "(create_graph=True, torch.autograd.functional.hessian) write the loss with torch's own operators."
        )

    torch.library.register_autograd(qualified, backward, lib=_library)
