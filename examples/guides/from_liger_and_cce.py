"""From Liger and cut-cross-entropy: what their calls compute, in plain PyTorch, and the same here.

    python examples/guides/from_liger_and_cce.py

Liger's kernels need a GPU: ``formula`` is what they compute, in PyTorch. cut-cross-entropy brings a formula of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cut_cross_entropy import linear_cross_entropy
from torch import Tensor, nn

import lt_kernels
import lt_kernels.functional as LF

BATCH, LENGTH, WIDTH, CLASSES = 4, 9, 32, 500


def liger(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # before: LigerCrossEntropyLoss(weight, label_smoothing=0.1)(logits, target)
    formula = F.cross_entropy(logits, target, weight, label_smoothing=0.1)
    # --8<-- [start:cross_entropy]
    after = LF.margin_cross_entropy(logits, target, weight, label_smoothing=0.1)
    # --8<-- [end:cross_entropy]
    return formula, after


def z_loss(logits: Tensor, target: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    # before: LigerCrossEntropyLoss(lse_square_scale=1e-3)(logits, target)
    formula = F.cross_entropy(logits, target) + 1e-3 * logits.logsumexp(1).square()[kept].mean()
    # --8<-- [start:z_loss]
    found = LF.margin_cross_entropy(logits, target, return_lse=True)
    after = found.loss + 1e-3 * found.lse.square().where(kept, 0).sum() / kept.sum()
    # --8<-- [end:z_loss]
    return formula, after


def softcap(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    # before: LigerCrossEntropyLoss(softcap=30.0)(logits, target)
    formula = F.cross_entropy(30 * (logits / 30).tanh(), target)
    # --8<-- [start:softcap]
    after = LF.margin_cross_entropy((logits / 30).tanh(), target, scale=30)
    # --8<-- [end:softcap]
    return formula, after


def fused_linear(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    # before: LigerFusedLinearCrossEntropyLoss()(weight, features, target, bias)
    formula = F.cross_entropy(F.linear(features, weight, bias), target)
    # --8<-- [start:fused_linear]
    after = LF.linear_margin_cross_entropy(features, weight, target, linear_bias=bias, ignore_index=-100)
    # --8<-- [end:fused_linear]
    return formula, after


def token_scaling(features: Tensor, weight: Tensor, target: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    # before: LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)(weight, features, target)
    log_probs = F.linear(features, weight).log_softmax(1)
    nll = F.nll_loss(log_probs, target, reduction="none")
    formula = (nll * (-nll).exp().detach())[kept].mean()
    # --8<-- [start:token_scaling]
    each = LF.linear_margin_cross_entropy(features, weight, target, ignore_index=-100, reduction="none")
    after = (each * (-each).exp().detach()).where(kept, 0).sum() / kept.sum()
    # --8<-- [end:token_scaling]
    return formula, after


def cce(e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    with torch.compiler.set_stance("force_eager"):  # on a GPU: impl="cce", its default
        formula = linear_cross_entropy(e, c, targets, shift=True, impl="torch_compile")
    # --8<-- [start:cce]
    features, target = e[:, :-1].flatten(0, 1), targets[:, 1:].flatten()  # shift: predict the next token
    after = LF.linear_margin_cross_entropy(features, c, target, ignore_index=-100)
    # --8<-- [end:cce]
    return formula, after


def long_tailed(e: Tensor, linear: nn.Linear, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Add a log prior, for which neither library has an argument."""
    log_prior = (counts / counts.sum()).log()
    formula = F.cross_entropy((linear(e) + log_prior).flatten(0, 1), targets.flatten())
    # --8<-- [start:long_tailed]
    head = lt_kernels.LinearHead.from_linear(linear, lt_kernels.LogitAdjustmentLoss(counts))
    after = head(e, targets)  # [..., D] and [...]
    # --8<-- [end:long_tailed]
    return formula, after


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    linear = nn.Linear(WIDTH, CLASSES)
    weight, bias = linear.weight, linear.bias
    targets = torch.randint(CLASSES, (BATCH, LENGTH))
    targets[0, :3] = -100
    features, target = tokens.flatten(0, 1), targets.flatten()
    kept, class_weight = target != -100, torch.rand(CLASSES) + 0.5
    counts = torch.arange(1, CLASSES + 1)
    logits = F.linear(features, weight)
    values = {
        "LigerCrossEntropyLoss": liger(logits, target, class_weight),
        "  lse_square_scale": z_loss(logits, target, kept),
        "  softcap": softcap(logits, target),
        "LigerFusedLinear...": fused_linear(features, weight, bias, target),
        "  use_token_scaling": token_scaling(features, weight, target, kept),
        "cce, shift": cce(tokens, weight, targets),
        "with a log prior": long_tailed(tokens, linear, targets, counts),
    }
    print(f"{'':24}{'formula':>12}{'value here':>12}{'gradients differ by':>22}")
    for name, (formula, after) in values.items():
        gradients = [torch.autograd.grad(value, tokens, retain_graph=True)[0] for value in (formula, after)]
        apart = ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()
        print(f"{name:24}{formula.item():12.6f}{after.item():12.6f}{apart:22.1e}")


if __name__ == "__main__":
    main()
