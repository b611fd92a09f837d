"""The gate of the Triton kernels' machine code on a few cases; ``.ci/run`` runs the whole of it (``make aot``)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the gate compiles Triton kernels")

import triton
import triton.language as tl

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.machine_code import engine, ledger, reading  # noqa: E402
from tools.machine_code.recording import Launch, code_hash, compile_launch  # noqa: E402

TABLES = ROOT / "benchmarks/results/aot"
LIMITS = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.machine_code", *arguments, "--jobs", "1"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def committed(op: str) -> list[dict]:
    return json.loads((TABLES / f"{op}.json").read_text())["rows"]


# --- the whole gate on a few cases -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("plain, C 8142, bfloat16, forward", 1),
        ("expert_cross_entropy, plain, E 3, C 8142", 1),
    ],
)
def test_a_case_compiles_to_the_committed_numbers(case, rows):
    result = gate("--check", "--all", "--only", case)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{rows} rows for sm_90, sm_80, sm_100, gfx942" in result.stdout
    assert f"{rows} compiled ({rows} asked for)" in result.stdout


@pytest.mark.slow
def test_an_edited_number_is_compiled_and_found(tmp_path):
    case = "plain, C 8142, bfloat16, forward"
    table = json.loads((TABLES / "margin_cross_entropy.json").read_text())
    table["rows"] = [row for row in table["rows"] if row["case"].startswith(case)]
    assert len(table["rows"]) == 1
    table["rows"][0]["sm_90"]["registers"] += 1
    (tmp_path / "margin_cross_entropy.json").write_text(json.dumps(table))
    result = gate("--check", "--only", case, "--tables", str(tmp_path))
    if "tables not compared" not in result.stdout:  # another Triton than the table's
        assert result.returncode == 1
        assert "1 changed since they were written" in result.stdout
        assert "differs from the committed table" in result.stdout


def test_nothing_checked_is_a_failure():
    result = gate("--check", "--only", "no such case")
    assert result.returncode == 1
    assert "nothing was checked" in result.stdout


# --- what a run compiles, and what it takes from the table -----------------------------------------------------------


def sealed(task: engine.Task, **changes) -> engine.Row:
    """A row of a table whose seal fits, whatever its numbers are."""
    code = {"registers": 40, "stack": 0, "spills": 0, "shared": 0, "instructions": 500}
    moved = {"loads": {"128": 8}, "stores": {"128": 8}}
    row = {"case": task.key.case, "kernel": task.key.kernel, **dict.fromkeys(engine.TARGETS, code)}
    return task.finished({**row, "sm_90": {**code, **moved}, "per_logit": 15.0, **changes})


@pytest.fixture
def task():
    return next(task for task in engine.tasks() if task.key.case == "plain, C 8142, bfloat16, forward + gradient")


@pytest.fixture
def run(tmp_path, monkeypatch, task, capsys):
    """Run the gate on a table with one row; compiling gives ``truth``."""
    truth = sealed(task)
    monkeypatch.setattr(engine, "tasks", lambda: (task,))
    monkeypatch.setattr(engine, "compile_rows", lambda indices, jobs: {task.key: (truth, [])} if indices else {})

    def check(row, turn=1, **options):
        rows = [] if row is None else [row]
        (tmp_path / f"{task.key.op}.json").write_text(engine.text(rows))
        defaults = {"check": True, "write": False, "no_table": False, "all": False, "only": "", "jobs": 1}
        arguments = Namespace(**{**defaults, "tables": tmp_path, "turn": turn, **options})
        monkeypatch.setattr(engine, "parse_arguments", lambda: arguments)
        status = engine.main()
        return status, capsys.readouterr().out

    return check


def edited(task, **changes) -> engine.Row:
    """A row with other numbers for sm_90, under the seal of the true ones."""
    row = sealed(task)
    return {**row, "sm_90": {**row["sm_90"], **changes}}


DIFFERS = "differs from the committed table"


@pytest.mark.parametrize(
    ("row", "options", "status", "words"),
    [
        (sealed, {}, 0, ["0 compiled; 1 taken from the table"]),
        (sealed, {"all": True}, 0, ["1 compiled (1 asked for); 0 taken"]),
        (lambda task: edited(task, registers=39), {}, 1, ["1 changed since they were written", DIFFERS]),
        (lambda task: task.finished(edited(task, registers=39)), {"turn": 1}, 0, []),
        (lambda task: task.finished(edited(task, registers=39)), {"turn": 0}, 1, ["1 in rotation"]),
        (lambda task: sealed(task, per_logit=21.0), {}, 1, ["21.0 instructions per logit, at most 20.0"]),
        (lambda task: {**sealed(task), "budget": 99.0}, {}, 1, [DIFFERS]),
        (
            lambda task: {**sealed(task), "seal": "0" * 16},
            {},
            0,
            ["1 changed since they were written", "1 rows have the committed numbers from changed inputs"],
        ),
        (lambda task: None, {}, 1, ["1 not in the table", DIFFERS]),
        (lambda task: {**sealed(task), "case": "gone"}, {}, 1, ['-{"case": "gone"']),
    ],
    ids=[
        "a seal that fits",
        "all",
        "a number edited by hand, without its turn",
        "a forged seal, before its turn",
        "a forged seal, in its turn",
        "a row from the table beyond its limit",
        "an edited limit",
        "changed inputs, the same numbers",
        "a row that is not in the table",
        "a row that no configuration asks for",
    ],
)
def test_a_run_compiles_what_is_due_and_finds(run, task, row, options, status, words):
    found, output = run(row(task), **options)
    assert found == status
    for word in words:
        assert word in output


def test_a_row_with_problems_is_not_sealed(task, monkeypatch, tmp_path):
    code = {"registers": 255, "stack": 8, "spills": 2, "shared": 0, "instructions": 500}
    monkeypatch.setattr(engine.Task, "_machine_code", lambda *_: {**code, "loads": {}, "stores": {}})
    row, problems = task.compile(tmp_path)
    assert any("8 bytes of stack, 2 spills" in problem for problem in problems)
    assert any("no 16-byte loads" in problem for problem in problems)
    assert row["seal"] == ""


@pytest.mark.parametrize("count", [1, 19, 20, 247])
def test_twenty_turns_compile_every_row_once(count):
    seals = dict.fromkeys(range(count), True)
    by_turn = [
        [index for index in seals if ledger.reason(index, seals, index, turn, False) == ledger.ROTATION]
        for turn in range(ledger.TURNS)
    ]
    assert sorted(index for indices in by_turn for index in indices) == list(range(count))
    assert max(map(len, by_turn)) <= -(-count // ledger.TURNS)


def test_the_turn_advances_with_every_commit(tmp_path):
    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    turns = []
    for _ in range(3):
        git("commit", "--allow-empty", "--message", "x")
        turns.append(ledger.current_turn(tmp_path))
    assert turns == [1, 2, 3]
    assert 0 <= ledger.current_turn(tmp_path / ".git/hooks") < ledger.TURNS  # no working tree


# --- what a seal covers ----------------------------------------------------------------------------------------------

SOURCE = '''
import triton
import triton.language as tl
from typing import NamedTuple

LIMIT = tl.constexpr(3)

class Pair(NamedTuple):
    a: tl.tensor
    b: tl.tensor

@triton.jit
def _twice(x):
    """What it does."""
    return x * 2  # doubled

@triton.jit
def _kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pair = Pair(tl.load(x_ptr + offsets), LIMIT)
    tl.store(x_ptr + offsets, _twice(pair.a))
'''


def hash_of(tmp_path, name: str, old: str = "", new: str = "") -> str:
    assert old in SOURCE
    path = tmp_path / f"lt_kernels_{name}.py"
    path.write_text(SOURCE.replace(old, new) if old else SOURCE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return code_hash(module._kernel)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * 2", "x * 3"),  # a helper
        ("constexpr(3)", "constexpr(4)"),  # a global
        ("    b: tl.tensor", "    c: tl.tensor"),  # a named tuple
        ("tl.arange(0, BLOCK)", "BLOCK - 1 - tl.arange(0, BLOCK)"),  # the kernel
    ],
)
def test_the_hash_of_a_kernel_changes_with(tmp_path, old, new):
    assert hash_of(tmp_path, "before") != hash_of(tmp_path, "after", old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [("# doubled", "# times two"), ("What it does.", "Double."), ("\nLIMIT", "\n\n\n# further down\nLIMIT")],
)
def test_the_hash_of_a_kernel_does_not_change_with(tmp_path, old, new):
    assert hash_of(tmp_path, "before") == hash_of(tmp_path, "after", old, new)


def test_the_inputs_of_a_row_name_its_arguments_and_options(task):
    launch = task.launches["sm_90"]
    gpu = engine.TARGETS["sm_90"]
    for changed in (
        Launch(launch.kernel, {**launch.arguments, "classes": 8144}, launch.options),  # a multiple of 16
        Launch(launch.kernel, {**launch.arguments, "GROUP": 4}, launch.options),
        Launch(launch.kernel, launch.arguments, {**launch.options, "num_warps": 16}),
    ):
        assert changed.inputs(gpu) != launch.inputs(gpu)
    assert launch.inputs(gpu) != launch.inputs(engine.TARGETS["sm_80"])
    assert Launch(launch.kernel, dict(launch.arguments), dict(launch.options)).inputs(gpu) == launch.inputs(gpu)


# --- recording and reading -------------------------------------------------------------------------------------------


class RowArguments(NamedTuple):
    pointer: object
    absent: object
    one: int
    sixteen: int
    odd: int
    scale: float


@triton.jit(do_not_specialize=["count"])
def _named_kernel(out_ptr, row, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(row.pointer + offsets * row.one) * row.scale + row.sixteen + row.odd
    if row.absent is not None:
        value += 1
    tl.store(out_ptr + offsets, value, mask=offsets < count)


def named_launch(**changes) -> Launch:
    x = torch.empty(64, device="meta")
    row = RowArguments(x, None, 1, 32, 7, 1.0)._replace(**changes)
    return Launch(_named_kernel, {"out_ptr": x, "row": row, "count": 1, "BLOCK": 64}, {"num_warps": 4})


def test_named_tuples_are_specialised_field_by_field():
    source = named_launch().source()
    assert tuple(source.signature["row"]) == ("*fp32", "constexpr", "constexpr", "i32", "i32", "fp32")
    assert source.signature["count"] == "i32"  # not specialised
    assert {path: value for path, value in source.constants.items() if path[0] == 1} == {(1, 1): None, (1, 2): 1}
    assert source.constants[(3,)] == 64
    assert {path for path, marks in source.attrs.items() if marks} == {(0,), (1, 0), (1, 3)}
    assert named_launch().pointer("row") == 1
    assert named_launch().pointer("count") == 5  # of the tuple, None and 1 are not passed


@pytest.mark.slow
def test_a_named_tuple_compiles():
    compiled = compile_launch(named_launch(), engine.TARGETS["sm_90"])
    assert "ld.global" in compiled.asm["ptx"]


@triton.jit
def _shared_kernel(first_ptr, sum_ptr, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(first_ptr + offsets)
    tl.store(sum_ptr + offsets, value)
    tl.debug_barrier()
    other = tl.load(sum_ptr + (BLOCK - 1 - offsets))
    if GUARDED:
        tl.debug_barrier()
    tl.store(sum_ptr + offsets, other + value)


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_missing_barrier_is_found(guarded):
    x = torch.empty(256, device="meta")
    arguments = {"first_ptr": x, "sum_ptr": x, "GUARDED": guarded, "BLOCK": 256}
    launch = Launch(_shared_kernel, arguments, {"num_warps": 4})
    ptx = compile_launch(launch, engine.TARGETS["sm_90"]).asm["ptx"]
    pointers = {launch.pointer("sum_ptr"): "sum_ptr"}
    assert reading.find_unguarded_stores(ptx, pointers) == ([] if guarded else ["sum_ptr"])
    with pytest.raises(RuntimeError, match="no load through other was found"):
        reading.find_unguarded_stores(ptx, {7: "other"})


def test_every_configuration_launches_a_kernel():
    wanted = {(op, config.title) for op, of in engine.calls.OPS.items() for config in of.configs}
    assert {(task.key.op, task.key.case) for task in engine.tasks()} == wanted
    assert len({task.key for task in engine.tasks()}) == len(engine.tasks())
    assert any(task.shares_memory for task in engine.tasks())


def test_triton_binds_the_arguments_of_every_launch():
    """Its binder has names of its own, ``options`` among them, which no parameter of a kernel may have."""
    for task in engine.tasks():
        assert task.inputs


def test_configurations_are_read_without_triton():
    ops = [path.parent.name for path in sorted((ROOT / "lt_kernels/ops").glob("*/configs.py"))]
    assert len(ops) == len(engine.calls.OPS)
    imports = "; ".join(f"import lt_kernels.ops.{op}.configs" for op in ops)
    script = f"import sys; sys.modules['triton'] = None; {imports}"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- the committed tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", engine.calls.OPS)
def test_the_committed_table_holds_what_the_gate_promises(op):
    for row in committed(op):
        for target, kilobytes in LIMITS.items():
            code = row[target]
            assert code["stack"] == code["spills"] == 0, row
            assert ("shared" in code) >= engine.calls.OPS[op].by_target
            assert code.get("shared", 0) <= kilobytes * 1024, row
            if "products" in code and "float32" not in row["case"]:
                assert code["products"] > 0, row
        assert row.get("per_logit", 0) <= row.get("budget", 1000), row


def rows_of(op: str, fits) -> list[dict]:
    return [row for row in committed(op) if fits(row)]


def plain(row: dict) -> bool:
    return row["case"].startswith(("plain, C 8142", "plain, C 8192"))


def aligned(row: dict) -> bool:
    return row["kernel"] == "expert_cross_entropy_forward_kernel" and row["GROUP"] >= 4


def backward(row: dict) -> bool:
    return "backward" in row["case"] and "E 9" not in row["case"]


@pytest.mark.parametrize(
    ("op", "fits", "least", "kinds"),
    [
        ("margin_cross_entropy", plain, 5, ("loads", "stores")),
        ("expert_cross_entropy", aligned, 8, ("loads", "stores")),
        ("expert_divergence", backward, 1, ("stores",)),
    ],
    ids=["rows", "experts", "divergence"],
)
def test_committed_rows_move_16_bytes_at_a_time(op, fits, least, kinds):
    rows = rows_of(op, fits)
    assert len(rows) >= least
    for row in rows:
        assert all(row["sm_90"][kind]["128"] > 0 for kind in kinds), row


def test_the_table_of_rows_is_whole_and_within_the_limit_of_one_tile():
    assert len(committed("margin_cross_entropy")) > 40
    for row in rows_of("margin_cross_entropy", plain):
        assert "forward" not in row["case"] or row["per_logit"] <= 20


@pytest.mark.parametrize("classes", [8142, 8192, 100000])
@pytest.mark.parametrize("op", ["expert_fusion", "expert_divergence"])
def test_a_row_of_every_width_reads_16_bytes_at_a_time(op, classes):
    wide = rows_of(op, lambda row: f"C {classes}," in row["case"] and "E 9" not in row["case"])
    assert any("128" in row["sm_90"]["loads"] for row in wide)


def test_every_tiled_kernel_of_heads_is_in_the_table():
    rows = rows_of("linear_margin_cross_entropy", lambda row: "products" in row["sm_90"])
    for kernel in ("forward", "grad_input", "grad_factor"):
        for width in (64, 128, 256):
            case = f"linear, class_bias, D {width}, C 8142, bfloat16"
            assert any(
                (row["kernel"], row["case"]) == (f"linear_margin_cross_entropy_{kernel}_kernel", case) for row in rows
            )


def test_the_counted_kernels_of_contrastive_losses_read_16_bytes_at_a_time():
    counted = rows_of("partitioned_logsumexp", lambda row: "per_logit" in row)
    assert all("128" in row["loads"] for row in counted)
    kernels = ("tiled_forward", "grad_query", "grad_key", "grad_both", "block_forward", "block_backward")
    assert {row["kernel"] for row in counted} == {f"partitioned_logsumexp_{kernel}_kernel" for kernel in kernels}
