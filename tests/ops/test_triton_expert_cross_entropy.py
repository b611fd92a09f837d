"""The experts' Triton kernel without a GPU: in the interpreter (a process of its own), and its launch table."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton")

import torch
from test_triton import run_in_the_interpreter

from lt_kernels.ops.expert_cross_entropy import triton as backend
from lt_kernels.ops.expert_cross_entropy.arguments import Arguments


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    report = run_in_the_interpreter("triton_expert_cross_entropy_interpreted.py")
    assert int(re.search(r"(\d+) passed", report)[1]) > 160, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.slow
def test_generic_cases_in_the_interpreter():
    """Of the suite of all backends, what goes another way than through the kernel alone."""
    cases = "(test_value_and_every_gradient or test_ensemble) and fp32 and not sum-none"
    report = run_in_the_interpreter("test_expert_cross_entropy.py", "-k", f"{cases} and (nine or learn or columns)")
    assert int(re.search(r"(\d+) passed", report)[1]) > 5, report[-1000:]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [1, 7, 129, 1000, 8142, 8192, 8199, 16384, 16391, 21841, 100_000, 2**27])
def test_launch_covers_the_row(classes, itemsize):
    for group in {1, 2, 16 // itemsize}:
        for options in range(4):
            found = backend._launch(classes, itemsize, group, options)
            if found is None:
                assert options > 1 or classes > 8192
                continue
            launch, keep, ahead = found
            assert launch.group == group
            assert ahead == (options == 0 and launch.block <= 8192 and group == 16 // itemsize)
            for power_of_two in (launch.repeat, launch.num_warps):
                assert power_of_two & (power_of_two - 1) == 0
            assert 1 <= launch.num_warps <= 8
            assert group * launch.repeat <= (64 if options == 0 and not ahead else 32)
            assert classes // group * group <= launch.block <= 16384  # every whole group, wherever the row starts
            assert not (keep and options)


def test_one_pass_at_the_sizes_that_matter():
    for classes in (8142, 8192, 16384):
        launch, keep, ahead = backend._launch(classes, 2, 8, 0)
        assert keep
        assert launch.num_warps == 8
        assert ahead == (classes <= 8192)
        if ahead:  # two programs to a multiprocessor
            assert 2 * launch.max_registers * 32 * launch.num_warps == 65536
    assert backend._launch(8142, 4, 4, 1) is not None
    assert backend._launch(16385 + 7, 2, 8, 0) is None


def parts_of(logits: list[torch.Tensor]) -> list[backend._Part] | None:
    experts = logits[0].shape[0] if logits[0].dim() == 3 else len(logits)
    nothing = [None] * 9
    target = torch.zeros(logits[0].shape[-2], dtype=torch.int64)
    a = Arguments(logits, target, *nothing, None, [0.0] * experts, 1.0, 0.0, False, -100, 0.0)
    return backend._parts(a, [])


@pytest.mark.parametrize(
    ("shape", "transposed", "group"),
    [
        ((3, 16, 8142), False, 8),
        ((3, 7, 8142), False, 2),
        ((3, 7, 8192), False, 8),
        ((16, 3, 8142), True, 2),  # samples first
        ((16, 3, 8192), True, 8),
        ((3, 7, 8141), False, 1),
    ],
)
def test_rows_of_all_experts_begin_at_the_same_place_within_a_group(shape, transposed, group):
    logits = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    (part,) = parts_of([logits.transpose(0, 1) if transposed else logits])
    assert part.layout.group == part.shape.launch.group == group
    assert part.shape.keep == (group == 8)


@pytest.mark.parametrize(("experts", "launches"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (13, 5)])
def test_experts_are_split_evenly(experts, launches):
    parts = parts_of([torch.empty(4, 100, device="meta") for _ in range(experts)])
    sizes = [len(part.layout.tensors) for part in parts]
    assert len(sizes) == launches
    assert sum(sizes) == experts
    assert max(sizes) - min(sizes) <= launches - 1
    assert [part.which.start for part in parts] == [sum(sizes[:i]) for i in range(launches)]


def test_what_the_kernel_does_not_take():
    assert parts_of([torch.empty(3, 4, 21841, device="meta")]) is None
    assert parts_of([torch.empty(3, 100, 4, device="meta").transpose(1, 2)]) is None
    assert parts_of([torch.empty(4, 100, device="meta"), torch.empty(4, 101, device="meta")[:, :100]]) is None
