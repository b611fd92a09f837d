"""Every example runs, at a small size, and shows what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_large_head_needs_a_tenth_of_the_memory_for_the_same_losses():
    printed = run("large_head.py", "--classes=100000", "--width=16", "--rows=256", "--steps=2")
    rows = re.findall(r"^(F.linear.*?|LinearHead) +([\d.]+) GB +[\d.]+ s +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    (dense, *of_dense), (head, *of_head) = ((name, *map(float, numbers)) for name, *numbers in rows)
    assert (dense, head) == ("F.linear + F.cross_entropy", "LinearHead"), printed
    assert of_head[0] <= of_dense[0] / 10, printed
    assert abs(of_head[1] - of_dense[1]) < 1e-3, printed
    assert abs(of_head[2] - of_dense[2]) < 1e-3, printed
    assert of_head[2] < of_head[1], printed  # it learns


def test_segmentation_finds_rare_classes_by_adjustment_and_contrast():
    printed = run("segmentation.py", "--images=16", "--steps=20")
    accuracy, overlap = (part.splitlines() for part in printed.split("\n\n")[1:])
    for rows in (accuracy, overlap):
        assert rows[0].split()[-2:] == ["frequent", "rare"], printed
    found = {row[:28].strip(): [float(value) for value in row[28:].split()] for row in accuracy[2:]}
    assert list(found) == ["cross-entropy", "logit adjustment", "GML"], printed
    assert found["cross-entropy"][0] > 90, printed  # background
    for name in ("logit adjustment", "GML"):
        assert found[name][-1] > found["cross-entropy"][-1] + 5, printed
