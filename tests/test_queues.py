"""Queues against slow models in plain Python, and the momentum update."""

from __future__ import annotations

import copy
import doctest
import io
import re
from collections.abc import Callable

import pytest
import torch
from _refused import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lt_kernels
import lt_kernels.functional as LF
from lt_kernels import queues
from lt_kernels.losses import GMLLoss, PaCoLoss
from lt_kernels.queues import ClassQueue, FeatureQueue, momentum_update

COUNTS = [500, 120, 40, 7, 1, 0]
OTHER = [3, 300, 40, 1, 70, 30]
C = len(COUNTS)


class SlowClassQueue:
    """One list of places for each class, as (feature, id) or None; ``next`` is written next."""

    def __init__(self, sizes: list[int]) -> None:
        self.places = [[None] * size for size in sizes]
        self.next = [0] * len(sizes)

    def enqueue(self, features: list[float], labels: list[int], ids: list[int]) -> list[int]:
        starts = [sum(len(p) for p in self.places[:c]) for c in range(len(self.places))]
        taken = [0] * len(self.places)
        slots, stored = [], []
        for feature, label, index in zip(features, labels, ids, strict=True):
            size = 0 if label < 0 else len(self.places[label])
            if label < 0 or taken[label] >= size:
                slots.append(-1)
                continue
            place = (self.next[label] + taken[label]) % size
            taken[label] += 1
            slots.append(starts[label] + place)
            stored.append((label, place, feature, index))
        for label, place, feature, index in stored:
            self.places[label][place] = (feature, index)
        for c, count in enumerate(taken):
            if self.places[c]:
                self.next[c] = (self.next[c] + count) % len(self.places[c])
        return slots

    def resize(self, sizes: list[int]) -> None:
        for c, size in enumerate(sizes):
            old = self.places[c]
            in_order = [held for held in old[self.next[c] :] + old[: self.next[c]] if held is not None]
            kept = in_order[max(len(in_order) - size, 0) :]
            self.places[c] = kept + [None] * (size - len(kept))
            self.next[c] = len(kept) % size if size else 0

    def state(self) -> tuple[list[float], list[int], list[int]]:
        flat = [(c, held) for c, places in enumerate(self.places) for held in places]
        return (
            [0.0 if held is None else held[0] for _, held in flat],
            [-1 if held is None else c for c, held in flat],
            [-1 if held is None else held[1] for _, held in flat],
        )


def assert_same(queue: ClassQueue, slow: SlowClassQueue) -> None:
    features, labels, ids = slow.state()
    assert queue.labels.tolist() == labels
    assert queue.ids.tolist() == ids
    filled = queue.labels >= 0
    assert queue.features[filled][:, 0].tolist() == torch.tensor(features)[filled].tolist()
    assert queue.pointers.tolist() == slow.next
    assert torch.equal(queue.starts, queue.sizes.cumsum(0) - queue.sizes)


