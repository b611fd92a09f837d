"""The publishing part of the benchmarks: figures, the report and its staleness, where rows come from, the comparison.

``op`` is the op on logits in memory, ``head`` the linear one, ``balpoe`` and ``fusion`` are those of experts,
``contrast`` is the one of contrastive losses.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_records import head_record, record

from lt_kernels.bench import records
from lt_kernels.bench.cases import counts_digest
from lt_kernels.bench.ops import OPS

sys.path[:0] = [str(Path(__file__).parent.parent / "benchmarks")]
compare, figures, provenance, report = map(importlib.import_module, ("compare", "figures", "provenance", "report"))
op, head, balpoe, _, fusion, contrast = OPS.values()

MARKERS = "# Title\n\n{}\n\nafter\n"


def block(name: str) -> str:
    return f"<!-- bench:{name} begin -->\n<!-- bench:{name} end -->"


@pytest.fixture
def checkout(tmp_path):
    """A folder with the documents that the report writes, and results of two providers on two cases."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(MARKERS.format(block("summary")))
    (tmp_path / "docs/benchmarks.md").write_text(
        MARKERS.format("\n\n".join(map(block, ("summary", "targets", "figures"))))
    )
    path = tmp_path / records.RESULTS / "cpu-a-cpu-2c" / f"{op.name}.json"
    ours = record(provider="lt[native]", backend="native", ms_median=1.6, gbps=20.8, fraction_of_floor=1.04)
    wide = {"case": "c65536-n256", "sizes": {"N": 256, "C": 65536}}
    records.save(path, [record(), ours, record(**wide), dataclasses.replace(ours, **wide)])
    compiled = tmp_path / records.RESULTS / "aot" / path.name  # no measurements: the ahead-of-time gate's table
    compiled.parent.mkdir(exist_ok=True)
    compiled.write_text("{}")
    return tmp_path


def then(record) -> str:
    return "then"


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """Files with the digest of a figure, which is not drawn."""

    def stand_in(figure, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"Shown-SHA256\0" + figure.digest.encode())

    monkeypatch.setattr(report, "draw", stand_in)


def test_a_drawn_figure_carries_its_digest(checkout):
    pytest.importorskip("matplotlib")
    figure = figures.figures(report._load_all(checkout))[0]
    figures.draw(figure, checkout / "one.png")
    assert (checkout / "one.png").read_bytes().startswith(b"\x89PNG")
    assert figures.stored_digest(checkout / "one.png") == figure.digest


# The report

FIGURE_NAMES = [f"cpu-a-cpu-2c-margin-cross-entropy-{name}.png" for name in ("throughput", "floor", "memory", "rows")]


