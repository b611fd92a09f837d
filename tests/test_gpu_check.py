"""The GPU check without a GPU: limited runs of pytest, control flow on stand-ins, the reading of ncu's output."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tools")]
gpu_check, gpu_counters, limited_run = map(importlib.import_module, ("gpu_check", "gpu_counters", "limited_run"))

# -------------------------------------------------------------------------------------------------------- limited runs


def limited(folder: Path, tests: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run tests with the plugin; return the process and its record."""
    (folder / "test_odd.py").write_text(textwrap.dedent(tests))
    (folder / "pytest.ini").write_text("[pytest]\n")
    results = folder / "results.json"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "limited_run"]
    done = subprocess.run(
        [*command, "--results", str(results), *arguments, "test_odd.py"],
        cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    return done, json.loads(results.read_text()) if results.exists() else {}


ODD = """
    import os, time
    import pytest

    def test_good(): pass
    def test_wrong(): assert 1 == 2
    def test_skipped(): pytest.skip("no reason")
    def test_another(): pass
"""


def names(states: dict[str, str]) -> set[str]:
    return {name.rpartition("::")[2] for name in states}


@pytest.mark.parametrize("processes", [0, 2])
def test_tests_that_fail_hang_or_end_their_process_fail_alone(processes, tmp_path):
    broken = """
    def test_ends(): os._exit(3)
    def test_hangs(): time.sleep(1000)
    """
    arguments = ["--numprocesses", "2", "--seconds-per-test", "4"] if processes else []
    done, record = limited(tmp_path, ODD + (broken if processes else ""), *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert names(record["failed"]) == {"test_wrong", *(("test_ends", "test_hangs") if processes else ())}
    assert "assert 1 == 2" in next(message for name, message in record["failed"].items() if "wrong" in name)
    assert record["counts"]["any"]["passed"] == 2
    assert {name.rpartition("::")[2]: why for name, why in record["skipped"].items()} == {"test_skipped": "no reason"}


def test_what_there_is_no_time_for_is_not_passed(tmp_path):
    done, record = limited(tmp_path, ODD, "--seconds", "0")
    assert done.returncode == 1
    assert record["counts"]["any"] == {"passed": 0, "failed": 0, "skipped": 0, "not run": 4}


def test_a_limit_runs_in_part(tmp_path):
    slow = """
    import time
    import pytest

    def test_first(): time.sleep(3)

    @pytest.mark.parametrize("name", ["a", "b"])
    def test_more(name): pass
    """
    done, record = limited(tmp_path, slow, "--seconds", "2")
    assert done.returncode == limited_run.IN_PART, done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 of 3 tests run in ")
    assert record["failed"] == {}
    assert names(record["not_run"]) == {"test_more[a]", "test_more[b]"}


def test_a_selection_names_functions_and_ids(tmp_path):
    many = """
    import pytest

    @pytest.mark.parametrize("size", ["odd", "even"])
    @pytest.mark.parametrize("way", ["a", "b"])
    def test_some(way, size): pass
    def test_other(): pass
    """
    _, record = limited(tmp_path, many, "--select", "test_some[odd]", "--select", "test_other")
    assert record["counts"]["any"]["passed"] == 3


COMPILED = """
    import pytest, triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def zero_kernel(to_ptr):
        tl.store(to_ptr, 0.0)

    @pytest.mark.parametrize("time", [0, 1, 2])
    def test_compiles(time):
        triton.compile(ASTSource(zero_kernel, {"to_ptr": "*fp32"}), target=GPUTarget("cuda", 90, 32))

    def test_compiles_nothing(): pass
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_kernels_that_are_compiled_or_found_are_counted(processes, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["--numprocesses", str(processes)] if processes else []
    done, record = limited(tmp_path, COMPILED, *arguments)
    assert done.returncode == 0, done.stdout
    expected = {"found in the cache": 2, "compiled": 1, "compiled by name": {"zero_kernel": 1}}
    assert record["kernels"] == expected
    assert done.stdout.splitlines()[-1].endswith("; 1 kernels compiled, 2 found in the cache")
    _, record = limited(tmp_path, COMPILED, *arguments)  # a second run has the cache of the first
    assert record["kernels"] == {"found in the cache": 3, "compiled": 0, "compiled by name": {}}


def test_no_kernels_are_counted_without_triton(tmp_path):
    done, record = limited(tmp_path, ODD)
    assert record["kernels"] == {"found in the cache": 0, "compiled": 0, "compiled by name": {}}
    assert "kernels" not in done.stdout.splitlines()[-1]


def device_tests() -> list[str]:
    """Return what ``pytest tests/kernels --engine=gpu`` collects from the files for devices."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--engine=gpu"]
    files = [str(path) for path in sorted((ROOT / "tests/kernels").glob("test_device_*.py"))]
    environment = {**os.environ, "LT_KERNELS_TEST_BACKENDS": "triton,native", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    found = re.findall(r"^(tests/kernels/\S+?::.*)$", done.stdout, re.MULTILINE)
    assert len(found) > 1000, done.stdout[-2000:] + done.stderr[-2000:]
    return found


def test_every_kernel_comes_before_a_second_test_of_a_kind():
    names = [f"test_a[{way}-{dtype}-{n}]" for way in ("triton", "native") for dtype in ("fp32", "bf16") for n in "123"]
    ordered = limited_run.in_order([*names, "test_b", "test_a[triton-loop-fp32]"])
    words = [limited_run.kind_of(name, limited_run.KINDS + limited_run.KERNELS) for name in ordered]
    assert {kind[0] for kind in words[:3]} == {"test_a", "test_b"}
    assert len(set(words[:6])) == len(set(words)) == 6
    assert len({limited_run.kind_of(name) for name in ordered[:3]}) == 3


def test_tests_of_devices():
    """One of every kind first, in one kind neighbours apart; what the sanitizer looks at exists."""
    names = device_tests()
    ordered = limited_run.in_order(names)
    assert sorted(ordered) == sorted(names)
    assert {name.partition("[")[0] for name in ordered[:200]} == {name.partition("[")[0] for name in names}
    kernels = [limited_run.kind_of(name, limited_run.KINDS + limited_run.KERNELS) for name in ordered]
    assert set(kernels[: len(set(kernels))]) == set(kernels), "a kernel, dtype or layout waits for a second of another"
    real = [name for name in ordered if "test_device_values.py::test_real_widths" in name]
    first = {word for name in real[:6] for word in name.rstrip("]").split("-")}
    assert {"bf16", "fp16", "fp32"} <= first

    for choice in [*gpu_check.SANITISED, *gpu_check.RACED]:
        function, _, ids = choice.removesuffix("]").partition("[")
        words = list(filter(None, ids.split(",")))
        assert any(f"::{function}" in name and all(word in name for word in words) for name in names), choice


# ------------------------------------------------------------------------------------------------------------ the steps


@pytest.fixture
def machine(tmp_path):
    info = {"backends": {"margin_cross_entropy": {"cuda": {"triton": None, "native": None}}}}
    return gpu_check.Machine(sys.executable, tmp_path, info, {"slug": "a-gpu", "capability": "9.0"})


def step(limit: float = 30.0, **codes: str) -> gpu_check.Step:
    commands = {label: gpu_check.Command([sys.executable, "-c", code]) for label, code in codes.items()}
    return gpu_check.Step(limit, lambda machine, limit: commands)


def test_states(machine):
    outcome = gpu_check.run_step("a", step(x="print('fine')"), machine)
    assert (outcome.state, outcome.note) == ("passed", "x: fine")
    assert (machine.out / "a-x.log").read_text() == "fine\n"
    outcome = gpu_check.run_step("b", step(x="print('fine')", y="print('oh'); raise SystemExit(5)"), machine)
    assert (outcome.state, outcome.note) == ("failed", "x: fine; y: status 5; last line: oh")
    outcome = gpu_check.run_step("c", step(x="print('no counters'); raise SystemExit(77)"), machine)
    assert (outcome.state, outcome.note) == ("skipped", "x: no counters")
    part = "print('7 of 9 checks run'); raise SystemExit(75)"
    outcome = gpu_check.run_step("e", step(x=part, y="print('fine')"), machine)
    assert (outcome.state, outcome.note) == ("passed in part", "x: 7 of 9 checks run; y: fine")
    assert gpu_check.run_step("f", step(x=part, y="raise SystemExit(1)"), machine).state == "failed"
    outcome = gpu_check.run_step("d", gpu_check.Step(1.0, lambda machine, limit: "there is no tool"), machine)
    assert (outcome.state, outcome.note) == ("skipped", "there is no tool")


def test_a_step_that_takes_too_long_ends_with_all_its_processes(machine):
    code = "import subprocess as s; child = s.Popen(['sleep', '1000']); print(child.pid, flush=True); child.wait()"
    outcome = gpu_check.run_step("slow", step(3.0, x=code), machine)
    assert outcome.state == "timed out"
    child = int((machine.out / "slow-x.log").read_text())
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_limit_is_a_step_and_seconds():
    assert gpu_check.limit("bench-contrastive=90") == ("bench-contrastive", 90.0)
    for given in ("bench", "bench=", "bench=soon", "bench=-1", "bench=0", "bench=nan", "benches=3"):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"got {given!r}, expected STEP=S")):
            gpu_check.limit(given)


