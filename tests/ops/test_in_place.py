"""The gradient of the logits written where it is asked for, above all over the logits themselves; the CPU's pool."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from _arguments import changed
from _engines import DTYPES
from _in_place import LAYOUTS, OPTIONS, arguments, check_in_place, needs_of, strided
from _layouts import surroundings_are_nan
from torch import Tensor

from lt_kernels.ops import _native
from lt_kernels.ops._backend import load
from lt_kernels.ops.margin_cross_entropy.arguments import Arguments

# --------------------------------------------------------------------------------------------------------------- tests

#: Of rows: one vector and less, one block, several, more than the scratch of a row holds (1 MiB) with few rows and
#: with many, split. Of panels: less than a vector, one panel, several, one class.
SHAPES = {
    "4x1": (4, 1, 1),
    "5x5": (5, 5, 1),
    "5x123": (5, 123, 1),
    "3x507": (3, 507, 1),
    "3x8142": (3, 8142, 1),
    "2x5x3 pixels": (2, 5, 3),
    "2x19x64 pixels": (2, 19, 64),
    "1x60x300 pixels": (1, 60, 300),
    "1x1x9 pixels": (1, 1, 9),
}
WIDE = {"9x40001": (9, 40_001, 1), "2x270000": (2, 270_000, 1), "8x270000": (8, 270_000, 1)}


_KINDS = [(option, kind) for option in OPTIONS for kind in ("fp32", "bf16")]
_KINDS += [(option, kind) for option in ("class_bias", "mixed, smoothing, vectors") for kind in ("fp64", "fp16")]


@pytest.mark.parametrize(("option", "kind"), _KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_is_as_into_another_tensor(shape, option, kind, backend, device):
    if backend == "triton" and kind == "fp64":
        pytest.skip("Triton kernels take no float64")
    if backend == "reference" and (math.prod(SHAPES[shape]) > 1000 or kind != "fp32"):
        return  # slow, and it has no paths of its own for them
    a = arguments(SHAPES[shape], option, DTYPES[kind], device)
    for layout in LAYOUTS:
        check_in_place(load("margin_cross_entropy", backend), a, layout, exact=device == "cpu")


@pytest.mark.parametrize("option", ["class_bias", "mixed, smoothing, vectors"])
@pytest.mark.parametrize("shape", WIDE)
def test_wide_rows_in_place(shape, option, dtype, backend, device):
    if backend == "reference" and (dtype != torch.float32 or shape != "9x40001"):
        return  # it has no paths of its own for them
    check_in_place(
        load("margin_cross_entropy", backend), arguments(WIDE[shape], option, dtype, device), "contiguous", False
    )


@pytest.mark.parametrize("option", ["class_bias", "mixed", "vectors"])
def test_gradients_too_large_for_the_caches_in_place(option, backend, device):
    """Elsewhere the CPU kernels write these past the caches."""
    few = backend == "reference"  # which has no path of its own for them
    for shape, kind in (((410, 8142, 1), torch.float32), ((100, 65_537, 1), torch.bfloat16)):
        shape = (4, *shape[1:]) if few else shape
        a = arguments(shape, option, kind, device)
        module = load("margin_cross_entropy", backend)
        expected = module.forward(a, False, True)
        buffer = a.input.clone()
        actual = module.forward(a._replace(input=buffer), False, True, out=buffer)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", ["class_bias", "vectors", "probabilities"])
def test_expanded_logits_into_a_tensor_of_any_strides(option, layout, dtype, backend, device):
    module = load("margin_cross_entropy", backend)
    for shape in ((5, 123, 1), (3, 19, 8)):
        a = arguments(shape, option, dtype, device)
        for x in (a.input[:1].expand(shape), a.input[:, :1].expand(shape)):
            b = a._replace(input=x)
            out = strided(layout, torch.zeros_like(a.input))
            expected, actual = module.forward(b, True, True), module.forward(b, True, True, out=out)
            assert actual[4] is out
            assert surroundings_are_nan(out)
            torch.testing.assert_close(actual, expected)
            needs = needs_of(a)
            upstream = torch.tensor(0.7, dtype=expected[0].dtype, device=device)
            wanted = module.backward(upstream, None, expected[3], b, needs)
            out.zero_()
            got = module.backward(upstream, None, expected[3], b, needs, out=out)
            assert got[0] is out
            assert surroundings_are_nan(out)
            torch.testing.assert_close(got, wanted)


def test_no_rows_in_place(backend, device):
    module = load("margin_cross_entropy", backend)
    for shape in ((0, 5, 1), (0, 5, 3), (2, 5, 0)):
        a = arguments((2, 5, 1), "class_bias", torch.float32, device)
        target = a.options.target.new_zeros(shape[0], shape[2])
        a = changed(a, input=a.input.new_empty(shape), target=target)
        result = module.forward(a, True, True, out=a.input)
        assert result[4] is a.input
        needs = [True, False, True, False, False, False]
        grads = module.backward(result[0].new_ones(()), None, result[3], a, needs, out=a.input)
        assert grads[0] is a.input
        assert torch.equal(grads[2], torch.zeros_like(grads[2]))


def test_out_is_left_alone_where_no_gradient_is_asked_for(backend, device):
    module = load("margin_cross_entropy", backend)
    a = arguments((4, 30, 1), "class_bias", torch.float32, device)
    before = a.input.clone()
    result = module.forward(a, True, False, out=a.input)
    assert result[4].shape == (0,)
    needs = [False, False, True, False, False, False]
    grads = module.backward(result[0].new_ones(()), None, result[3], a, needs, out=a.input)
    assert grads[0].shape == (0,)
    assert torch.equal(a.input, before)


class TestChecksOfTheNativeOperator:
    def call(self, a: Arguments, out: Tensor) -> None:
        load("margin_cross_entropy", "native").forward(a, False, True, out=out)

    def test_shape_and_dtype(self):
        a = arguments((4, 30, 1), "plain", torch.float32)
        for out in (a.input[:3], a.input.double(), a.input[:, :, 0]):
            with pytest.raises(ValueError, match="out: got"):
                self.call(a, out)

    def test_overlap(self):
        room = torch.randn(5, 30, 1)
        a = arguments((4, 30, 1), "plain", torch.float32)._replace(input=room[:4])
        with pytest.raises(RuntimeError, match="single memory location"):
            self.call(a, room[1:])
        with pytest.raises(RuntimeError, match="single memory location"):
            self.call(a, torch.zeros(1, 30, 1).expand(4, 30, 1))


# ----------------------------------------------------------------------------------------------------------- the pool


@pytest.mark.skipif(isinstance(_native.load(), str), reason="needs the compiled extension")
class TestPool:
    MB = 1 << 20

    def bytes(self, megabytes: float) -> Tensor:
        return _native.empty_pooled((int(megabytes * self.MB),), torch.uint8)

    @staticmethod
    def free_in_order(tensors: list[Tensor]) -> None:
        while tensors:
            del tensors[0]

    def test_is_an_ordinary_tensor(self):
        for size, kind in (((3, 5), torch.bfloat16), ((0, 4), torch.float32), ((700, 1000), torch.float64)):
            t = _native.empty_pooled(size, kind)
            assert (t.shape, t.dtype, t.device.type, t.is_contiguous()) == (torch.Size(size), kind, "cpu", True)
            t.fill_(1)
            assert t.sum() == t.numel()
            assert not t.requires_grad
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()

    def test_pages_come_back(self):
        """A head of 100,000 classes: its logits and the gradient of its weight, from step to step."""
        addresses = set()
        for _ in range(4):
            logits = _native.empty_pooled((512, 100_000), torch.float32)
            weight = _native.empty_pooled((100_000, 512), torch.float32)
            addresses.add(frozenset((logits.data_ptr(), weight.data_ptr())))
            del logits, weight
        assert len(addresses) == 1
        assert len(next(iter(addresses))) == 2

    def test_gradients_share_it(self):
        # a size of its own: what other tests gave back does not fit
        buffer = self.bytes(4 * 300 * 33_333 / self.MB)
        address = buffer.data_ptr()
        del buffer
        a = arguments((300, 33_333, 1), "plain", torch.float32)
        assert load("margin_cross_entropy", "native").forward(a, False, True)[4].data_ptr() == address

    def test_the_smallest_buffer_that_is_not_much_too_large(self):
        sizes = (98, 100, 104)
        held = {size: self.bytes(size) for size in sizes}
        address = {size: held[size].data_ptr() for size in sizes}
        del held
        taken = self.bytes(99)
        assert taken.data_ptr() == address[100]
        second = self.bytes(99)
        assert second.data_ptr() == address[104]
        third, small = self.bytes(99), self.bytes(86)
        assert third.data_ptr() not in address.values()
        assert small.data_ptr() != address[98]  # more than an eighth would be wasted
        assert self.bytes(90).data_ptr() == address[98]

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' own count of pages")
    def test_what_it_holds_is_bounded(self):
        def address_space() -> int:
            return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")

        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 16 // self.MB
        most = min(max(memory, 512), 4096)
        size = most * 7 // 16  # two fit, three do not
        tensors = [self.bytes(size) for _ in range(4)]  # untouched: no memory, but addresses
        last = {t.data_ptr() for t in tensors[2:]}
        full = address_space()
        self.free_in_order(tensors)
        assert full - address_space() >= (4 * size - most) * self.MB
        again = [self.bytes(size), self.bytes(size)]
        assert {t.data_ptr() for t in again} == last  # the oldest went first
        del again
        many = [self.bytes(2) for _ in range(20)]
        kept = {t.data_ptr() for t in many[12:]}
        self.free_in_order(many)
        assert kept == {t.data_ptr() for t in [self.bytes(2) for _ in range(8)]}

    def test_storage_can_be_resized(self):
        t = self.bytes(6)
        t.untyped_storage().resize_(0)
        assert t.untyped_storage().nbytes() == 0
        t.untyped_storage().resize_(6 * self.MB)
        t.fill_(3)
        assert t.sum() == 18 * self.MB

    def test_the_profiler_counts_its_tensors(self):
        with torch.profiler.profile(profile_memory=True) as profile:
            t = self.bytes(10)
            del t
        changes = [e.cpu_memory_usage for e in profile.events()] + [e.self_cpu_memory_usage for e in profile.events()]
        assert 10 * self.MB in changes
        assert sum(e.self_cpu_memory_usage for e in profile.events() if e.name == "[memory]") <= 0
