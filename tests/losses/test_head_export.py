"""Inference of heads in ONNX: each exported graph runs in onnxruntime, for batches of other sizes too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lt_kernels.functional import expert_fusion
from lt_kernels.losses import ExpertHead, LDAMLoss, LinearHead, VSLoss

D, C, E, K = 8, 50, 3, 5
COUNTS = list(range(C, 0, -1))
SHIFT = torch.linspace(-2, 1, C).masked_fill(torch.arange(C) % 7 == 0, -math.inf)


class Call(nn.Module):
    """A method of a head as a module, whose parameters an exporter finds."""

    def __init__(self, head: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.head, self.call = head, call

    def forward(self, features: Tensor) -> Any:
        return self.call(self.head, features)


def session(program: torch.onnx.ONNXProgram) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString())


def run(program: onnxruntime.InferenceSession, features: Tensor) -> list[Tensor]:
    return [torch.from_numpy(value) for value in program.run(None, {program.get_inputs()[0].name: features.numpy()})]


def check(found: list[Tensor], expected: Any) -> None:
    expected = [expected] if isinstance(expected, Tensor) else [value for value in expected if value is not None]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.dtype == torch.int64:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def linear(loss: type) -> LinearHead:
    torch.manual_seed(0)
    return LinearHead(D, C, loss(COUNTS))


def experts(**options: Any) -> ExpertHead:
    torch.manual_seed(0)
    return ExpertHead(D, C, E, **options)


CASES: dict[str, tuple[nn.Module, Callable[[Any, Tensor], Any], tuple[int | str, ...]]] = {
    "call": (linear(VSLoss), lambda head, x: head(x), ("n", D)),
    "logits-cosine": (linear(LDAMLoss), lambda head, x: head.logits(x), ("n", D)),
    "predict": (linear(VSLoss), lambda head, x: head.predict(x), ("n", D)),
    "predict-cosine": (linear(LDAMLoss), lambda head, x: head.predict(x, K, SHIFT), ("n", D)),
    "predict-tokens": (linear(VSLoss), lambda head, x: head.predict(x, K), ("n", 3, D)),
    "experts": (experts(), lambda head, x: head.predict(x, K, SHIFT, 1.5, (0.2, 0.5, 0.3)), (E, "n", D)),
    "experts-shared": (experts(shared=True, learn_scale=True), lambda head, x: head.predict(x), ("n", D)),
    "experts-logits": (experts(), lambda head, x: head(x), (E, "n", D)),
    "fusion": (
        experts(learn_scale=True),
        lambda head, x: expert_fusion(head(x), topk=K, log_prior_shift=SHIFT, return_log_probs=True),
        (E, "n", D),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_head_in_onnxruntime(case):
    head, call, shape = case
    module, axis = Call(head, call).eval(), shape.index("n")

    def features(n: int) -> Tensor:
        return torch.randn([n if size == "n" else size for size in shape], generator=torch.Generator().manual_seed(n))

    sizes = ({axis: torch.export.Dim("n")},)
    exported = session(torch.onnx.export(module, (features(4),), dynamo=True, dynamic_shapes=sizes, verbose=False))
    for n in (4, 1, 9):
        check(run(exported, features(n)), module(features(n)))


def test_an_exported_program_and_the_oldest_opset():
    module, x = Call(linear(VSLoss), lambda head, x: head.predict(x, K, SHIFT)).eval(), torch.randn(4, D)
    program = torch.onnx.export(torch.export.export(module, (x,)), dynamo=True, opset_version=18, verbose=False)
    assert program.model.opset_imports[""] == 18
    check(run(session(program), x), module(x))


def test_the_lowest_of_equal_classes_comes_first():
    head = linear(VSLoss)
    with torch.no_grad():
        head.weight.copy_(head.weight[torch.arange(C) // 10 * 10])  # rows that are equal in tens
        head.bias.zero_()
    module, x = Call(head, lambda head, x: head.predict(x, 2 * K)).eval(), torch.randn(6, D)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    check(run(session(program), x), module(x))