def test_report_writes_checks_and_notices_stale(checkout):
    with pytest.raises(report.StaleReportError, match=r"README.md.*docs/benchmarks.md.*throughput.png"):
        report.check(checkout)
    changed = report.write(checkout)
    assert [path.name for path in changed] == ["README.md", "benchmarks.md", *FIGURE_NAMES]
    report.check(checkout)
    assert report.write(checkout) == []

    readme, docs = ((checkout / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    assert (
        "| A CPU, 2 threads, AVX2 | 512 x 8,142 | float32 | 8 |  | **1.6** (native) | 5.0x |  | 104% | revision 0"
        in readme
    )
    assert "](docs/figures/cpu-a-cpu-2c-margin-cross-entropy-throughput.png)" in readme
    assert "-memory.png" not in readme
    for name in FIGURE_NAMES:
        assert f"](figures/{name})" in docs
    assert "| inat18-n512 | float32 | faster than eager | >= 5.00x | 5.00x | yes |" in docs
    assert "| inat18-n512 | float32 | faster than compile | >= 2.50x | not yet measured |" in docs
    assert report.NOT_ON_GPU in readme
    assert readme.startswith("# Title")
    assert readme.endswith("after\n")

    path = next((checkout / records.RESULTS).glob("cpu-*/*.json"))
    records.save(path, [record(ms_median=9.0), record(provider="lt[native]", backend="native", gbps=3.0)])
    with pytest.raises(report.StaleReportError, match=r"throughput.png"):
        report.check(checkout)


def test_a_figure_is_stale_only_if_what_it_shows_changed(checkout):
    report.write(checkout)
    path = next((checkout / records.RESULTS).glob("cpu-*/*.json"))
    found = records.load(path)
    records.save(path, [dataclasses.replace(found[0], peak_bytes=1), *found[1:]])
    assert [path.name for path in report.write(checkout)] == ["cpu-a-cpu-2c-margin-cross-entropy-memory.png"]


def test_report_removes_figures_of_results_that_are_gone(checkout):
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
    monkeypatch.setattr(report, "draw", figures.draw)
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
    shown = report._load_all(checkout)
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


def test_time_per_call_has_a_panel_for_each_number_of_classes(checkout):
    path = checkout / records.RESULTS / "cpu-a-cpu-2c" / f"{op.name}.json"
    sizes = {"n8-c10": (8, 10), "n64-c10": (64, 10), "n8-c8142": (8, 8142)}
    small = [record(case=case, sizes=dict(zip("NC", size, strict=True))) for case, size in sizes.items()]
    records.save(path, [*small, record(case="n8-c10", sizes={"N": 8, "C": 10}, dtype="bfloat16")])
    gpu = {"device": "NVIDIA X", "device_slug": "nvidia-x", "case": "n8-c10", "sizes": {"N": 8, "C": 10}}
    clocks = [
        record(**gpu, clock=clock, ms_median=ms) for clock, ms in (("device", 1.0), ("wall", 2.0), ("graph", 3.0))
    ]
    for one in clocks:  # a group each
        records.save(checkout / records.RESULTS / "nvidia-x" / f"{op.name}.json", [one])
    shown = report._load_all(checkout)
    assert [one for one in shown if one.device_slug == "nvidia-x"] == clocks
    calls, on_gpu = [one for one in figures.figures(shown) if one.name.endswith("-calls.png")]
    assert [(panel.title, panel.ticks, panel.lines) for panel in calls.panels] == [
        ("10 classes", ["8", "64"], {"eager": [(0, 8000.0), (1, 8000.0)]}),
        ("8,142 classes", ["8"], {"eager": [(0, 8000.0)]}),
    ]
    assert [panel.lines for panel in on_gpu.panels] == [{"eager": [(0, 2000.0)]}]  # the host's time counts
    rows = next(one for one in figures.figures(shown) if one.name.endswith("-rows.png"))
    assert rows.panels[0].ticks == ["512"]
    assert "n8-c10 | float32 | time / eager | <= 1.30x | not yet measured" in report.targets(clocks, then)


def test_gpu_results_are_reported_beside_those_of_the_cpu(checkout):
    gpu = {"device": "NVIDIA X", "device_slug": "nvidia-x", "case": "inat18-n8192", "dtype": "bfloat16"}
    gpu |= {"sizes": {"N": 8192, "C": 8142}, "static_floor_ms": 0.062}
    path = checkout / records.RESULTS / "nvidia-x" / f"{op.name}.json"
    ours = record(**gpu, provider="lt[triton]", backend="triton", fraction_of_floor=0.5)
    records.save(path, [record(**gpu), record(**gpu, provider="liger", ms_median=9.0), ours])
    shown = report._load_all(checkout)
    assert {figure.name.split("-margin")[0] for figure in figures.figures(shown)} == {
        "cpu-a-cpu-2c",
        "nvidia-x",
    }
    text = report.summary(shown, then, image_folder=report.FIGURES)
    assert "](docs/figures/nvidia-x-margin-cross-entropy-throughput.png)" in text
    assert "| NVIDIA X | 8,192 x 8,142 | bfloat16 | 8 |  | 9 (liger) | **8** (triton) | 1.0x |  | 50% | then |" in text
    assert report.NOT_ON_GPU not in text
    assert (
        "| NVIDIA X | inat18-n8192 | bfloat16 | share of copy bandwidth | >= 85% | 50% | no | then |"
        in report.targets(shown, then)
    )


@pytest.fixture
def with_heads(checkout):
    """Results of both ops: the products alone, eager, torch, ours, and ours in chunks."""
    ours = {"provider": "lt[native]", "backend": "native", "ms_median": 600.0, "fraction_of_floor": 0.9333}
    chunked = {"provider": "lt-chunked", "ms_median": 640.0, "fraction_of_floor": 0.875, "peak_bytes": 73_394_790}
    torchs = {"provider": "torch-linear-ce-chunked", "ms_median": 1200.0, "fraction_of_floor": 0.4667}
    gemms = {"provider": "gemms", "ms_median": 560.0, "fraction_of_floor": 1.0, "peak_bytes": None}
    found = [head_record(**changes) for changes in (gemms, {}, torchs, ours, chunked)]
    records.save(checkout / records.RESULTS / "cpu-a-cpu-2c" / f"{head.name}.json", found)
    return checkout


def test_report_shows_both_ops(with_heads):
    report.write(with_heads)
    report.check(with_heads)
    readme, docs = ((with_heads / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    for text in (readme, docs):
        assert f"`{op.name}`, forward and backward\n\n| device | logits | dtype |" in text
        assert f"`{head.name}`, forward and backward\n\n| device | N x D x C | dtype |" in text
        assert (
            "| 512 x 2,048 x 8,142 | float32 | 700 |  | 1,200 (torch-linear-ce-chunked) | **600** (native) "
            "| 1.2x |  | 1.07x | revision 0"
        ) in text
    assert docs.index(f"`{op.name}`") < docs.index(f"`{head.name}`")
    name = "cpu-a-cpu-2c-linear-margin-cross-entropy"
    for figure in ("floor", "memory", "rows"):
        assert f"](figures/{name}-{figure}.png)" in docs
        assert (with_heads / report.FIGURES / f"{name}-{figure}.png").exists()


def expert_record(module, **changes) -> records.Record:
    fields = {"op": module.name, "case": "inat18-e3-n512", "sizes": {"E": 3, "N": 512, "C": 8142}}
    return record(**{**fields, "direction": module.directions[-1], **changes})


def test_report_of_experts_divides_by_the_fastest_eager_form(checkout):
    for module, slow in ((balpoe, "published"), (fusion, "eager")):
        ours = {"provider": "lt[native]", "backend": "native", "ms_median": 4.0, "fraction_of_floor": 0.5}
        found = [expert_record(module, provider=slow, ms_median=40.0), expert_record(module, provider="compile")]
        found += [expert_record(module, **ours)]
        if slow == "published":
            found += [expert_record(module, provider="eager", ms_median=24.0)]
            found += [expert_record(module, provider="lt-loop", ms_median=6.0)]
            found += [expert_record(module, provider="lt[native]", direction="fwd", ms_median=1.0)]
        records.save(checkout / records.RESULTS / "cpu-a-cpu-2c" / f"{module.name}.json", found)
    report.write(checkout)
    report.check(checkout)
    docs, readme = ((checkout / name).read_text() for name in ("docs/benchmarks.md", "README.md"))
    assert "`expert_cross_entropy`, forward and backward\n\n| device | E x N x C | dtype | eager |" in readme
    assert "`expert_fusion`, forward\n\n| device | E x N x C | dtype | eager |" in readme
    assert "| 3 x 512 x 8,142 | float32 | 24 | 8 | **4** (native) | 6.0x | 2.0x | 50% | revision 0" in readme
    assert "| 3 x 512 x 8,142 | float32 | 40 | 8 | **4** (native) | 10.0x | 2.0x | 50% | revision 0" in readme
    start = "A CPU, 2 threads, AVX2 | inat18-e3-n512 | float32"
    assert f"| expert_cross_entropy | {start} | faster than published | >= 4.00x | 10.00x | yes | revision 0" in docs
    assert f"| expert_fusion | {start} | faster than eager | >= 3.00x | 10.00x | yes | revision 0" in docs
    assert "| GPU | inat18-e3-n8192 | bfloat16 | share of copy bandwidth | >= 85% | not yet measured |" in docs
    assert "-margin-cross-entropy-throughput.png" in readme
    for name in ("cross-entropy-floor", "cross-entropy-memory", "fusion-floor", "fusion-memory"):
        assert f"](figures/cpu-a-cpu-2c-expert-{name}.png)" in docs
    shown = report._load_all(checkout)
    floor = next(one for one in figures.figures(shown) if one.title.startswith("expert_fusion, forward:"))
    assert floor.x_label == "classes C (experts E x rows N)"
    assert floor.panels[0].ticks == ["8,142 (3 x 512)"]


def test_targets_of_heads(with_heads):
    shown = report._load_all(with_heads)
    text = report.targets(shown, then)
    start = f"| {head.name} | A CPU, 2 threads, AVX2 | inat18-n512-d2048 | float32"
    assert f"{start} | time / gemms | <= 1.10x | 1.07x | yes |" in text
    assert f"{start} | faster than torch-linear-ce-chunked | >= 1.70x | 2.00x | yes |" in text
    assert f"{start} | lt-chunked: peak memory / logits | <= 0.25 | 0.15 | yes |" in text
    assert "| GPU | inat18-n8192-d2048 | bfloat16 | faster than fastest other | >= 1.00x | not yet measured |" in text
    slow = [dataclasses.replace(one, ms_median=900.0) if one.backend == "native" else one for one in shown]
    assert f"{start} | time / gemms | <= 1.10x | 1.61x | no |" in report.targets(slow, then)


@pytest.mark.parametrize(("ours", "value", "met"), [(5.0, "1.20x", "yes"), (7.0, "0.86x", "no")])
def test_target_against_every_other(ours, value, met):
    gpu = {"device": "NVIDIA X", "device_slug": "nvidia-x", "case": "inat18-n8192-d2048", "dtype": "bfloat16"}
    times = {"gemms": 4.0, "eager": 8.0, "liger": 6.0, "lt-tiled": 1.0, "lt[triton]": ours}
    found = [head_record(**gpu, provider=name, ms_median=ms) for name, ms in times.items()]
    assert f"faster than fastest other | >= 1.00x | {value} | {met} |" in report.targets(found, then)


def test_targets_against_the_static_floor():
    (target,) = [target for target in contrast.targets if target.against == "static floor"]
    gpu = {"op": contrast.name, "device": "NVIDIA X", "device_slug": "nvidia-x", "case": target.case}
    gpu |= {"dtype": target.dtype, "sizes": contrast.cases[target.case].sizes}
    found = [record(**gpu, provider="dense"), record(**gpu, provider="lt[triton]", backend="triton", ms_median=0.02)]
    cells = f"{target.case} | {target.dtype} | static floor / time | >= 40% |"
    assert f"| GPU | {cells} not yet measured |  |  |" in report.targets(found, then)
    found = [dataclasses.replace(one, static_floor_ms=0.009) for one in found]
    text = report.targets(found, then)
    assert f"| NVIDIA X | {cells} 45% | yes |" in text
    assert f"| {target.case} | {target.dtype} | faster than dense | >= 10.00x | 400.00x | yes |" in text
    assert figures.figures(found) == []


def test_figures_of_heads_are_ratios_to_the_products(with_heads):
    shown = report._load_all(with_heads)
    floor, memory, rows = [one for one in figures.figures(shown) if head.name in one.title]
    assert floor.panels[0].ticks == ["8,142 (512 x 2,048)"]
    assert rows.panels[0].ticks == ["512"]
    assert floor.x_label == "classes C (rows N x width D)"
    assert floor.panels[0].lines["gemms"] == [(0, 1.0)]
    assert floor.panels[0].lines["eager"] == [(0, 1.25)]
    assert "gemms" not in memory.panels[0].lines
    assert memory.panels[0].lines["eager"] == [(0, pytest.approx(4.0))]
    assert memory.panels[0].lines["lt-chunked"] == [(0, pytest.approx(0.15, abs=0.001))]


# Where a row comes from

KERNEL = "// a comment\nvoid rows(float* x) { x[0] = 1.0f; }\n"
CASE = "plain, C 1000, float32"


def machine_code(registers: int = 40, **changes) -> dict:
    facts = {"registers": registers, "stack": 0, "spills": 0}
    return {"case": CASE, "kernel": "_rows_kernel", "num_warps": 4, "sm_90": facts, "budget": 20.0, **changes}


class Checkout:
    """A repository with the sources and the machine code of one op, and what it takes to change them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write_code(machine_code())
        self.write("csrc/rows.h", "#pragma once\nfloat one();\n")
        self.write(f"csrc/{op.name}/cpu.cpp", f'#include "../rows.h"\n{KERNEL}')
        self.write(f"csrc/{op.name}/cuda.cu", KERNEL)
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git(
            "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=1", date="2026-01-02T03:04:05Z"
        )
        self.revision = self.git("rev-parse", "--short=12", "HEAD").strip()

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def write_code(self, *rows: dict) -> None:
        self.write(f"{records.RESULTS}/aot/{op.name}.json", json.dumps({"triton": "3.7.1", "rows": rows}))

    def git(self, *arguments: str, date: str = "") -> str:
        environment = {**os.environ, **({"GIT_COMMITTER_DATE": date} if date else {})}
        command = ["git", "-C", str(self.root), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def origins(self, *found: records.Record) -> list[str]:
        """What rows say after the revisions of ``found`` have been published."""
        self.write(str(provenance.REVISIONS), provenance.text_of(provenance.complete(self.root, found)))
        describe = provenance.Origins(self.root, provenance.load(self.root)).describe
        return [describe(one) for one in found]


@pytest.fixture
def repository(tmp_path):
    return Checkout(tmp_path)


def measured(revision: str | None, **changes) -> records.Record:
    changes = {"provider": "lt[native]", "backend": "native", "date": "2026-01-03", **changes}
    return record(**changes, git=revision)


def on_a_gpu(revision: str | None, backend: str = "triton") -> records.Record:
    versions = {"torch": "2.13.0", "triton": "3.7.1"}
    return measured(revision, provider=f"lt[{backend}]", backend=backend, device_slug="nvidia-x", versions=versions)


def test_a_row_tells_date_revision_and_versions(repository):
    revision = repository.revision
    old, dirty, unknown = measured(revision, date=None), measured(f"{revision}-dirty"), measured("0" * 12)
    assert repository.origins(measured(revision), on_a_gpu(revision), old, dirty, unknown, measured(None)) == [
        f"2026-01-03, revision {revision}, torch 2.13.0",
        f"2026-01-03, revision {revision}, torch 2.13.0, triton 3.7.1",
        f"revision {revision} of 2026-01-02, torch 2.13.0",
        f"2026-01-03, revision {revision}-dirty, torch 2.13.0",
        "2026-01-03, revision 000000000000, torch 2.13.0; kernels not compared",
        "2026-01-03, revision unknown, torch 2.13.0; kernels not compared",
    ]
    assert repository.origins(record(git=revision)) == [f"revision {revision}, torch 2.13.0"]  # eager has no kernels


def test_a_row_tells_that_its_class_counts_have_changed(repository):
    today = f"inat18_like {counts_digest('inat18_like')}"
    assert repository.origins(
        *(record(git=None, class_counts=name) for name in (None, "exponential profile", today, "inat18_like 0123")),
        measured("0" * 12, class_counts="inat18_like 0123"),
    ) == [
        *["revision unknown, torch 2.13.0"] * 3,
        "revision unknown, torch 2.13.0; other inat18_like counts then",
        "2026-01-03, revision 000000000000, torch 2.13.0; kernels not compared; other inat18_like counts then",
    ]


def verdicts(repository) -> list[str]:
    """Return the verdicts on the kernels of the CPU, of CUDA and of Triton."""
    rows = [measured(repository.revision), on_a_gpu(repository.revision, "native"), on_a_gpu(repository.revision)]
    return [origin.partition("; ")[2] for origin in repository.origins(*rows)]


def test_a_row_tells_that_its_sources_have_changed(repository):
    assert verdicts(repository) == ["", "", ""]
    (repository.root / "csrc/rows.h").rename(repository.root / f"csrc/{op.name}/moved.h")
    moved = f'#include "moved.h"\n{KERNEL.replace("a comment", "another")}  // more\n'
    repository.write(f"csrc/{op.name}/cpu.cpp", moved.replace("{ ", "{\n    "))
    assert verdicts(repository) == ["", "", ""]
    repository.write(f"csrc/{op.name}/moved.h", "float two();\n")
    assert verdicts(repository) == ["csrc changed since", "", ""]
    repository.write(f"csrc/{op.name}/cuda.cu", KERNEL.replace("1.0f", "2.0f"))
    assert verdicts(repository) == ["csrc changed since", "csrc changed since", ""]


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([machine_code(kernel="margin_cross_entropy_rows_kernel", hash="0123", budget=21.0)], ""),
        ([machine_code(), machine_code(50, case="a new case")], ""),
        ([machine_code(41)], "kernels changed since"),
        ([machine_code(), machine_code()], "kernels changed since"),
        ([machine_code(case="another case")], "kernels changed since"),
    ],
    ids=["renamed", "new-case", "other-code", "two-kernels", "gone"],
)
def test_a_row_tells_that_its_machine_code_has_changed(repository, rows, verdict):
    repository.write_code(*rows)
    assert verdicts(repository) == ["", "", verdict]


def test_the_check_says_the_same_without_git(repository, checkout, monkeypatch):
    """A copy without history, as CI or an sdist may be: what git knew is in revisions.json."""
    path = checkout / records.RESULTS / "cpu-a-cpu-2c" / f"{op.name}.json"
    records.save(path, [measured(repository.revision)])
    report.write(checkout)
    assert f"revision {repository.revision}, torch 2.13.0 |" in (checkout / "README.md").read_text()
    monkeypatch.setattr(subprocess, "run", None)
    report.check(checkout)
    repository.write(f"csrc/{op.name}/cpu.cpp", "void other();\n")
    with pytest.raises(report.StaleReportError, match="README.md"):
        report.check(checkout)


def test_revisions_keep_what_git_no_longer_knows_and_drop_what_nothing_was_measured_at(repository):
    row = measured(repository.revision)
    repository.origins(row)
    (repository.root / ".git").rename(repository.root / "gone")
    assert repository.origins(row) == [f"2026-01-03, revision {repository.revision}, torch 2.13.0"]
    assert list(provenance.load(repository.root)) == [repository.revision]
    repository.origins(measured("0" * 12))
    assert provenance.load(repository.root) == {}


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
    assert both.index(op.name) < both.index("/compile") < both.index(head.name) < both.index("/gemms")


@pytest.fixture
def results(tmp_path):
    records.save(tmp_path / "cpu-another-4c" / f"{op.name}.json", timed(1.0))
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
    assert runs[0]["cases"] == op.compare_cases
    assert runs[1]["cases"] == ["inat18-n512"]
    assert runs[0]["seconds"] == 0.5
    assert any("comparing with those of cpu-another-4c" in line for line in lines)
    assert "measured once more: inat18-n512" in lines


def test_compare_now_prefers_the_results_of_this_device(results, monkeypatch):
    lines = []
    records.save(results / records.device_slug("cpu") / f"{op.name}.json", timed(2.0))
    monkeypatch.setattr(compare, "run", lambda name, **options: timed(2.0))
    (one,) = compare.compare_now(results, "cpu", 0.3, lines.append)
    assert one.ratios["eager"] == (pytest.approx(1 / 4), pytest.approx(1 / 4))
    assert lines == [f"without {name}: it has no committed results of a cpu device" for name in OPS if name != op.name]


def test_compare_now_needs_results(tmp_path):
    with pytest.raises(ValueError, match="no committed results of a cpu device"):
        compare.compare_now(tmp_path, "cpu", 0.3, print)


# The command lines


def run(capsys, module, *argv: str) -> tuple[int, str, str]:
    status = module.main(argv)
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("report", ["--root", "/"], ["report: ", "run this in a checkout"]),
        ("compare", ["--root", "/"], ["compare: ", "run this in a checkout"]),
        ("compare", ["--tolerance", "0"], ["--tolerance: got 0.0", "above 0"]),
        ("compare", ["one.json"], ["got 1 file, expected two"]),
        ("compare", ["a.json", "b.json"], ["a.json"]),
        ("compare", ["--device", "tpu"], ["unknown device 'tpu'", "cuda"]),
        ("compare", ["--device", "cuda"], ["no CUDA device is available"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_arguments_are_said_on_a_line(capsys, monkeypatch, name, argv, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(Path(__file__).parent.parent)
    status, _, err = run(capsys, {"report": report, "compare": compare}[name], *argv)
    assert status == 2
    assert all(word in err for word in words)


def test_report_check_fails_until_it_is_written(capsys, checkout):
    argv = ["--root", str(checkout)]
    status, _, err = run(capsys, report, *argv, "--check")
    assert status == 1
    assert "run `python benchmarks/report.py`" in err
    status, out, _ = run(capsys, report, *argv)
    assert status == 0
    assert f"wrote {checkout / 'README.md'}" in out
    assert report.NOT_ON_GPU in out
    assert run(capsys, report, *argv, "--check")[0] == 0


def test_compare_of_two_files_fails_on_a_regression(capsys, tmp_path):
    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    records.save(Path(before), timed(1.0))
    records.save(Path(after), timed(2.0))
    status, out, _ = run(capsys, compare, before, after)
    assert status == 1
    assert "1 of 1 are regressions" in out
    assert run(capsys, compare, before, after, "--tolerance", "1.5")[0] == 0
    status, out, _ = run(capsys, compare, before, before)
    assert status == 0
    assert "no regression" in out
