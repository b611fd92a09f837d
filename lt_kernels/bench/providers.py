"""What is measured: our backends, plain PyTorch, and the cross-entropies of other libraries.

Each provider computes the mean cross-entropy of logits shifted by a log prior, from logits in memory. Other libraries
have no prior: they get the shifted copy that a user would have to make, which is part of their time. The copy is
theirs alone, so they may write gradients over it, and those with a switch for that have it on. They take [N, C] only:
segmentation maps are transposed for them, also within their time.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import info, use_backend
from ..functional import margin_cross_entropy
from .cases import Inputs

OP = "margin_cross_entropy"
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    """A way to compute the loss.

    ``make`` turns inputs into a call without arguments that returns the loss (0-dim). ``unavailable`` says for a
    device ("cpu" or "cuda") why the provider cannot run there, ``unasked`` why it is measured only when asked for; None
    where neither holds.
    """

    name: str
    make: Callable[[Inputs], Step]
    unavailable: Callable[[str], str | None] = lambda device: None
    unasked: Callable[[str], str | None] = lambda device: None

    @property
    def backend(self) -> str | None:
        """reference | native | triton for ours, None for others."""
        return self.name[3:-1] if self.name.startswith("lt[") else None


def eager_loss(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """What the library replaces; ``log_prior`` broadcasts against ``logits``."""
    return F.cross_entropy(logits + log_prior.to(logits.dtype), target)


def _eager(inputs: Inputs) -> Step:
    log_prior = inputs.per_class(inputs.log_prior)
    return lambda: eager_loss(inputs.logits, inputs.target, log_prior)


def _compile(mode: str | None) -> Callable[[Inputs], Step]:
    def make(inputs: Inputs) -> Step:
        compiled = torch.compile(eager_loss, fullgraph=True, dynamic=False, mode=mode)
        log_prior = inputs.per_class(inputs.log_prior)
        return lambda: compiled(inputs.logits, inputs.target, log_prior)

    return make


def _autotune_unasked(device: str) -> str | None:
    return "on a CPU the code is that of compile (only matrix products are autotuned)" if device == "cpu" else None


def _loop(inputs: Inputs) -> Step:
    """The step of published code for balanced softmax: counts expanded over the rows, their log taken every time.

    In float32 for every dtype of the logits, as autocast runs it.
    """
    counts = inputs.per_class(inputs.counts)

    def step() -> Tensor:
        shifted = inputs.logits + counts.expand(inputs.logits.shape).log()
        return F.nll_loss(F.log_softmax(shifted, dim=1), inputs.target)

    return step


def _ours(backend: str) -> Provider:
    def make(inputs: Inputs) -> Step:
        def step() -> Tensor:
            with use_backend(backend):
                return margin_cross_entropy(inputs.logits, inputs.target, class_bias=inputs.log_prior)

        return step

    def unavailable(device: str) -> str | None:
        reason: str | None = info()["backends"][OP][device][backend]
        return reason

    def unasked(device: str) -> str | None:
        return "it defines the mathematics and is not meant to be fast" if backend == "reference" else None

    return Provider(f"lt[{backend}]", make, unavailable, unasked)


def _peer(name: str, module: str, make_loss: Callable[[object], Callable[[Tensor, Tensor], Tensor]]) -> Provider:
    """A library whose cross-entropy takes logits [N, C] and targets [N] on a GPU; imported when first needed."""

    def make(inputs: Inputs) -> Step:
        loss = make_loss(importlib.import_module(module))
        log_prior = inputs.per_class(inputs.log_prior).to(inputs.logits.dtype)
        target = inputs.target.flatten()
        return lambda: loss((inputs.logits + log_prior).movedim(1, -1).flatten(0, -2), target)

    def unavailable(device: str) -> str | None:
        if device != "cuda":
            return "its kernels need CUDA tensors"
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except Exception as error:  # other people's packages fail to import in many ways
            return f"{module} cannot be imported: {first_line(error)}"
        return None

    return Provider(name, make, unavailable)


def _with_inplace_backward(loss: Callable[..., Tensor]) -> dict[str, bool]:
    return {"inplace_backward": True} if "inplace_backward" in inspect.signature(loss).parameters else {}


def _liger(module: object) -> Callable[[Tensor, Tensor], Tensor]:
    loss: Callable[[Tensor, Tensor], Tensor] = module.LigerCrossEntropyLoss()  # type: ignore[attr-defined]
    return loss


def _flash_attn(module: object) -> Callable[[Tensor, Tensor], Tensor]:
    kind = module.CrossEntropyLoss  # type: ignore[attr-defined]
    loss: Callable[[Tensor, Tensor], Tensor] = kind(**_with_inplace_backward(kind))
    return loss


def _quack(module: object) -> Callable[[Tensor, Tensor], Tensor]:
    function: Callable[..., Tensor] = module.cross_entropy  # type: ignore[attr-defined]
    options = _with_inplace_backward(function)
    return lambda logits, target: function(logits, target, reduction="mean", **options)


def _no_such_op(inputs: Inputs) -> Step:
    raise NotImplementedError("cut-cross-entropy takes embeddings and a classifier")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _named(*providers: Provider) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


PROVIDERS = _named(
    Provider("eager", _eager),
    Provider("loop", _loop),
    Provider("compile", _compile(None)),
    Provider("compile-max-autotune", _compile("max-autotune-no-cudagraphs"), unasked=_autotune_unasked),
    _ours("reference"),
    _ours("native"),
    _ours("triton"),
    _peer("liger", "liger_kernel.transformers", _liger),
    _peer("flash-attn", "flash_attn.losses.cross_entropy", _flash_attn),
    _peer("quack", "quack.cross_entropy", _quack),
    Provider(
        "cut-cross-entropy",
        _no_such_op,
        lambda device: "it computes logits from embeddings and a classifier; this op is given logits in memory",
    ),
)
