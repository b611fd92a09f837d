"""What heads owe the libraries that wrap modules: sharded parameters of FSDP2, adapters of peft."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def as_forward(module: nn.Module, method: str, *arguments: Any) -> Any:
    """Call a method as ``module(...)`` would be: ``fully_shard`` makes parameters whole around ``forward`` alone."""
    sharded = hasattr(module, "set_reshard_after_forward")  # an FSDPModule, whose import takes long
    if sharded and method not in module.__dict__:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, method)
    return getattr(module, method)(*arguments)


def whole(name: str, parameter: Tensor, features: Tensor) -> Tensor:
    """Return a parameter for the product with ``features``, gathered if it is still sharded.

    Parameters are sharded here if ``fully_shard`` was called on a model and not on its head, which is used by itself.

    Raises:
        RuntimeError: a gradient is asked for, which nothing would reduce over the ranks.
    """
    if not hasattr(parameter, "full_tensor") or hasattr(features, "full_tensor"):
        return parameter
    if torch.is_grad_enabled() and parameter.requires_grad:
        raise RuntimeError(
            f"{name}: got a sharded parameter outside the forward of the module it was sharded with, expected "
            "fully_shard(head) before fully_shard(model), or torch.no_grad()"
        )
    gathered: Tensor = parameter.full_tensor()
    return gathered


def refuse_adapter(head: nn.Module) -> None:
    """Raise TypeError if the caller's caller is a method of a peft layer that wraps ``head``.

    Such layers add to the result of the layer they wrap, or compute the logits themselves; the result is a loss here.
    """
    layer = sys._getframe(2).f_locals.get("self")
    kind = type(layer)
    if not isinstance(layer, nn.Module) or layer._modules.get("base_layer") is not head:
        return
    if kind.__name__ == "ParamWrapper":  # adapts the weight that the head reads
        return
    raise TypeError(
        f"target_modules: got a {type(head).__name__}, whose result is a loss, for {kind.__module__}.{kind.__name__}, "
        "expected layers without it: exclude_modules=['head'] leaves it out, modules_to_save=['head'] trains it whole, "
        "and target_parameters=['head.weight'] of LoraConfig adapts its weight"
    )
