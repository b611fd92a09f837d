"""GML against its published definition with dense masks; pixels as queries, and segmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import COUNTS, OTHER, C, D, M, N
from _loss_dense import INAT, Leaves, check, counts_like, every_dtype, exact_dtypes, random_labels, run, unit
from _refused import refused
from torch import Tensor, nn

import lt_kernels
from lt_kernels.losses import GMLLoss, _contrastive_base, sample_pixels
from lt_kernels.queues import ClassQueue


def class_means(s: Tensor, keep: Tensor, l: Tensor, classes: int) -> tuple[Tensor, Tensor]:  # noqa: E741
    """log of the mean of exp(s) over the kept keys of each class, -inf where there are none; and how many."""
    member = F.one_hot(l.clamp_min(0), classes).to(s) * (l >= 0)[:, None]
    peak = s.amax(1, keepdim=True).detach()
    total, count = ((s - peak).exp() * keep) @ member, keep.to(s) @ member
    mean = total / count.clamp_min(1)
    return torch.where(count > 0, torch.where(count > 0, mean, 1.0).log() + peak, -math.inf), count


def of_class_means(s: Tensor, keep: Tensor, y: Tensor, l: Tensor, log_prior: Tensor) -> Tensor:  # noqa: E741
    mean, count = class_means(s, keep, l, len(log_prior))
    has = count.gather(1, y[:, None])[:, 0] > 0
    logits = mean + log_prior
    logits = torch.where(has[:, None], logits, 0.0)
    return torch.where(has, F.cross_entropy(logits, y, reduction="none"), 0.0)


def gml_terms(
    query: Tensor,
    key: Tensor,
    log_t: Tensor,
    cosines: Tensor,
    y: Tensor,
    l: Tensor,  # noqa: E741
    n: Tensor,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    log_prior = (n / n.sum()).log()
    every = torch.ones(len(query), len(key), dtype=torch.bool)
    if own is None:
        others = every
    else:  # one key of each query, or which of all
        others = ~own if own.dim() == 2 else torch.arange(len(key)) != own[:, None]
    s = query @ key.T
    con = of_class_means(s / log_t.exp().detach(), every, y, l, log_prior)
    con_temperature = of_class_means(s.detach() / log_t.exp(), others, y, l, log_prior)
    return F.cross_entropy(30 * cosines + log_prior, y, reduction="none"), con, con_temperature


def gml(beta: float = 1.0, gamma: float = 1.0, **k: Any) -> Tensor:
    sup, con, con_temperature = gml_terms(**k)
    return gamma * sup + beta * (con + con_temperature)


def gml_inputs(rows: int = N, keys: int = M, classes: int = C, seed: int = 0) -> tuple[Leaves, Tensor, Tensor, Tensor]:
    """Class 4 has no key, class 5 one key, every third key is empty; queries of all classes."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        "query": unit(rows, D, seed=seed),
        "key": unit(keys, D, seed=seed + 1),
        "cosines": 2 * torch.rand(rows, classes, generator=generator).double() - 1,
        "log_t": torch.tensor(0.1).double().log(),
    }
    y, l = random_labels(rows, classes, seed + 2), random_labels(keys, classes, seed + 3)  # noqa: E741
    y[: min(6, rows)] = torch.arange(min(6, rows)) % classes
    l[l == 4] = 0
    l[l == 5] = 1
    l[::3] = -1
    own = torch.full((rows,), -1)
    fit = min(rows, keys) // 2
    own[:fit] = 2 * torch.arange(fit)
    placed = own[:fit][own[:fit] % 3 != 0]
    l[placed] = y[:fit][own[:fit] % 3 != 0]  # own keys have the queries' labels; those of empty slots do not
    l[l == 4] = 3
    own[:fit] = torch.where(l[own[:fit]] == y[:fit], own[:fit], -1)
    return leaves, y, l, own


def with_temperature(loss: GMLLoss, call: Callable[[], Tensor], log_t: Tensor) -> Tensor:
    """The loss with a tensor of ours in the place of its parameter."""
    del loss.log_temperature
    loss.log_temperature = log_t
    return call()


def make_gml(dtype: torch.dtype, counts: Any = COUNTS, **options: Any) -> GMLLoss:
    return GMLLoss(counts, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options)


