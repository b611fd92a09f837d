"""Hold ``margin_cross_entropy`` to the error budget on a device, with nothing installed but torch (and Triton).

Every dtype x case x set of options, value and gradients, through ``lt_kernels.testing``; and that two runs agree bit
for bit. It needs no pytest, so it runs where only torch is installed. Writes JSON; exit status 1 if a check failed.

    python3 scripts/run_device_checks.py --device cuda --backend triton --json checks.json
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import lt_kernels
from lt_kernels import testing
from lt_kernels.functional import margin_cross_entropy

#: rows, classes, positions: both sides of every alignment, of one on-chip row, and a segmentation layout.
Shape = tuple[int, int, tuple[int, ...]]
SHAPES: tuple[Shape, ...] = (
    (1, 1, ()),
    (3, 5, ()),
    (7, 123, ()),
    (5, 507, ()),
    (64, 1000, ()),
    (33, 1203, ()),
    (16, 8142, ()),
    (16, 8192, ()),
    (8, 21_841, ()),
    (4, 32_768, ()),
    (4, 32_769, ()),
    (4, 65_536, ()),
    (2, 100_000, ()),
    (2, 19, (5, 7)),
    (2, 150, (16, 16)),
)
#: those that every set of options is checked on; the others are checked with a class bias
SHAPES_OF_ALL_OPTIONS: tuple[Shape, ...] = ((7, 123, ()), (16, 8142, ()), (4, 65_536, ()), (2, 19, (5, 7)))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"options": ("class_bias",)},
    "vs": {"options": ("class_bias", "class_scale"), "ignored": 0.2},
    "margin": {"options": ("class_bias", "margin", "weight"), "scale": 20.0, "spread": 0.3},
    "angular": {"options": ("margin",), "margin_type": "angular", "scale": 20.0},
    "smoothed": {"options": ("class_bias", "weight"), "label_smoothing": 0.1},
    "mixed": {"options": ("class_bias", "mixed_target")},
    "soft": {"options": ("class_bias",), "soft": True},
    "unreduced": {"options": ("class_bias",), "reduction": "none"},
    "sum": {"options": ("class_bias",), "reduction": "sum"},
    "learned": {
        "options": ("class_bias", "class_scale", "scale"),
        "requires_grad": ("input", "class_bias", "class_scale", "scale"),
    },
}


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and body of every check."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in SHAPES:
            for name in OPTIONS if shape in SHAPES_OF_ALL_OPTIONS else ("bias",):
                rows, classes, positions = shape
                label = f"{'x'.join(map(str, (rows, classes, *positions)))}-{str(dtype).removeprefix('torch.')}"
                draw = functools.partial(
                    testing.sample_inputs, rows, classes, positions, dtype=dtype, device=device, **OPTIONS[name]
                )
                yield f"{name}-{label}", functools.partial(_within_budget, draw)
                if name == "bias":
                    yield f"deterministic-{label}", functools.partial(_deterministic, draw)
                    yield f"outputs-{label}", functools.partial(_outputs, draw)
                    yield f"bad-target-{label}", functools.partial(_bad_target, draw)
                    yield f"no-sync-{label}", functools.partial(_no_synchronisation, draw)


def _within_budget(draw: Callable[[], testing.Sample]) -> None:
    testing.check_margin_cross_entropy(margin_cross_entropy, draw())


def _deterministic(draw: Callable[[], testing.Sample]) -> None:
    first, second = (_value_and_gradient(draw()) for _ in range(2))
    assert all(map(torch.equal, first, second)), "two runs differ"


def _outputs(draw: Callable[[], testing.Sample]) -> None:
    sample = draw()
    output = margin_cross_entropy(
        sample.input, sample.target, **sample.options, return_prediction=True, return_lse=True
    )
    assert torch.equal(output.prediction, sample.input.argmax(1)), "prediction is not the argmax"
    assert torch.isfinite(output.lse).all(), "log-sum-exp is not finite"


def _bad_target(draw: Callable[[], testing.Sample]) -> None:
    sample = draw()
    sample.target.view(-1)[0] = sample.input.shape[1]
    if sample.input.device.type == "cpu":
        try:
            margin_cross_entropy(sample.input, sample.target, **sample.options)
        except IndexError:
            return
        raise AssertionError("a target out of range raised nothing")
    loss = margin_cross_entropy(sample.input, sample.target, **{**sample.options, "reduction": "none"})
    assert torch.isnan(loss.view(-1)[0]), "the loss of a bad target is not NaN"
    assert torch.isfinite(loss.view(-1)[1:]).all(), "a bad target spoilt another row"


def _no_synchronisation(draw: Callable[[], testing.Sample]) -> None:
    sample = draw()
    _value_and_gradient(sample)  # compiles
    sample = draw()
    if sample.input.device.type != "cuda":
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        _value_and_gradient(sample)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _value_and_gradient(sample: testing.Sample) -> tuple[torch.Tensor, torch.Tensor]:
    loss = margin_cross_entropy(sample.input, sample.target, **sample.options)
    loss.sum().backward()
    assert sample.input.grad is not None
    return loss.detach(), sample.input.grad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="triton", choices=("reference", "native", "triton"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what passed and what failed")
    parser.add_argument("--match", default="", metavar="TEXT", help="only checks whose name contains TEXT")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="stop, and fail, after this")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available", file=sys.stderr)
        return 1

    passed, started = 0, time.perf_counter()
    failed: dict[str, str] = {}
    not_run: list[str] = []
    with lt_kernels.use_backend(arguments.backend):
        for name, body in checks(arguments.device):
            if arguments.match not in name:
                continue
            if time.perf_counter() - started > arguments.seconds:
                not_run.append(name)
                continue
            try:
                body()
                passed += 1
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"FAILED {name}: {failed[name]}", flush=True)
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
    seconds = time.perf_counter() - started
    print(
        f"{passed} passed, {len(failed)} failed, {len(not_run)} not run in {seconds:.0f} s "
        f"on {arguments.device} with {arguments.backend}"
    )
    if arguments.json:
        facts: dict[str, Any] = {"passed": passed, "failed": failed, "not_run": not_run, "seconds": round(seconds, 1)}
        facts["info"] = lt_kernels.info()
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if failed or not_run or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