def test_limits_leave_room_in_nine_minutes():
    assert sum(step.limit for step in gpu_check.STEPS.values()) <= 9 * 60 - 20


def test_commands_of_the_steps(machine, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: f"/bin/{name}")
    commands = {name: step.commands(machine, step.limit) for name, step in gpu_check.STEPS.items()}
    assert commands["build"][""].environment["LT_KERNELS_BUILD"] == "cuda"
    assert commands["build"][""].environment["TORCH_CUDA_ARCH_LIST"] == os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")
    assert list(commands["sanitizer"]) == ["memcheck-triton", "memcheck-native", "racecheck-native"]
    benchmarks = {
        "bench": "margin_cross_entropy",
        "bench-linear": "linear_margin_cross_entropy",
        "bench-experts": "expert_cross_entropy",
        "bench-fusion": "expert_fusion",
        "bench-contrastive": "partitioned_logsumexp",
    }
    for name, op in benchmarks.items():
        assert commands[name][""].arguments[-1] == str(machine.out / f"a-gpu/{op}.json")

    assert commands["tests"][""].arguments[-1] == "tests/kernels"
    assert commands["suite"][""].arguments[-1] == "tests/ops"
    assert "--engine=gpu" in commands["sanitizer"]["racecheck-native"].arguments
    assert commands["sanitizer"]["memcheck-triton"].environment["LT_KERNELS_TEST_BACKENDS"] == "triton"

    monkeypatch.setattr(gpu_check, "importable", lambda machine, module: module != "pytest")
    assert "pytest cannot be imported" in gpu_check.STEPS["tests"].commands(machine, 50)
    monkeypatch.setattr(gpu_check, "importable", lambda machine, module: True)

    reasons = machine.info["backends"]["margin_cross_entropy"]["cuda"]
    reasons["native"] = "the extension was built without kernels for cuda tensors"
    assert list(gpu_check.sanitizer(machine, 50)) == ["memcheck-triton"]
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: None)
    assert gpu_check.sanitizer(machine, 50) == "compute-sanitizer was not found"
    assert gpu_check.ncu(machine, 50) == "ncu was not found"