class TestClassQueue:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 3),
        st.lists(st.lists(st.tuples(st.integers(-1, C - 1), st.integers(-1, 30)), max_size=25), max_size=6),
        st.integers(0, 6),
    )
    def test_equals_a_slow_model(self, base, steps, resize_after):
        size = C * base + 17
        queue = ClassQueue(COUNTS, size, 2, base)
        slow = SlowClassQueue(queue.sizes.tolist())
        number = 0.0
        for step, rows in enumerate(steps):
            if step == resize_after:
                queue.update_counts(OTHER)
                slow.resize(queue.sizes.tolist())
                assert queue.sizes.tolist() == ClassQueue(OTHER, size, 2, base).sizes.tolist()
                assert_same(queue, slow)
            labels, ids = [label for label, _ in rows], [index for _, index in rows]
            values = [number + i + 1 for i in range(len(rows))]
            number += len(rows)
            features = torch.tensor(values)[:, None].expand(-1, 2)
            slots = queue.enqueue(features, torch.tensor(labels, dtype=torch.int32), torch.tensor(ids).long())
            assert slots.tolist() == slow.enqueue(values, labels, ids)
            assert_same(queue, slow)

    def test_sizes_are_base_and_a_share_by_largest_remainder(self):
        queue = ClassQueue([6, 3, 1], 20, 4, base=2)  # 14 more: 8.4, 4.2, 1.4
        assert queue.sizes.tolist() == [2 + 9, 2 + 4, 2 + 1]
        assert ClassQueue([6, 0], 9, 4, base=1).sizes.tolist() == [8, 1]
        assert ClassQueue([6, 0], 9, 4, base=0).sizes.tolist() == [9, 0]
        assert ClassQueue([1] * 7, 100, 4).sizes.tolist() == [15, 15, 14, 14, 14, 14, 14]
        assert ClassQueue([5, 1, 1], 3, 4, base=1).sizes.tolist() == [1, 1, 1]
        inat = ClassQueue([1000 / (c + 1) + 2 for c in range(8142)], 16384 * 2, 4, base=3)
        assert inat.sizes.sum() == 16384 * 2
        assert inat.sizes.min() == 3

    def test_oldest_of_its_class_is_replaced(self):
        queue = ClassQueue([1, 1], 6, 1, base=3)
        for step in range(5):
            queue.enqueue(torch.tensor([[float(step)]]), torch.tensor([1]), torch.tensor([step]))
        assert queue.features[:, 0].tolist() == [0, 0, 0, 3, 4, 2]
        assert queue.labels.tolist() == [-1, -1, -1, 1, 1, 1]
        assert queue.ids.tolist() == [-1, -1, -1, 3, 4, 2]

    def test_several_keys_of_a_sample_keep_its_id(self):
        queue = ClassQueue([1, 1], 6, 1, base=3)
        queue.enqueue(torch.zeros(2, 1), torch.tensor([1, 1]), torch.tensor([7, 7]))
        queue.enqueue(torch.zeros(1, 1), torch.tensor([1]), torch.tensor([7]))
        assert queue.ids.tolist() == [-1, -1, -1, 7, 7, 7]

    def test_random_fill_has_every_class(self):
        torch.manual_seed(0)
        queue = ClassQueue(COUNTS, 40, 8, fill="random")
        assert torch.equal(torch.bincount(queue.labels, minlength=C), queue.sizes)
        torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(40))
        assert (queue.ids == -1).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
    def test_features_are_cast_and_carry_no_gradient(self, dtype):
        queue = ClassQueue(COUNTS, 40, 3)
        features = torch.randn(2, 3, dtype=dtype, requires_grad=True)
        queue.enqueue(features, torch.tensor([0, 1]))
        assert queue.features.dtype == torch.float32
        assert not queue.features.requires_grad
        assert torch.equal(queue.features[0], features[0].detach().float())
        assert ClassQueue(COUNTS, 40, 3, dtype=dtype).features.dtype == dtype

    def test_labels_of_any_integer_dtype(self):
        for dtype in (torch.uint8, torch.int16, torch.int64):
            queue = ClassQueue(COUNTS, 40, 3)
            queue.enqueue(torch.ones(2, 3), torch.tensor([0, 1], dtype=dtype))
            assert (queue.labels >= 0).sum() == 2

    def test_nothing_to_store(self):
        queue = ClassQueue(COUNTS, 40, 3)
        before = copy.deepcopy(queue.state_dict())
        assert queue.enqueue(torch.zeros(0, 3), torch.zeros(0).long()).shape == (0,)
        assert queue.enqueue(torch.ones(3, 3), torch.full((3,), -1)).tolist() == [-1, -1, -1]
        assert all(torch.equal(queue.state_dict()[name], value) for name, value in before.items())

    def test_state_dict_round_trip(self):
        queue, twin = ClassQueue(COUNTS, 40, 3), ClassQueue(OTHER, 40, 3)
        labels = torch.tensor([0, 0, 1, 4, 3, 3])
        queue.enqueue(torch.randn(6, 3), labels, torch.arange(6))
        file = io.BytesIO()
        torch.save(queue.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file))
        more = torch.randn(6, 3)
        assert torch.equal(queue.enqueue(more, labels, torch.arange(6)), twin.enqueue(more, labels, torch.arange(6)))
        assert all(torch.equal(twin.state_dict()[name], value) for name, value in queue.state_dict().items())
        with pytest.raises(RuntimeError, match="size mismatch"):
            ClassQueue(COUNTS, 41, 3).load_state_dict(queue.state_dict())

    def test_update_counts_is_in_place_and_undone_by_its_inverse(self):
        queue = ClassQueue(COUNTS, 40, 3)
        held = {name: buffer.data_ptr() for name, buffer in queue.named_buffers()}
        queue.enqueue(torch.ones(3, 3), torch.tensor([0, 1, 5]), torch.arange(3))
        before = copy.deepcopy(queue.state_dict())
        queue.update_counts(OTHER)
        assert (queue.labels >= 0).sum() == 3
        queue.update_counts(torch.tensor(COUNTS))
        assert all(torch.equal(queue.state_dict()[name], value) for name, value in before.items())
        assert {name: buffer.data_ptr() for name, buffer in queue.named_buffers()} == held

    @pytest.mark.parametrize(
        ("counts", "message"),
        [([1, 2], "class_counts: got 2 classes, expected 6"), ([1, -1], "class_counts: got -1")],
        ids=["length", "negative"],
    )
    def test_bad_counts_change_nothing(self, counts, message):
        queue = ClassQueue(COUNTS, 40, 3)
        before = copy.deepcopy(queue.state_dict())
        with pytest.raises(ValueError, match=message):
            queue.update_counts(counts)
        assert all(torch.equal(queue.state_dict()[name], value) for name, value in before.items())

    def test_compiles_to_one_graph(self):
        torch._dynamo.reset()
        queue, eager = ClassQueue(COUNTS, 40, 3), ClassQueue(COUNTS, 40, 3)
        enqueue = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")
        for step in range(4):
            labels = torch.randint(-1, C, (16,), generator=torch.Generator().manual_seed(step))
            features, ids = torch.randn(16, 3), 16 * step + torch.arange(16)
            assert torch.equal(enqueue(features, labels, ids), eager.enqueue(features, labels, ids))
        assert all(torch.equal(queue.state_dict()[name], value) for name, value in eager.state_dict().items())

    @refused(
        "change",
        ({"size": 11}, ValueError, "size: got 11, expected at least 12, 2 for each class"),
        ({"size": 40.0}, TypeError, "size: got float, expected an int"),
        ({"dim": 0}, ValueError, "dim: got 0, expected an int >= 1"),
        ({"base": -1}, ValueError, "base: got -1, expected an int >= 0"),
        ({"base": True}, TypeError, "base: got bool, expected an int"),
        ({"fill": "zeros"}, ValueError, "fill: got 'zeros', expected one of 'empty', 'random'"),
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, expected a floating-point dtype"),
        ({"class_counts": [0, 0]}, ValueError, "class_counts: got 0 for all 2 classes"),
    )
    def test_bad_construction(self, change, refusal):
        with refusal:
            ClassQueue(**{"class_counts": COUNTS, "size": 40, "dim": 3, **change})

    @refused(
        "change",
        ({"features": None}, TypeError, "features: got NoneType, expected a Tensor [N, 3]"),
        ({"features": torch.zeros(2, 4)}, ValueError, "features: got shape (2, 4), expected [N, 3]"),
        ({"features": torch.zeros(2, 3).long()}, TypeError, "features: got dtype torch.int64, expected a floating"),
        ({"features": torch.zeros(2, 3, device="meta")}, ValueError, "features: got device meta, expected cpu as th"),
        ({"labels": [0, 1]}, TypeError, "labels: got list, expected a Tensor [2] of integers"),
        ({"labels": torch.zeros(3).long()}, ValueError, "labels: got shape (3,), expected [2], one for each feature"),
        ({"labels": torch.zeros(2)}, TypeError, "labels: got dtype torch.float32, expected an integer dtype"),
        ({"labels": torch.tensor([0, C])}, IndexError, "labels: row 1 has class 6, expected 0 <= class < 6, or -1"),
        ({"labels": torch.tensor([-2, 0])}, IndexError, "labels: row 0 has class -2, expected 0 <= class < 6"),
        ({"ids": torch.zeros(3).long()}, ValueError, "ids: got shape (3,), expected [2], one for each feature"),
        ({"ids": torch.zeros(2, dtype=torch.bool)}, TypeError, "ids: got dtype torch.bool, expected an integer"),
    )
    def test_bad_calls_change_nothing(self, change, refusal):
        queue = ClassQueue(COUNTS, 40, 3)
        with refusal:
            queue.enqueue(**{"features": torch.zeros(2, 3), "labels": torch.zeros(2).long(), **change})
        assert (queue.labels == -1).all()

    def test_repr(self):
        assert repr(ClassQueue(COUNTS, 40, 3)) == "ClassQueue(num_classes=6, size=40, dim=3, base=2)"


