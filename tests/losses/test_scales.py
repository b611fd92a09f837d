"""Scales and margins that are tensors of the loss: learned by the caller, or buffers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _loss_cases import CASES, CLASSIFIERS, COUNTS, C, make_batch
from _refused import refused
from torch import nn

from lt_kernels import losses
from lt_kernels.losses import LinearHead

BATCH = make_batch()
SINGLE = BATCH.to(torch.float32)
WEIGHTED = {name: case for name, case in CASES.items() if case.weighted}  # over margin_cross_entropy, or of experts
every_loss = pytest.mark.parametrize("case", WEIGHTED.values(), ids=WEIGHTED.keys())


@every_loss
def test_a_learned_scale(case, backend):
    """The value is that of the number, and the gradient its derivative, in every term of the loss."""
    start, step = 12.5, 1e-5

    def of_number(scale: float) -> float:
        return case.call(case.make(COUNTS, scale=scale, dtype=torch.float64), BATCH).item()

    scale = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    loss = case.make(COUNTS, scale=scale, dtype=torch.float64)
    assert dict(loss.named_parameters())["scale"] is scale
    value = case.call(loss, BATCH)
    torch.testing.assert_close(value.item(), of_number(start), rtol=1e-12, atol=0)
    value.backward()
    slope = (of_number(start + step) - of_number(start - step)) / (2 * step)
    torch.testing.assert_close(scale.grad.item(), slope, rtol=1e-6, atol=1e-8)
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert case.call(loss, BATCH) < value
    other = case.make(COUNTS, scale=nn.Parameter(torch.tensor(1.0, dtype=torch.float64)), dtype=torch.float64)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(case.call(other, BATCH), case.call(loss, BATCH))


@every_loss
def test_a_scale_that_is_a_buffer(case):
    given = torch.tensor(12.5)
    loss = case.make(COUNTS, scale=given)
    assert "scale" in loss.state_dict()
    assert "scale" not in dict(loss.named_parameters())
    torch.testing.assert_close(case.call(loss, BATCH), case.call(case.make(COUNTS, scale=12.5), BATCH))
    loss.half().scale.fill_(3.3)
    assert given.item() == 12.5
    torch.testing.assert_close(case.call(loss, BATCH), case.call(case.make(COUNTS, scale=3.3), BATCH))


@every_loss
@refused(
    "scale",
    (0.0, ValueError, "scale: got 0.0, expected a number > 0"),
    (torch.tensor(-1.0), ValueError, "scale: got -1.0, expected a number > 0"),
    (torch.tensor(math.nan), ValueError, "scale: got nan, expected a finite number"),
    (torch.ones(1), ValueError, "scale: got shape (1,), expected a number or a 0-dim tensor"),
    (torch.tensor(3), TypeError, "scale: got dtype torch.int64, expected a floating-point dtype"),
    (nn.Parameter(torch.tensor(3.0)).exp(), ValueError, "scale: got a tensor that requires grad, expected an nn.P"),
    ("30", TypeError, "scale: got str, expected a number"),
)
def test_bad_scales(case, scale, refusal):
    with refusal:
        case.make(COUNTS, scale=scale)


@pytest.mark.parametrize("make", [losses.CosFaceLoss, losses.ArcFaceLoss])
def test_a_learned_margin_of_all_classes(make, backend):
    margin = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    value = make(margin, scale=10.0)(BATCH.logits, BATCH.target)
    value.backward()
    above, below = (make(0.3 + h, scale=10.0)(BATCH.logits, BATCH.target).item() for h in (1e-6, -1e-6))
    torch.testing.assert_close(value.item(), (above + below) / 2)
    torch.testing.assert_close(margin.grad.item(), (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name, case in CLASSIFIERS.items() if case.from_counts])
def test_a_head_learns_the_scale_of_its_loss(name):
    scale = nn.Parameter(torch.tensor(12.5))
    head = LinearHead(SINGLE.embeddings.shape[1], C, CLASSIFIERS[name].make(COUNTS, scale=scale), normalize=True)
    fixed = LinearHead.from_linear(head, CLASSIFIERS[name].make(COUNTS, scale=12.5), normalize=True)
    value = head(SINGLE.embeddings, SINGLE.target)
    torch.testing.assert_close(value, fixed(SINGLE.embeddings, SINGLE.target))
    value.backward()
    assert scale.grad != 0
    torch.testing.assert_close(head.logits(SINGLE.embeddings), fixed.logits(SINGLE.embeddings))
    for ours, theirs in zip(head.predict(SINGLE.embeddings, 3), fixed.predict(SINGLE.embeddings, 3), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_loss
def test_a_learned_scale_compiles_to_one_graph(case):
    torch._dynamo.reset()
    scale = nn.Parameter(torch.tensor(12.5))
    loss, graphs = case.make(COUNTS, scale=scale), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda: case.call(loss, SINGLE), fullgraph=True, backend=backend)
    for value in (12.5, 3.0, 40.0):
        scale.data.fill_(value)
        actual, expected = (torch.autograd.grad(f(), scale)[0] for f in (compiled, lambda: case.call(loss, SINGLE)))
        torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1
