"""Benchmarks: cases, providers, agreement, the runner and its budget, the report and its staleness, the comparison.

``op`` is the one on logits in memory, on which everything that ops share is tested; ``head`` is the linear one,
``contrast`` that of contrastive losses.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lt_kernels.bench import (
    cases,
    compare,
    expert_cross_entropy,
    expert_divergence,
    expert_fusion,
    figures,
    providers,
    records,
    report,
    roofline,
    runner,
)
from lt_kernels.bench import contrastive as contrast
from lt_kernels.bench import linear_margin_cross_entropy as head
from lt_kernels.bench import margin_cross_entropy as op

MARKERS = "# Title\n\n{}\n\nafter\n"


def block(name: str) -> str:
    return f"<!-- bench:{name} begin -->\n<!-- bench:{name} end -->"


def record(**changes) -> records.Record:
    fields = {
        "op": op.OP,
        "provider": "eager",
        "backend": None,
        "case": "inat18-n512",
        "sizes": {"N": 512, "C": 8142},
        "dtype": "float32",
        "direction": "fwd_bwd",
        "ms_median": 8.0,
        "ms_p20": 7.9,
        "ms_p80": 8.2,
        "repetitions": 20,
        "peak_bytes": 33_000_000,
        "bytes_moved": 33_349_632,
        "flops": 33_349_632,
        "gbps": 4.2,
        "copy_gbps": 20.0,
        "fraction_of_floor": 0.21,
        "device": "A CPU, 2 threads, AVX2",
        "device_slug": "cpu-a-cpu-2c",
        "versions": {"torch": "2.13.0", "triton": None},
        "git": "0123456789ab",
    }
    return records.Record(**{**fields, **changes})


def head_record(**changes) -> records.Record:
    fields = {
        "op": head.OP,
        "case": "inat18-n512-d2048",
        "sizes": {"N": 512, "D": 2048, "C": 8142},
        "ms_median": 700.0,
        "ms_p20": 690.0,
        "ms_p80": 720.0,
        "repetitions": 3,
        "peak_bytes": 137_592_832,  # gradients, and four times the logits
        "bytes_moved": 141_787_136,
        "flops": 51_223_461_888,
        "gbps": 0.2,
        "copy_gbps": None,
        "fraction_of_floor": 0.8,
    }
    return record(**{**fields, **changes})


@pytest.fixture
def checkout(tmp_path):
    """A folder with the documents that the report writes, and results of two providers on two cases."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(MARKERS.format(block("summary")))
    (tmp_path / "docs/benchmarks.md").write_text(
        MARKERS.format("\n\n".join(map(block, ("summary", "targets", "figures", "tables"))))
    )
    path = tmp_path / report.RESULTS / "cpu-a-cpu-2c" / f"{op.OP}.json"
    ours = record(provider="lt[native]", backend="native", ms_median=1.6, gbps=20.8, fraction_of_floor=1.04)
    wide = {"case": "c65536-n256", "sizes": {"N": 256, "C": 65536}}
    records.save(path, [record(), ours, record(**wide), dataclasses.replace(ours, **wide)])
    compiled = tmp_path / report.RESULTS / "aot" / path.name  # no measurements: the ahead-of-time gate's table
    compiled.parent.mkdir()
    compiled.write_text("{}")
    return tmp_path


@pytest.fixture
def small_inputs():
    return op.make_inputs(op.CASES["odd-7x123"], torch.float32, "cpu")


# Cases and costs

EXPERTS = (expert_cross_entropy, expert_fusion, expert_divergence)
EXPERT_CASES = list({case.name: case for module in EXPERTS for case in module.CASES.values()}.values())


ALL_CASES = [*op.CASES.values(), *head.CASES.values(), *EXPERT_CASES, *contrast.CASES.values()]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_case_counts_fit_and_are_long_tailed(case: cases.Case):
    counts = case.class_counts()
    assert counts.shape == (case.classes,)
    assert counts.min() >= 1
    assert counts.max() > counts.min()
    assert case.log_prior().exp().sum().item() == pytest.approx(1, abs=1e-9 * case.classes)


@pytest.mark.parametrize("op", runner.OPS.values(), ids=runner.OPS)
def test_cases_cover_the_targets_and_the_comparison(op):
    for target in op.TARGETS:
        assert target.device in op.CASES[target.case].devices
        assert target.dtype in op.DTYPES[target.device]
        assert target.against in ("copy", "memory", "static floor", "fastest other", *op.PROVIDERS)
        assert target.ours in (None, *op.PROVIDERS)
        assert (target.at_least is None) != (target.at_most is None)
        if target.against in op.PROVIDERS:
            provider, case = op.PROVIDERS[target.against], op.CASES[target.case]
            assert provider.unasked(target.device) is provider.left_out(case, target.dtype, target.device) is None
    for name in op.COMPARE_CASES:
        assert "cpu" in op.CASES[name].devices
    assert set(op.REFERENCES) <= set(op.PROVIDERS)
    assert set(op.DIRECTIONS) <= set(runner.DIRECTIONS)
    for device in ("cpu", "cuda"):
        assert any(device in case.headline for case in op.CASES.values())


def test_names_of_cases_tell_the_ops_apart():
    experts = {case.name for case in EXPERT_CASES}
    assert not op.CASES.keys() & head.CASES.keys()
    assert not (op.CASES.keys() | head.CASES.keys()) & experts
    assert not (op.CASES.keys() | head.CASES.keys() | experts) & contrast.CASES.keys()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_cover_every_number_of_classes_on_each_device(device):
    wanted = {1000, 1203, 8142, 8192, 10_000, 21_841, 65_536, 100_000, 1_000_000}
    swept = [case for case in op.CASES.values() if device in case.sweep]
    assert {case.classes for case in swept} == wanted
    assert len(swept) == len(wanted)
    measured = [case for case in op.CASES.values() if device in case.devices]
    assert {case.rows for case in measured if case.classes == 8142} == {64, 256, 512, 2048, 8192}
    assert (16, 150, (512, 512)) in {(case.rows, case.classes, case.positions) for case in measured}
    assert any(device in case.headline for case in measured)


@pytest.mark.parametrize(("direction", "factor"), [("fwd", 1), ("bwd", 2), ("fwd_bwd", 2)])
def test_cost_counts_each_logit_once_per_pass(direction, factor):
    cost = op.cost(cases.Case("c", 7, 123), torch.bfloat16, direction)
    assert cost.bytes_moved == factor * 7 * 123 * 2
    assert cost.flops % (7 * 123) == 0
    assert cost.exponentials == 7 * 123
    assert op.cost(cases.Case("m", 7, 123, positions=(4, 5)), torch.bfloat16, direction).flops == cost.flops * 20


@pytest.mark.parametrize(
    ("direction", "products", "passes"), [("fwd", 1, 1), ("bwd", 2, 2), ("fwd_bwd", 3, 2)], ids=runner.DIRECTIONS
)
def test_cost_of_a_head_counts_products_and_operands_but_no_logits(direction, products, passes):
    cost = head.cost(cases.LinearCase("c", 7, 123, width=19), torch.bfloat16, direction)
    assert cost.flops == products * 2 * 7 * 19 * 123
    assert cost.bytes_moved == passes * (7 + 123) * 19 * 2  # features and weight, and their gradients
    assert cost.exponentials == 7 * 123


@pytest.mark.parametrize("module", EXPERTS, ids=lambda module: module.OP)
def test_cost_of_experts_counts_the_logits_of_each_once_per_pass(module):
    case = cases.ExpertCase("c", 7, 123, experts=4)
    for direction in module.DIRECTIONS:
        cost = module.cost(case, torch.bfloat16, direction)
        assert cost.bytes_moved == (1 if direction == "fwd" else 2) * 4 * 7 * 123 * 2
        assert cost.flops % (7 * 123) == 0
    means, logits = 7 * 123, 4 * 7 * 123
    expected = {expert_cross_entropy: logits, expert_fusion: means, expert_divergence: logits + means}
    assert cost.exponentials == expected[module]


