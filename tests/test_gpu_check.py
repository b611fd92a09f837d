"""The GPU check without a GPU: its runner on the CPU, its control flow on stand-ins, its reading of ncu's output."""

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
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests/gpu")]
gpu_check, gpu_counters, run_device_checks, device_checks = map(
    importlib.import_module, ("gpu_check", "gpu_counters", "run_device_checks", "device_checks")
)


def run_checks(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/run_device_checks.py"), "--device", "cpu", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, check=False
    )


# ------------------------------------------------------------------------------------------------------- device checks


def test_device_checks_on_the_cpu(tmp_path):
    """Bodies of the checks, on the backends that are here; what needs CUDA is skipped and says so."""
    words = "bad_targets,retained_graph,gradient_accumulation,[odd-,[segmentation-,no_synchronisation[angular"
    result = run_checks("--backend", "reference,native", "--match", words, "--json", str(tmp_path / "checks.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads((tmp_path / "checks.json").read_text())
    assert facts["counts"]["reference"] == facts["counts"]["native"]
    counts = facts["counts"]["native"]
    assert counts["passed"] > 50
    assert counts["failed"] == counts["not run"] == 0
    assert counts["skipped"] == 12
    tiled = "tiled runs on Triton, with class indices and one loss per sample"
    assert set(facts["skipped"].values()) == {"needs a CUDA device", tiled}
    assert "SKIPPED 8: needs a CUDA device" in result.stdout
    assert facts["info"]["torch"]


def test_a_backend_that_cannot_run_is_reported(tmp_path):
    result = run_checks("--backend", "triton", "--json", str(tmp_path / "checks.json"), TRITON_INTERPRET="0")
    assert result.returncode == 1
    assert "WITHOUT triton: " in result.stdout
    facts = json.loads((tmp_path / "checks.json").read_text())
    assert facts["counts"] == {}
    assert list(facts["unavailable_backends"]) == ["triton"]


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_checks_that_fail_hang_or_end_their_process_fail_alone(jobs, tmp_path):
    (tmp_path / "odd_checks.py").write_text(
        textwrap.dedent("""
        import os, time
        from types import SimpleNamespace
        from unittest import SkipTest

        def raises(error):
            raise error

        bodies = {
            "good": lambda: None,
            "wrong": lambda: raises(AssertionError("1 is not 2")),
            "skipped": lambda: raises(SkipTest("no reason")),
            "another": lambda: None,
        }
        if "IN_PROCESSES" in os.environ:
            bodies = {"ends": lambda: os._exit(3), "hangs": lambda: time.sleep(1000), **bodies}
        CHECKS = {
            name: SimpleNamespace(large=name == "another", run=lambda backend, device, body=body: body())
            for name, body in bodies.items()
        }
        """)
    )
    environment = {"PYTHONPATH": str(tmp_path), **({"IN_PROCESSES": "1"} if jobs != "0" else {})}
    arguments = ["--module", "odd_checks", "--backend", "reference", "--jobs", jobs, "--seconds-per-check", "2"]
    result = run_checks(*arguments, "--json", str(tmp_path / "checks.json"), **environment)
    assert result.returncode == 1
    facts = json.loads((tmp_path / "checks.json").read_text())
    failed = {name.removeprefix("reference: "): message for name, message in facts["failed"].items()}
    assert failed.pop("wrong") == "AssertionError: 1 is not 2"
    if jobs != "0":
        assert failed == {"ends": "its process ended (status 3)", "hangs": "took more than 2 s (status -9)"}
    assert facts["counts"]["reference"]["passed"] == 2
    assert facts["skipped"] == {"reference: skipped": "no reason"}


def test_what_there_is_no_time_for_is_not_passed(tmp_path):
    arguments = ["--backend", "reference", "--match", "bad_targets", "--seconds", "0"]
    result = run_checks(*arguments, "--json", str(tmp_path / "checks.json"))
    assert result.returncode == 1
    counts = json.loads((tmp_path / "checks.json").read_text())["counts"]["reference"]
    assert counts["passed"] == 0
    assert counts["not run"] == 40


def test_a_limit_leaves_a_sample_of_everything(tmp_path, monkeypatch):
    """One check of every kind first; none that the limit cut short is counted as failed."""
    names = run_device_checks.in_order(list(device_checks.CHECKS))
    assert sorted(names) == sorted(device_checks.CHECKS)
    functions = {check.body.__name__ for check in device_checks.CHECKS.values()}
    first = {name.partition("[")[0] for name in names[:150]}
    assert first == functions
    values = [name for name in names if name.startswith("value_and_every_gradient[")]
    assert {name.split("-")[-2] for name in values[:3]} == {"bf16", "fp16", "fp32"}
    assert len({name.split("[")[1].split("-")[0] for name in values[:30]}) > 15

    (tmp_path / "slow_checks.py").write_text(
        textwrap.dedent("""
        import time
        from types import SimpleNamespace

        CHECKS = {
            name: SimpleNamespace(large=False, run=lambda backend, device, seconds=seconds: time.sleep(seconds))
            for name, seconds in {"first": 0, "endless": 1000, "more[a]": 0, "more[b]": 0}.items()
        }
        """)
    )
    arguments = ["--module", "slow_checks", "--backend", "reference", "--jobs", "1", "--seconds", "3"]
    result = run_checks(*arguments, "--json", str(tmp_path / "checks.json"), PYTHONPATH=str(tmp_path))
    assert result.returncode == run_device_checks.IN_PART
    assert result.stdout.splitlines()[-1].startswith("1 of 4 checks run in ")
    facts = json.loads((tmp_path / "checks.json").read_text())
    assert facts["failed"] == {}
    assert sorted(facts["not_run"]) == ["reference: endless", "reference: more[a]", "reference: more[b]"]
    monkeypatch.syspath_prepend(tmp_path)
    result = run_device_checks.Worker("slow_checks", "cpu").run(("reference", "endless"), 0.5, cut=True)
    assert (result.state, result.message) == ("not run", "the time limit came after 0 s of it")


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

    for word in gpu_check.SANITISED + gpu_check.RACED:
        assert any(word in name for name in device_checks.CHECKS), word
        assert "," not in word  # which separates them

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
