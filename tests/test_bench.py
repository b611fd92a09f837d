"""The measuring part of the benchmarks: cases, costs, inputs, the runner and its budget, timing, records.

``op`` is the one on logits in memory, on which everything that ops share is tested; ``head`` is the linear one,
``contrast`` the one of contrastive losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_records import record
from torch.utils._python_dispatch import TorchDispatchMode

import lt_kernels
from lt_kernels.bench import contrastive, experts, ops, records, runner, timing
from lt_kernels.bench.cases import Case
from lt_kernels.bench.op import DIRECTIONS, Cost
from lt_kernels.bench.ops import OPS
from lt_kernels.bench.ops import linear_margin_cross_entropy as head_module
from lt_kernels.bench.ops.margin_cross_entropy import RowCase
from lt_kernels.ops._configs import COUNTED_EXPERTS, EXPERT_SHAPES

op, head = OPS["margin_cross_entropy"], OPS["linear_margin_cross_entropy"]
fusion, contrast = OPS["expert_fusion"], OPS["partitioned_logsumexp"]

# Cases and costs

EXPERTS = [OPS[name] for name in ("expert_cross_entropy", "expert_fusion", "expert_divergence")]
ALL_CASES = list({case.name: case for one in OPS.values() for case in one.cases.values()}.values())


def test_every_module_of_the_folder_is_an_op_of_the_library():
    folder = Path(ops.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules == set(OPS) == {one.name for one in OPS.values()}
    assert modules <= lt_kernels.info()["backends"].keys()
    assert list(OPS)[:2] == [op.name, head.name]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_named_real_shape_is_measured(op):
    configs = importlib.import_module(f"lt_kernels.ops.{op.name}.configs")
    shapes = getattr(configs, "SHAPES", EXPERT_SHAPES)
    for name in shapes.keys() & op.cases.keys():
        assert {field: getattr(op.cases[name], field) for field in shapes[name]._fields} == shapes[name]._asdict()
    if op in EXPERTS:  # which share them
        shapes = {name: shape for name, shape in shapes.items() if shape._asdict() != COUNTED_EXPERTS}
    assert op is OPS["expert_divergence"] or shapes.keys() <= op.cases.keys()
    measured = {
        name for name, case in op.cases.items() if case.devices and not case.calls and not getattr(case, "variant", "")
    }
    assert measured <= shapes.keys()


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_case_counts_fit_and_are_long_tailed(case: Case):
    counts = case.class_counts()
    assert counts.shape == (case.classes,)
    assert counts.min() >= 1
    assert counts.max() > counts.min()
    assert case.log_prior().exp().sum().item() == pytest.approx(1, abs=1e-9 * case.classes)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_cases_cover_the_targets_and_the_comparison(op):
    for target in op.targets:
        assert target.device in op.cases[target.case].devices
        assert target.dtype in op.dtypes[target.device]
        assert target.against in ("copy", "memory", "static floor", "fastest other", *op.providers)
        assert target.ours in (None, *op.providers)
        assert (target.at_least is None) != (target.at_most is None)
        if target.against in op.providers:
            provider, case = op.providers[target.against], op.cases[target.case]
            assert provider.unasked(target.device) is provider.left_out(case, target.dtype, target.device) is None
    for name in op.compare_cases:
        assert "cpu" in op.cases[name].devices
    assert set(op.references) <= set(op.providers)
    assert set(op.directions) <= set(DIRECTIONS)
    for device in ("cpu", "cuda"):
        assert any(device in case.headline for case in op.cases.values())


def test_names_of_cases_tell_the_ops_apart():
    families = [op.cases, head.cases, {name for one in EXPERTS for name in one.cases}, contrast.cases]
    names = [name for family in families for name in family]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_cover_every_number_of_classes_on_each_device(device):
    wanted = {1000, 1203, 8142, 8192, 10_000, 21_841, 65_536, 100_000, 1_000_000}
    swept = [case for case in op.cases.values() if device in case.sweep]
    assert {case.classes for case in swept} == wanted
    assert len(swept) == len(wanted)
    measured = [case for case in op.cases.values() if device in case.devices and not case.calls]
    assert {case.rows for case in measured if case.classes == 8142} == {64, 256, 512, 2048, 8192}
    assert (16, 150, (512, 512)) in {(case.rows, case.classes, case.positions) for case in measured}
    assert any(device in case.headline for case in measured)


@pytest.mark.parametrize(
    ("direction", "factor", "products"), [("fwd", 1, 1), ("bwd", 2, 2), ("fwd_bwd", 2, 3)], ids=DIRECTIONS
)
def test_cost_counts_each_operand_once_per_pass(direction, factor, products):
    cost = op.cost(RowCase("c", 7, 123), torch.bfloat16, direction)
    assert cost.bytes_moved == factor * 7 * 123 * 2
    assert cost.flops % (7 * 123) == 0
    assert cost.exponentials == 7 * 123
    assert op.cost(RowCase("m", 7, 123, positions=(4, 5)), torch.bfloat16, direction).flops == cost.flops * 20
    cost = head.cost(head_module.LinearCase("c", 7, 123, width=19), torch.bfloat16, direction)
    assert cost.flops == products * 2 * 7 * 19 * 123
    assert cost.bytes_moved == factor * (7 + 123) * 19 * 2  # features and weight, and their gradients, but no logits
    assert cost.exponentials == 7 * 123
    means, logits = 7 * 123, 4 * 7 * 123
    expected = {"expert_cross_entropy": logits, "expert_fusion": means, "expert_divergence": logits + means}
    for one in EXPERTS:
        if direction in one.directions:
            cost = one.cost(experts.ExpertCase("c", 7, 123, experts=4), torch.bfloat16, direction)
            assert cost.bytes_moved == factor * logits * 2
            assert cost.flops % (7 * 123) == 0
            assert cost.exponentials == expected[one.name]


def test_inputs_of_experts():
    case = experts.ExpertCase("c", 7, 123)
    inputs = case.inputs(torch.float32, "cpu")
    assert case.sizes == {"E": 3, "N": 7, "C": 123}
    assert case.taus == [-1, 1, 3]
    assert experts.ExpertCase("c", 7, 123, experts=1).taus == [1]
    assert sum(experts.ExpertCase("c", 7, 123, experts=6).taus) == pytest.approx(6)
    assert [tuple(x.shape) for x in inputs.leaves.values()] == [(7, 123)] * 3
    assert torch.equal(torch.stack(experts.experts_of(inputs)), inputs["stacked"])
    assert not torch.equal(inputs.target, inputs["mixed_target"])
    again = case.inputs(torch.float32, "cpu")
    assert torch.equal(again["stacked"], inputs["stacked"])
    assert torch.equal(again["mixed_target"], inputs["mixed_target"])


SMALL_CONTRASTS = [case for case in contrast.cases.values() if not case.devices]


def test_cost_of_a_contrast_counts_the_products_that_its_gradients_need():
    def cost(name: str, direction: str = "fwd_bwd"):
        return contrast.cost(contrast.cases[name], torch.bfloat16, direction)

    product = 2 * 7 * 33 * 5
    directions = {"fwd": product, "bwd": 2 * product, "fwd_bwd": 3 * product}
    for direction, flops in directions.items():
        assert cost("supcon-7x33x5", direction).flops == flops
        assert cost("supcon-7x33x5", direction).bytes_moved == (1 if direction == "fwd" else 2) * (7 + 33) * 5 * 2
        assert cost("supcon-7x33x5", direction).exponentials == 7 * 33
    frozen = cost("supcon-7x33x5-frozen")
    assert frozen.flops == 2 * product
    assert frozen.bytes_moved == (2 * 7 + 33) * 5 * 2
    assert cost("views-10x10x5").flops == 2 * 2 * 10 * 10 * 5  # one product serves queries and keys
    assert cost("moco-5x41x6").flops == 2 * (2 * 5 * 41 * 6) + 2 * 5 * 5 * 6  # the batch's keys alone learn
    gml = cost("gml-9x40x6-c11")
    assert gml.bytes_moved == 2 * ((9 + 40) * 6 + 9 * 11) * 2  # logits of the classifier and their gradient too
    assert gml.exponentials == 9 * 40 + 9 * 11


@pytest.mark.parametrize("case", SMALL_CONTRASTS, ids=lambda case: case.name)
def test_inputs_of_contrasts(case):
    inputs = case.inputs(torch.float32, "cpu")
    query, key = contrastive.vectors(inputs)
    assert case.sizes == {"N": len(query), "M": len(key), "D": query.shape[1]}
    assert (len(inputs.target), len(inputs["key_label"])) == (len(query), len(key))
    torch.testing.assert_close(query.norm(dim=1), torch.ones(len(query)))
    own = torch.arange(len(query))
    if contrastive.leaves_out_own(case.method):
        assert torch.equal(inputs["key_label"][own], inputs.target)
    elements = sum(leaf.numel() for leaf in inputs.leaves.values() if leaf.dim() > 0)
    assert elements == case.uncounted
    again = case.inputs(torch.float32, "cpu")
    assert all(torch.equal(tensor, again[name]) for name, tensor in inputs.tensors.items())
    if case.method == "gml":
        held = inputs["query_id"][:, None] == inputs["key_id"]
        assert torch.equal(held.sum(1), torch.ones(len(query), dtype=torch.int64))
        assert torch.equal(inputs["key_label"][held.int().argmax(1)], inputs.target)
        assert int(torch.bincount(inputs["key_label"]).min()) >= 2  # one is left without a query's own


@pytest.mark.parametrize(
    ("device", "cost", "milliseconds"),
    [
        ("NVIDIA H200", Cost(43 * 10**9, 0, 0), 10),
        ("NVIDIA H200", Cost(43 * 10**9, 0, 418 * 10**9), 100),
        ("NVIDIA H100 80GB HBM3", Cost(3 * 10**10, 0, 0), 10),
        ("NVIDIA H100 PCIe", Cost(1, 1, 1), None),  # another memory
        ("A CPU, 2 threads, AVX2", Cost(1, 1, 1), None),
    ],
)
def test_static_floor_is_the_slowest_of_what_a_chip_does(device, cost, milliseconds):
    expected = None if milliseconds is None else pytest.approx(milliseconds)
    assert cost.static_floor_ms(device) == expected


# The runner


def run_small(**options):
    options = {"cases": ["odd-7x123"], "dtypes": ["float32"], "repetitions": 3, "seconds": 0.0} | options
    return runner.run(op.name, **options)


@pytest.mark.parametrize("case", ["odd-7x123", "map-2x19x6x7"])
def test_run_makes_complete_records(case):
    names = ["eager", "lt[reference]"]
    found = run_small(cases=[case], providers=names)
    assert [(r.direction, r.provider) for r in found] == [(d, p) for d in DIRECTIONS for p in names]
    for r in found:
        assert r.repetitions == 3
        assert 0 < r.ms_p20 <= r.ms_median <= r.ms_p80
        assert r.gbps == pytest.approx(r.bytes_moved / r.ms_median / 1e6, rel=1e-3)
        assert r.fraction_of_floor == pytest.approx(r.gbps / r.copy_gbps, rel=1e-3)
        assert r.sizes == op.cases[case].sizes
        assert r.class_counts == "exponential profile"
        assert r.device_slug.startswith("cpu-")
        assert r.versions["torch"] == torch.__version__
        assert r.static_floor_ms is None
        assert (date.today() - date.fromisoformat(r.date)).days in (-1, 0, 1)  # UTC's, wherever this runs
    eager = {r.direction: r for r in found if r.provider == "eager"}
    assert eager["bwd"].ms_p20 < eager["fwd_bwd"].ms_median
    logits = 4 * op.cases[case].logits
    if eager["fwd_bwd"].peak_bytes is not None:
        assert eager["fwd_bwd"].peak_bytes >= eager["bwd"].peak_bytes >= logits
        assert eager["fwd"].peak_bytes >= 2 * logits  # shifted, and its log-softmax


def test_records_name_the_class_counts_of_a_data_set():
    (found,) = run_small(cases=["inat18-n64"], providers=["eager"], directions=["fwd"], repetitions=1)
    counts = lt_kernels.datasets.class_counts("inat18_like").tolist()
    digest = hashlib.sha256("".join(f"{count}\n" for count in counts).encode()).hexdigest()
    assert found.class_counts == f"inat18_like {digest[:12]}"


def test_run_of_a_head_measures_its_floor_unasked_and_holds_others_against_it(monkeypatch):
    checked = []
    check = head.agreement.check
    monkeypatch.setattr(
        head.agreement, "check", lambda self, name, step: (checked.append(name), check(self, name, step))
    )
    lines = []
    found = runner.run(
        head.name,
        cases=["odd-33x45x507"],
        providers=["eager", "lt[reference]"],
        repetitions=3,
        seconds=0.0,
        log=lines.append,
    )
    names = ["gemms", "eager", "lt[reference]"]
    assert [(r.dtype, r.direction, r.provider) for r in found] == [
        (dtype, direction, name) for dtype in ("float32", "bfloat16") for direction in DIRECTIONS for name in names
    ]
    assert checked == ["lt[reference]", "eager"] * 2
    gemms = {(r.dtype, r.direction): r for r in found if r.provider == "gemms"}
    for r in found:
        floor = gemms[r.dtype, r.direction].ms_median
        assert r.fraction_of_floor == pytest.approx(floor / r.ms_median, rel=1e-3)
        assert r.copy_gbps is None
        assert r.sizes == {"N": 33, "D": 45, "C": 507}
        assert any(f"{r.dtype:9} {r.direction:8} {r.provider} " in line and "of gemms" in line for line in lines)
    assert {r.peak_bytes for r in gemms.values()} == {None}
    eager = next(r for r in found if (r.provider, r.dtype, r.direction) == ("eager", "float32", "fwd_bwd"))
    if eager.peak_bytes is not None:
        assert eager.peak_bytes >= 4 * (33 + 507) * 45
        assert 1 < head.memory(eager) < 5


def test_run_of_the_fusion_has_no_backward_pass():
    lines = []
    found = runner.run(
        fusion.name,
        cases=["odd-3x7x123", "odd-3x7x123-top5"],
        providers=["eager", "eager-one-tensor", "lt[reference]"],
        dtypes=["float32"],
        repetitions=1,
        seconds=0.0,
        log=lines.append,
    )
    assert {r.direction for r in found} == {"fwd"}
    assert {r.sizes["E"] for r in found} == {3}
    assert len(found) == 6
    assert all(r.fraction_of_floor == pytest.approx(r.gbps / r.copy_gbps, rel=1e-3) for r in found)
    assert runner.run(fusion.name, cases=["odd-3x7x123"], directions=["bwd", "fwd_bwd"]) == []


def test_run_of_a_contrast():
    options = {"repetitions": 1, "seconds": 0.0}
    found = runner.run(contrast.name, cases=["moco-5x41x6"], providers=["dense", "lt[reference]"], **options)
    assert {r.dtype for r in found} == {"float32"}  # what the case says, unless asked
    assert {r.provider for r in found} == {"gemms", "dense", "lt[reference]"}
    dense = next(r for r in found if (r.provider, r.direction) == ("dense", "fwd_bwd"))
    assert dense.sizes == {"N": 5, "M": 41, "D": 6}
    if dense.peak_bytes is not None:
        similarities, gradients = 4 * 5 * 41, 4 * 2 * 5 * 6
        assert contrast.memory(dense) == pytest.approx((dense.peak_bytes - gradients) / similarities)
        assert contrast.memory(dense) > 2
    found = runner.run(
        contrast.name, cases=["supcon-7x33x5"], providers=["masked"], dtypes=["bfloat16"], directions=["fwd"], **options
    )
    assert {r.dtype for r in found} == {"bfloat16"}


def only(monkeypatch, *names: str, **changes) -> None:
    """Make every other provider unavailable, and change the last of these."""
    for name, provider in op.providers.items():
        if name not in names:
            monkeypatch.setitem(op.providers, name, dataclasses.replace(provider, unavailable=lambda device: "absent"))
    monkeypatch.setitem(op.providers, names[-1], dataclasses.replace(op.providers[names[-1]], **changes))


def test_run_leaves_a_provider_out_of_a_case_unless_asked(monkeypatch):
    only(monkeypatch, "eager", "loop", left_out=lambda case, dtype, device: f"no {case.name} {dtype} on a {device}")
    lines = []
    found = run_small(directions=["fwd"], log=lines.append)
    assert {r.provider for r in found} == {"eager"}
    assert "without loop on odd-7x123 float32: no odd-7x123 float32 on a cpu" in lines
    found = run_small(directions=["fwd"], providers=["loop"])
    assert {r.provider for r in found} == {"loop"}


def test_names_of_another_op_are_passed_over():
    lines = []
    assert run_small(cases=["odd-7x19x123"], log=lines.append) == []
    assert lines == [f"{op.name} has no case odd-7x19x123: another op has"]
    found = run_small(cases=["odd-7x123", "odd-7x19x123"], providers=["gemms", "eager"], directions=["fwd"])
    assert {r.provider for r in found} == {"eager"}
    with pytest.raises(ValueError, match="unknown provider 'jax'"):
        run_small(providers=["gemms", "jax"])


def test_a_provider_that_disagrees_is_left_out_and_said(monkeypatch):
    lines = []
    only(monkeypatch, "eager", "loop", make=lambda inputs: lambda: op.make_step("eager", inputs)() * 1.01)
    found = run_small(directions=["fwd"], log=lines.append)
    assert {r.provider for r in found} == {"eager"}
    assert any(line.startswith("without loop on odd-7x123 float32: AssertionError") for line in lines)
    assert "without quack: absent" in lines
    kept = []
    with pytest.raises(runner.BenchmarkError, match="loop on odd-7x123 float32: AssertionError"):
        run_small(directions=["fwd"], providers=["eager", "loop"], on_records=kept.extend)
    assert {r.provider for r in kept} == {"eager"}


def test_our_own_failure_is_an_error_even_unasked(monkeypatch):
    def make(inputs):
        raise RuntimeError("no kernel image\nfor this device")

    native = dataclasses.replace(op.providers["lt[native]"], make=make, unavailable=lambda device: None)
    monkeypatch.setitem(op.providers, "lt[native]", native)
    monkeypatch.setitem(
        op.providers, "compile", dataclasses.replace(op.providers["compile"], unavailable=lambda device: "slow")
    )
    with pytest.raises(
        runner.BenchmarkError, match=r"lt\[native\] on odd-7x123 float32: RuntimeError: no kernel image$"
    ):
        run_small(directions=["fwd"])


def test_an_overflow_of_eager_is_said_and_is_no_error_of_ours(monkeypatch):
    class Overflow(RowCase):
        def inputs(self, dtype, device):
            inputs = super().inputs(dtype, device)
            inputs["logits"].data[:] = torch.tensor([-3e4, 3e4, 0.0, 0.0, 0.0])
            inputs.target[:] = 0  # losses of 60,000, whose float16 sum is infinite
            return inputs

    lines = []
    monkeypatch.setitem(op.cases, "overflow", Overflow("overflow", 4, 5))
    only(monkeypatch, "eager", "lt[reference]", unasked=lambda device: None)
    found = run_small(cases=["overflow"], dtypes=["float16"], log=lines.append)
    assert {r.provider for r in found} == {"lt[reference]"}
    assert any(line.startswith("without eager on overflow float16: AssertionError") for line in lines)


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def group_order(monkeypatch):
    """Groups take ten seconds each and measure nothing; their names and time limits, on a GPU and providers."""
    clock, seen = Clock(), []

    def run_group(job, case, dtype, providers, left, keep):
        clock.now += 10
        seen.append((f"{case.name} {dtype}", job.timing.limit))
        if job.device == "cuda":
            measured = []
            for name in providers:
                if left(name) > 0:
                    measured.append(name)
                    clock.now += job.op.providers[name].compiler_seconds
            seen[-1] = (f"{case.name} {dtype}", measured)
        return {}

    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(runner, "_run_group", run_group)
    return seen


def test_headline_cases_come_first_and_float16_last(group_order):
    runner.run(op.name, cases=["lvis-n512", "inat18-n512"], dtypes=["float16", "float32"])
    names = [name for name, _ in group_order]
    assert names == ["inat18-n512 float32", "lvis-n512 float32", "inat18-n512 float16", "lvis-n512 float16"]


def test_budget_leaves_out_the_least_important_and_names_it(group_order):
    lines = []
    runner.run(op.name, cases=["lvis-n512", "inat18-n512"], budget=35, limit=6, log=lines.append)
    assert [name for name, _ in group_order] == ["inat18-n512 float32", "inat18-n512 bfloat16", "lvis-n512 float32"]
    assert [limit for _, limit in group_order] == [6, 6, 6]
    assert lines[-1] == ("left out to stay within 35 s: lvis-n512 bfloat16, inat18-n512 float16, lvis-n512 float16")


def test_budget_measures_something_and_shortens_what_is_left(group_order):
    runner.run(op.name, cases=["lvis-n512"], budget=21, limit=6)
    assert [limit for _, limit in group_order] == [6, 5.5]
    del group_order[:]
    runner.run(op.name, cases=["lvis-n512"], budget=0)
    assert len(group_order) == 1


def test_on_a_gpu_a_budget_is_spent_on_compilers_last(group_order, monkeypatch):
    """What they are slow for is measured without them first, and with them where that fits."""
    monkeypatch.setattr(runner, "check_device", lambda device: None)
    monkeypatch.setattr(runner, "unavailable_reason", lambda op, provider, device: None)
    options = {"cases": ["lvis-n8192", "inat18-n8192"], "dtypes": ["float32"], "device": "cuda"}
    lines = []
    runner.run(op.name, budget=60, log=lines.append, **options)
    (first, few), (again, more), (second, rest) = group_order
    assert (first, again, second) == ("inat18-n8192 float32", "inat18-n8192 float32", "lvis-n8192 float32")
    assert few == rest
    assert {"eager", "lt[native]", "lt[triton]", "liger"} <= set(few)
    assert set(more) - set(few) == {"compile"}
    assert lines[-1] == "left out to stay within 60 s: lvis-n8192 float32 (compile, compile-max-autotune)"
    del group_order[:]
    runner.run(op.name, **options)
    assert [name for name, _ in group_order] == ["inat18-n8192 float32", "lvis-n8192 float32"]
    assert {"compile", "compile-max-autotune"} <= set(group_order[0][1])


def test_records_are_told_as_soon_as_there_are_some_and_again_with_more(monkeypatch):
    only(monkeypatch, "eager", "lt[reference]", unasked=lambda device: None)
    told = []
    found = run_small(on_records=told.append)
    assert [[r.direction for r in each] for each in told] == [["fwd"] * 2, [r.direction for r in found]]
    assert told[-1] == found
    assert len(found) == 6


def test_without_time_left_our_backends_are_measured(monkeypatch):
    only(monkeypatch, "eager", "lt[reference]", unasked=lambda device: None)
    lines = []
    assert {r.provider for r in run_small(budget=0, log=lines.append)} == {"lt[reference]"}
    assert "without eager on odd-7x123 float32: there is no time left for it" in lines


class Leaves:
    """Inputs of steps that need none."""

    def __init__(self):
        self.drops = 0

    def drop_gradients(self):
        self.drops += 1


def test_measure_takes_turns():
    order = []
    steps = {name: [lambda name=name: order.append(name)] for name in "abc"}
    times = timing.measure(steps, Leaves(), "cpu", timing.Timing(repetitions=11, seconds=0.0))
    assert {name: len(samples) for name, samples in times.items()} == {"a": 15, "b": 15, "c": 15}
    # bursts of five after one untimed repetition, in an order that rotates
    assert "".join(order[-54:]) == "".join(name * 6 for name in "abcbcacab")


def test_measure_repeats_a_slow_step_three_times_only(monkeypatch):
    clock, leaves = Clock(), Leaves()
    monkeypatch.setattr(timing, "time", clock)

    def part(seconds):
        def run():
            clock.now += seconds

        return run

    steps = {"slow": [part(1.0), part(3.0)], "fast": [part(0.001), part(0.002)]}
    times = timing.measure(steps, leaves, "cpu", timing.Timing(repetitions=20, seconds=1.0, limit=6.0))
    assert times["slow"] == [pytest.approx((1000, 3000))] * 3
    assert times["fast"] == [pytest.approx((1, 2))] * 10
    assert leaves.drops >= 13
    steps["endless"] = [part(2.0), part(4.0)]
    times = timing.measure(steps, leaves, "cpu", timing.Timing(repetitions=20, seconds=1.0, limit=6.0))
    assert times["endless"] == [pytest.approx((2000, 4000))]
    assert len(times["slow"]) == 3
    assert len(timing.measure({"endless": steps["endless"]}, leaves, "cpu", timing.Timing())["endless"]) == 1


def test_the_cache_is_flushed_by_reading(monkeypatch):
    """A write would leave dirty lines, to be written back while the next step is timed."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func, args))
            return func(*args, **(kwargs or {}))

    calls = []
    monkeypatch.setattr(timing, "_CACHE_BYTES", 4 * 1000)
    flush = timing.CacheFlush("cpu")
    with Seen():
        flush()
    assert not any(func._schema.is_mutable for func, _ in calls)
    assert 1000 in [tensor.numel() for _, args in calls for tensor in args if isinstance(tensor, torch.Tensor)]


