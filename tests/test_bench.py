"""Benchmarks: cases, records, the agreement check, the runner, and the report with its staleness check."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lt_kernels.bench import cases, records, report, runner
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


@pytest.fixture
def checkout(tmp_path):
    """A folder with the documents that the report writes, and results of two providers."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(MARKERS.format(block("summary")))
    (tmp_path / "docs/benchmarks.md").write_text(
        MARKERS.format("\n\n".join(map(block, ("summary", "targets", "tables"))))
    )
    path = tmp_path / report.RESULTS / "cpu-a-cpu-2c" / f"{op.OP}.json"
    ours = record(provider="lt[native]", backend="native", ms_median=1.6, gbps=20.8, fraction_of_floor=1.04)
    records.save(path, [record(), ours])
    compiled = tmp_path / report.RESULTS / "aot" / path.name  # no measurements: the ahead-of-time gate's table
    compiled.parent.mkdir()
    compiled.write_text("{}")
    return tmp_path


@pytest.mark.parametrize("case", op.CASES.values(), ids=lambda case: case.name)
def test_case_counts_fit_and_are_long_tailed(case: cases.Case):
    counts = case.class_counts()
    assert counts.shape == (case.classes,)
    assert counts.min() >= 1
    assert counts.max() > counts.min()
    assert case.log_prior().exp().sum().item() == pytest.approx(1)


def test_cases_cover_the_targets_and_the_headline():
    for name in (*op.HEADLINE_CASES, *(target.case for target in op.TARGETS)):
        assert name in op.CASES
    for target in op.TARGETS:
        assert target.device in op.CASES[target.case].devices
        assert target.against in ("floor", *op.PROVIDERS)


@pytest.mark.parametrize(("direction", "factor"), [("fwd", 1), ("bwd", 2), ("fwd_bwd", 2)])
def test_cost_counts_each_logit_once_per_pass(direction, factor):
    case = cases.Case("c", 7, 123)
    bytes_moved, flops = op.cost(case, torch.bfloat16, direction)
    assert bytes_moved == factor * 7 * 123 * 2
    assert flops % (7 * 123) == 0


def test_agreement_check_rejects_a_wrong_provider(monkeypatch):
    inputs = op.make_inputs(op.CASES["odd-7x123"], torch.float32, "cpu")
    op.check_agreement("lt[reference]", inputs)
    right = op.make_step
    monkeypatch.setattr(
        op, "make_step", lambda name, values: lambda: right(name, values)() * (1.01 if name == "lt[native]" else 1.0)
    )
    with pytest.raises(AssertionError, match="lt\\[native\\] loss"):
        op.check_agreement("lt[native]", inputs)


def test_run_makes_complete_records():
    providers = ["eager", "lt[reference]"]
    found = runner.run(
        op.OP,
        cases=["odd-7x123"],
        providers=providers,
        dtypes=["float32"],
        directions=list(runner.DIRECTIONS),
        repetitions=3,
        seconds=0.0,
    )
    assert [(r.direction, r.provider) for r in found] == [(d, p) for d in runner.DIRECTIONS for p in providers]
    for r in found:
        assert r.repetitions == 3
        assert 0 < r.ms_p20 <= r.ms_median <= r.ms_p80
        assert r.gbps == pytest.approx(r.bytes_moved / r.ms_median / 1e6, rel=1e-3)
        assert r.fraction_of_floor == pytest.approx(r.gbps / r.copy_gbps, rel=1e-3)
        assert r.sizes == {"N": 7, "C": 123}
        assert r.device_slug.startswith("cpu-")
        assert r.versions["torch"] == torch.__version__
    eager = found[runner.DIRECTIONS.index("fwd_bwd") * len(providers)]
    assert eager.peak_bytes is None or eager.peak_bytes >= 7 * 123 * 4


def test_measure_takes_turns():
    order = []
    steps = {name: (lambda: None, lambda _, name=name: order.append(name)) for name in "abc"}
    times = runner.measure(steps, "cpu", repetitions=11, seconds=0.0)
    assert {name: len(samples) for name, samples in times.items()} == {"a": 15, "b": 15, "c": 15}
    # bursts of five after one untimed repetition, in an order that rotates
    assert "".join(order[-54:]) == "".join(name * 6 for name in "abcbcacab")


def test_save_replaces_whole_groups_only(tmp_path):
    path = tmp_path / "results" / "out.json"
    bf16 = record(dtype="bfloat16")
    records.save(path, [record(), record(provider="compile"), bf16])
    faster = record(ms_median=4.0)
    records.save(path, [faster])
    assert records.load(path) == [bf16, faster]
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert set(content["records"][0]) == {field.name for field in dataclasses.fields(records.Record)}


def test_report_writes_checks_and_notices_stale(checkout):
    with pytest.raises(report.StaleReportError, match=r"README.md.*docs/benchmarks.md.*throughput.png"):
        report.check(checkout)
    changed = report.write(checkout)
    assert [path.name for path in changed] == ["README.md", "benchmarks.md", "throughput.png"]
    report.check(checkout)
    assert report.write(checkout) == []

    readme, docs = ((checkout / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    assert "| A CPU, 2 threads, AVX2 | 512 x 8,142 | float32 | 8 |  | **1.6** (native) | 5.0x |  | 104% |" in readme
    assert "](docs/figures/throughput.png)" in readme
    assert "](figures/throughput.png)" in docs
    assert "| inat18-n512 | float32 | eager | 4x | 5.00x | yes |" in docs
    assert "| inat18-n512 | float32 | compile | 2x | not yet measured |" in docs
    assert report.NOT_ON_GPU in readme
    assert readme.startswith("# Title")
    assert readme.endswith("after\n")

    path = next((checkout / report.RESULTS).glob("*/*.json"))
    records.save(path, [record(ms_median=9.0), record(provider="lt[native]", backend="native", ms_median=3.0)])
    with pytest.raises(report.StaleReportError, match=r"throughput.png"):
        report.check(checkout)


def test_report_without_results_says_so(checkout):
    for path in report.result_files(checkout):
        path.unlink()
    report.write(checkout)
    report.check(checkout)
    assert "Not yet measured. " + report.NOT_ON_GPU in (checkout / "README.md").read_text()
    assert not (checkout / report.FIGURE).exists()


def test_report_needs_its_markers(checkout):
    (checkout / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"README.md: expected one block <!-- bench:summary begin"):
        report.write(checkout)


def test_gpu_results_are_reported_beside_those_of_the_cpu(checkout):
    gpu = {"device": "NVIDIA X", "device_slug": "nvidia-x", "case": "inat18-n8192", "dtype": "bfloat16"}
    gpu |= {"sizes": {"N": 8192, "C": 8142}}
    path = checkout / report.RESULTS / "nvidia-x" / f"{op.OP}.json"
    records.save(path, [record(**gpu), record(**gpu, provider="lt[triton]", backend="triton", fraction_of_floor=0.5)])
    report.write(checkout)
    docs = (checkout / "docs/benchmarks.md").read_text()
    assert report.NOT_ON_GPU not in docs
    assert "| NVIDIA X | inat18-n8192 | bfloat16 | copy bandwidth | 85% | 50% | no |" in docs