def test_inputs_of_experts():
    case = cases.ExpertCase("c", 7, 123)
    inputs = case.inputs(torch.float32, "cpu")
    assert case.sizes == {"E": 3, "N": 7, "C": 123}
    assert case.taus == [-1, 1, 3]
    assert cases.ExpertCase("c", 7, 123, experts=1).taus == [1]
    assert sum(cases.ExpertCase("c", 7, 123, experts=6).taus) == pytest.approx(6)
    assert [tuple(x.shape) for x in inputs.leaves.values()] == [(7, 123)] * 3
    assert torch.equal(torch.stack(inputs.experts), inputs.stacked)
    assert not torch.equal(inputs.target, inputs.mixed_target)
    again = case.inputs(torch.float32, "cpu")
    assert torch.equal(again.stacked, inputs.stacked)
    assert torch.equal(again.mixed_target, inputs.mixed_target)


SMALL_CONTRASTS = [case for case in contrast.CASES.values() if not case.devices]


def test_cost_of_a_contrast_counts_the_products_that_its_gradients_need():
    def cost(name: str, direction: str = "fwd_bwd"):
        return contrast.cost(contrast.CASES[name], torch.bfloat16, direction)

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
    query, key = contrast.vectors(inputs)
    assert case.sizes == {"N": len(query), "M": len(key), "D": query.shape[1]}
    assert (len(inputs.target), len(inputs.key_label)) == (len(query), len(key))
    torch.testing.assert_close(query.norm(dim=1), torch.ones(len(query)))
    own = torch.arange(len(query))
    if contrast.leaves_out_own(case.method):
        assert torch.equal(inputs.key_label[own], inputs.target)
    elements = sum(leaf.numel() for leaf in inputs.leaves.values() if leaf.dim() > 0)
    assert elements == contrast._gradient_elements(case)
    again = case.inputs(torch.float32, "cpu")
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in inputs.tensors.items())
    if case.method == "gml":
        held = inputs.tensors["query_id"][:, None] == inputs.tensors["key_id"]
        assert torch.equal(held.sum(1), torch.ones(len(query), dtype=torch.int64))
        assert torch.equal(inputs.key_label[held.int().argmax(1)], inputs.target)
        assert int(torch.bincount(inputs.key_label).min()) >= 2  # one is left without a query's own


def test_static_floor_is_the_slowest_of_what_a_chip_does():
    assert roofline.static_floor_ms("NVIDIA H200", 43 * 10**9, 0, 0) == pytest.approx(10)
    assert roofline.static_floor_ms("NVIDIA H200", 43 * 10**9, 0, 418 * 10**9) == pytest.approx(100)
    assert roofline.static_floor_ms("NVIDIA H100 80GB HBM3", 3 * 10**10, 0, 0) == pytest.approx(10)
    assert roofline.static_floor_ms("NVIDIA H100 PCIe", 1, 1, 1) is None  # another memory
    assert roofline.static_floor_ms("A CPU, 2 threads, AVX2", 1, 1, 1) is None


# Providers


