"""Contrastive losses on a device: every strategy at real sizes, recipes, memory, graphs, very many similarities.

A test goes through every strategy that its backend has, and names the one that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases.contrastive import BY_ID, COSINES, EVERYTHING, LEARNED, SELF, Case
from _device import (
    DTYPES,
    HALF_AND_SINGLE,
    assert_index_error,
    assert_same_bits,
    capture,
    checks_on,
    need_free_memory,
    parametrized,
    peak_memory_beside,
    poisoned_memory,
    run_late,
    synchronisation_is_an_error,
)
from _strategies import small_blocks
from torch import Tensor

import lt_kernels
from lt_kernels import _settings, losses
from lt_kernels.functional import partitioned_logsumexp, supervised_contrastive
from lt_kernels.ops.partitioned_logsumexp import plan
from lt_kernels.queues import ClassQueue
from lt_kernels.testing import (
    ContrastiveSample,
    assert_within_budget,
    check_partitioned_logsumexp,
    dense_partitioned_logsumexp,
)

#: Strategies, and "blocks": chunks of a few queries and keys, so that small cases take many.
MODES = ("materialize", "chunked", "blocks", "tiled")
#: Real sizes, in which products take the library's fast paths; every width that tiles are compiled for.
REAL = {
    "supcon": Case("supcon", 1024, 128, None, classes=100, normalized=True, keywords={"scale": 1 / 0.07, **SELF}),
    "memory": Case("memory", 512, 128, 16_384, classes=1000, **COSINES),
    "8142 keys": Case("8142 keys", 300, 64, 8142, classes=500),
    "odd width": Case("odd width", 300, 100, 8142, classes=500),
    "wide tiles": Case("wide tiles", 128, 256, 16_384, classes=1000, **COSINES),
    "gml": Case("gml", 128, 1024, 16_384, classes=1000, options=("key_bias", "scale", "exclude"), **COSINES),
    "everything": Case("everything", 256, 128, 8142, classes=500, unlabelled=0.1, masked=0.1, **EVERYTHING),
    "with itself": Case("with itself", 1000, 100, None, classes=100, **LEARNED),
    "queue": Case("queue", 256, 128, 8142, classes=500, keywords={"key_grad_rows": (0, 256)}, options=("key_bias",)),
}
FEW = {name: REAL[name] for name in ("memory", "everything", "with itself")}
#: Of the small cases those whose float16 is looked at as well, and whose memory is poisoned.
HALF = {
    name: BY_ID[name]
    for name in ("plain", "odd", "supcon", "everything", "everything with itself", "8142 keys, everything", "cosines")
}
POISONED = {
    name: BY_ID[name]
    for name in (
        "odd",
        "everything",
        "everything with itself",
        "one row",
        "one key",
        "one feature",
        "wide",
        "8142 keys",
        "few rows, many keys",
        "many rows, few keys",
        "no positives",
        "every key masked",
        "rows of keys",
        "rows of keys with itself",
        "no rows of keys",
        "only vectors learn",
    )
}

# ---------------------------------------------------------------------------------------------------------- what is run


@contextmanager
def mode_of(mode: str) -> Iterator[str]:
    """The strategy of ``mode``."""
    if mode != "blocks":
        yield mode
        return
    with small_blocks():
        yield "chunked"


def modes(case: Case, dtype: torch.dtype) -> list[str]:
    """Those that can run a case on the backend under test."""
    elements = case.rows * (case.rows if case.keys is None else case.keys)
    found = ["materialize", "chunked"] + ["blocks"] * (elements < 2**16)
    tiled = _settings.backend == "triton" and plan.tiled_reason(case.width, dtype) is None
    return found + ["tiled"] * tiled


def in_every_mode(case: Case, dtype: torch.dtype, body: Callable[[str], None]) -> None:
    """``body`` with each strategy; the failures of all in one message."""
    failures = []
    for mode in modes(case, dtype):
        with mode_of(mode) as strategy:
            try:
                body(strategy)
            except AssertionError as error:
                failures.append(f"{mode}: {error}")
    assert not failures, "; ".join(failures)


def step(sample: ContrastiveSample, strategy: str = "auto", upstream: tuple[float, ...] = (0.7, -1.3, 0.4)) -> Any:
    """Every result, then the gradient of everything that requires one."""
    result = partitioned_logsumexp(*sample.arguments, strategy=strategy, **sample.options)
    parts = result if isinstance(result[0], tuple) else (result,)
    leaves = list(sample.differentiable.values())
    values = [value for part in parts for value in part]
    pairs = [(value, factor) for part in parts for value, factor in zip(part, upstream, strict=False)]
    pairs = [(value, factor) for value, factor in pairs if value.requires_grad]
    weights = [torch.full_like(value, factor) for value, factor in pairs]
    grads = torch.autograd.grad([value for value, _ in pairs], leaves, weights) if pairs else ()
    return [*(value.detach() for value in values), *grads]


def check_case(case: Case, dtype: torch.dtype, device: str) -> None:
    sample = case.sample(dtype, device)
    in_every_mode(
        case,
        dtype,
        lambda strategy: check_partitioned_logsumexp(partial(partitioned_logsumexp, strategy=strategy), sample),
    )


@dataclass(frozen=True)
class Batch:
    """What a training step of the recipes is given; counts of 200 classes fall from 512 to 2."""

    query: Tensor  # [N, D], unit vectors, requires grad
    label: Tensor  # [N]
    key: Tensor  # [M, D], unit vectors, requires grad
    logits: Tensor  # [N, C], cosines, requires grad
    centers: Tensor  # [C, D], requires grad
    counts: Tensor  # [C], on the CPU

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.logits, self.centers]

    @staticmethod
    def make(dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        classes = 200
        counts = (512 * 256 ** -torch.linspace(0, 1, classes)).round()

        def unit(*shape: int) -> Tensor:
            x = F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
            return x.to(device, dtype).requires_grad_()

        label = torch.multinomial(counts, 96, replacement=True, generator=generator).to(device)
        cosines = torch.rand(96, classes, generator=generator, dtype=torch.float64) * 2 - 1
        vectors = unit(96, 128), unit(2048, 128), unit(classes, 128)
        return Batch(
            vectors[0], label, vectors[1], cosines.to(device, dtype).requires_grad_(), vectors[2], counts
        )  # fmt: skip


def _supcon(batch: Batch) -> Callable[[Batch], Tensor]:
    loss = losses.SupConLoss()
    return lambda b: loss(b.query.view(-1, 2, 128), b.label[::2])


def _bcl(batch: Batch) -> Callable[[Batch], Tensor]:
    loss = losses.BalancedContrastiveLoss(batch.counts)
    return lambda b: loss(b.query.view(-1, 2, 128), b.label[::2], b.centers)


def _paco(batch: Batch) -> Callable[[Batch], Tensor]:
    device = batch.query.device
    loss = losses.PaCoLoss(batch.counts, alpha=0.05, device=device)
    own = torch.arange(96, device=device)
    labels = torch.arange(2048, device=device) % 200
    return lambda b: loss(
        b.query, b.label, torch.cat([b.query, b.key]), torch.cat([b.label, labels]), b.logits, exclude=own
    )


def _gml(batch: Batch) -> Callable[[Batch], Tensor]:
    """With the enqueue of the batch, into a queue that is filled but for the rarest classes."""
    device = batch.query.device
    loss = losses.GMLLoss(batch.counts, device=device)
    queue = ClassQueue(batch.counts, 2048, 128, device=device)
    owners = torch.arange(200, device=device).repeat_interleave(queue.sizes)
    queue.labels.copy_(owners.masked_fill(owners >= 180, -1))
    ids = torch.arange(96, device=device)
    start = {name: value.clone() for name, value in queue.state_dict().items()}

    def run(b: Batch) -> Tensor:
        for name, value in queue.named_buffers():
            value.copy_(start[name])  # the same every time
        slots = queue.enqueue(b.query, b.label, ids)
        result: Tensor = loss(b.query, b.label, b.key, queue.labels, b.logits, own_key=slots)
        return result + loss(b.query, b.label, b.key, queue.labels, b.logits, query_id=ids, key_id=queue.ids)

    return run


#: Recipe -> what makes its training step.
RECIPES = {
    "SupConLoss": _supcon,
    "BalancedContrastiveLoss": _bcl,
    "PaCoLoss": _paco,
    "GMLLoss": _gml,
    "supervised_contrastive": lambda batch: (
        lambda b: supervised_contrastive(
            b.query, b.key, b.label, torch.arange(2048, device=b.key.device) % 200, temperature=0.1, form="in"
        )
    ),
}


def train(run: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor]:
    loss = run(batch)
    grads = torch.autograd.grad(0.5 * loss, batch.leaves, allow_unused=True)
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


# --------------------------------------------------------------------------------------------------------------- values


@parametrized(case=REAL, dtype=DTYPES)
def test_real_sizes(device: str, case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, device)


@parametrized(case=BY_ID, dtype=HALF_AND_SINGLE)
def test_value_and_every_gradient(device: str, case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, device)


@parametrized(case=HALF)
def test_half_precision(device: str, case: Case) -> None:
    check_case(case, torch.float16, device)


@parametrized(case=HALF)
def test_double_precision(device: str, case: Case) -> None:
    if _settings.backend == "triton":
        pytest.skip("Triton kernels take no float64")
    check_case(case, torch.float64, device)


@parametrized(recipe={name: RECIPES[name] for name in ("SupConLoss", "GMLLoss", "PaCoLoss")}, dtype=HALF_AND_SINGLE)
def test_recipes(device: str, recipe: Callable[[Batch], Callable[[Batch], Tensor]], dtype: torch.dtype) -> None:
    """Value and gradients as close to the reference in float64 as that in the same dtype is."""
    batch = Batch.make(dtype, device)
    double = replace(
        batch,
        **{
            name: getattr(batch, name).detach().double().requires_grad_()
            for name in ("query", "key", "logits", "centers")
        },
    )
    actual = train(recipe(batch), batch)
    with lt_kernels.use_backend("reference"):
        eager, truth = (train(recipe(each), each) for each in (batch, double))
    for position, values in enumerate(zip(actual, eager, truth, strict=True)):
        assert_within_budget(*values, f"result {position}")


@parametrized(case={name: REAL[name] for name in ("supcon", "with itself")}, dtype=HALF_AND_SINGLE)
def test_queries_as_keys(device: str, case: Case, dtype: torch.dtype) -> None:
    """One tensor as queries and keys is as good as two of the same values, whose gradients add up."""
    one = case.sample(dtype, device)
    two = one.apart()
    double = one.converted(torch.float64)

    def gradient(sample: ContrastiveSample, sums: Any) -> Tensor:
        leaves = [sample.query] if sample.key is sample.query else [sample.query, sample.key]
        total = (0.7 * sums[0] - 1.3 * sums[1] + 0.4 * sums[2]).sum()
        return torch.stack(torch.autograd.grad(total, leaves)).sum(0)

    truth = gradient(double, dense_partitioned_logsumexp(*double.arguments, **double.options))

    def body(strategy: str) -> None:
        sums = [partitioned_logsumexp(*s.arguments, strategy=strategy, **s.options) for s in (one, two)]
        assert_within_budget(gradient(one, sums[0]), gradient(two, sums[1]), truth, "gradient")

    in_every_mode(case, dtype, body)


# ----------------------------------------------------------------------------------------------- memory, repeatability


@parametrized(case=FEW, dtype=HALF_AND_SINGLE)
def test_determinism(device: str, case: Case, dtype: torch.dtype) -> None:
    sample = case.sample(dtype, device)

    def body(strategy: str) -> None:
        first = step(sample, strategy)
        for _ in range(3):
            assert_same_bits(step(sample, strategy), first, "another run")

    in_every_mode(case, dtype, body)


@parametrized(recipe=RECIPES)
def test_recipes_repeat(device: str, recipe: Callable[[Batch], Callable[[Batch], Tensor]]) -> None:
    batch = Batch.make(torch.bfloat16, device)
    run = recipe(batch)
    first = train(run, batch)
    for _ in range(3):
        assert_same_bits(train(run, batch), first, "another run")


@parametrized(case=POISONED)
def test_every_element_is_written(device: str, case: Case) -> None:
    """The same bits where all fresh memory is NaN."""
    sample = case.sample(torch.float32, device)

    def body(strategy: str) -> None:
        expected = step(sample, strategy)
        with poisoned_memory():
            assert_same_bits(step(sample, strategy), expected, "poisoned memory")

    in_every_mode(case, torch.float32, body)


@parametrized(mode={name: name for name in ("chunked", "tiled")}, itself={"": False, "with itself": True})
def test_peak_memory(device: str, mode: str, itself: bool) -> None:
    """Beside the gradients far less than all similarities: a few blocks, or with tiles numbers per row and key."""
    case = Case("memory", 16_384 if itself else 2048, 64, None if itself else 2**18, classes=1000, **COSINES)
    if mode not in modes(case, torch.bfloat16):
        pytest.skip("tiled runs on Triton")
    keys = case.rows if case.keys is None else case.keys
    sample = case.sample(torch.bfloat16, device)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in sample.differentiable.values())
    extra = peak_memory_beside(lambda: step(sample, mode), gradients)
    similarities = 2 * case.rows * keys
    allowed = similarities // (2 if mode == "chunked" else 8)
    assert extra <= allowed, f"{extra} bytes beside the gradients, at most {allowed}"


@parametrized(large=True, mode={name: name for name in ("materialize", "chunked", "tiled")})
def test_offsets_beyond_32_bits(device: str, mode: str) -> None:
    """More than 2^31 similarities; the last queries against float64."""
    rows, keys, width = 32_800, 65_536, 16
    case = Case("large", rows, width, keys, **COSINES)
    if mode not in modes(case, torch.bfloat16):
        pytest.skip("tiled runs on Triton")
    need_free_memory((6 if mode == "materialize" else 1) * rows * keys)
    generator = torch.Generator(device).manual_seed(0)

    def unit(size: int) -> Tensor:
        return F.normalize(torch.randn(size, width, device=device, generator=generator), dim=1).bfloat16()

    query, key = unit(rows).requires_grad_(), unit(keys)
    labels = [torch.randint(1000, (size,), device=device, generator=generator) for size in (rows, keys)]
    options: dict[str, Any] = {"scale": 10.0, "exclude": torch.arange(rows, device=device) + 2**15}
    before = _settings.memory_budget
    lt_kernels.set_memory_budget(2**33)
    try:
        sums = partitioned_logsumexp(query, key, *labels, strategy=mode, **options)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad((sums.neg - sums.pos).sum(), query)
    finally:
        lt_kernels.set_memory_budget(before)
    last = slice(rows - 64, rows)
    expected = []
    for dtype in (torch.bfloat16, torch.float64):
        few = query.detach()[last].to(dtype).requires_grad_()
        of_few = {**options, "exclude": options["exclude"][last]}
        part = dense_partitioned_logsumexp(few, key.to(dtype), labels[0][last], labels[1], **of_few)
        expected.append((part[0], part[1], torch.autograd.grad((part[0] - part[1]).sum(), few)[0]))
    for what, value, eager, truth in zip(
        ("neg", "pos", "gradient"), (sums.neg[last], sums.pos[last], grad[last]), *expected, strict=True
    ):
        assert_within_budget(value, eager, truth, what)
    assert bool(grad.ne(0).any(1).all()), "a row was not written"


# ------------------------------------------------------------------------------------ streams, graphs, synchronisation


@parametrized(case=REAL)
def test_no_synchronisation(device: str, case: Case) -> None:
    sample = case.sample(torch.bfloat16, device)

    def body(strategy: str) -> None:
        step(sample, strategy)  # compiles, and loads modules
        with synchronisation_is_an_error():
            step(sample, strategy)

    in_every_mode(case, torch.bfloat16, body)


@parametrized(recipe=RECIPES)
def test_recipes_without_synchronisation(device: str, recipe: Callable[[Batch], Callable[[Batch], Tensor]]) -> None:
    batch = Batch.make(torch.bfloat16, device)
    run = recipe(batch)
    train(run, batch)
    with synchronisation_is_an_error():
        train(run, batch)


@parametrized(case=FEW)
def test_graph_replay(device: str, case: Case) -> None:
    """Captured once, replayed over other values in the same memory."""
    static, other = (case.sample(torch.bfloat16, device, seed=seed) for seed in range(2))

    def body(strategy: str) -> None:
        graph, captured = capture(lambda: step(static, strategy))
        before = {name: value.detach().clone() for name, value in static.tensors.items()}
        for name, value in static.tensors.items():
            value.detach().copy_(other.tensors[name].detach())
        expected = step(other, strategy)
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)  # the library may choose another product there
        for name, value in static.tensors.items():
            value.detach().copy_(before[name])

    in_every_mode(case, torch.bfloat16, body)


@parametrized(recipe=RECIPES)
def test_recipes_in_a_graph(device: str, recipe: Callable[[Batch], Callable[[Batch], Tensor]]) -> None:
    static, other = (Batch.make(torch.bfloat16, device, seed) for seed in range(2))
    run = recipe(static)
    graph, captured = capture(lambda: train(run, static))
    for name in ("query", "label", "key", "logits", "centers"):
        getattr(static, name).detach().copy_(getattr(other, name).detach())
    expected = train(run, other)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@parametrized()
def test_side_stream(device: str) -> None:
    """Queries that a stream makes late are read after they are made."""
    case = REAL["memory"]
    sample = case.sample(torch.bfloat16, device)

    def body(strategy: str) -> None:
        expected = step(sample, strategy)
        actual = run_late(sample.query, lambda: step(sample, strategy))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)  # the library may choose another product there

    in_every_mode(case, torch.bfloat16, body)


# ------------------------------------------------------------------------------------------------------- training loops


@parametrized(recipe={name: RECIPES[name] for name in ("SupConLoss", "BalancedContrastiveLoss", "PaCoLoss")})
def test_recipes_compile(device: str, recipe: Callable[[Batch], Callable[[Batch], Tensor]]) -> None:
    batch = Batch.make(torch.float32, device)
    torch._dynamo.reset()
    run = recipe(batch)
    expected = train(run, batch)
    actual = train(torch.compile(run, fullgraph=True, dynamic=False), batch)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@parametrized()
def test_autocast(device: str) -> None:
    """float32 vectors, products in bfloat16."""
    case = REAL["memory"]
    sample = case.sample(torch.float32, device)
    low, truth = (step(sample.converted(dtype), "materialize") for dtype in (torch.bfloat16, torch.float32))

    def body(strategy: str) -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            values = step(sample, strategy)
        assert {value.dtype for value in values} == {torch.float32}
        for position, (a, b, t) in enumerate(zip(values, low, truth, strict=True)):
            assert_within_budget(a, b, t.double(), f"result {position}")

    in_every_mode(case, torch.bfloat16, body)


@parametrized(dtype=HALF_AND_SINGLE)
def test_retained_graph(device: str, dtype: torch.dtype) -> None:
    case = REAL["8142 keys"]
    sample = case.sample(dtype, device)
    double = sample.converted(torch.float64)
    expected = []
    for each in (sample, double):
        sums = dense_partitioned_logsumexp(*each.arguments, **each.options)
        expected.append(torch.autograd.grad((sums[0] - sums[1]).sum(), (each.query, each.key)))

    def body(strategy: str) -> None:
        sums = partitioned_logsumexp(*sample.arguments, strategy=strategy, **sample.options)  # type: ignore[arg-type]
        loss = (sums.neg - sums.pos).sum()
        for factor in (2.0, -0.25, 1.0, 0.0):
            grads = torch.autograd.grad(factor * loss, (sample.query, sample.key), retain_graph=True)
            for grad, eager, truth in zip(grads, *expected, strict=True):
                assert_within_budget(grad, factor * eager, factor * truth, f"{factor} * loss")

    in_every_mode(case, dtype, body)


# ------------------------------------------------------------------------------------------------------------ bad input


@parametrized(anywhere=True, value={"keys": 41, "2^31": 2**31, "-2": -2, "lowest": -(2**31)})
def test_bad_exclude(device: str, value: int) -> None:
    """A key out of range excludes nothing; with checks on (and on the CPU) it is an error."""
    case = replace(BY_ID["excluded keys"], width=16)
    sample = case.sample(torch.float32, device)
    sample.options["exclude"][1] = value

    with checks_on():
        assert_index_error(lambda: step(sample), f"exclude: got {value} in row 1")
    if device == "cpu":
        assert_index_error(lambda: step(sample), f"exclude: got {value} in row 1")
        return

    def body(strategy: str) -> None:
        actual = step(sample, strategy)
        good = case.sample(torch.float32, device)
        good.options["exclude"][1] = -1
        for a, b in zip(actual, step(good, strategy), strict=True):
            torch.testing.assert_close(a, b)

    in_every_mode(case, torch.float32, body)