class TestFeatureQueue:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 9), st.lists(st.integers(0, 25), max_size=6))
    def test_equals_a_slow_model(self, size, steps):
        queue, held, place, number = FeatureQueue(size, 2), [-1] * size, 0, 0
        for rows in steps:
            values, slots = list(range(number, number + rows)), []
            number += rows
            for value in values:
                held[place] = value
                slots.append(place)
                place = (place + 1) % size
            slots = [s if held[s] == value else -1 for s, value in zip(slots, values, strict=True)]
            given_features = torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, 2)
            assert queue.enqueue(given_features, torch.tensor(values).long()).tolist() == slots
            assert queue.labels.tolist() == held
            filled = queue.labels >= 0
            assert queue.features[filled, 1].tolist() == queue.labels[filled].tolist()
            assert int(queue.pointer) == place

    def test_state_dict_and_dtype(self):
        queue = FeatureQueue(5, 3, dtype=torch.float16)
        queue.enqueue(torch.randn(7, 3, requires_grad=True), torch.arange(7))
        twin = FeatureQueue(5, 3, dtype=torch.float16)
        twin.load_state_dict(queue.state_dict())
        assert set(queue.state_dict()) == {"features", "labels", "pointer"}
        assert torch.equal(twin.features, queue.features)
        assert queue.features.dtype == torch.float16
        assert repr(queue) == "FeatureQueue(size=5, dim=3)"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_enqueue_is_six_operators(self, dtype):
        """Beside views and the check of the labels' values."""
        queue, names = FeatureQueue(5, 3, dtype=dtype), []

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if not function.is_view:
                    names.append(function.overloadpacket.__name__)
                return function(*args, **(kwargs or {}))

        features, labels = torch.ones(4, 3, dtype=dtype), torch.arange(4)
        with Seen():
            queue.enqueue(features, labels)
        check = ["aminmax", "_local_scalar_dense", "_local_scalar_dense"]
        assert names == [*check, "arange", "add", "remainder", "index_copy_", "index_copy_", "copy_"]

    def test_compiles_to_one_graph(self):
        torch._dynamo.reset()
        queue = FeatureQueue(5, 3)
        enqueue = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")
        for step in range(3):
            enqueue(torch.ones(4, 3), 4 * step + torch.arange(4))
        assert queue.labels.tolist() == [10, 11, 7, 8, 9]

    @refused(
        "arguments",
        ((0, 3), ValueError, "size: got 0, expected an int >= 1"),
        ((4, "3"), TypeError, "dim: got str, expected an int"),
    )
    def test_bad_construction(self, arguments, refusal):
        with refusal:
            FeatureQueue(*arguments)

    def test_bad_calls(self):
        with pytest.raises(ValueError, match=re.escape("features: got shape (2, 4), expected [N, 3]")):
            FeatureQueue(5, 3).enqueue(torch.zeros(2, 4), torch.zeros(2).long())
        with pytest.raises(ValueError, match=re.escape("labels: got shape (3,), expected [2]")):
            FeatureQueue(5, 3).enqueue(torch.zeros(2, 3), torch.zeros(3).long())


def encoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module(torch.randn(8, 3))
    return module


class TestMomentumUpdate:
    @pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
    @pytest.mark.parametrize("buffers", [True, False])
    def test_averages(self, momentum, buffers):
        target, source = encoder(0), encoder(1)
        source[1].num_batches_tracked += 5
        before = {name: value.clone() for name, value in target.state_dict().items()}
        momentum_update(target, source, momentum, buffers=buffers)
        for name, value in target.state_dict().items():
            new = source.state_dict()[name]
            expected = momentum * before[name] + (1 - momentum) * new if value.is_floating_point() else new
            if not buffers and ("running" in name or "num" in name):
                expected = before[name]
            torch.testing.assert_close(value, expected)

    def test_the_target_needs_no_gradient_and_another_dtype_will_do(self):
        target, source = encoder(0).requires_grad_(False), encoder(1).bfloat16()
        momentum_update(target, source, 0.5)
        assert target[0].weight.dtype == torch.float32
        assert not target[0].weight.requires_grad
        assert source[0].weight.requires_grad

    @refused(
        "arguments",
        ((nn.Linear(2, 3), nn.Linear(2, 4), 0.9), ValueError, "source: got a module that differs in bias, weight"),
        ((nn.Linear(2, 3), nn.Linear(2, 3, bias=False), 0.9), ValueError, "source: got a module that differs in b"),
        ((nn.Linear(2, 3), nn.Linear(2, 3), 1.5), ValueError, "momentum: got 1.5, expected a number in [0, 1]"),
        ((nn.Linear(2, 3), torch.zeros(3), 0.5), TypeError, "source: got Tensor, expected an nn.Module"),
    )
    def test_bad_arguments(self, arguments, refusal):
        with refusal:
            momentum_update(*arguments)