def stand_in_for_cuda(monkeypatch, order):
    """Events of a millisecond, and graphs whose replays are told in ``order``."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            order.append("event")

        def elapsed_time(self, end):
            return 1.0

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            order.append("replay")

    @contextmanager
    def within(kind, thing):
        order.append(f"{kind} begins")
        yield
        order.append(f"{kind} ends")

    for name, stand_in in (
        ("_sleep", lambda cycles: None),
        ("Event", Event),
        ("Stream", Stream),
        ("CUDAGraph", Graph),
        ("current_stream", Stream),
        ("stream", partial(within, "warm-up")),
        ("graph", partial(within, "capture")),
        ("synchronize", lambda: order.append("wait")),
        ("empty_cache", lambda: None),
        ("is_available", lambda: True),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "CacheFlush", lambda device: lambda: None)


def test_a_gpu_flushes_before_each_repetition_and_outside_the_timed_part(monkeypatch):
    order = []
    stand_in_for_cuda(monkeypatch, order)
    monkeypatch.setattr(timing, "CacheFlush", lambda device: lambda: order.append(f"flush {device}"))
    times = timing.measure({"a": [lambda: order.append("part")]}, Leaves(), "cuda", timing.Timing(4, 0.0))
    assert times == {"a": [(1.0,)] * 4}
    assert order == ["flush cuda", "event", "part", "event", "wait"] * 7  # three to warm up


def test_the_wall_clock_counts_the_host_and_waits_once_for_many_steps(monkeypatch):
    order, clock, leaves = [], Clock(), Leaves()
    stand_in_for_cuda(monkeypatch, order)
    monkeypatch.setattr(timing, "time", clock)

    def part(name, seconds):
        def run():
            order.append(name)
            clock.now += seconds

        return run

    steps = {"a": [part("fwd", 0.001), part("bwd", 0.002)]}
    times = timing.measure(steps, leaves, "cuda", timing.Timing(4, 0.0, clock="wall"))
    assert times == {"a": [pytest.approx((3.0,))] * 4}
    assert order == ["wait", *["fwd", "bwd"] * timing._RUN, "wait"] * 7
    assert leaves.drops == 7 * (timing._RUN + 1)  # no step adds to the gradients of the one before


def test_a_graph_is_captured_once_after_a_warm_up_and_replayed(monkeypatch):
    order = []
    stand_in_for_cuda(monkeypatch, order)
    steps = {"a": [lambda: order.append("fwd"), lambda: order.append("bwd")]}
    times = timing.measure(steps, Leaves(), "cuda", timing.Timing(4, 0.0, clock="graph"))
    assert times == {"a": [(1.0,)] * 4}
    captured = ["warm-up begins", *["fwd", "bwd"] * 3, "warm-up ends", "capture begins", "fwd", "bwd", "capture ends"]
    assert order == [*captured, *["event", "replay", "event", "wait"] * 7]


@pytest.mark.parametrize("clock", ["wall", "graph"])
def test_other_clocks_measure_small_calls_whole(monkeypatch, clock):
    order, told = [], []
    stand_in_for_cuda(monkeypatch, order)
    only(monkeypatch, "eager", "lt[reference]", unasked=lambda device: None, unavailable=lambda device: None)
    monkeypatch.setattr(runner, "_run_group", lambda job, case, *_: told.append((case.name, job.directions)) or {})
    runner.run(op.name, device="cuda", clock=clock, dtypes=["float32"])
    assert [name for name, _ in told] == [name for name, case in op.cases.items() if "cuda" in case.calls]
    assert {tuple(directions) for _, directions in told} == {("fwd", "fwd_bwd")}
    assert {(case.rows, case.classes) for case in op.cases.values() if case.calls} == {
        (rows, classes) for rows in (8, 64, 128, 512) for classes in (10, 100, 1000, 8142)
    }


def test_a_cpu_has_one_clock():
    with pytest.raises(ValueError, match="unknown clock 'graph'; choose from: device"):
        runner.run(op.name, clock="graph")


def test_a_provider_that_cannot_be_captured_is_left_out(monkeypatch):
    only(monkeypatch, "eager", unasked=lambda device: None)
    job = runner._Job(op, ("fwd", "fwd_bwd"), "cpu", timing.Timing(clock="graph"), print)
    inputs, captured = op.cases["tiny-3x5"].inputs(torch.float32, "cpu"), []
    monkeypatch.setattr(runner, "capture", lambda parts, inputs: captured.append(len(parts)))
    steps, failed, _ = runner._agreeing(job, inputs, ["eager"], lambda name: 1.0)
    assert (list(steps), failed, captured) == (["eager"], {}, [1, 2])  # forward alone; forward and backward

    def refuse(parts, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(runner, "capture", refuse)
    steps, failed, _ = runner._agreeing(job, inputs, ["eager"], lambda name: 1.0)
    assert (steps, failed) == ({}, {"eager": "RuntimeError: operation not permitted when stream is capturing"})


# Records


def test_save_replaces_whole_groups_only(tmp_path):
    path = tmp_path / "results" / "out.json"
    bf16 = record(dtype="bfloat16")
    records.save(path, [record(), record(provider="compile"), bf16])
    faster = record(ms_median=4.0)
    records.save(path, [faster])
    assert records.load(path) == [bf16, faster]
    content = json.loads(path.read_text())
    assert content["schema"] == records.SCHEMA
    assert set(content["records"][0]) == {field.name for field in dataclasses.fields(records.Record)}


def test_load_reads_the_first_schemas_and_refuses_others(tmp_path):
    path = tmp_path / "old.json"
    for schema, absent in (
        (1, ("static_floor_ms", "date", "class_counts", "clock")),
        (2, ("date", "class_counts", "clock")),
        (3, ("class_counts", "clock")),
        (4, ("clock",)),
    ):
        old = {name: value for name, value in dataclasses.asdict(record()).items() if name not in absent}
        path.write_text(json.dumps({"schema": schema, "records": [old]}))
        assert records.load(path) == [record()]
    path.write_text(json.dumps({"schema": 6, "records": []}))
    with pytest.raises(ValueError, match=r"old.json: got schema 6, expected one of \(1, 2, 3, 4, 5\)"):
        records.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"old.json: expected a results file"):
        records.load(path)
