"""The scripts of the guides, at a small size: they run, print a result, and it is the right one."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "examples" / "guides"
STANDINS = ROOT / "tests" / "standins"
GROUPS = ("overall", "many", "medium", "few", "balanced")


def run(name: str, *arguments: str) -> str:
    paths = [os.environ.get("PYTHONPATH", "")]
    if "timm" in name and importlib.util.find_spec("torchvision") is None:
        paths.append(str(STANDINS))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(GUIDES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(printed: str) -> dict[str, dict[str, float]]:
    """Return the table that a script prints: method -> group -> percent."""
    rows = printed[printed.index(GROUPS[0]) :]
    assert tuple(rows.splitlines()[0].split()) == GROUPS, printed
    found = re.findall(r"^(\S.*?)((?: +[\d.]+){5})$", rows, re.MULTILINE)
    return {name: dict(zip(GROUPS, map(float, numbers.split()), strict=True)) for name, numbers in found}


def differences(printed: str) -> dict[str, tuple[float, float, float]]:
    """Return the table of a migration: loss -> (value there, value here, relative difference of gradients)."""
    found = re.findall(r"^ *(\S.*?) +([\d.]+) +([\d.]+) +(\d\.\de[-+]\d+)$", printed, re.MULTILINE)
    return {name: tuple(map(float, numbers)) for name, *numbers in found}


@pytest.mark.parametrize(
    ("script", "arguments", "plain", "adjusted", "gain"),
    [
        ("with_accelerate.py", ("--epochs=2",), "cross-entropy", ["logit adjustment"], 5),
        ("with_lightning.py", ("--epochs=2",), "cross-entropy", ["LDAM + DRW"], 4),
        ("with_transformers.py", ("--epochs=1",), "cross-entropy", ["compute_loss_func", "LinearHead"], 5),
        ("with_timm.py", ("--steps=100",), "SoftTargetCrossEntropy", ["LogitAdjustmentLoss", "LinearHead"], 5),
    ],
)
def test_long_tailed_losses_raise_the_balanced_accuracy(script, arguments, plain, adjusted, gain):
    printed = run(script, *arguments)
    found = accuracies(printed)
    assert list(found) == [plain, *adjusted], printed
    assert found[plain]["overall"] > 17, printed  # the largest class alone gives at most 16.2
    for name in adjusted:
        assert found[name]["balanced"] > found[plain]["balanced"] + gain, printed
        assert found[name]["few"] > found[plain]["few"] + gain, printed
    if script == "with_transformers.py":
        assert found["compute_loss_func"] == found["LinearHead"], printed  # the same steps, to the last digit shown
        evaluated = dict(re.findall(r"^(.+): loss of the test split ([\d.]+)$", printed, re.MULTILINE))
        assert list(evaluated) == list(found), printed
        assert float(evaluated["LinearHead"]) == pytest.approx(float(evaluated["compute_loss_func"]), abs=2e-3), printed


def test_processes_learn_what_one_learns():
    printed = run("with_ddp_and_fsdp.py", "--steps=30")
    alone = re.search(r"^one process +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert alone is not None, printed
    loss, balanced = map(float, alone.groups())
    assert loss < 2.9, printed  # log 18 is 2.89
    assert balanced > 100 / 18 + 3, printed
    rows = re.findall(r"^(\w+) +([\d.]+) +([\d.]+) +(\d\.\de[-+]\d+)$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["DDP", "FSDP2"], printed
    for _, *numbers in rows:
        there, accuracy, apart = map(float, numbers)
        assert there == pytest.approx(loss, abs=2e-5), printed
        assert accuracy == pytest.approx(balanced, abs=0.2), printed
        assert apart < 1e-5, printed


@pytest.mark.parametrize(("script", "rows"), [("from_metric_learning.py", 7), ("from_liger_and_cce.py", 7)])
def test_migrations_keep_values_and_gradients(script, rows):
    printed = run(script)
    found = differences(printed)
    assert len(found) == rows, printed
    for there, here, apart in found.values():
        assert here == pytest.approx(there, rel=1e-6, abs=2e-6), printed
        assert apart < 1e-5, printed


def test_pages_include_every_marked_part_of_the_scripts():
    marked = {
        f"examples/guides/{script.name}:{name}"
        for script in GUIDES.glob("*.py")
        for name in re.findall(r"--8<-- \[start:(\w+)\]", script.read_text())
    }
    pages = [page.read_text() for page in (ROOT / "docs" / "guides").glob("*.md")]
    included = {name for page in pages for name in re.findall(r'^--8<-- "(.*:.*)"$', page, re.MULTILINE)}
    assert included == marked
    assert {f"guides/{path.name}" for path in (ROOT / "docs" / "guides").glob("*.md")} == set(
        re.findall(r"guides/\w+\.md", (ROOT / "mkdocs.yml").read_text())
    )
    named = set(re.findall(r"examples/guides/(\w+\.py)", "".join(pages)))
    assert {script.name for script in GUIDES.glob("*.py")} == named


def arguments_of(package: str, file: str, function: str) -> set[str]:
    """Return the names of a function's arguments, or of a class's, from the installed source: it is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: pip install 'lt_kernels[integrations]'"
    assert spec.submodule_search_locations
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text())
    (found,) = (node for node in ast.walk(tree) if getattr(node, "name", "") == function)
    calls = [found] if isinstance(found, ast.FunctionDef) else [
        node for node in found.body if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "forward")
    ]  # fmt: skip
    return {argument.arg for call in calls for argument in (*call.args.args, *call.args.kwonlyargs)} - {"self"}


@pytest.mark.parametrize(
    ("package", "file", "function"),
    [
        ("liger_kernel", "transformers/cross_entropy.py", "LigerCrossEntropyLoss"),
        ("liger_kernel", "transformers/fused_linear_cross_entropy.py", "LigerFusedLinearCrossEntropyLoss"),
        ("cut_cross_entropy", "linear_cross_entropy.py", "linear_cross_entropy"),
    ],
)
def test_the_migration_page_names_every_argument(package, file, function):
    page = (ROOT / "docs" / "guides" / "liger_and_cce.md").read_text()
    (section,) = re.findall(rf"^## `{function}`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == arguments_of(package, file, function)
