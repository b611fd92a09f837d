"""The ahead-of-time gate on a few cases; ``.ci/run`` runs the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the gate compiles Triton kernels")

ROOT = Path(__file__).parent.parent


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools/aot_gate.py"), *arguments, "--jobs", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_one_pass_kernel_at_8142_and_8192(tmp_path):
    for case in ("plain, C 8142, bfloat16, forward", "plain, C 8192, bfloat16, forward"):
        result = gate("--check", "--only", case)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "1 kernels compiled for sm_90, sm_80, sm_100, gfx942" in result.stdout

    table = json.loads((ROOT / "benchmarks/results/aot/margin_cross_entropy.json").read_text())
    table["rows"] = [row for row in table["rows"] if row["case"].startswith(case)]
    assert len(table["rows"]) == 1
    table["rows"][0]["sm_90"]["registers"] += 1
    (tmp_path / "margin_cross_entropy.json").write_text(json.dumps(table))
    result = gate("--check", "--only", case, "--tables", str(tmp_path))
    if "table not compared" not in result.stdout:  # another Triton than the table's
        assert result.returncode == 1
        assert "differs from the committed table" in result.stdout


def test_nothing_checked_is_a_failure():
    result = gate("--check", "--only", "no such case")
    assert result.returncode == 1
    assert "nothing was checked" in result.stdout


def test_the_committed_table_holds_what_the_gate_promises():
    table = json.loads((ROOT / "benchmarks/results/aot/margin_cross_entropy.json").read_text())
    assert len(table["rows"]) > 40
    for row in table["rows"]:
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert row[target]["stack"] == row[target]["spills"] == 0, row
    one_pass = {row["case"]: row for row in table["rows"] if row["case"].startswith(("plain, C 8142", "plain, C 8192"))}
    for row in one_pass.values():
        assert row["sm_90"]["loads"]["128"] > 0
        assert row["sm_90"]["stores"]["128"] > 0
        if "forward" in row["case"]:
            assert row["per_logit"] <= 20
    assert len(one_pass) >= 5


@pytest.mark.slow
def test_tiled_kernels():
    result = gate("--check", "--only", "linear, class_bias, D 64")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kernels compiled for sm_90, sm_80, sm_100, gfx942" in result.stdout


def test_the_table_of_the_tiled_kernels_holds_what_the_gate_promises():
    table = json.loads((ROOT / "benchmarks/results/aot/linear_margin_cross_entropy.json").read_text())
    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    seen = set()
    for row in table["rows"]:
        for target, kilobytes in limits.items():
            assert row[target]["stack"] == row[target]["spills"] == 0, row
            assert row[target]["shared"] <= kilobytes * 1024, row
            if "products" in row[target] and "float32" not in row["case"]:
                assert row[target]["products"] > 0, row
                seen.add((row["kernel"], row["case"]))
    for kernel in ("_tiled_forward_kernel", "_grad_input_kernel", "_grad_factor_kernel"):
        for width in (64, 128, 256):
            assert (kernel, f"linear, class_bias, D {width}, C 8142, bfloat16") in seen


def test_the_tables_of_fusion_and_divergence_hold_what_the_gate_promises():
    for op in ("expert_fusion", "expert_divergence"):
        rows = json.loads((ROOT / f"benchmarks/results/aot/{op}.json").read_text())["rows"]
        for row in rows:
            for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
                assert row[target]["stack"] == row[target]["spills"] == 0, row
            assert row.get("per_logit", 0) <= row.get("budget", 100), row
        for classes in (8142, 8192, 100000):
            wide = [row for row in rows if f"C {classes}," in row["case"] and "E 9" not in row["case"]]
            assert any("128" in row["sm_90"]["loads"] for row in wide)
        if op == "expert_divergence":
            backward = [row for row in rows if "backward" in row["case"] and "E 9" not in row["case"]]
            assert all("128" in row["sm_90"]["stores"] for row in backward)


@pytest.mark.slow
def test_losses_of_several_experts():
    result = gate("--check", "--only", "expert_cross_entropy, plain, E 3, C 8142")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kernels compiled for sm_90, sm_80, sm_100, gfx942" in result.stdout


def test_the_table_of_losses_of_several_experts_holds_what_the_gate_promises():
    table = json.loads((ROOT / "benchmarks/results/aot/expert_cross_entropy.json").read_text())
    aligned = [row for row in table["rows"] if row["kernel"] == "_experts_forward_kernel" and row["GROUP"] >= 4]
    assert len(aligned) >= 8
    for row in table["rows"]:
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert row[target]["stack"] == row[target]["spills"] == 0, row
    for row in aligned:
        assert row["sm_90"]["loads"]["128"] > 0, row
        assert row["sm_90"]["stores"]["128"] > 0, row


@pytest.mark.slow
def test_contrastive_kernels():
    result = gate("--check", "--only", "keys, bounded, self left out, D 64")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 kernels compiled for sm_90, sm_80, sm_100, gfx942" in result.stdout


def test_the_table_of_contrastive_kernels_holds_what_the_gate_promises():
    rows = json.loads((ROOT / "benchmarks/results/aot/partitioned_logsumexp.json").read_text())["rows"]
    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    seen = set()
    for row in rows:
        for target, kilobytes in limits.items():
            assert row[target]["stack"] == row[target]["spills"] == 0, row
            assert row[target]["shared"] <= kilobytes * 1024, row
            if "products" in row[target] and "float32" not in row["case"]:
                assert row[target]["products"] > 0, row
        if "per_logit" in row:
            assert row["per_logit"] <= row.get("budget", 1000)
            assert "128" in row["loads"]
            seen.add(row["kernel"])
    tiles = {"_tiled_forward_kernel", "_grad_query_kernel", "_grad_key_kernel", "_grad_both_kernel"}
    assert seen == tiles | {"_block_forward_kernel", "_block_backward_kernel"}