# What a loss does between the queue's enqueues. Each gives the loss of a batch against the queue as it was.

CLASSES = torch.tensor([0, 1, 2, 0, 1])


def filled(kind: str) -> ClassQueue | FeatureQueue:
    queue = ClassQueue(COUNTS, 40, 8) if kind == "class" else FeatureQueue(20, 8)
    generator = torch.Generator().manual_seed(0)
    queue.enqueue(torch.randn(12, 8, generator=generator), torch.arange(12) % 3)
    return queue


def of_supcon(query: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = LF.supervised_contrastive(query, features, CLASSES, labels, temperature=0.5)
    return value


def of_paco(query: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = PaCoLoss(COUNTS, 0.1, zero_counts=1)(query, CLASSES, features, labels, torch.zeros(5, C))
    return value


def of_gml(query: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    return GMLLoss(COUNTS, zero_counts=1)(query, CLASSES, features, labels, torch.zeros(5, C))


@pytest.mark.parametrize("loss", [of_supcon, of_paco, of_gml])
@pytest.mark.parametrize("kind", ["class", "last"])
class TestBetweenEnqueues:
    def query(self) -> Tensor:
        return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def expected(self, kind: str, loss: Callable[..., Tensor]) -> Tensor:
        queue, query = filled(kind), self.query()
        loss(query, queue.features, queue.labels).backward()
        queue.enqueue(query.detach(), CLASSES)  # after backward
        assert query.grad is not None
        return query.grad

    def test_a_snapshot_outlives_an_enqueue(self, backend, kind, loss):
        queue, query = filled(kind), self.query()
        keys = queue.snapshot()
        value = loss(query, keys.features, keys.labels)
        queue.enqueue(query.detach(), CLASSES)
        value.backward()
        assert torch.equal(query.grad, self.expected(kind, loss))
        assert not torch.equal(keys.features, queue.features)
        assert (keys.ids is None) == (kind == "last")

    def test_an_enqueue_before_backward_is_an_error_that_says_what_to_do(self, backend, kind, loss):
        queue, query = filled(kind), self.query()
        value = loss(query, queue.features, queue.labels)
        queue.enqueue(query.detach(), CLASSES)
        with pytest.raises(
            RuntimeError, match=r"written in place before backward.* or give the loss queue.snapshot\(\)"
        ):
            value.backward()


def test_paco_of_two_views_holds_a_copy_of_the_queue(backend):
    grads = []
    for enqueue_first in (True, False):
        queue, features = filled("last"), torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(1))
        features.requires_grad_()
        value = PaCoLoss(COUNTS, 0.1, zero_counts=1).two_views(
            features, CLASSES, torch.zeros(5, C), queue.features, queue.labels
        )
        if enqueue_first:
            queue.enqueue(features[:, 1], CLASSES)
        value.backward()
        grads.append(features.grad)
    assert torch.equal(*grads)


def test_queues_move_and_copy():
    for queue in (ClassQueue(COUNTS, 40, 3), FeatureQueue(5, 3)):
        queue.enqueue(torch.ones(2, 3), torch.tensor([0, 1]))
        twin = copy.deepcopy(queue)
        twin.enqueue(torch.ones(2, 3), torch.tensor([1, 1]))
        assert (queue.labels >= 0).sum() == 2
        assert {buffer.device.type for buffer in queue.to("meta").buffers()} == {"meta"}


def test_at_top_level():
    for name in ("ClassQueue", "FeatureQueue", "momentum_update"):
        assert getattr(lt_kernels, name) is getattr(queues, name)


def test_examples_in_docstrings():
    result = doctest.testmod(queues)
    assert result.attempted > 0
    assert result.failed == 0
