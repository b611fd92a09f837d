"""Bad input: a clear error naming the argument, what was given and what was expected, before anything is changed."""

from __future__ import annotations

import pytest
import torch

import lt_kernels
from lt_kernels.functional import margin_cross_entropy

X, Y = torch.randn(3, 5), torch.tensor([0, 1, 4])
META = torch.device("meta")

NAN = float("nan")
PIXELS = {"input": torch.randn(2, 3, 4), "target": torch.tensor([[0, 1, 2, 0], [0, 3, 1, 1]])}
MIXED = {"mixed_target": Y, "mix_lambda": 0.5}

TABLE = {
    "target of pixels": (PIXELS, IndexError, r"target: row 5 has class 3, expected 0 <= class < 3"),
    "ignore_index of probabilities": (
        {"target": X.softmax(1), "ignore_index": 1},
        ValueError,
        r"ignore_index: got 1 with class-probability targets",
    ),
    "class_bias type": ({"class_bias": [0.0] * 5}, TypeError, r"class_bias: got list, expected a Tensor"),
    "class_bias device": ({"class_bias": torch.ones(5, device=META)}, ValueError, r"class_bias: got device meta"),
    "class_scale shape": ({"class_scale": torch.ones(6)}, ValueError, r"class_scale: got shape \(6,\), expected \[5\]"),
    "class_scale dtype": ({"class_scale": torch.ones(5).long()}, TypeError, r"class_scale: got dtype torch.int64"),
    "class_scale device": ({"class_scale": torch.ones(5, device=META)}, ValueError, r"class_scale: got device meta"),
    "margin dtype": ({"margin": torch.ones(5).long()}, TypeError, r"margin: got dtype torch.int64"),
    "margin device": ({"margin": torch.ones(5, device=META)}, ValueError, r"margin: got device meta"),
    "angle": (
        {"margin": -0.5, "margin_type": "angular"},
        ValueError,
        r"margin: got -0.5, expected an angle in \[0, pi\]",
    ),
    "scale device": ({"scale": torch.ones((), device=META)}, ValueError, r"scale: got device meta"),
    "scale type": ({"scale": "30"}, TypeError, r"scale: got str, expected a number"),
    "share type": ({**MIXED, "mix_lambda": "0.5"}, TypeError, r"mix_lambda: got str, expected a number"),
    "share nan": ({**MIXED, "mix_lambda": NAN}, ValueError, r"mix_lambda: got nan, expected a finite number"),
    "mixed_target type": ({**MIXED, "mixed_target": [0, 1, 2]}, TypeError, r"mixed_target: got list"),
    "mixed_target device": ({**MIXED, "mixed_target": Y.to(META)}, ValueError, r"mixed_target: got device meta"),
    "smoothing negative": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing: got -0.1, expected .* \[0, 1\]"),
    "smoothing nan": ({"label_smoothing": NAN}, ValueError, r"label_smoothing: got nan, expected a finite number"),
    "ignore_index bool": ({"ignore_index": True}, TypeError, r"ignore_index: got bool, expected an int"),
    "input not a tensor": ({"input": [1.0]}, TypeError, r"input: got list, expected a Tensor"),
    "input of integers": ({"input": X.long()}, TypeError, r"input: got dtype torch.int64, expected one of"),
    "input 0-dim": ({"input": torch.tensor(1.0)}, ValueError, r"input: got a 0-dim tensor, expected \[C\]"),
    "no classes": (
        {"input": torch.zeros(3, 0)},
        ValueError,
        r"input: got shape \(3, 0\), expected at least one class",
    ),
    "target not a tensor": ({"target": [0, 1, 2]}, TypeError, r"target: got list, expected a Tensor"),
    "target of bools": ({"target": Y > 0}, TypeError, r"target: got dtype torch.bool, expected an integer dtype"),
    "target shape": ({"target": Y[:2]}, ValueError, r"target: got class indices of shape \(2,\), expected \(3,\)"),
    "classes last": (
        {"input": torch.randn(2, 3, 5), "target": Y.expand(2, 3)},
        ValueError,
        r"expected \(2, 5\) for logits of shape \(2, 3, 5\), whose classes are dimension 1 .*\.movedim\(-1, 1\), or "
        r"logits.flatten\(0, -2\) with target.flatten\(\)",
    ),
    "probabilities' shape": (
        {"target": X[:, :4]},
        ValueError,
        r"target: got class probabilities .* of shape \(3, 4\)",
    ),
    "target device": ({"target": Y.to(META)}, ValueError, r"target: got device meta, expected cpu"),
    "target too large": ({"target": Y + 1}, IndexError, r"target: row 2 has class 5, expected 0 <= class < 5"),
    "target negative": ({"target": Y - 1}, IndexError, r"target: row 0 has class -1, .* ignore_index=-100"),
    "weight type": ({"weight": [1.0] * 5}, TypeError, r"weight: got list, expected a Tensor of shape \[5\]"),
    "weight shape": ({"weight": torch.ones(4)}, ValueError, r"weight: got shape \(4,\), expected \[5\]"),
    "weight dtype": (
        {"weight": torch.ones(5).long()},
        TypeError,
        r"weight: got dtype torch.int64, expected a floating",
    ),
    "weight device": ({"weight": torch.ones(5, device=META)}, ValueError, r"weight: got device meta, expected cpu"),
    "weight learns": (
        {"weight": torch.ones(5).requires_grad_()},
        ValueError,
        r"weight: got a tensor that requires grad",
    ),
    "class_bias shape": ({"class_bias": torch.ones(5, 1)}, ValueError, r"class_bias: got shape \(5, 1\)"),
    "class_bias dtype": ({"class_bias": torch.ones(5).int()}, TypeError, r"class_bias: got dtype torch.int32"),
    "class_scale type": ({"class_scale": 2.0}, TypeError, r"class_scale: got float, expected a Tensor"),
    "margin shape": ({"margin": torch.ones(3)}, ValueError, r"margin: got shape \(3,\), expected \[5\]"),
    "margin type": ({"margin": "0.5"}, TypeError, r"margin: got str, expected a number"),
    "margin infinite": ({"margin": float("inf")}, ValueError, r"margin: got inf, expected a finite number"),
    "scale nan": ({"scale": float("nan")}, ValueError, r"scale: got nan, expected a finite number"),
    "scale shape": ({"scale": torch.ones(1)}, ValueError, r"scale: got shape \(1,\), expected a number or a 0-dim"),
    "scale dtype": ({"scale": torch.tensor(2)}, TypeError, r"scale: got dtype torch.int64, expected a floating"),
    "scale bool": ({"scale": True}, TypeError, r"scale: got bool, expected a number"),
    "margin_type": ({"margin_type": "cosine"}, ValueError, r"margin_type: got 'cosine', expected one of 'additive'"),
    "reduction": ({"reduction": "avg"}, ValueError, r"reduction: got 'avg', expected one of 'none', 'mean', 'sum'"),
    "empty_mean": ({"empty_mean": 0}, ValueError, r"empty_mean: got 0, expected one of 'nan', 'zero'"),
    "masked_classes": ({"masked_classes": 0}, TypeError, r"masked_classes: got int, expected a bool"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, r"ignore_index: got float, expected an int"),
    "smoothing range": (
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing: got 1.5, expected a number in \[0, 1\]",
    ),
    "smoothing type": ({"label_smoothing": "x"}, TypeError, r"label_smoothing: got str, expected a number"),
    "mixture without share": (
        {"mixed_target": Y},
        ValueError,
        r"mix_lambda: got None with mixed_target, expected both",
    ),
    "share without mixture": (
        {"mix_lambda": 0.5},
        ValueError,
        r"mixed_target: got None with mix_lambda, expected both",
    ),
    "share range": ({"mixed_target": Y, "mix_lambda": -0.1}, ValueError, r"mix_lambda: got -0.1, expected .* \[0, 1\]"),
    "share shape": ({"mixed_target": Y, "mix_lambda": torch.ones(2)}, ValueError, r"mix_lambda: got shape \(2,\)"),
    "share dtype": ({"mixed_target": Y, "mix_lambda": Y}, TypeError, r"mix_lambda: got dtype torch.int64"),
    "share device": (
        {"mixed_target": Y, "mix_lambda": torch.ones((), device=META)},
        ValueError,
        r"mix_lambda: got device meta, expected cpu",
    ),
    "share learns": (
        {"mixed_target": Y, "mix_lambda": torch.tensor(0.5, requires_grad=True)},
        ValueError,
        r"mix_lambda: got a tensor that requires grad",
    ),
    "mixed_target shape": (
        {"mixed_target": Y[:2], "mix_lambda": 0.5},
        ValueError,
        r"mixed_target: got class indices of shape",
    ),
    "mixed_target of probabilities": (
        {"mixed_target": X, "mix_lambda": 0.5},
        TypeError,
        r"mixed_target: got dtype torch.float32",
    ),
    "mixed_target range": ({"mixed_target": Y + 2, "mix_lambda": 0.5}, IndexError, r"mixed_target: row 2 has class 6"),
    "margin with probabilities": (
        {"target": X.softmax(1), "margin": 0.1},
        ValueError,
        r"margin: .* class-probability targets",
    ),
    "mixture with probabilities": (
        {"target": X.softmax(1), "mixed_target": Y, "mix_lambda": 0.5},
        ValueError,
        r"mixed_target: got class-probability targets",
    ),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("checks", [False, True], ids=["", "with checks on"])
def test_bad_input(name, checks, backend, device):
    changed, error, message = TABLE[name]
    arguments = {"input": X, "target": Y, **changed}
    lt_kernels.set_checks(checks)
    try:
        if error is IndexError and device != "cpu" and not checks:
            loss = margin_cross_entropy(
                **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            )
            assert torch.isnan(loss)
            return
        with pytest.raises(error, match=message):
            margin_cross_entropy(**arguments)
    finally:
        lt_kernels.set_checks(False)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = r"backend 'triton' cannot run margin_cross_entropy on cpu tensors .* need CUDA tensors"
    with lt_kernels.use_backend("triton"), pytest.raises(lt_kernels.BackendUnavailableError, match=message):
        margin_cross_entropy(X, Y)
    with pytest.raises(ValueError, match=r"use_backend\(name\): got 'cuda', expected one of 'auto'"):
        with lt_kernels.use_backend("cuda"):
            pass
    with pytest.raises(ValueError, match=r"set_gradient_policy\(policy\): got 'fast'"):
        lt_kernels.set_gradient_policy("fast")


def test_shares_in_a_tensor_are_checked_with_checks_on(backend):
    share = torch.tensor([0.5, 3.0, 0.1])
    margin_cross_entropy(X, Y, mixed_target=Y, mix_lambda=share)
    lt_kernels.set_checks(True)
    try:
        with pytest.raises(ValueError, match=r"mix_lambda: got values outside \[0, 1\]"):
            margin_cross_entropy(X, Y, mixed_target=Y, mix_lambda=share)
    finally:
        lt_kernels.set_checks(False)


def test_the_backend_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), lt_kernels.use_backend("reference"):
        raise ZeroDivisionError
    assert lt_kernels.info()["settings"]["backend"] == "auto"