@pytest.mark.parametrize("provider", ["loop", "lt[reference]", "lt[native]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["odd-7x123", "map-2x19x6x7"])
def test_providers_agree(case, dtype, provider):
    reason = runner.unavailable_reason(op.OP, provider, "cpu")
    if reason is not None:
        pytest.skip(reason)
    op.check_agreement(provider, op.make_inputs(op.CASES[case], dtype, "cpu"))


HEADS = ["torch-linear-ce", "torch-linear-ce-chunked", "lt[reference]", "lt[native]", "lt-chunked", "lt-materialize"]


@pytest.mark.parametrize("provider", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["odd-7x19x123", "even-16x64x1024"])
def test_providers_of_heads_agree(case, dtype, provider):
    reason = runner.unavailable_reason(head.OP, provider, "cpu")
    if reason is not None:
        pytest.skip(reason)
    head.check_agreement(provider, head.make_inputs(head.CASES[case], dtype, "cpu"))


@pytest.mark.parametrize("module", EXPERTS, ids=lambda module: module.OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_providers_of_experts_agree(module, dtype):
    for case in module.CASES.values():
        if case.devices:
            continue
        agreement = module.Agreement(inputs := module.make_inputs(case, dtype, "cpu"))
        for name in module.PROVIDERS:
            if name != "compile" and runner.unavailable_reason(module.OP, name, "cpu") is None:
                agreement.check(name, module.make_step(name, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL_CONTRASTS, ids=lambda case: case.name)
def test_providers_of_contrasts_agree(case, dtype):
    agreement = contrast.Agreement(inputs := contrast.make_inputs(case, dtype, "cpu"))
    assert agreement._truth.keys() == {"loss", *(f"gradient of {name}" for name in inputs.leaves)}
    for name, provider in contrast.PROVIDERS.items():
        strategy = name.startswith("lt-") and case.method in ("supcon", "moco")
        left_out = not strategy and provider.left_out(case, "float32", "cpu") is not None
        if name != "compile" and not left_out and provider.unavailable("cpu") is None and provider.is_loss:
            agreement.check(name, contrast.make_step(name, inputs))


def test_contrasts_are_the_formulas():
    """The dense forms against sums over keys, query by query."""
    inputs = contrast.make_inputs(contrast.CASES["gml-9x40x6-c11"], torch.float64, "cpu")
    given, prior = inputs.tensors, inputs.log_prior.double()
    total = 0.0
    for i, label in enumerate(inputs.target):
        s = (given["query"][i] * given["key"]).sum(1) / 0.07
        others = given["key_id"] != given["query_id"][i]
        for keep in (torch.ones_like(others), others):
            means = [s[keep & (inputs.key_label == c)].exp().mean().log() for c in range(11)]
            total += F.cross_entropy(torch.stack(means) + prior, label)
        total += F.cross_entropy(30 * given["logits"][i] + prior, label)
    torch.testing.assert_close(contrast.make_step("dense", inputs)(), total / 9, rtol=1e-6, atol=0.0)

    inputs = contrast.make_inputs(contrast.CASES["bcl-12x17x6"], torch.float64, "cpu")
    query, key = contrast.vectors(inputs)
    total = 0.0
    for i, label in enumerate(inputs.target):
        s, others = (query[i] * key).sum(1) / 0.1, torch.arange(17) != i
        means = [s[others & (inputs.key_label == c)].exp().mean() for c in range(5)]
        total += torch.stack(means).sum().log() - s[others & (inputs.key_label == label)].mean()
    torch.testing.assert_close(contrast.make_step("dense", inputs)(), total / 12)

    inputs = contrast.make_inputs(contrast.CASES["supcon-7x33x5"], torch.float64, "cpu")
    total = 0.0
    for i, label in enumerate(inputs.target):
        s, others = (inputs.tensors["query"][i] * inputs.tensors["key"]).sum(1) / 0.07, torch.arange(33) != i
        positive = others & (inputs.key_label == label)
        total += s[others].logsumexp(0) - s[positive].mean() if positive.any() else 0.0
    torch.testing.assert_close(contrast.make_step("dense", inputs)(), total / 7)

    inputs = contrast.make_inputs(contrast.CASES["paco-5x32x6"], torch.float64, "cpu")
    query, key = contrast.vectors(inputs)
    total = 0.0
    for i, label in enumerate(inputs.target):
        s, others = (query[i] * key).sum(1) / 0.2, torch.arange(21) != i
        adjusted = inputs.tensors["logits"][i] + (inputs.log_prior.double().exp() + 1e-9).log()
        positive = s[others & (inputs.key_label == label)]
        pulled = (adjusted[label] + 0.05 * positive.sum()) / (1 + 0.05 * len(positive))
        total += torch.cat([adjusted, s[others]]).logsumexp(0) - pulled
    torch.testing.assert_close(contrast.make_step("dense", inputs)(), total / 5, rtol=1e-6, atol=0.0)


def test_contrasts_say_where_they_are_not_measured_unasked(monkeypatch):
    def reason(name: str, case: str, dtype: str = "float32", device: str = "cpu") -> str | None:
        return contrast.PROVIDERS[name].left_out(contrast.CASES[case], dtype, device)

    memory, gml = "supcon-512x16384x128", "gml-128x16384x1024-c8142"
    assert reason("compile", memory) is reason("compile", gml, device="cuda") is None
    assert f"in {memory} only" in reason("compile", gml)
    assert reason("pml", "supcon-2x256x128") is reason("pml", "moco-256x65536x128") is None
    assert "query's own" in reason("pml", memory)
    assert reason("pml", gml) == "it has no such loss"
    assert "library chooses here" in reason("lt-materialize", memory)
    assert reason("lt-chunked", memory) is None
    assert "leaves the strategy to the library" in reason("lt-chunked", gml)
    assert "CUDA" in contrast.PROVIDERS["lt-tiled"].unavailable("cpu")
    assert "not meant to be fast" in contrast.PROVIDERS["lt[reference]"].unasked("cpu")
    for module in ("pytorch_metric_learning", *(f"pytorch_metric_learning.{name}" for name in contrast._PML)):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pytorch_metric_learning" in contrast.PROVIDERS["pml"].unavailable("cpu")


@pytest.mark.parametrize("case", ["views-10x10x5", "moco-5x41x6"])
def test_pytorch_metric_learning_is_called_properly(monkeypatch, case):
    """Norms as they are, and the mean over all queries."""
    calls = []

    class SupConLoss:
        def __init__(self, temperature, distance, reducer):
            calls.append((temperature, distance, reducer))

        def __call__(self, embeddings, labels, ref_emb=None, ref_labels=None):
            key, key_label = (embeddings, labels) if ref_emb is None else (ref_emb, ref_labels)
            return contrast.dense_supcon(embeddings, key, labels, key_label, 0.07, ref_emb is None)

    package = {
        "losses": {"SupConLoss": SupConLoss},
        "distances": {"DotProductSimilarity": lambda normalize_embeddings: ("dot", normalize_embeddings)},
        "reducers": {"MeanReducer": lambda: "mean"},
    }
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", types.ModuleType("pytorch_metric_learning"))
    for name, members in package.items():
        module = types.ModuleType(f"pytorch_metric_learning.{name}")
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert contrast.PROVIDERS["pml"].unavailable("cpu") is None
    contrast.check_agreement("pml", contrast.make_inputs(contrast.CASES[case], torch.float32, "cpu"))
    assert calls == [(0.07, ("dot", False), "mean")]


@pytest.mark.parametrize("case", SMALL_CONTRASTS, ids=lambda case: case.name)
def test_gemms_of_contrasts_are_those_of_what_learns(case):
    inputs = contrast.make_inputs(case, torch.float32, "cpu")
    step = contrast.make_step("gemms", inputs)
    for _ in range(2):  # into the same outputs
        step().backward()
    query, key = (x.detach() for x in contrast.vectors(inputs))
    similarities = query @ key.T
    torch.testing.assert_close(step._similarities, similarities)
    torch.testing.assert_close(step._of_query, similarities @ key)
    learning = {"views": 0, "moco": len(query), "paco": len(query)}.get(case.method, 0 if case.frozen else len(key))
    torch.testing.assert_close(step._of_key, (similarities.T @ query)[:learning])
    assert all(leaf.grad is None for leaf in inputs.leaves.values())


def test_experts_are_the_published_loops():
    inputs = cases.ExpertCase("c", 7, 123).inputs(torch.float64, "cpu")
    prior = inputs.counts / inputs.counts.sum()

    def loss(target):
        pairs = zip(inputs.experts, (-1, 1, 3), strict=True)
        each = [F.cross_entropy(x + tau * (prior + 1e-9).log(), target) for x, tau in pairs]
        return sum(each) / 3

    mixed = 0.7 * loss(inputs.target) + 0.3 * loss(inputs.mixed_target)
    for name in ("published", "eager"):
        torch.testing.assert_close(expert_cross_entropy.make_step(name, inputs)(), mixed, rtol=1e-6, atol=0.0)
    p = [x.softmax(1) for x in inputs.experts]
    mean = torch.stack(inputs.experts).mean(0).softmax(1)
    to_mean = sum((mean * (mean / q).log()).sum() for q in p) / 7
    torch.testing.assert_close(expert_divergence.make_step("published", inputs)(), to_mean)
    pairs = sum((q * (q / r).log()).sum() for q in p for r in p) / 7
    inputs.case = dataclasses.replace(inputs.case, variant=expert_divergence.PAIRWISE)
    torch.testing.assert_close(expert_divergence.make_step("published", inputs)(), pairs)


def test_experts_are_compiled_in_headline_cases():
    for module in EXPERTS:
        left_out = module.PROVIDERS["compile"].left_out
        assert left_out(module.CASES["inat18-e3-n512"], "float32", "cpu") is None
        assert "headline cases only" in left_out(module.CASES["inat18-e6-n512"], "float32", "cpu")
        assert left_out(module.CASES["inat18-e6-n512"], "float32", "cuda") is None


def test_heads_say_where_they_are_not_measured_unasked(monkeypatch):
    def reason(name: str, case: str, dtype: str = "float32", device: str = "cpu") -> str | None:
        return head.PROVIDERS[name].left_out(head.CASES[case], dtype, device)

    assert "takes many seconds" in reason("torch-linear-ce-chunked", "c100k-n512-d512", "bfloat16")
    assert reason("torch-linear-ce-chunked", "c100k-n512-d512") is None  # a target needs it
    assert reason("torch-linear-ce-chunked", "c1m-n1024-d256", device="cuda") is None
    for name in ("compile", "torch-linear-ce"):
        assert reason(name, "inat18-n512-d2048") is reason(name, "inat21-n512-d2048", device="cuda") is None
        assert "headline cases only" in reason(name, "inat21-n512-d2048")
    assert "library chooses here" in reason("lt-materialize", "inat18-n512-d2048")
    assert reason("lt-chunked", "inat18-n512-d2048") is None
    assert reason("lt-chunked", "c1m-n64-d256") == "one chunk holds all rows"
    assert "narrow heads" in reason("lt-tiled", "inat18-n8192-d2048", device="cuda")
    assert reason("lt-tiled", "c100k-n4096-d512", device="cuda") is None
    assert "library chooses here" in reason("lt-tiled", "c100k-n8192-d128", "bfloat16", "cuda")
    assert "CUDA" in head.PROVIDERS["lt-tiled"].unavailable("cpu")
    assert "not meant to be fast" in head.PROVIDERS["lt[reference]"].unasked("cpu")
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert "2.13" in head.PROVIDERS["torch-linear-ce-chunked"].unavailable("cpu")
    for peer in ("liger", "cut-cross-entropy", "cut-cross-entropy-exact", "quack"):
        assert head.PROVIDERS[peer].unavailable("cpu") == "its kernels need CUDA tensors"


def test_gemms_are_the_three_products():
    inputs = head.make_inputs(head.CASES["odd-7x19x123"], torch.float32, "cpu")
    step = head.make_step("gemms", inputs)
    assert not head.PROVIDERS["gemms"].is_loss
    for _ in range(2):  # into the same outputs
        step().backward()
    logits = inputs.features @ inputs.weight.T
    torch.testing.assert_close(step._logits, logits)
    torch.testing.assert_close(step._gradients, (logits @ inputs.weight, logits.T @ inputs.features))
    assert inputs.features.grad is inputs.weight.grad is None


def test_providers_that_cannot_run_say_why(monkeypatch):
    def reason(name: str, device: str) -> str | None:
        return op.PROVIDERS[name].unavailable(device)

    for peer in ("liger", "flash-attn", "quack"):
        assert reason(peer, "cpu") == "its kernels need CUDA tensors"
    monkeypatch.setitem(sys.modules, "quack", None)  # as if it were not there, wherever this runs
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", None)
    assert "quack" in reason("quack", "cuda")
    assert "embeddings" in reason("cut-cross-entropy", "cuda")
    assert "code is that of compile" in op.PROVIDERS["compile-max-autotune"].unasked("cpu")
    assert op.PROVIDERS["compile-max-autotune"].unasked("cuda") is None


def test_a_peer_that_breaks_on_import_is_skipped_with_its_message(monkeypatch):
    def import_module(name):
        raise RuntimeError("needs another driver\nand more")

    monkeypatch.setattr(providers.importlib, "import_module", import_module)
    reason = op.PROVIDERS["liger"].unavailable("cuda")
    assert reason == "liger_kernel.transformers cannot be imported: RuntimeError: needs another driver"


class InPlace(torch.autograd.Function):
    """Like Liger's: the gradient is made in the forward pass and written over the logits."""

    @staticmethod
    def forward(ctx, logits, target):
        probabilities = logits.softmax(1)
        loss = -probabilities.gather(1, target[:, None]).log().mean()
        probabilities.scatter_add_(1, target[:, None], -torch.ones_like(target[:, None], dtype=logits.dtype))
        logits.data.copy_(probabilities / len(target))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None


def fake_peer(name: str, wrong: float = 1.0) -> tuple[str, types.ModuleType, list]:
    """(module name, a module with the interface of that peer, what it was called with)."""
    calls = []

    def loss(logits, target, **options):
        assert logits.dim() == 2
        assert target.shape == logits.shape[:1]
        calls.append(options)
        return wrong * InPlace.apply(logits, target)

    def quack(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="none", inplace_backward=False):
        return loss(x, target, reduction=reduction, inplace_backward=inplace_backward)

    class LossModule(torch.nn.Module):
        def __init__(self, ignore_index=-100, reduction="mean"):
            super().__init__()

        def forward(self, logits, target):
            return loss(logits, target)

    class FlashAttention(LossModule):
        def __init__(self, ignore_index=-100, reduction="mean", inplace_backward=False):
            super().__init__()
            calls.append({"inplace_backward": inplace_backward})

    path, member, value = {
        "liger": ("liger_kernel.transformers", "LigerCrossEntropyLoss", LossModule),
        "flash-attn": ("flash_attn.losses.cross_entropy", "CrossEntropyLoss", FlashAttention),
        "quack": ("quack.cross_entropy", "cross_entropy", quack),
    }[name]
    module = types.ModuleType(path)
    setattr(module, member, value)
    return path, module, calls


@pytest.mark.parametrize("case", ["odd-7x123", "map-2x19x6x7"])
@pytest.mark.parametrize("peer", ["liger", "flash-attn", "quack"])
def test_an_importable_peer_is_called_properly(monkeypatch, peer, case):
    path, module, calls = fake_peer(peer)
    for index in range(path.count(".")):
        parent = ".".join(path.split(".")[: index + 1])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, path, module)
    assert op.PROVIDERS[peer].unavailable("cuda") is None
    inputs = op.make_inputs(op.CASES[case], torch.float32, "cpu")
    before = inputs.logits.detach().clone()
    op.check_agreement(peer, inputs)
    op.check_agreement(peer, inputs)
    assert torch.equal(inputs.logits, before)  # it may write over its shifted copy, never over the logits
    if peer != "liger":
        assert {"inplace_backward": True}.items() <= calls[0].items()
    if peer == "quack":
        assert calls[0]["reduction"] == "mean"


def fake_linear_peer(name: str) -> tuple[str, types.ModuleType, list]:
    """Likewise for heads."""
    calls = []

    def loss(features, weight, target, bias, **options):
        assert (weight.shape, target.shape, bias.shape) == ((123, 19), (7,), (123,))
        calls.append(options)
        return F.cross_entropy(F.linear(features, weight, bias), target)

    class Liger(torch.nn.Module):
        def forward(self, lin_weight, _input, target, bias=None):
            return loss(_input, lin_weight, target, bias)

    def cut(e, c, targets, bias=None, impl="cce"):
        return loss(e, c, targets, bias, impl=impl)

    def quack(x, weight, bias, target, ignore_index=-100, reduction="mean", inplace_backward=False):
        return loss(x, weight, target, bias, reduction=reduction, inplace_backward=inplace_backward)

    path, member, value = {
        "liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", Liger),
        "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy", cut),
        "cut-cross-entropy-exact": ("cut_cross_entropy", "linear_cross_entropy", cut),
        "quack": ("quack.linear_cross_entropy", "linear_cross_entropy_func", quack),
    }[name]
    module = types.ModuleType(path)
    setattr(module, member, value)
    return path, module, calls


@pytest.mark.parametrize(
    ("peer", "options"),
    [
        ("liger", {}),
        ("cut-cross-entropy", {"impl": "cce"}),
        ("cut-cross-entropy-exact", {"impl": "cce_exact"}),
        ("quack", {"reduction": "mean", "inplace_backward": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_importable_peer_of_heads_is_called_properly(monkeypatch, peer, options):
    path, module, calls = fake_linear_peer(peer)
    for index in range(path.count(".")):
        parent = ".".join(path.split(".")[: index + 1])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, path, module)
    assert head.PROVIDERS[peer].unavailable("cuda") is None
    head.check_agreement(peer, head.make_inputs(head.CASES["odd-7x19x123"], torch.float32, "cpu"))
    assert calls == [options]


def test_a_peer_of_heads_without_a_bias_is_left_out(monkeypatch):
    module = types.ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = lambda e, c, targets, impl="cce": None
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    for name in ("cut-cross-entropy", "cut-cross-entropy-exact"):
        assert "takes no bias" in head.PROVIDERS[name].unavailable("cuda")


def test_a_wrong_peer_fails_the_agreement_check(monkeypatch, small_inputs):
    path, module, _ = fake_peer("liger", wrong=1.01)
    monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    with pytest.raises(AssertionError, match="liger loss: error"):
        op.check_agreement("liger", small_inputs)


# Agreement


def test_agreement_rejects_a_wrong_gradient_in_the_last_row(small_inputs):
    def spoiled(error):
        logit = small_inputs.logits[-1, 5]
        return op.make_step("eager", small_inputs)() + error * (logit - logit.detach())

    agreement = op.Agreement(small_inputs)
    agreement.check("same", lambda: spoiled(0.0))
    with pytest.raises(AssertionError, match="spoiled gradient"):
        agreement.check("spoiled", lambda: spoiled(0.01))


@pytest.mark.parametrize("case", ["odd-7x123", "map-2x19x6x7"])
def test_agreement_of_a_large_case_samples_rows_but_not_the_loss(monkeypatch, case):
    monkeypatch.setattr(op, "CHECKED_LOGITS", 3 * op.CASES[case].classes)  # three rows
    inputs = op.make_inputs(op.CASES[case], torch.float32, "cpu")
    agreement = op.Agreement(inputs)
    rows = inputs.target.numel()
    assert agreement._rows.tolist() == [0, (rows - 1) // 2, rows - 1]
    for provider in ("eager", "lt[reference]"):
        agreement.check(provider, op.make_step(provider, inputs))
    without_a_row = F.cross_entropy(inputs.logits.detach()[1:] + inputs.per_class(inputs.log_prior), inputs.target[1:])
    with pytest.raises(AssertionError, match="short loss"):
        agreement.check("short", lambda: without_a_row + 0 * inputs.logits.sum())


@pytest.fixture
def head_inputs():
    return head.make_inputs(head.CASES["odd-33x45x507"], torch.float32, "cpu")


def test_agreement_of_heads_is_exact_in_what_it_samples(monkeypatch, head_inputs):
    monkeypatch.setattr(head, "BLOCK_LOGITS", 33 * 100)  # six blocks of classes
    monkeypatch.setattr(head, "CHECKED_ROWS", 3)
    truth = head.Agreement(head_inputs)._truth
    features, weight = (leaf.detach().double().requires_grad_() for leaf in head_inputs.leaves.values())
    loss = head.eager_loss(features, weight, head_inputs.target, head_inputs.log_prior.double())
    loss.backward()
    rows = torch.tensor([0, 16, 32])
    classes = torch.tensor([0, 253, 506, *head_inputs.target[rows]]).unique()
    torch.testing.assert_close(truth["loss"], loss.detach())
    torch.testing.assert_close(truth["gradient of features"], features.grad[rows])
    torch.testing.assert_close(truth["gradient of weight"], weight.grad[classes])


@pytest.mark.parametrize("what", ["loss", "gradient of features", "gradient of weight"])
def test_agreement_of_heads_rejects_each_error(head_inputs, what):
    def spoiled(error):
        one = {"gradient of features": head_inputs.features[-1, 7], "gradient of weight": head_inputs.weight[-1, 7]}
        entry = one.get(what)
        return head.make_step("eager", head_inputs)() + error * (1.0 if entry is None else entry - entry.detach())

    agreement = head.Agreement(head_inputs)
    agreement.check("same", lambda: spoiled(0.0))
    with pytest.raises(AssertionError, match=f"{head.OP} spoiled {what}"):
        agreement.check("spoiled", lambda: spoiled(0.01))
    with pytest.raises(AssertionError, match="no gradient of weight"):
        agreement.check("frozen", lambda: head_inputs.features.sum())


def test_agreement_of_contrasts_is_exact_in_pieces_and_rejects_each_error(monkeypatch):
    monkeypatch.setattr(contrast, "PIECE", 2 * 40)  # two queries at a time
    inputs = contrast.make_inputs(contrast.CASES["gml-9x40x6-c11"], torch.float32, "cpu")
    agreement = contrast.Agreement(inputs)
    whole = inputs.converted(torch.float64)
    loss = contrast.masked_loss(whole)
    loss.backward()
    torch.testing.assert_close(agreement._truth["loss"], loss.detach())
    for name, leaf in whole.leaves.items():
        torch.testing.assert_close(agreement._truth[f"gradient of {name}"], leaf.grad)
    for name, leaf in inputs.leaves.items():

        def spoiled(leaf=leaf):
            entry = leaf.reshape(-1)[-1]
            return contrast.make_step("masked", inputs)() + 0.01 * (entry - entry.detach())

        with pytest.raises(AssertionError, match=f"spoiled gradient of {name}"):
            agreement.check("spoiled", spoiled)
    with pytest.raises(AssertionError, match="spoiled loss"):
        agreement.check("spoiled", lambda: 1.01 * contrast.make_step("masked", inputs)())


@pytest.mark.parametrize("module", [expert_cross_entropy, expert_divergence], ids=lambda module: module.OP)
def test_agreement_of_experts_is_exact_in_what_it_samples(monkeypatch, module):
    from lt_kernels.bench import experts

    monkeypatch.setattr(experts, "CHECKED_LOGITS", 2 * 3 * 123)  # two samples
    for name in [name for name in module.CASES if name.startswith("odd-3x7x123")]:
        inputs = module.make_inputs(module.CASES[name], torch.float32, "cpu")
        agreement = module.Agreement(inputs)
        loss = module.make_step(module.REFERENCES[0], inputs)()
        loss.backward()
        torch.testing.assert_close(agreement._truth["loss"].float(), loss.detach(), rtol=1e-5, atol=0.0)
        gradient = torch.stack([x.grad[[0, 6]] for x in inputs.experts])
        torch.testing.assert_close(agreement._truth["gradient"].float(), gradient, rtol=1e-4, atol=1e-7)
        inputs.drop_gradients()
        last = inputs.experts[2][-1, 5]
        for error in (0.0, 0.01):

            def spoiled(error=error):
                return module.make_step(module.REFERENCES[0], inputs)() + error * (last - last.detach())

            if error:
                with pytest.raises(AssertionError, match="spoiled gradient"):
                    agreement.check("spoiled", spoiled)
            else:
                agreement.check("same", spoiled)


def test_agreement_of_the_fusion_takes_any_of_equal_classes_and_no_other():
    inputs = expert_fusion.make_inputs(expert_fusion.CASES["odd-3x7x123-top5"], torch.float32, "cpu")
    inputs.stacked.data[:, 2, 7] = inputs.stacked.data[:, 2, 9] = 20.0
    agreement = expert_fusion.Agreement(inputs)
    values, classes = expert_fusion.make_step("eager", inputs)()
    swapped = classes.clone()
    swapped[2, :2] = classes[2, [1, 0]]
    agreement.check("another order", lambda: (values, swapped))
    swapped[3, :2] = classes[3, [1, 0]]
    with pytest.raises(AssertionError, match="wrong order logits"):
        agreement.check("wrong order", lambda: (values, swapped))
    with pytest.raises(AssertionError, match="too sure probabilities"):
        agreement.check("too sure", lambda: (values * 1.001, classes))


# The runner


def run_small(**options):
    options = {"cases": ["odd-7x123"], "dtypes": ["float32"], "repetitions": 3, "seconds": 0.0} | options
    return runner.run(op.OP, **options)


@pytest.mark.parametrize("case", ["odd-7x123", "map-2x19x6x7"])
def test_run_makes_complete_records(case):
    names = ["eager", "lt[reference]"]
    found = run_small(cases=[case], providers=names)
    assert [(r.direction, r.provider) for r in found] == [(d, p) for d in runner.DIRECTIONS for p in names]
    for r in found:
        assert r.repetitions == 3
        assert 0 < r.ms_p20 <= r.ms_median <= r.ms_p80
        assert r.gbps == pytest.approx(r.bytes_moved / r.ms_median / 1e6, rel=1e-3)
        assert r.fraction_of_floor == pytest.approx(r.gbps / r.copy_gbps, rel=1e-3)
        assert r.sizes == op.CASES[case].sizes
        assert r.device_slug.startswith("cpu-")
        assert r.versions["torch"] == torch.__version__
        assert r.static_floor_ms is None
    eager = {r.direction: r for r in found if r.provider == "eager"}
    assert eager["bwd"].ms_p20 < eager["fwd_bwd"].ms_median
    logits = 4 * op.CASES[case].logits
    if eager["fwd_bwd"].peak_bytes is not None:
        assert eager["fwd_bwd"].peak_bytes >= eager["bwd"].peak_bytes >= logits
        assert eager["fwd"].peak_bytes >= 2 * logits  # shifted, and its log-softmax


def test_run_of_a_head_measures_its_floor_unasked_and_holds_others_against_it(monkeypatch):
    checked = []
    check = head.Agreement.check
    monkeypatch.setattr(
        head.Agreement, "check", lambda self, name, step: (checked.append(name), check(self, name, step))
    )
    lines = []
    found = runner.run(
        head.OP,
        cases=["odd-33x45x507"],
        providers=["eager", "lt[reference]"],
        repetitions=3,
        seconds=0.0,
        log=lines.append,
    )
    names = ["gemms", "eager", "lt[reference]"]
    assert [(r.dtype, r.direction, r.provider) for r in found] == [
        (dtype, direction, name)
        for dtype in ("float32", "bfloat16")
        for direction in runner.DIRECTIONS
        for name in names
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
        expert_fusion.OP,
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
    assert runner.run(expert_fusion.OP, cases=["odd-3x7x123"], directions=["bwd", "fwd_bwd"]) == []


def test_run_of_a_contrast():
    options = {"repetitions": 1, "seconds": 0.0}
    found = runner.run(contrast.OP, cases=["moco-5x41x6"], providers=["dense", "lt[reference]"], **options)
    assert {r.dtype for r in found} == {"float32"}  # what the case says, unless asked
    assert {r.provider for r in found} == {"gemms", "dense", "lt[reference]"}
    dense = next(r for r in found if (r.provider, r.direction) == ("dense", "fwd_bwd"))
    assert dense.sizes == {"N": 5, "M": 41, "D": 6}
    if dense.peak_bytes is not None:
        similarities, gradients = 4 * 5 * 41, 4 * 2 * 5 * 6
        assert contrast.memory(dense) == pytest.approx((dense.peak_bytes - gradients) / similarities)
        assert contrast.memory(dense) > 2
    found = runner.run(
        contrast.OP, cases=["supcon-7x33x5"], providers=["masked"], dtypes=["bfloat16"], directions=["fwd"], **options
    )
    assert {r.dtype for r in found} == {"bfloat16"}


def only(monkeypatch, *names: str, **changes) -> None:
    """Make every other provider unavailable, and change the last of these."""
    for name, provider in op.PROVIDERS.items():
        if name not in names:
            monkeypatch.setitem(op.PROVIDERS, name, dataclasses.replace(provider, unavailable=lambda device: "absent"))
    monkeypatch.setitem(op.PROVIDERS, names[-1], dataclasses.replace(op.PROVIDERS[names[-1]], **changes))


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
    assert lines == [f"{op.OP} has no case odd-7x19x123: another op has"]
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

    native = dataclasses.replace(op.PROVIDERS["lt[native]"], make=make, unavailable=lambda device: None)
    monkeypatch.setitem(op.PROVIDERS, "lt[native]", native)
    monkeypatch.setitem(
        op.PROVIDERS, "compile", dataclasses.replace(op.PROVIDERS["compile"], unavailable=lambda device: "slow")
    )
    with pytest.raises(
        runner.BenchmarkError, match=r"lt\[native\] on odd-7x123 float32: RuntimeError: no kernel image$"
    ):
        run_small(directions=["fwd"])


def test_an_overflow_of_eager_is_said_and_is_no_error_of_ours(monkeypatch):
    lines = []
    case = cases.Case("overflow", 4, 5)
    monkeypatch.setitem(op.CASES, "overflow", case)
    inputs = op.make_inputs(case, torch.float16, "cpu")
    inputs.logits.data[:] = torch.tensor([-3e4, 3e4, 0.0, 0.0, 0.0])
    inputs.target[:] = 0  # losses of 60,000, whose float16 sum is infinite
    monkeypatch.setattr(op, "make_inputs", lambda *_: inputs)
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

    def run_group(module, case, dtype, providers, directions, device, timing, check, log, left, keep):
        clock.now += 10
        seen.append((f"{case.name} {dtype}", timing.limit))
        if device == "cuda":
            measured = []
            for name in providers:
                if left(name) > 0:
                    measured.append(name)
                    clock.now += module.PROVIDERS[name].compiler_seconds
            seen[-1] = (f"{case.name} {dtype}", measured)
        return {}

    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(runner, "_run_group", run_group)
    return seen


def test_headline_cases_come_first_and_float16_last(group_order):
    runner.run(op.OP, cases=["lvis-n512", "inat18-n512"], dtypes=["float16", "float32"])
    names = [name for name, _ in group_order]
    assert names == ["inat18-n512 float32", "lvis-n512 float32", "inat18-n512 float16", "lvis-n512 float16"]


def test_budget_leaves_out_the_least_important_and_names_it(group_order):
    lines = []
    runner.run(op.OP, cases=["lvis-n512", "inat18-n512"], budget=35, limit=6, log=lines.append)
    assert [name for name, _ in group_order] == ["inat18-n512 float32", "inat18-n512 bfloat16", "lvis-n512 float32"]
    assert [limit for _, limit in group_order] == [6, 6, 6]
    assert lines[-1] == ("left out to stay within 35 s: lvis-n512 bfloat16, inat18-n512 float16, lvis-n512 float16")


def test_budget_measures_something_and_shortens_what_is_left(group_order):
    runner.run(op.OP, cases=["lvis-n512"], budget=21, limit=6)
    assert [limit for _, limit in group_order] == [6, 5.5]
    del group_order[:]
    runner.run(op.OP, cases=["lvis-n512"], budget=0)
    assert len(group_order) == 1


def test_on_a_gpu_a_budget_is_spent_on_compilers_last(group_order, monkeypatch):
    """What they are slow for is measured without them first, and with them where that fits."""
    monkeypatch.setattr(runner, "check_device", lambda device: None)
    monkeypatch.setattr(runner, "unavailable_reason", lambda op, provider, device: None)
    options = {"cases": ["lvis-n8192", "inat18-n8192"], "dtypes": ["float32"], "device": "cuda"}
    lines = []
    runner.run(op.OP, budget=60, log=lines.append, **options)
    (first, few), (again, more), (second, rest) = group_order
    assert (first, again, second) == ("inat18-n8192 float32", "inat18-n8192 float32", "lvis-n8192 float32")
    assert few == rest
    assert {"eager", "lt[native]", "lt[triton]", "liger"} <= set(few)
    assert set(more) - set(few) == {"compile"}
    assert lines[-1] == "left out to stay within 60 s: lvis-n8192 float32 (compile, compile-max-autotune)"
    del group_order[:]
    runner.run(op.OP, **options)
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
    times = runner.measure(steps, Leaves(), "cpu", runner.Timing(repetitions=11, seconds=0.0))
    assert {name: len(samples) for name, samples in times.items()} == {"a": 15, "b": 15, "c": 15}
    # bursts of five after one untimed repetition, in an order that rotates
    assert "".join(order[-54:]) == "".join(name * 6 for name in "abcbcacab")


def test_measure_repeats_a_slow_step_three_times_only(monkeypatch):
    clock, leaves = Clock(), Leaves()
    monkeypatch.setattr(runner, "time", clock)

    def part(seconds):
        def run():
            clock.now += seconds

        return run

    steps = {"slow": [part(1.0), part(3.0)], "fast": [part(0.001), part(0.002)]}
    times = runner.measure(steps, leaves, "cpu", runner.Timing(repetitions=20, seconds=1.0, limit=6.0))
    assert times["slow"] == [pytest.approx((1000, 3000))] * 3
    assert times["fast"] == [pytest.approx((1, 2))] * 10
    assert leaves.drops >= 13
    steps["endless"] = [part(2.0), part(4.0)]
    times = runner.measure(steps, leaves, "cpu", runner.Timing(repetitions=20, seconds=1.0, limit=6.0))
    assert times["endless"] == [pytest.approx((2000, 4000))]
    assert len(times["slow"]) == 3
    assert len(runner.measure({"endless": steps["endless"]}, leaves, "cpu", runner.Timing())["endless"]) == 1


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


def test_load_reads_the_first_schema_and_refuses_others(tmp_path):
    path = tmp_path / "old.json"
    old = {name: value for name, value in dataclasses.asdict(record()).items() if name != "static_floor_ms"}
    path.write_text(json.dumps({"schema": 1, "records": [old]}))
    assert records.load(path) == [record()]
    path.write_text(json.dumps({"schema": 3, "records": []}))
    with pytest.raises(ValueError, match=r"old.json: got schema 3, expected one of \(1, 2\)"):
        records.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"old.json: expected a results file"):
        records.load(path)


# The report

FIGURE_NAMES = [f"cpu-a-cpu-2c-margin-cross-entropy-{name}.png" for name in ("throughput", "floor", "memory", "rows")]


def test_report_writes_checks_and_notices_stale(checkout):
    pytest.importorskip("matplotlib")
    with pytest.raises(report.StaleReportError, match=r"README.md.*docs/benchmarks.md.*throughput.png"):
        report.check(checkout)
    changed = report.write(checkout)
    assert [path.name for path in changed] == ["README.md", "benchmarks.md", *FIGURE_NAMES]
    report.check(checkout)
    assert report.write(checkout) == []

    readme, docs = ((checkout / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    assert "| A CPU, 2 threads, AVX2 | 512 x 8,142 | float32 | 8 |  | **1.6** (native) | 5.0x |  | 104% |" in readme
    assert "](docs/figures/cpu-a-cpu-2c-margin-cross-entropy-throughput.png)" in readme
    assert "-memory.png" not in readme
    for name in FIGURE_NAMES:
        assert f"](figures/{name})" in docs
    assert "| inat18-n512 | float32 | faster than eager | >= 4.00x | 5.00x | yes |" in docs
    assert "| inat18-n512 | float32 | faster than compile | >= 2.00x | not yet measured |" in docs
    assert "##### Forward and backward, float32: milliseconds" in docs
    assert "| inat18-n512 | 512 x 8,142 | 8 | **1.6** | 5.0x | 5.0x | 104% |" in docs
    assert report.NOT_ON_GPU in readme
    assert readme.startswith("# Title")
    assert readme.endswith("after\n")

    path = next((checkout / report.RESULTS).glob("cpu-*/*.json"))
    records.save(path, [record(ms_median=9.0), record(provider="lt[native]", backend="native", gbps=3.0)])
    with pytest.raises(report.StaleReportError, match=r"throughput.png"):
        report.check(checkout)


def test_a_figure_is_stale_only_if_what_it_shows_changed(checkout):
    pytest.importorskip("matplotlib")
    report.write(checkout)
    path = next((checkout / report.RESULTS).glob("cpu-*/*.json"))
    found = records.load(path)
    records.save(path, [dataclasses.replace(found[0], peak_bytes=1), *found[1:]])
    assert [path.name for path in report.write(checkout)] == [
        "benchmarks.md",
        "cpu-a-cpu-2c-margin-cross-entropy-memory.png",
    ]


def test_report_removes_figures_of_results_that_are_gone(checkout):
    pytest.importorskip("matplotlib")
    report.write(checkout)
    other = checkout / report.FIGURES / "drawing.png"
    other.write_bytes(b"not ours")
    for path in report.result_files(checkout):
        path.unlink()
    with pytest.raises(report.StaleReportError, match=r"cpu-a-cpu-2c-margin-cross-entropy-memory.png"):
        report.check(checkout)
    report.write(checkout)
    report.check(checkout)
    assert list((checkout / report.FIGURES).iterdir()) == [other]
    assert "Not yet measured. " + report.NOT_ON_GPU in (checkout / "README.md").read_text()


def test_report_without_matplotlib_says_so_and_changes_nothing(checkout, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = (checkout / "README.md").read_text()
    with pytest.raises(ValueError, match=r"^.*figures need matplotlib.*pip install 'lt_kernels\[bench\]'$"):
        report.write(checkout)
    assert (checkout / "README.md").read_text() == before


def test_report_needs_its_markers(checkout):
    (checkout / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"README.md: expected one block <!-- bench:summary begin"):
        report.write(checkout)


def test_figures_show_each_provider_over_the_classes_of_its_device(checkout):
    shown = [record for path in report.result_files(checkout) for record in records.load(path)]
    throughput, floor, memory, rows = figures.figures(shown)
    (panel,) = throughput.panels
    assert panel.ticks == ["8,142 (512)", "65,536 (256)"]
    assert panel.lines == {
        "eager": [(0, 4.2), (1, 4.2)],
        "lt[native]": [(0, 20.8), (1, 20.8)],
        "copy": [(0, 20.0), (1, 20.0)],
    }
    assert floor.panels[0].lines["lt[native]"][0] == (0, pytest.approx(104))
    assert memory.panels[0].lines["eager"][0] == (0, pytest.approx(33_000_000 / 33_349_632 * 2))
    assert rows.panels[0].ticks == ["512"]
    for figure in (throughput, floor, memory, rows):
        assert "forward + backward" in figure.title
        assert "A CPU, 2 threads, AVX2" in figure.title
        assert figure.panels[0].title == "float32"


def test_gpu_results_are_reported_beside_those_of_the_cpu(checkout):
    gpu = {"device": "NVIDIA X", "device_slug": "nvidia-x", "case": "inat18-n8192", "dtype": "bfloat16"}
    gpu |= {"sizes": {"N": 8192, "C": 8142}, "static_floor_ms": 0.062}
    path = checkout / report.RESULTS / "nvidia-x" / f"{op.OP}.json"
    ours = record(**gpu, provider="lt[triton]", backend="triton", fraction_of_floor=0.5)
    records.save(path, [record(**gpu), record(**gpu, provider="liger", ms_median=9.0), ours])
    shown = [record for path in report.result_files(checkout) for record in records.load(path)]
    assert {figure.name.split("-margin")[0] for figure in figures.figures(shown)} == {
        "cpu-a-cpu-2c",
        "nvidia-x",
    }
    text = report.summary(shown, image_folder=report.FIGURES)
    assert "](docs/figures/nvidia-x-margin-cross-entropy-throughput.png)" in text
    assert "| NVIDIA X | 8,192 x 8,142 | bfloat16 | 8 |  | 9 (liger) | **8** (triton) | 1.0x |  | 50% |" in text
    assert report.NOT_ON_GPU not in text
    assert "| NVIDIA X | inat18-n8192 | bfloat16 | share of copy bandwidth | >= 85% | 50% | no |" in report.targets(
        shown
    )
    assert "| inat18-n8192 | 8,192 x 8,142 | 8 | 9 | **8** | 1.0x | 1.0x | 50% | 0.062 |" in report.tables(shown)


@pytest.fixture
def with_heads(checkout):
    """Results of both ops: the products alone, eager, torch, ours, and ours in chunks."""
    ours = {"provider": "lt[native]", "backend": "native", "ms_median": 600.0, "fraction_of_floor": 0.9333}
    chunked = {"provider": "lt-chunked", "ms_median": 640.0, "fraction_of_floor": 0.875, "peak_bytes": 73_394_790}
    torchs = {"provider": "torch-linear-ce-chunked", "ms_median": 1200.0, "fraction_of_floor": 0.4667}
    gemms = {"provider": "gemms", "ms_median": 560.0, "fraction_of_floor": 1.0, "peak_bytes": None}
    found = [head_record(**changes) for changes in (gemms, {}, torchs, ours, chunked)]
    records.save(checkout / report.RESULTS / "cpu-a-cpu-2c" / f"{head.OP}.json", found)
    return checkout


def test_report_shows_both_ops(with_heads):
    pytest.importorskip("matplotlib")
    report.write(with_heads)
    report.check(with_heads)
    readme, docs = ((with_heads / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    for text in (readme, docs):
        assert f"`{op.OP}`, forward and backward\n\n| device | logits | dtype |" in text
        assert f"`{head.OP}`, forward and backward\n\n| device | N x D x C | dtype |" in text
        assert (
            "| 512 x 2,048 x 8,142 | float32 | 700 |  | 1,200 (torch-linear-ce-chunked) | **600** (native) "
            "| 1.2x |  | 1.07x |"
        ) in text
    assert docs.index(f"#### {op.OP}") < docs.index(f"#### {head.OP}")
    assert (
        "| case | N x D x C | gemms | eager | torch-linear-ce-chunked | lt[native] | lt-chunked "
        "| vs eager | vs fastest other | x of gemms |"
    ) in docs
    assert "| 560 | 700 | 1,200 | **600** | 640 | 1.2x | 1.2x | 1.07x |" in docs
    assert f"##### {head.MEMORY}, forward and backward, float32: multiples of the logits' bytes" in docs
    assert "| inat18-n512-d2048 | 512 x 2,048 x 8,142 | 4.00 | 4.00 | 4.00 | 0.15 |" in docs
    name = "cpu-a-cpu-2c-linear-margin-cross-entropy"
    for figure in ("floor", "memory", "rows"):
        assert f"](figures/{name}-{figure}.png)" in docs
        assert (with_heads / report.FIGURES / f"{name}-{figure}.png").exists()


def expert_record(module, **changes) -> records.Record:
    fields = {"op": module.OP, "case": "inat18-e3-n512", "sizes": {"E": 3, "N": 512, "C": 8142}}
    return record(**{**fields, "direction": module.DIRECTIONS[-1], **changes})


def test_report_of_experts_divides_by_what_they_replace(checkout):
    pytest.importorskip("matplotlib")
    for module, slow in ((expert_cross_entropy, "published"), (expert_fusion, "eager")):
        ours = {"provider": "lt[native]", "backend": "native", "ms_median": 4.0, "fraction_of_floor": 0.5}
        found = [expert_record(module, provider=slow, ms_median=40.0), expert_record(module, provider="compile")]
        found += [expert_record(module, **ours)]
        if slow == "published":
            found += [expert_record(module, provider="eager", ms_median=24.0)]
            found += [expert_record(module, provider="lt-loop", ms_median=6.0)]
            found += [expert_record(module, provider="lt[native]", direction="fwd", ms_median=1.0)]
        records.save(checkout / report.RESULTS / "cpu-a-cpu-2c" / f"{module.OP}.json", found)
    report.write(checkout)
    report.check(checkout)
    docs, readme = ((checkout / name).read_text() for name in ("docs/benchmarks.md", "README.md"))
    assert "`expert_cross_entropy`, forward and backward\n\n| device | E x N x C | dtype | published |" in readme
    assert "`expert_fusion`, forward\n\n| device | E x N x C | dtype | eager |" in readme
    assert "| 3 x 512 x 8,142 | float32 | 40 | 8 | **4** (native) | 10.0x | 2.0x | 50% |" in readme
    start = "A CPU, 2 threads, AVX2 | inat18-e3-n512 | float32"
    assert f"| expert_cross_entropy | {start} | faster than published | >= 4.00x | 10.00x | yes |" in docs
    assert f"| expert_fusion | {start} | faster than eager | >= 3.00x | 10.00x | yes |" in docs
    assert "| GPU | inat18-e3-n8192 | bfloat16 | share of copy bandwidth | >= 85% | not yet measured |" in docs
    assert "vs published | vs fastest other | of copy |" in docs
    assert "##### Peak memory, forward, float32" in docs
    assert "-margin-cross-entropy-throughput.png" in readme
    for name in ("cross-entropy-floor", "cross-entropy-memory", "fusion-floor", "fusion-memory"):
        assert f"](figures/cpu-a-cpu-2c-expert-{name}.png)" in docs
    shown = [record for path in report.result_files(checkout) for record in records.load(path)]
    floor = next(one for one in figures.figures(shown) if one.title.startswith("expert_fusion, forward:"))
    assert floor.x_label == "classes C (experts E x rows N)"
    assert floor.panels[0].ticks == ["8,142 (3 x 512)"]


def test_targets_of_heads(with_heads):
    shown = [record for path in report.result_files(with_heads) for record in records.load(path)]
    text = report.targets(shown)
    start = f"| {head.OP} | A CPU, 2 threads, AVX2 | inat18-n512-d2048 | float32"
    assert f"{start} | time / gemms | <= 1.10x | 1.07x | yes |" in text
    assert f"{start} | faster than torch-linear-ce-chunked | >= 1.70x | 2.00x | yes |" in text
    assert f"{start} | lt-chunked: peak memory / logits | <= 0.25 | 0.15 | yes |" in text
    assert "| GPU | inat18-n8192-d2048 | bfloat16 | faster than fastest other | >= 1.00x | not yet measured |" in text
    slow = [dataclasses.replace(one, ms_median=900.0) if one.backend == "native" else one for one in shown]
    assert f"{start} | time / gemms | <= 1.10x | 1.61x | no |" in report.targets(slow)


@pytest.mark.parametrize(("ours", "value", "met"), [(5.0, "1.20x", "yes"), (7.0, "0.86x", "no")])
def test_target_against_every_other(ours, value, met):
    gpu = {"device": "NVIDIA X", "device_slug": "nvidia-x", "case": "inat18-n8192-d2048", "dtype": "bfloat16"}
    times = {"gemms": 4.0, "eager": 8.0, "liger": 6.0, "lt-tiled": 1.0, "lt[triton]": ours}
    found = [head_record(**gpu, provider=name, ms_median=ms) for name, ms in times.items()]
    assert f"faster than fastest other | >= 1.00x | {value} | {met} |" in report.targets(found)


def test_targets_against_the_static_floor():
    (target,) = [target for target in contrast.TARGETS if target.against == "static floor"]
    gpu = {"op": contrast.OP, "device": "NVIDIA X", "device_slug": "nvidia-x", "case": target.case}
    gpu |= {"dtype": target.dtype, "sizes": contrast.CASES[target.case].sizes}
    found = [record(**gpu, provider="dense"), record(**gpu, provider="lt[triton]", backend="triton", ms_median=0.02)]
    cells = f"{target.case} | {target.dtype} | static floor / time | >= 40% |"
    assert f"| GPU | {cells} not yet measured |  |" in report.targets(found)
    found = [dataclasses.replace(one, static_floor_ms=0.009) for one in found]
    text = report.targets(found)
    assert f"| NVIDIA X | {cells} 45% | yes |" in text
    assert f"| {target.case} | {target.dtype} | faster than dense | >= 10.00x | 400.00x | yes |" in text
    assert f"#### {contrast.OP}" in report.tables(found)
    assert figures.figures(found) == []


def test_figures_of_heads_are_ratios_to_the_products(with_heads):
    shown = [record for path in report.result_files(with_heads) for record in records.load(path)]
    floor, memory, rows = [one for one in figures.figures(shown) if head.OP in one.title]
    assert floor.panels[0].ticks == ["8,142 (512 x 2,048)"]
    assert rows.panels[0].ticks == ["512"]
    assert floor.x_label == "classes C (rows N x width D)"
    assert floor.panels[0].lines["gemms"] == [(0, 1.0)]
    assert floor.panels[0].lines["eager"] == [(0, 1.25)]
    assert "gemms" not in memory.panels[0].lines
    assert memory.panels[0].lines["lt-chunked"] == [(0, pytest.approx(0.15, abs=0.001))]


# The comparison


def timed(ours: float, eager: float = 8.0, compiled: float = 4.0, **changes) -> list[records.Record]:
    names = {"eager": eager, "compile": compiled, "lt[native]": ours}
    return [record(provider=name, ms_median=ms, **changes) for name, ms in names.items()]


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        (timed(1.0), "same"),
        (timed(1.25), "same"),
        (timed(1.4), "regression"),
        (timed(1.4, eager=16.0), "same"),  # one reference was slow too: noise
        (timed(2.0, eager=16.0, compiled=8.0), "same"),  # a slower day
        (timed(0.5), "faster"),
    ],
    ids=["equal", "within", "slower", "noisy-reference", "slower-machine", "faster"],
)
def test_compare_judges_ratios(now, verdict):
    (one,) = compare.compare(timed(1.0), now)
    assert one.verdict == verdict
    assert one.ratios["eager"] == (pytest.approx(1 / 8), pytest.approx(now[2].ms_median / now[0].ms_median))
    assert verdict in compare.table([one])
    (lenient,) = compare.compare(timed(1.0), now, tolerance=1.0)
    assert lenient.verdict == "same"


def test_compare_takes_what_both_have_in_the_order_of_the_first():
    wide = {"case": "c65536-n256"}
    before = [*timed(1.0, **wide), *timed(1.0), *timed(1.0, dtype="bfloat16")]
    now = [*timed(1.0), *timed(1.0, **wide)[1:], record(case="lvis-n512")]
    found = compare.compare(before, now)
    assert [(one.case, one.dtype) for one in found] == [("c65536-n256", "float32"), ("inat18-n512", "float32")]
    assert list(found[0].ratios) == ["compile"]


def test_compare_divides_heads_by_their_products():
    def run(ours):
        times = {"gemms": 560.0, "eager": 700.0, "compile": 690.0, "lt[native]": ours, "lt-chunked": 640.0}
        return [head_record(provider=name, ms_median=ms) for name, ms in times.items()]

    (one,) = compare.compare(run(600.0), run(900.0))
    assert one.verdict == "regression"
    assert {name: after for name, (_, after) in one.ratios.items()} == {
        "eager": pytest.approx(900 / 700),
        "gemms": pytest.approx(900 / 560),
    }
    both = compare.table([*compare.compare(timed(1.0), timed(1.0)), one])
    assert both.index(op.OP) < both.index("/compile") < both.index(head.OP) < both.index("/gemms")


@pytest.fixture
def results(tmp_path):
    records.save(tmp_path / "cpu-another-4c" / f"{op.OP}.json", timed(1.0))
    return tmp_path


def test_compare_now_measures_a_suspect_twice(results, monkeypatch):
    lines, runs = [], []
    times = iter([2.0, 1.1])

    def run(name, **options):
        runs.append(options)
        return timed(next(times))

    monkeypatch.setattr(compare, "run", run)
    (one,) = compare.compare_now(results, "cpu", 0.3, lines.append, seconds=0.5)
    assert one.verdict == "same"
    assert one.ratios["eager"] == (pytest.approx(1 / 8), pytest.approx(1.1 / 8))
    assert runs[0]["cases"] == op.COMPARE_CASES
    assert runs[1]["cases"] == ["inat18-n512"]
    assert runs[0]["seconds"] == 0.5
    assert any("comparing with those of cpu-another-4c" in line for line in lines)
    assert "measured once more: inat18-n512" in lines


def test_compare_now_prefers_the_results_of_this_device(results, monkeypatch):
    lines = []
    records.save(results / records.device_slug("cpu") / f"{op.OP}.json", timed(2.0))
    monkeypatch.setattr(compare, "run", lambda name, **options: timed(2.0))
    (one,) = compare.compare_now(results, "cpu", 0.3, lines.append)
    assert one.ratios["eager"] == (pytest.approx(1 / 4), pytest.approx(1 / 4))
    assert lines == [
        f"without {name}: it has no committed results of a cpu device" for name in runner.OPS if name != op.OP
    ]


def test_compare_now_needs_results(tmp_path):
    with pytest.raises(ValueError, match="no committed results of a cpu device"):
        compare.compare_now(tmp_path, "cpu", 0.3, print)
