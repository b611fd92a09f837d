"""The launches of Triton kernels as pure functions of sizes and dtype, without a device."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the launch tables are those of the Triton backend")

import torch
from torch import Tensor

from lt_kernels.ops._gemm import launch as products
from lt_kernels.ops._rows import triton_experts as common
from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.expert_cross_entropy.arguments import Arguments
from lt_kernels.ops.expert_cross_entropy.triton import launch as expert_rows
from lt_kernels.ops.expert_divergence.triton import launch as divergence
from lt_kernels.ops.expert_fusion.triton import launch as fusion
from lt_kernels.ops.linear_margin_cross_entropy.triton import launch as linear
from lt_kernels.ops.margin_cross_entropy.triton import launch as margin
from lt_kernels.ops.partitioned_logsumexp import arguments as contract
from lt_kernels.ops.partitioned_logsumexp.arguments import Arguments as ContrastiveArguments
from lt_kernels.ops.partitioned_logsumexp.triton import keys
from lt_kernels.ops.partitioned_logsumexp.triton import launch as partitioned

#: Shared memory of a multiprocessor's program in kilobytes, by architecture (0: AMD's).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 0: 64}

# ------------------------------------------------------------------------------------------------- margin_cross_entropy


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [129, 1000, 8142, 8192, 8199, 21841, 32768, 32769, 65536, 1_000_000, 2**27])
@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_rows_launch_covers_the_row(rows, classes, itemsize):
    for aligned in (False, True):
        for hungry in range(4):
            launch = margin.rows_launch(rows, classes, itemsize, aligned, hungry)
            assert launch.group == (16 // itemsize if aligned else 1)
            for power_of_two in (launch.repeat, launch.num_warps):
                assert power_of_two & (power_of_two - 1) == 0
            assert 1 <= launch.num_warps <= 32
            assert launch.lanes == 32 * launch.num_warps
            assert launch.group * launch.repeat <= 64
            if launch.body == "tile":  # every whole group, wherever the row starts
                assert launch.block >= classes // launch.group * launch.group
                assert launch.block <= 32768
            else:
                assert launch.group * launch.repeat == 16
            if launch.body == "parts":
                assert launch.parts * launch.part_groups * launch.group >= classes
                assert (launch.parts - 1) * launch.part_groups * launch.group < classes
                assert launch.parts <= 1024
                assert launch.part_groups * launch.group % launch.block == 0
        backward = margin.rows_backward_launch(classes, itemsize, aligned)
        assert backward.block <= 4096
        assert backward.part_groups * backward.group == backward.block
        assert backward.parts * backward.block >= classes // backward.group * backward.group
        assert backward.parts <= 65535


def test_rows_take_one_pass_at_the_sizes_that_matter():
    for rows in (1, 64, 8192):
        assert margin.rows_launch(rows, 8142, 2, True).body == "tile"
        assert margin.rows_launch(rows, 8142, 2, True).block == 8192
        assert margin.rows_launch(rows, 32768, 2, True).body == "tile"
        assert margin.rows_launch(rows, 32768 + 8, 2, True).body != "tile"


@pytest.mark.parametrize(
    ("rows", "classes", "itemsize", "body"),
    [
        (64, 1_000_000, 2, "parts"),  # 68 of 132 multiprocessors would be idle
        (64, 1_000_000, 4, "parts"),
        (64, 100_000, 2, "parts"),  # and all rows fit into L2
        (1, 32_776, 2, "loop"),  # too short a call for two more launches
        (132, 100_000, 2, "loop"),  # a full wave, and its rows fit into L2 nearly
        (4096, 65_536, 2, "loop"),
        (4096, 100_000, 2, "loop"),
        (8192, 1_000_000, 2, "loop"),  # neither fits: the fewer launches
        (140, 1_000_000, 2, "parts"),  # a second wave of 8 rows
    ],
)
def test_wide_rows_are_visited_whole_or_in_parts(rows, classes, itemsize, body):
    assert margin.rows_launch(rows, classes, itemsize, True).body == body


def test_programs_that_loop_leave_their_rows_in_the_cache():
    for classes in (32776, 65536, 94_000):
        launch = margin.rows_launch(4096, classes, 2, True)
        assert launch.body == "loop"
        together = 132 * (32 // launch.num_warps)
        assert together * classes * 2 <= 25_000_000


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 19, 128, 150, 8142])
@pytest.mark.parametrize("positions", [1, 2, 49, 512, 512 * 512])
def test_tiles_launch(positions, classes, contiguous):
    for itemsize in (2, 4):
        launch = margin.tiles_launch(classes, positions, contiguous, itemsize)
        assert all(size >= 1 and size & (size - 1) == 0 for size in launch)
        assert launch.num_warps <= 8
        assert launch.repeat * launch.lanes * launch.block_k <= 32 * 32 * launch.num_warps
    sums = margin.sums_launch(classes, positions, contiguous)
    assert all(size >= 1 and size & (size - 1) == 0 for size in sums)
    assert sums.block_c * sums.block_k <= 2048


def test_segmentation_maps_stay_in_the_cache():
    """The classes of Cityscapes, PASCAL VOC and ADE20K, between their first and their second read."""
    for classes, itemsize in ((19, 2), (21, 2), (150, 2), (19, 4), (150, 4)):
        launch = margin.tiles_launch(classes, 512 * 512, False, itemsize)
        assert launch.block_k == 128
        assert 132 * 16 / launch.num_warps * launch.block_k * classes * itemsize <= 25_000_000
        assert -(-classes // (launch.repeat * launch.lanes)) * launch.repeat * launch.lanes <= 1.3 * classes


@pytest.mark.parametrize("blocks", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("class_tiles", [1, 32, 5000])
def test_class_vector_gradients_are_split_into_a_bounded_number_of_programs(blocks, class_tiles):
    per_program = margin.blocks_per_program(blocks, class_tiles)
    programs = -(-blocks // per_program)
    assert 1 <= per_program <= blocks
    assert programs * per_program >= blocks
    assert programs * class_tiles <= max(margin.PARTIAL_PROGRAMS, class_tiles)


# ------------------------------------------------------------------------------------------ linear_margin_cross_entropy


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("width", [1, 16, 33, 64, 96, 128, 200, 256, 300, 512])
def test_linear_tiles_are_possible(width, architecture):
    for itemsize, tf32 in ((2, False), (4, False), (4, True)):
        for options in range(4):
            launches = linear.launches_of(width, itemsize, tf32, options, architecture)
            for launch in launches:
                for size in (launch.block_n, launch.block_c, launch.num_warps):
                    assert size & (size - 1) == 0
                assert min(launch.block_n, launch.block_c) >= 16
                assert products.PADDING % launch.block_n == 0
            for launch in (launches.forward, launches.grad_input):  # what the pipeline and the resident block take
                vectors = launch.block_c * max(launch.num_stages - 1, 1)
                assert vectors * products.block_d(width) * itemsize <= SHARED[architecture] * 1024


def test_more_linear_features_than_the_table_has_are_refused():
    with pytest.raises(ValueError, match="got 513 columns, expected at most 512"):
        linear.launches_of(513, 2, False, 0, 90)


@pytest.mark.parametrize("blocks", [1, 2, 64, 132, 133, 1000])
@pytest.mark.parametrize("tiles", [1, 2, 64, 65, 5000])
def test_splits_cover_the_tiles(tiles, blocks):
    for together in (1, 2):
        for most in (1, 64):
            per_split = products.tiles_per_split(blocks, tiles, together, most)
            splits = -(-tiles // per_split)
            assert 1 <= splits <= most
            assert (splits - 1) * per_split < tiles <= splits * per_split


def test_few_rows_fill_the_machine():
    for rows, classes in ((128, 100_000), (256, 8142), (1024, 8142)):
        launch = linear.launches_of(128, 2, False, 0, 90).forward
        blocks, tiles = -(-rows // launch.block_n), -(-classes // launch.block_c)
        splits = -(-tiles // products.tiles_per_split(blocks, tiles, launch.together))
        assert blocks * splits >= 0.9 * min(132, 64 * blocks)


def test_partial_gradients_have_a_bound():
    assert products.most_splits(8192 * 128) == 64
    assert products.most_splits(1_000_000 * 256) == 1


def test_float32_products_are_as_exact_as_those_of_torch():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert products.product_precision(torch.float32) == precision
            assert products.product_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


TF32 = """
import torch
from lt_kernels.ops._gemm import launch as backend
assert backend.product_precision(torch.float32) == "ieee"
{setting}
assert backend.product_precision(torch.float32) == "tf32"
assert backend.product_precision(torch.bfloat16) == "ieee"
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_float32_products_follow_torch(setting):
    """However TF32 was allowed: torch's older flag raises once the newer one has been set."""
    if "fp32_precision" in setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the older flag only")
    result = subprocess.run(
        [sys.executable, "-c", TF32.format(setting=setting)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------ partitioned_logsumexp


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("width", [1, 16, 33, 64, 96, 128, 200, 256])
def test_contrastive_tiles_are_possible(width, architecture):
    for itemsize, tf32 in ((2, False), (4, False), (4, True)):
        launches = partitioned.launches_of(width, itemsize, tf32, architecture)
        for launch in launches:
            if launch is None:
                continue
            for size in (launch.block_n, launch.block_c, launch.num_warps):
                assert size & (size - 1) == 0
            assert min(launch.block_n, launch.block_c) >= 16
            assert products.PADDING % launch.block_n == products.PADDING % launch.block_c == 0
            resident, moving = sorted((launch.block_n, launch.block_c), reverse=True)
            vectors = resident + moving * max(launch.num_stages, 1)
            if architecture == 0:  # what is resident is in registers
                vectors = moving
            assert vectors * products.block_d(width) * itemsize <= SHARED[architecture] * 1024


def test_more_contrastive_features_than_the_table_has_are_refused():
    with pytest.raises(ValueError, match="got 257 columns, expected at most 256"):
        partitioned.launches_of(257, 2, False, 90)


@pytest.mark.parametrize("columns", [1, 8, 500, 512, 513, 4096, 100_000])
def test_a_row_fills_the_lanes_of_a_block(columns):
    launch = partitioned.block_launch(columns)
    assert launch["LANES"] == 32 * launch["num_warps"]
    assert launch["num_warps"] == 1 or launch["LANES"] * launch["GROUP"] < 2 * columns


def test_exponentials_are_relative_to_a_bound_only_where_there_is_one():
    def constant(scale: float = 30.0, normalized: bool = True, **others: torch.Tensor) -> bool:
        x, label = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int32)
        vectors = {name: others.get(name) for name in ("key_bias", "key_scale", "learned_scale")}
        settings = {"scale": scale, "key_grad_begin": 0, "key_grad_end": 2, "normalized": normalized}
        return partitioned.bounds_exponents(ContrastiveArguments(x, x, label, label, None, **vectors, **settings))

    assert constant()
    assert constant(-30.0)
    assert not constant(30.1)
    assert not constant(normalized=False)
    for name in ("key_bias", "key_scale", "learned_scale"):
        assert not constant(**{name: torch.ones(2)})


def test_the_kernels_number_statistics_as_the_contract_does():
    for name in ("NEG_PEAK", "NEG_MASS", "POS_PEAK", "POS_MASS", "POS_SUM", "NUM_POS", "NEG_SLOPE", "POS_SLOPE"):
        assert getattr(keys, name).value == getattr(contract, name)


# -------------------------------------------------------------------------------------------------------------- experts


def power_of_two(*sizes: int) -> bool:
    return all(size >= 1 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("k", [0, 1, 8])
@pytest.mark.parametrize("classes", [1, 33, 129, 8142, 8192, 8193, 16384, 16391, 100_000, 10**6, 2**27])
def test_parts_of_the_fusion_cover_the_row(classes, k):
    for column_bytes in (2, 6, 12, 36):
        for group in (1, 2, 4, 8):
            launch = fusion.fusion_launch(classes, column_bytes, group, k)
            assert power_of_two(launch.group, launch.repeat, launch.tiles, launch.num_warps)
            assert launch.num_warps <= 16
            assert launch.group * launch.repeat * launch.tiles <= (32 if column_bytes <= 8 else 16)
            assert launch.parts * launch.part_groups >= classes // group
            assert launch.parts == 1 or (launch.parts - 1) * launch.part_groups < classes // group
            assert launch.parts * max(k, 1) <= fusion.CANDIDATES or classes > 10**6
            assert launch.parts == 1 or classes > 8192
            assert launch.parts < 65536


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 6, 8, 9, 17, 65])
def test_launches_of_the_divergence(experts):
    for classes in (1, 33, 1000, 8142, 8192, 100_000, 10**6):
        for group in (1, 2, 4, 8):
            for rows in (1, 256, 4096):
                forward = divergence.forward_launch(experts, rows, classes, group)
                backward = divergence.backward_launch(experts, classes, group)
                for launch in (forward, backward):
                    assert power_of_two(launch.group, launch.repeat, launch.num_warps)
                    assert launch.num_warps <= 8
                    assert launch.group <= group
                    assert launch.group * launch.repeat <= 16
                    assert launch.group * launch.repeat * experts <= max(divergence.PER_THREAD, experts)
                assert forward.group == backward.group
    assert divergence.forward_launch(3, 1024, 8142, 8).group == 8