def test_without_a_gpu_every_step_fails_with_the_reason(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "tools/gpu_check.sh"), str(tmp_path / "out"), "--python", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary["steps"]) == list(gpu_check.STEPS)
    for outcome in summary["steps"].values():
        assert (outcome["state"], outcome["note"]) == ("failed", "no CUDA device is available")


def test_one_step_again_leaves_the_others_results(tmp_path, monkeypatch, machine):
    monkeypatch.setattr(gpu_check, "look", lambda python, out: machine)
    ran = {name: step(x=f"print({name!r})") for name in ("build", "tests")}
    monkeypatch.setattr(gpu_check, "STEPS", ran)
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path)])
    assert gpu_check.main() == 0
    ran["tests"] = step(x="raise SystemExit('broken')")
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--only", "tests"])
    assert gpu_check.main() == 1
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert {name: outcome["state"] for name, outcome in steps.items()} == {"build": "passed", "tests": "failed"}


# ------------------------------------------------------------------------------------------------------------- counters

LISTING = """==PROF== Connected to process 77 (python3)
==PROF== Disconnected from process 77
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
{rows}"""


def listing(*kernels: tuple[str, float]) -> str:
    rows = []
    for number, (kernel, megabytes) in enumerate(kernels):
        values = {"dram__bytes_read.sum": megabytes * 1e6, "dram__bytes_write.sum": 1e6, "gpu__time_duration.sum": 2000}
        values["launch__registers_per_thread"] = 53
        for metric, value in values.items():
            start = f'"{number}","77","python3","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(8192, 1, 1)","0","9.0"'
            rows.append(f'{start},"Command line profiler metrics","{metric}","byte","{value:,.0f}"')
    return LISTING.format(rows="\n".join(rows))


