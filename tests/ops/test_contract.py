"""What every operator promises, whatever it computes: registration, autograd, memory, repeatability, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import _engines
import pytest
import torch
from _cases.operators import BY_NAME, OPERATORS, Operator, registered_calls, with_input
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lt_kernels

DIFFERENTIABLE = [operator for operator in OPERATORS if operator.differentiable]


@pytest.fixture(autouse=True)
def strategy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run an operator's strategy in many chunks."""
    parameters = request.node.callspec.params
    operator = parameters.get("operator") or BY_NAME.get(parameters.get("name"))
    with operator.around() if operator else nullcontext():
        yield


def of_operators(attribute: str, operators: list[Operator] = OPERATORS) -> Any:
    """Parametrize over operators and one list of their cases."""
    pairs = [(operator, case) for operator in operators for case in getattr(operator, attribute)]
    ids = [f"{operator.name}-{case.id}" for operator, case in pairs]
    return pytest.mark.parametrize(("operator", "case"), pairs, ids=ids)


def each_operator(operators: list[Operator] = OPERATORS) -> Any:
    return pytest.mark.parametrize("operator", operators, ids=lambda operator: operator.name)


def grads_of(operator: Operator, sample: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(operator.loss(sample, **options), list(sample.differentiable.values()))


def same_bits(one: Any, other: Any) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


# -------------------------------------------------------------------------------------------------------- registration

#: "expert_cross_entropy", ...; modes of linear heads have the registered operator in common, which takes no backend's.
REGISTERED = [
    "margin_cross_entropy", "expert_cross_entropy", "expert_fusion", "expert_divergence",
    *(name for name in BY_NAME if name.startswith("partitioned_logsumexp")),
]  # fmt: skip
REGISTERED_ONCE = [*(name for name in BY_NAME if name.startswith("linear_margin")), "linear_topk"]


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
COMPILED = "test_aot_dispatch_dynamic"


@pytest.mark.parametrize("op", REGISTERED)
def test_opcheck(op, backend, device):
    """Compiled code sees shapes and autograd, which all backends share: ``COMPILED`` runs on the first of them."""
    checks = (*OPCHECKS, COMPILED) if backend == _engines.ENGINE.backends[0] else OPCHECKS
    for _, overload, arguments in registered_calls(op, backend, device):
        torch.library.opcheck(overload, arguments, test_utils=checks)


@pytest.mark.parametrize("op", REGISTERED_ONCE)
def test_opcheck_of_products(op, device):
    for _, overload, arguments in registered_calls(op, "reference", device):
        # compiled code takes no operator that writes to its arguments
        checks = OPCHECKS if overload._schema.is_mutable else (*OPCHECKS, COMPILED)
        torch.library.opcheck(overload, arguments, test_utils=checks)


def input_of(sample: Any) -> Tensor:
    return sample.query if hasattr(sample, "query") else sample.input


def compare_with_eager(operator: Operator, case: Any, device: str, backend: str, **keywords: Any) -> None:
    torch._dynamo.reset()
    sample = case.sample(torch.float32, device)

    def call(x: Tensor) -> list[Tensor]:
        results = operator.results(with_input(sample, x.sin()))
        return [value if value.dtype == torch.int64 else 2 * value for value in results]

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend, **keywords)):
        found.append(function(input_of(sample)))
        totals = [value.nan_to_num(0, 0, 0).sum() for value in found[-1] if value.requires_grad]
        if totals:
            leaves = list(sample.differentiable.values())
            found[-1] += torch.autograd.grad(sum(totals[1:], totals[0]), leaves, allow_unused=True)
    for expected, actual in zip(*found, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@of_operators("compiled", [operator for operator in OPERATORS if not operator.products])
def test_compile_fullgraph(operator, case, backend, device):
    compare_with_eager(operator, case, device, "aot_eager")


@of_operators("compiled", [operator for operator in OPERATORS if operator.products])
def test_compile_fullgraph_of_products(operator, case, device):
    compare_with_eager(operator, case, device, "aot_eager")


@each_operator()
def test_compile_with_dynamic_shapes(operator, device):
    compare_with_eager(operator, operator.compiled[0], device, "aot_eager", dynamic=True)


@pytest.mark.parametrize("op", ["linear_topk", "expert_fusion"])
def test_decompositions_for_exporters(op, device):
    for what, overload, arguments in registered_calls(op, "reference", device):
        names = [argument.name for argument in overload._schema.arguments]
        given = dict(zip(names, arguments, strict=True))
        floats = {name: given[name] for name in ("weights", "scale") if name in given}  # in the schema's order
        flat = [each for value in floats.values() for each in (value if isinstance(value, list) else [value])]
        in_tensor = {name: [0.0] * len(value) if isinstance(value, list) else 0.0 for name, value in floats.items()}
        in_tensor["numbers"] = torch.tensor(flat, dtype=torch.float64)
        for changed in ({}, in_tensor):
            found = torch._decomp.decomposition_table[overload](*{**given, **changed}.values())
            for ours, theirs in zip(found, overload(*{**given, **changed}.values()), strict=True):
                torch.testing.assert_close(ours, theirs, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize(
    "name",
    [
        "margin_cross_entropy",
        "linear_margin_cross_entropy, rows",
        "expert_cross_entropy",
        "expert_fusion",
        "expert_divergence, pairwise",
        "partitioned_logsumexp, chunked",
    ],
)
def test_compile_with_inductor(name, device):
    compare_with_eager(BY_NAME[name], BY_NAME[name].compiled[0], device, "inductor")


@each_operator()
def test_a_backend_asked_for_by_name_is_never_replaced(operator, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sample = operator.cases[0].sample(torch.float32)
    name = operator.name.partition(",")[0].removesuffix(" of a list")
    message = rf"backend 'triton' cannot run {name} on cpu tensors"
    with lt_kernels.use_backend("triton"), pytest.raises(lt_kernels.BackendUnavailableError, match=message):
        operator.results(sample)


# ------------------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize(
    ("operator", "reduction"),
    [
        pytest.param(operator, reduction, id=f"{operator.name}-{reduction}")
        for operator in DIFFERENTIABLE
        for reduction in (("mean", "none") if operator.per_row else ("mean",))
    ],
)
@pytest.mark.backends("native", "triton")
def test_double_backward_is_refused(operator, reduction, backend, device):
    """On all backends but the reference, see test_second_order.py."""
    sample = operator.cases[0].sample(torch.float32, device)
    loss = operator.loss(sample, **({"reduction": reduction} if operator.per_row else {}))
    leaf = next(iter(sample.differentiable.values()))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.backends("native", "triton")
@each_operator(DIFFERENTIABLE)
def test_transforms_are_refused(operator, backend, device):
    """Forward mode, functional transforms, and dual numbers that an operator would drop; not on the reference."""
    sample = operator.cases[0].sample(torch.float32, device)
    x = input_of(sample).detach()

    def call(z: Tensor) -> Tensor:
        return operator.results(with_input(sample, z))[0].sum()

    for transform in (lambda: torch.func.jvp(call, (x,), (x,)), lambda: torch.func.grad(call)(x)):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            transform()
    with torch.autograd.forward_ad.dual_level():
        call(x)  # nothing to lose
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@of_operators("cases", DIFFERENTIABLE)
def test_retained_graphs_and_accumulation(operator, case, backend, device):
    for options in ({}, operator.per_row) if operator.per_row else ({},):
        sample = case.sample(torch.float32, device)
        leaves = list(sample.differentiable.values())
        once = [grad.clone() for grad in grads_of(operator, sample, **options)]
        loss = operator.loss(sample, **options)
        for factor, total in ((2.0, 2.0), (-0.25, 1.75), (0.0, 1.75)):
            (factor * loss).backward(retain_graph=factor != 0)
            for leaf, grad in zip(leaves, once, strict=True):
                torch.testing.assert_close(leaf.grad, total * grad)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@each_operator(DIFFERENTIABLE)
def test_checkpointing(operator, backend, device):
    sample = operator.cases[0].sample(torch.float32, device)
    leaf = input_of(sample)

    def call(x: Tensor) -> Tensor:
        return operator.loss(with_input(sample, x.sin()))

    (plain,) = torch.autograd.grad(call(leaf), leaf)
    (again,) = torch.autograd.grad(checkpoint(call, leaf, use_reentrant=False), leaf)
    assert torch.equal(plain, again)
    leaf.grad = None
    checkpoint(call, leaf, use_reentrant=True).backward()
    assert torch.equal(plain, leaf.grad)


# -------------------------------------------------------------------------------------------------------------- memory


@of_operators("cases")
def test_inputs_are_left_alone(operator, case, backend, device):
    sample = case.sample(torch.float32, device)
    tensors = list(sample.tensors.values())
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    operator.step(sample)
    assert same_bits([t.detach() for t in tensors], before)
    assert versions == [t._version for t in tensors]


@each_operator(DIFFERENTIABLE)
def test_gradients_stay_after_the_graph_is_gone(operator, backend, device):
    """A gradient that left the graph is the caller's: later calls must not write into its memory."""
    case = operator.large[0]
    held = grads_of(operator, case.sample(torch.float32, device))
    copies = [grad.clone() for grad in held]
    for seed in range(1, 4):
        grads_of(operator, case.sample(torch.float32, device, seed=seed))
    assert same_bits(held, copies)


@of_operators("cases", DIFFERENTIABLE)
def test_gradients_are_tensors_of_their_own(operator, case, backend, device):
    """As the fake says: compiled code asserts that each begins on 16 bytes."""
    found = grads_of(operator, case.sample(torch.float32, device))
    assert len({grad.untyped_storage().data_ptr() for grad in found}) == len(found)
    for grad in found:
        assert grad.storage_offset() == 0


# ------------------------------------------------------------------------------------------------------- repeatability


@of_operators("large")
def test_the_same_bits_from_run_to_run(operator, case, backend, device):
    """With one thread of the CPU and with two, but for products."""
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        before = torch.get_num_threads()
        for threads in (2, 2, 2) if operator.products else (1, 2, 2):
            torch.set_num_threads(threads)
            try:
                runs.append(operator.step(case.sample(dtype, device)))
            finally:
                torch.set_num_threads(before)
        assert same_bits(runs[0], runs[1])
        assert same_bits(runs[0], runs[2])


@each_operator()
def test_no_graph_no_gradient(operator, backend, device):
    sample = operator.cases[0].sample(torch.float32, device)
    with torch.no_grad():
        results = operator.results(sample)
    assert not any(value.requires_grad for value in results)
    for a, b in zip(results, operator.results(sample), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