def test_few_rows_get_more_warps():
    warps = [divergence.forward_launch(3, rows, 8142, 8).num_warps for rows in (64, 256, 1024, 8192)]
    assert warps == [8, 8, 2, 1]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [1, 7, 129, 1000, 8142, 8192, 8199, 16384, 16391, 21841, 100_000, 2**27])
def test_expert_launch_covers_the_row(classes, itemsize):
    for group in {1, 2, 16 // itemsize}:
        for options in range(4):
            found = expert_rows.experts_launch(classes, itemsize, group, options)
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


def test_experts_take_one_pass_at_the_sizes_that_matter():
    for classes in (8142, 8192, 16384):
        launch, keep, ahead = expert_rows.experts_launch(classes, 2, 8, 0)
        assert keep
        assert launch.num_warps == 8
        assert ahead == (classes <= 8192)
        if ahead:  # two programs to a multiprocessor
            assert 2 * launch.max_registers * 32 * launch.num_warps == 65536
    assert expert_rows.experts_launch(8142, 4, 4, 1) is not None
    assert expert_rows.experts_launch(16385 + 7, 2, 8, 0) is None


def parts_of(logits: list[torch.Tensor]) -> list[expert_rows.Part] | None:
    experts = logits[0].shape[0] if logits[0].dim() == 3 else len(logits)
    options = RowOptions(torch.zeros(logits[0].shape[-2], 1, dtype=torch.int64))
    return expert_rows.parts_of(Arguments(logits, options, None, None, [0.0] * experts), [])


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


def test_groups_are_as_wide_as_the_strides_allow():
    room = torch.zeros(10**5, dtype=torch.bfloat16)
    assert room.data_ptr() % 16 == 0

    def group(shape: tuple[int, int, int], strides: tuple[int, int, int], offset: int = 0, *outputs: Tensor) -> int:
        return common.layout_of([room.as_strided(shape, strides, offset)], *outputs).group

    assert group((3, 4, 8142), (4 * 8142, 8142, 1)) == 8
    assert group((3, 3, 8142), (3 * 8142, 8142, 1)) == 2
    assert group((3, 4, 8142), (8142, 3 * 8142, 1)) == 2
    assert group((3, 4, 8192), (8192, 3 * 8192, 1)) == 8
    assert group((3, 4, 8142), (4 * 8142, 8142, 1), 1) == 1
    assert group((1, 4, 8142), (5, 8142, 1)) == 8
    assert group((3, 4, 8142), (4 * 8142, 8142, 1), 0, torch.zeros(3, 4, 8142)) == 8
    assert group((3, 4, 7000), (4 * 7004, 7004, 1), 0, torch.zeros(4, 7000)) == 4
    experts = [room[e * 33000 :][:32568].view(4, 8142) for e in range(3)]
    assert common.layout_of(experts).group == 8
    assert common.layout_of(experts).expert_stride == 0