def test_counters_are_cut_into_cases():
    text = listing(
        ("spin_kernel", 0.0),
        ("_rows_forward_kernel", 3.0),
        ("reduce_kernel", 1.0),
        ("void at::cuda::spin_kernel(long)", 0.0),
        ("_rows_backward_kernel", 7.0),
    )
    case = {"backend": "triton", "direction": "fwd+grad", "shape": [8, 8], "dtype": "float32", "floor_bytes": 4_000_000}
    first, second = gpu_counters.tabulate([case, case], gpu_counters.read(text))
    assert (first["dram_bytes"], first["ratio_to_floor"], len(first["kernels"])) == (6e6, 1.5, 2)
    assert (second["dram_bytes"], second["microseconds"], second["kernels"][0]["registers"]) == (8e6, 2.0, 53)
    with pytest.raises(RuntimeError, match="ncu lists 2 cases of 3"):
        gpu_counters.tabulate([case] * 3, gpu_counters.read(text))


def test_floors():
    floors = {(case.direction, case.shape, case.dtype): case.floor_bytes for case in gpu_counters.CASES}
    assert floors["fwd+grad", (8192, 8142), "bfloat16"] == 2 * 8192 * 8142 * 2
    assert floors["fwd", (8192, 8142), "bfloat16"] == 8192 * 8142 * 2
    assert floors["bwd", (8192, 8142), "float32"] == 2 * 8192 * 8142 * 4


@pytest.mark.parametrize("case", gpu_counters.CASES, ids=lambda case: f"{case.op}-{case.direction}-{case.dtype}")
def test_what_is_counted_runs(case):
    small = replace(case, shape=(3, 4, 5) if case.op.startswith("expert") else (4, 5))
    logits, forward = gpu_counters.call(small, "cpu")
    assert logits.shape == small.shape
    if case.op == "expert_fusion":
        assert forward().prediction.shape == (4,)
    else:
        assert torch.autograd.grad(forward(), logits)[0].isfinite().all()


@pytest.mark.parametrize(("message", "status"), [("==ERROR== ERR_NVGPUCTRPERM - no permission", 77), ("", 1)])
def test_counters_that_cannot_be_read(message, status, tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text(f"""#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
echo '{message}' > "$2"
exit 1
""")
    ncu.chmod(0o755)
    command = [sys.executable, str(ROOT / "tools/gpu_counters.py"), "--ncu", str(ncu)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == status
    if status == 77:
        assert result.stdout.strip() == "ncu cannot read the counters here: ERROR== ERR_NVGPUCTRPERM - no permission"
