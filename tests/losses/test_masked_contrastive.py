"""Contrastive recipes beside a masked class: the loss of the other classes by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lt_kernels.losses import ELMLoss, GMLLoss, PaCoLoss

KEPT = torch.tensor([0, 2, 3])
COUNTS = torch.tensor([50, 0, 20, 3])
TARGET = torch.tensor([0, 2, 3, 0, 2, 0])
KEY_LABEL = torch.tensor([0, 2, 2, 3, 3, 0, 0])


def unit(*shape: int, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1)


def paco(counts, logits, of_class, **options):
    loss = PaCoLoss(counts, alpha=0.05, label_smoothing=0.1, dtype=torch.float64, **options)
    return loss(unit(6, 8, seed=1), of_class[TARGET], unit(7, 8, seed=2), of_class[KEY_LABEL], logits)


def gml(counts, logits, of_class, **options):
    loss = GMLLoss(counts, alpha=1.0, dtype=torch.float64, **options)
    teacher = unit(6, 4, seed=3)[:, KEPT if logits.shape[1] == 3 else slice(None)]
    return loss(
        unit(6, 8, seed=1), of_class[TARGET], unit(7, 8, seed=2), of_class[KEY_LABEL], logits, teacher_logits=teacher
    )


def elm(counts, logits, of_class, **options):
    return ELMLoss(counts, dtype=torch.float64, **options)(logits, unit(6, 8, seed=1), of_class[TARGET])


@pytest.mark.parametrize("call", [paco, gml, elm])
def test_a_masked_class_takes_no_part(call, backend):
    logits = unit(6, 4, seed=0).requires_grad_()
    value = call(COUNTS, logits, torch.arange(4), zero_counts="mask")
    expected = call(COUNTS[KEPT], logits[:, KEPT], torch.tensor([0, -1, 1, 2]))
    torch.testing.assert_close(value, expected)
    (gradient,), (of_expected,) = (torch.autograd.grad(each, logits) for each in (value, expected))
    torch.testing.assert_close(gradient, of_expected)
    assert gradient[:, KEPT].any()
    assert not gradient[:, 1].any()