def several_keys(y: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Ids of queries, two of which are one sample, one of none; and of keys, up to all of a class of one sample."""
    query_id, key_id = 2**40 + torch.arange(len(y)), torch.full((len(l),), -1)
    for row in (0, 3, 9):
        same = (l == y[row]).nonzero().flatten()
        key_id[same[: 3 if row == 0 else len(same)]] = query_id[row]
    again = (y == y[0]).nonzero().flatten()
    query_id[again[-1]] = query_id[0]
    key_id[(l == (y[0] + 1) % C).nonzero().flatten()[:1]] = query_id[0]  # of another label
    query_id[5] = -1
    return query_id, key_id


def own_keys(query_id: Tensor, key_id: Tensor, y: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    return (query_id[:, None] == key_id) & (query_id >= 0)[:, None] & (y[:, None] == l)


class TestGML:
    @every_dtype
    @pytest.mark.parametrize("weights", [{}, {"beta": 0.5, "gamma": 2.0}, {"gamma": 0.0}], ids=["1", "other", "con"])
    def test_mean(self, backend, dtype, weights):
        leaves, y, l, own = gml_inputs()  # noqa: E741

        def ours(query: Tensor, key: Tensor, cosines: Tensor, log_t: Tensor) -> Tensor:
            loss = make_gml(dtype, **weights)
            return with_temperature(loss, lambda: loss(query, y, key, l, cosines, own_key=own), log_t)

        check(
            ours,
            lambda **k: gml(**weights, **k, y=y, l=l, own=own, n=counts_like(COUNTS, k["query"])).mean(),
            dtype,
            **leaves,
        )

    @exact_dtypes
    @pytest.mark.parametrize("with_own", [False, True], ids=["no-own-keys", "own-keys"])
    def test_each_term_of_each_row(self, backend, dtype, with_own):
        leaves, y, l, own = gml_inputs(seed=10)  # noqa: E741
        for which in range(3):

            def ours(query, key, cosines, log_t, which=which):
                loss = make_gml(dtype, reduction="none")
                keys = {"own_key": own} if with_own else {}
                call = partial(loss, query, y, key, l, cosines, return_terms=True, **keys)
                return with_temperature(loss, call, log_t)[1 + which]

            check(
                ours,
                lambda which=which, **k: gml_terms(
                    **k, y=y, l=l, own=own if with_own else None, n=counts_like(COUNTS, k["query"])
                )[which],
                dtype,
                **leaves,
            )

    @exact_dtypes
    def test_as_many_classes_as_inaturalist(self, backend, dtype):
        leaves, y, l, own = gml_inputs(9, 64, 8142)  # noqa: E741

        def ours(query: Tensor, key: Tensor, cosines: Tensor, log_t: Tensor) -> Tensor:
            loss = make_gml(dtype, INAT)
            return with_temperature(loss, lambda: loss(query, y, key, l, cosines, own_key=own), log_t)

        check(ours, lambda **k: gml(**k, y=y, l=l, own=own, n=counts_like(INAT, k["query"])).mean(), dtype, **leaves)

    def test_ids_find_own_keys(self, backend):
        leaves, y, l, own = gml_inputs(seed=20)  # noqa: E741
        leaves.pop("log_t")
        query_id = 1000 + 7 * torch.arange(N).flip(0)
        query_id[2] = -1
        own[2] = -1
        key_id = torch.full((M,), -1)
        rows = (own >= 0).nonzero().flatten()
        key_id[own[rows]] = query_id[rows]
        loss = make_gml(torch.float64)
        given = (leaves["query"], y, leaves["key"], l, leaves["cosines"])
        by_id = loss(*given, query_id=query_id.int(), key_id=key_id)
        torch.testing.assert_close(by_id, loss(*given, own_key=own))
        assert loss(*given) != by_id
        # an id of another label is nobody's own key
        wrong = torch.full((M,), -1)
        other = int((l == (y[0] + 1) % C).nonzero()[0])
        wrong[other] = query_id[0]
        torch.testing.assert_close(loss(*given, query_id=query_id, key_id=wrong), loss(*given), rtol=0, atol=0)

    @every_dtype
    @pytest.mark.parametrize("chunk", [None, 5 * M + 1], ids=["whole", "chunks"])
    def test_all_keys_of_the_own_sample_are_left_out(self, backend, dtype, chunk, monkeypatch):
        if chunk is not None:
            monkeypatch.setattr(_contrastive_base, "CHUNK", chunk)
        leaves, y, l, _ = gml_inputs(seed=30)  # noqa: E741
        query_id, key_id = several_keys(y, l)
        own = own_keys(query_id, key_id, y, l)
        assert int(own.sum(1).max()) >= 3
        assert bool((own.sum(1) == (y[:, None] == l).sum(1))[own.any(1)].any())  # a query without other keys

        def ours(query: Tensor, key: Tensor, cosines: Tensor, log_t: Tensor) -> Tensor:
            loss = make_gml(dtype, reduction="none")
            given = (query, y, key, l, cosines)
            return with_temperature(loss, lambda: loss(*given, query_id=query_id, key_id=key_id), log_t)

        def dense(**k: Tensor) -> Tensor:
            return gml(**k, y=y, l=l, own=own, n=counts_like(COUNTS, k["query"]))

        check(ours, dense, dtype, **leaves)

    @pytest.mark.parametrize("chunk", [2**22, 5 * M + 1], ids=["whole", "chunks"])
    @pytest.mark.parametrize("by", ["ids", "own_key"])
    def test_second_derivatives_of_the_temperature(self, by, chunk, monkeypatch):
        monkeypatch.setattr(_contrastive_base, "CHUNK", chunk)
        leaves, y, l, own = gml_inputs(seed=30)  # noqa: E741
        query_id, key_id = several_keys(y, l)
        dense_own = own if by == "own_key" else own_keys(query_id, key_id, y, l)
        log_t, given = leaves.pop("log_t"), {"query_id": query_id, "key_id": key_id}
        loss = make_gml(torch.float64, temperature=0.1)
        given = {"own_key": own} if by == "own_key" else given
        arguments = (leaves["query"], y, leaves["key"], l, leaves["cosines"])
        log_t.requires_grad_()
        dense = gml(**leaves, log_t=log_t, y=y, l=l, own=dense_own, n=counts_like(COUNTS, log_t)).mean()
        with lt_kernels.use_backend("reference"):
            ours = loss(*arguments, **given)
            (slope,) = torch.autograd.grad(ours, loss.log_temperature, create_graph=True)
            (actual,) = torch.autograd.grad(slope, loss.log_temperature)
        (slope,) = torch.autograd.grad(dense, log_t, create_graph=True)
        torch.testing.assert_close(actual, torch.autograd.grad(slope, log_t)[0])

    def test_the_published_code_at_its_settings(self, backend):
        """An epoch of CIFAR-100-LT and a batch: keys of both epochs are left out, and the slope shows it."""
        torch.manual_seed(0)
        counts = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
        classes = torch.arange(100).repeat_interleave(torch.tensor(counts))
        queue = ClassQueue(counts, 4096, 32, dtype=torch.float64)
        centers, samples = torch.randn(100, 32).double(), torch.randn(len(classes), 32).double()
        for which in [*torch.randperm(len(classes)).split(128), torch.randperm(len(classes))[:128]]:
            views = centers[classes[which]] + samples[which] + 0.3 * torch.randn(len(which), 32).double()
            slots = queue.enqueue(F.normalize(views, dim=1), classes[which], which)
        y = classes[which]
        query = F.normalize(centers[y] + samples[which] + 0.3 * torch.randn(len(y), 32).double(), dim=1)
        several = (which[:, None] == queue.ids).sum(1) > 1
        assert several.any()
        loss = GMLLoss(counts, temperature=0.1, gamma=0.0, dtype=torch.float64)
        cosines = torch.zeros(len(y), 100).double()
        given = (query, y, queue.features, queue.labels, cosines)
        value = loss(*given, query_id=which, key_id=queue.ids)
        (slope,) = torch.autograd.grad(value, [loss.log_temperature])
        log_t = torch.tensor(0.1).double().log().requires_grad_()
        own, n = which[:, None] == queue.ids, torch.tensor(counts).double()
        filled = queue.labels >= 0
        expected = gml(
            gamma=0.0, query=query, key=queue.features[filled], log_t=log_t, cosines=cosines, y=y,
            l=queue.labels[filled], n=n, own=own[:, filled],
        ).mean()  # fmt: skip
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(slope, torch.autograd.grad(expected, log_t)[0])
        newest = torch.autograd.grad(loss(*given, own_key=slots), [loss.log_temperature])[0]
        assert (newest - slope).abs() > 1e-3

    def test_only_the_temperature_learns_from_the_term_without_the_own_key(self, backend):
        leaves, y, l, own = gml_inputs()  # noqa: E741
        leaves.pop("log_t")
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        loss = make_gml(torch.float64)
        terms = loss(leaves["query"], y, leaves["key"], l, leaves["cosines"], own_key=own, return_terms=True)
        inputs = [*leaves.values(), loss.log_temperature]
        grads = torch.autograd.grad(terms.con_temperature, inputs, retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in grads[:-1])
        assert grads[-1] != 0
        grads = torch.autograd.grad(terms.con, inputs, allow_unused=True)
        assert grads[-1] is None or not grads[-1].any()
        assert terms.div is None
        torch.testing.assert_close(terms.total, terms.sup + terms.con + terms.con_temperature)

    @pytest.mark.parametrize("keys", ["none", "empty", "other-class", "own-only"])
    @pytest.mark.parametrize("rows", [1, 2])
    def test_queries_without_keys_of_their_class(self, backend, keys, rows):
        leaves, y, _, _ = gml_inputs(rows, 3)
        leaves.pop("log_t")
        l = {"none": y[:0], "empty": torch.full((3,), -1), "own-only": torch.full((3,), -1)}.get(keys, (y[0] + 7) % C)  # noqa: E741
        own = torch.full((rows,), -1)
        if keys == "none":
            leaves["key"] = leaves["key"][:0]
        elif keys == "other-class":
            l = l.expand(3)  # noqa: E741
        elif keys == "own-only":
            l[:rows] = y
            own = torch.arange(rows)
        loss = make_gml(torch.float64)
        value, gradients = run(
            lambda query, key, cosines: loss(query, y, key, l, cosines, own_key=own, return_terms=True).total, leaves
        )
        terms = loss(leaves["query"], y, leaves["key"], l, leaves["cosines"], own_key=own, return_terms=True)
        assert terms.con_temperature == 0
        assert (terms.con == 0) == (keys != "own-only" or rows == 1)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        value = loss(leaves["query"], y, leaves["key"], l, leaves["cosines"], own_key=own)
        value.backward()
        assert loss.log_temperature.grad == 0

    def test_distillation(self, backend):
        leaves, y, l, own = gml_inputs()  # noqa: E741
        teacher = 2 * torch.rand(N, C, generator=torch.Generator().manual_seed(3)).double() - 1

        def dense(query: Tensor, key: Tensor, cosines: Tensor, log_t: Tensor) -> Tensor:
            n = counts_like(COUNTS, query)
            rest = gml(query=query, key=key, cosines=cosines, log_t=log_t, y=y, l=l, own=own, n=n).mean()
            p, q = (30 / 4 * teacher.to(cosines)).softmax(1), (30 / 4 * cosines).log_softmax(1)
            return rest + 0.7 * 16 * F.kl_div(q, p, reduction="batchmean")

        for dtype in (torch.float64, torch.float32):

            def ours(query, key, cosines, log_t, dtype=dtype):
                loss = make_gml(dtype, alpha=0.7)
                call = partial(loss, query, y, key, l, cosines, own_key=own, teacher_logits=teacher.to(dtype))
                return with_temperature(loss, call, log_t)

            check(ours, dense, dtype, **leaves)

    def test_ignored_queries(self, backend):
        leaves, y, l, own = gml_inputs()  # noqa: E741
        leaves.pop("log_t")
        ignored = y.clone()
        ignored[::3] = 255
        kept = ignored != 255
        loss = make_gml(torch.float64, ignore_index=255)
        value, gradients = run(lambda query, key, cosines: loss(query, ignored, key, l, cosines, own_key=own), leaves)
        some = loss(leaves["query"][kept], y[kept], leaves["key"], l, leaves["cosines"][kept], own_key=own[kept])
        torch.testing.assert_close(value, some)
        assert not gradients["query"][~kept].any()
        rows = make_gml(torch.float64, ignore_index=255, reduction="none")
        each = rows(leaves["query"], ignored, leaves["key"], l, leaves["cosines"], own_key=own)
        assert not each[~kept].any()
        torch.testing.assert_close(each.sum() / kept.sum(), value)

    def test_without_contrastive_parts(self, backend):
        leaves, y, l, _ = gml_inputs()  # noqa: E741
        n = torch.tensor(COUNTS).double()
        value = make_gml(torch.float64, beta=0.0)(leaves["query"], y, leaves["key"], l, leaves["cosines"])
        torch.testing.assert_close(value, F.cross_entropy(30 * leaves["cosines"] + (n / n.sum()).log(), y))

    @pytest.mark.parametrize("weights", [{}, {"beta": 0.0}, {"gamma": 0.0}, {"beta": 0.0, "reduction": "sum"}], ids=str)
    @pytest.mark.parametrize("batch", ["usual", "ignored", "no-keys"])
    def test_every_parameter_has_a_gradient(self, weights, batch):
        """DistributedDataParallel stops at a parameter that has none."""
        leaves, y, l, _ = gml_inputs()  # noqa: E741
        loss = make_gml(torch.float64, **weights)
        y, l = (torch.full_like(y, -100) if batch == "ignored" else y), (l if batch != "no-keys" else l * 0 - 1)  # noqa: E741
        loss(leaves["query"], y, leaves["key"], l, leaves["cosines"]).backward()
        for name, parameter in loss.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad == 0 or (batch == "usual" and "beta" not in weights)

    def test_distributed_data_parallel_without_contrastive_parts(self, tmp_path):
        if not torch.distributed.is_available():
            pytest.skip("torch was built without torch.distributed")
        leaves, y, l, _ = gml_inputs()  # noqa: E741
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(make_gml(torch.float64, beta=0.0))
            for _ in range(2):  # the second call stops where the first left a parameter out
                model(leaves["query"], y, leaves["key"], l, leaves["cosines"]).backward()
            assert model.module.log_temperature.grad == 0
        finally:
            torch.distributed.destroy_process_group()

    def test_with_a_queue_and_a_network_of_keys(self, backend):
        torch.manual_seed(0)
        queue, network = ClassQueue(COUNTS, 64, 8), nn.Linear(8, D)
        loss = GMLLoss(COUNTS)
        optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], 0.1)
        before = loss.log_temperature.detach().clone()
        for step in range(3):
            y = random_labels(N, C, step)
            ids = step * N + torch.arange(N)
            slots = queue.enqueue(torch.randn(N, 8), y, ids)
            key = F.normalize(network(queue.features), dim=1)
            query = F.normalize(torch.randn(N, D), dim=1)
            given = (query, y, key, queue.labels, torch.rand(N, C))
            value = loss(*given, query_id=ids, key_id=queue.ids)
            torch.testing.assert_close(value, loss(*given, own_key=slots))
            optimizer.zero_grad()
            value.backward()
            assert network.weight.grad.abs().sum() > 0
            optimizer.step()
        assert loss.log_temperature != before
        assert loss.log_temperature.isfinite()

    def test_parameters_and_state(self):
        loss = GMLLoss(COUNTS, temperature=0.05)
        assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
        assert set(loss.state_dict()) == {"log_temperature", "class_counts", "class_bias"}
        torch.testing.assert_close(loss.temperature, torch.tensor(0.05))
        assert loss.log_temperature.shape == ()
        assert loss.half().log_temperature.dtype == torch.float32
        twin = GMLLoss(OTHER)
        twin.load_state_dict(loss.state_dict())
        torch.testing.assert_close(twin.temperature, torch.tensor(0.05))

    @refused(
        "change",
        ({"temperature": 0}, ValueError, "temperature: got 0, expected a number > 0"),
        ({"beta": -1}, ValueError, "beta: got -1, expected a number >= 0"),
        ({"gamma": "1"}, TypeError, "gamma: got str, expected a number"),
        ({"alpha": math.inf}, ValueError, "alpha: got inf, expected a number >= 0"),
        ({"scale": 0}, ValueError, "scale: got 0, expected a number > 0"),
        ({"pixels_per_class": 0}, ValueError, "pixels_per_class: got 0, expected an int >= 1"),
        ({"pixels_per_class": 1.5}, TypeError, "pixels_per_class: got float, expected an int or None"),
        ({"class_counts": [1, 0]}, ValueError, "class_counts: got 0 for 1 of 2 classes"),
        ({"label_smoothing": 0.1}, TypeError, "label_smoothing"),
        ({"weight": COUNTS}, TypeError, "weight"),
    )
    def test_bad_construction(self, change, refusal):
        with refusal:
            GMLLoss(**{"class_counts": COUNTS, **change})

    @refused(
        "change",
        ({"query": torch.zeros(3)}, ValueError, "query: got shape (3,), expected [N, D]"),
        ({"query": torch.zeros(3, D, 2, 2)}, ValueError, "or pixels_per_class in the constructor"),
        ({"key": torch.zeros(5, D + 1)}, ValueError, "key: got 20 features (shape (5, 20)), expected 19"),
        ({"key": None}, TypeError, "key: got NoneType, expected a Tensor [M, D]"),
        ({"logits": torch.zeros(2, C)}, ValueError, "query_label: got shape (3,), expected (2,)"),
        ({"logits": torch.zeros(3, C + 1)}, ValueError, "class_counts: got 10 classes, expected 11 as logits"),
        ({"query_label": torch.tensor([0, 1, C])}, IndexError, "query_label: row 2 has class 10"),
        ({"key_label": torch.full((5,), C)}, IndexError, "key_label: row 0 has class 10, expected 0 <= class < 10"),
        ({"key_label": torch.zeros(4).long()}, ValueError, "key_label: got shape (4,), expected (5,)"),
        ({"query_id": torch.zeros(3).long()}, ValueError, "key_id: got None with query_id, expected both or"),
        ({"key_id": torch.zeros(5).long()}, ValueError, "query_id: got None with key_id, expected both or"),
        (
            {"query_id": torch.zeros(3).long(), "key_id": torch.zeros(4).long()},
            ValueError,
            "key_id: got shape (4,), expected (5,)",
        ),
        ({"own_key": torch.tensor([0, 1, 5])}, IndexError, "own_key: row 2 has key 5, expected 0 <= key < 5"),
        ({"own_key": torch.zeros(3)}, TypeError, "own_key: got dtype torch.float32, expected an integer dtype"),
        (
            {"own_key": torch.zeros(3).long(), "query_id": torch.zeros(3).long(), "key_id": torch.zeros(5).long()},
            ValueError,
            "own_key: got both own_key and ids, expected one of them",
        ),
        ({"teacher_logits": torch.zeros(3, C)}, ValueError, "teacher_logits: got logits with alpha 0.0"),
        ({"generator": torch.Generator()}, ValueError, "generator: got one with query [N, D], expected None"),
        ({"key_label": torch.zeros(5, device="meta").long()}, ValueError, "key_label: got device meta"),
    )
    def test_bad_calls(self, change, refusal):
        given = {"query": torch.zeros(3, D), "query_label": torch.zeros(3).long(), "logits": torch.zeros(3, C)}
        given |= {"key": torch.zeros(5, D), "key_label": torch.zeros(5).long()}
        with refusal:
            GMLLoss(COUNTS)(**{**given, **change})

    def test_bad_teacher_logits(self):
        given = (torch.zeros(3, D), torch.zeros(3).long(), torch.zeros(5, D), torch.zeros(5).long(), torch.zeros(3, C))
        loss = GMLLoss(COUNTS, alpha=1.0)
        with pytest.raises(ValueError, match=r"teacher_logits: got None with alpha 1.0, expected them if and only if"):
            loss(*given)
        with pytest.raises(ValueError, match=r"teacher_logits: got shape \(3, 9\), expected \(3, 10\) as logits"):
            loss(*given, teacher_logits=torch.zeros(3, C - 1))


# --------------------------------------------------------------------------------------------------------- segmentation


def scene(seed: int = 0, height: int = 6, width: int = 5, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Features [2, D, H, W] and classes [2, H, W], with ignored pixels and without class 3."""
    features = unit(2, height, width, D, seed=seed).movedim(3, 1)
    target = torch.randint(0, classes - 1, (2, height, width), generator=torch.Generator().manual_seed(seed))
    target[:, 0] = 255
    return features, target


class TestSamplePixels:
    def test_draws_pixels_of_each_class_without_replacement(self):
        features, target = scene()
        generator = torch.Generator().manual_seed(1)
        sample = sample_pixels(features, target, 7, 255, num_classes=4, generator=generator)
        assert sample.features.shape == (28, D)
        drawn = sample.position >= 0
        counts = torch.bincount(target[target != 255], minlength=4)
        assert torch.equal(torch.bincount(sample.labels[drawn], minlength=4), counts.clamp_max(7))
        assert len(sample.position[drawn].unique()) == int(drawn.sum())
        assert torch.equal(target.flatten()[sample.position[drawn]], sample.labels[drawn])
        assert torch.equal(features.movedim(1, 3).reshape(-1, D)[sample.position[drawn]], sample.features[drawn])
        assert (sample.labels[~drawn] == -1).all()
        assert not sample.features[~drawn].any()
        assert torch.equal(sample.take(target), sample.labels)
        again = sample_pixels(features, target, 7, 255, num_classes=4, generator=generator.manual_seed(1))
        assert torch.equal(again.position, sample.position)
        assert not torch.equal(sample_pixels(features, target, 7, 255, num_classes=4).position, sample.position)

    def test_every_pixel_is_as_likely(self):
        features, target = torch.zeros(1, 1, 1, 6), torch.tensor([[[0, 0, 0, 0, 1, 1]]])
        generator, hits = torch.Generator().manual_seed(0), torch.zeros(6)
        for _ in range(2000):
            position = sample_pixels(features, target, 2, num_classes=2, generator=generator).position
            hits[position] += 1
        torch.testing.assert_close(hits / 2000, torch.tensor([0.5, 0.5, 0.5, 0.5, 1, 1]), rtol=0, atol=0.05)

    def test_gradients_reach_the_pixels_drawn(self):
        features, target = scene()
        features.requires_grad_()
        sample = sample_pixels(features, target.byte(), 3, 255, num_classes=4)
        sample.features.sum().backward()
        got = features.grad.movedim(1, 3).reshape(-1, D)[:, 0]
        expected = torch.zeros(len(got)).double().index_fill(0, sample.position[sample.position >= 0], 1.0)
        assert torch.equal(got, expected)

    def test_a_target_of_another_size(self):
        features, target = scene()
        large = target.repeat_interleave(3, 1).repeat_interleave(2, 2)
        assert torch.equal(
            sample_pixels(features, large, 100, 255, num_classes=4).labels.sort().values,
            sample_pixels(features, target, 100, 255, num_classes=4).labels.sort().values,
        )

    def test_ignored_and_no_pixels(self):
        features, target = scene()
        assert (sample_pixels(features, torch.full_like(target, 255), 2, 255, num_classes=4).labels == -1).all()
        assert (sample_pixels(features, target, 2, 1, num_classes=256).labels != 1).all()  # a class that is ignored
        none = sample_pixels(features[:0], target[:0], 2, 255, num_classes=4)
        assert none.features.shape == (8, D)
        assert (none.position == -1).all()

    @refused(
        "change",
        ({"features": torch.zeros(2, D)}, ValueError, "features: got shape (2, 19), expected [N, D, H, W]"),
        ({"target": torch.zeros(3, 4, 4).long()}, ValueError, "target: got shape (3, 4, 4), expected (2, 4, 4)"),
        ({"target": torch.zeros(2, 4, 4)}, TypeError, "target: got dtype torch.float32, expected an integer dtype"),
        ({"target": torch.full((2, 4, 4), 9)}, IndexError, "target: row 0 has class 9, expected 0 <= class < 4"),
        ({"target": None}, TypeError, "target: got NoneType"),
        ({"per_class": 0}, ValueError, "per_class: got 0, expected an int >= 1"),
        ({"num_classes": 2.0}, TypeError, "num_classes: got float, expected an int"),
    )
    def test_bad_arguments(self, change, refusal):
        given = {"features": torch.zeros(2, D, 4, 4), "target": torch.zeros(2, 4, 4).long(), "per_class": 2}
        with refusal:
            sample_pixels(**{**given, "num_classes": 4, **change})


class TestSegmentation:
    def test_gml_draws_its_queries(self, backend):
        features, target = scene()
        logits = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(2)).double()
        key, l = unit(20, D, seed=3), random_labels(20, 4, 4)  # noqa: E741
        n = [100, 50, 20, 5]
        loss = GMLLoss(n, pixels_per_class=100, ignore_index=255, dtype=torch.float64)  # all pixels
        generator = torch.Generator().manual_seed(0)
        value = loss(features, target, key, l, logits, generator=generator)
        kept = target.flatten() != 255
        flat = logits.movedim(1, 3).reshape(-1, 4)[kept], target.flatten()[kept]
        pixels = features.movedim(1, 3).reshape(-1, D)[kept]
        expected = gml(
            query=pixels,
            key=key,
            log_t=loss.log_temperature,
            cosines=flat[0],
            y=flat[1],
            l=l,
            n=torch.tensor(n).double(),
        )
        torch.testing.assert_close(value, expected.mean())
        # the same, drawn beforehand
        sample = sample_pixels(features, target, 100, 255, num_classes=4)
        drawn = loss(sample.features, sample.labels, key, l, logits, target=target)
        torch.testing.assert_close(drawn, value)

    def test_own_keys_of_drawn_pixels(self, backend):
        features, target = scene()
        sample = sample_pixels(features, target, 4, 255, num_classes=4)
        queue = ClassQueue([100, 50, 20, 5], 40, D, dtype=torch.float64)
        ids = torch.arange(target.numel()).view(target.shape)
        queue.enqueue(sample.features, sample.labels, sample.take(ids))
        logits = torch.rand(2, 4, 6, 5).double()
        loss = GMLLoss([100, 50, 20, 5], pixels_per_class=100, ignore_index=255, dtype=torch.float64)
        slots = torch.full_like(ids, -1).flatten()
        filled = queue.ids >= 0
        slots[queue.ids[filled]] = filled.nonzero().flatten()
        given = (features, target, queue.features, queue.labels, logits)
        by_id = loss(*given, query_id=ids, key_id=queue.ids)
        torch.testing.assert_close(loss(*given, own_key=slots.view(ids.shape)), by_id)
        assert loss(*given) != by_id

    def test_rows_cannot_be_returned(self):
        features, target = scene()
        given = (torch.zeros(3, D), torch.zeros(3).long(), torch.zeros(2, 4, 6, 5))
        loss = GMLLoss([1, 2, 3, 4], pixels_per_class=2, ignore_index=255, reduction="none")
        with pytest.raises(ValueError, match=r"reduction: got 'none' with query \[N, D, H, W\]"):
            loss(features.float(), target, *given)
        with pytest.raises(ValueError, match="target: got one with reduction 'none'"):
            loss(torch.zeros(3, D), torch.zeros(3).long(), *given, target=target)


def test_pixels_of_a_class_that_wraps_to_ignore_index_are_drawn():
    target = torch.full((1, 2, 2), 156, dtype=torch.uint8)  # -100 as uint8
    sample = sample_pixels(torch.randn(1, 3, 2, 2), target, per_class=3, num_classes=160)
    assert int((sample.labels == 156).sum()) == 3


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"own_key": torch.tensor([0, -1])},
        {"query_id": torch.tensor([7, -1]), "key_id": torch.tensor([7, 5, 3, 2])},
    ],
    ids=["none", "own-key", "ids"],
)
def test_gml_of_a_masked_class_has_no_nan_gradient(backend, own):
    loss = GMLLoss([10, 0, 5], zero_counts="mask", gamma=0.0)
    query, key = (F.normalize(torch.randn(n, 4), dim=1).requires_grad_() for n in (2, 4))
    value = loss(query, torch.tensor([1, 0]), key, torch.tensor([1, 1, 0, 2]), torch.rand(2, 3), **own)
    for grad in torch.autograd.grad(value, (query, key, loss.log_temperature)):
        assert bool(grad.isfinite().all())
