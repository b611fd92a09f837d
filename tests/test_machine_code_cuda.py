"""The gate of the CUDA C++ kernels, without a compiler; ``.ci/run`` runs the whole of it (``make cuda``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.machine_code import cuda as gate  # noqa: E402
from tools.machine_code import ledger  # noqa: E402


def record(**changes):
    kernel = "rows_forward_kernel<BFloat16, 128, 8, false>"
    good = {"kernel": kernel, "source": "", "architecture": "sm_90", "registers": 80, "stack": 0, "spills": 0}
    return {**good, "loads": {"128": 8, "32": 2}, "stores": {"128": 8, "16": 1}, **changes}


def test_a_good_kernel_has_no_problems():
    assert gate.problems(record()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 4}, "4 bytes of spills"),
        ({"loads": {"64": 16}}, "no 128-bit loads"),
        ({"stores": {"16": 64}}, "no 128-bit stores"),
        ({"kernel": "panels_kernel<Half, 4, true, false>", "stores": {"16": 4}}, "no 64-bit loads"),
        ({"kernel": "divergence_forward_kernel<Half>", "loads": {"16": 4}}, "no 128-bit loads"),
        ({"kernel": "divergence_backward_kernel<Half>", "stores": {"16": 4}}, "no 128-bit stores"),
    ],
)
def test_the_gate_finds(changes, expected):
    assert any(expected in problem for problem in gate.problems(record(**changes)))


@pytest.mark.parametrize("pattern", [pattern for pattern, _, _ in gate.WIDTHS])
def test_every_rule_has_a_kernel(pattern):
    assert any(gate.covers(pattern, row) for row in gate.read_table()["rows"] if row["architecture"] == "sm_90")


def test_the_gate_covers_every_source():
    """setup.py builds every file whose name begins with cuda."""
    built = set((ROOT / "csrc").rglob("cuda*.c*"))
    assert built == {*gate.SOURCES, *gate.HOST_SOURCES} - {ROOT / "csrc/library.cpp"}


def test_widths_of_machine_code():
    sass = "LDG.E.128 R4, [R2]; LDG.E.U16 R1, [R8]; LDGSTS.E.BYPASS.128 [R3]; LDG.E R5, [R8]; STG.E.64 [R8], R2"
    assert gate.widths(sass, r"(?:LDG|LDGSTS)") == {"128": 2, "32": 1, "16": 1}
    assert gate.widths(sass, "STG") == {"64": 1}


def test_without_nvcc_the_gate_says_so(tmp_path):
    script = "import runpy, shutil, sys; shutil.which = lambda *a, **k: None; sys.argv = ['gate', '--check']; "
    script += "runpy.run_module('tools.machine_code.cuda', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("SKIPPED: nvcc was not found")


# --- what a run compiles, and what it takes from the table -----------------------------------------------------------

UNIT = gate.Unit("a/cuda.cu", "sm_90")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the gate on one source file, whose compilation gives ``record()``."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/cuda.cu").write_text('#include "../common.h"\nint x;  // a comment\n')
    (tmp_path / "common.h").write_text("#pragma once\nint y;\n")
    monkeypatch.setattr(gate, "CSRC", tmp_path)
    monkeypatch.setattr(gate, "TABLE", tmp_path / "cuda.json")
    monkeypatch.setattr(gate, "VIEW", tmp_path / "cuda.md")
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setattr(gate, "units", lambda: [UNIT])
    monkeypatch.setattr(gate, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gate, "run", lambda *command: "release 13.0")
    rows = [record(source="a/cuda.cu")]
    monkeypatch.setattr(gate, "compile_units", lambda nvcc, chosen, jobs: dict.fromkeys(chosen, rows))

    def check(turn=1, **options):
        gate.included.cache_clear()
        defaults = {"check": True, "write": False, "all": False, "only": "", "jobs": 1, "turn": turn}
        monkeypatch.setattr(gate, "parse_arguments", lambda: Namespace(**{**defaults, **options}))
        status = gate.main()
        output = capsys.readouterr()
        return status, output.out + output.err

    assert check(write=True, check=False)[0] == 0
    return check


def edit(tmp_path, forge: bool, **changes) -> None:
    """Change the numbers of the table's row, and its seal too if it is to be forged."""
    table = json.loads((tmp_path / "cuda.json").read_text())
    table["rows"][0].update(changes)
    if forge:
        table["seals"][str(UNIT)] = ledger.seal(gate.inputs(UNIT, "nvcc"), table["rows"])
    (tmp_path / "cuda.json").write_text(gate.text(table))
    (tmp_path / "cuda.md").write_text(gate.view(table))


def test_an_unchanged_file_is_taken_from_the_table_unless_all_is_asked_for(run):
    status, output = run()
    assert status == 0
    assert "0 compiled; 1 taken from the table" in output
    assert "1 compiled (1 asked for); 0 taken" in run(all=True)[1]


@pytest.mark.parametrize(("path", "text"), [("a/cuda.cu", "int x, z;"), ("common.h", "int z;")])
def test_a_changed_file_is_compiled(run, tmp_path, path, text):
    (tmp_path / path).write_text((tmp_path / path).read_text() + text)
    status, output = run()
    assert status == 0
    assert "1 changed since they were written" in output


def test_a_changed_comment_compiles_nothing(run, tmp_path):
    path = tmp_path / "a/cuda.cu"
    path.write_text(path.read_text().replace("// a comment", "/* another\n */ // comment"))
    assert "0 compiled" in run()[1]


def test_a_text_in_quotes_is_no_comment(tmp_path):
    path = tmp_path / "x.h"
    path.write_text('auto a = "// kept";  // dropped\n')
    assert gate.code(path) == 'auto a = "// kept";'


@pytest.mark.parametrize(
    ("forge", "changes", "turn", "status", "words"),
    [
        (
            False,
            {"registers": 79},
            1,
            1,
            ["1 changed since they were written", '-  {"kernel": "rows_forward_kernel<BFloat16, 128, 8, false>"'],
        ),
        (True, {"registers": 79}, 1, 0, []),
        (True, {"registers": 79}, 0, 1, ["1 in rotation"]),
        (True, {"spills": 4}, 1, 1, ["4 bytes of spills"]),
    ],
    ids=["edited by hand", "forged, before its turn", "forged, in its turn", "a rule holds for the table's rows"],
)
def test_an_edited_table_is_found(run, tmp_path, forge, changes, turn, status, words):
    edit(tmp_path, forge, **changes)
    found, output = run(turn=turn)
    assert found == status
    for word in words:
        assert word in output
