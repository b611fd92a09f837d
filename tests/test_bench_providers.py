"""Providers and the agreement that each is held to; other libraries are stand-ins with their interfaces.

``op`` is the op on logits in memory, ``head`` the linear one, ``balpoe``, ``fusion`` and ``divergence`` are those of
experts, ``contrast`` is the one of contrastive losses.
"""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lt_kernels.bench import contrastive, experts, providers
from lt_kernels.bench.cases import Case
from lt_kernels.bench.op import Op
from lt_kernels.bench.ops import OPS
from lt_kernels.bench.ops import expert_divergence as divergence_module
from lt_kernels.bench.ops import linear_margin_cross_entropy as head_module
from lt_kernels.bench.ops import margin_cross_entropy as rows_module
from lt_kernels.bench.providers import Provider

op, head, balpoe, divergence, fusion, contrast = OPS.values()


@pytest.fixture
def small_inputs():
    return op.cases["odd-7x123"].inputs(torch.float32, "cpu")


# Providers


SMALL = [(one, case) for one in OPS.values() for case in one.cases.values() if not case.devices]
SMALL_DTYPES = [(one, case, dtype) for one, case in SMALL for dtype in one.dtypes["cpu"]]


def can_be_checked(one: Op, case: Case, dtype: str, provider: Provider) -> bool:
    if "compile" in provider.name or not provider.is_loss or provider.unavailable("cpu") is not None:
        return False
    if one is not contrast:
        return True
    if provider.name.startswith("lt-"):  # left out only where the library chooses the same strategy
        return case.method in ("supcon", "moco")
    return provider.left_out(case, dtype, "cpu") is None


@pytest.mark.parametrize(
    ("one", "case", "dtype"), SMALL_DTYPES, ids=[f"{one.name}-{case.name}-{dtype}" for one, case, dtype in SMALL_DTYPES]
)
def test_providers_agree(one, case, dtype):
    agreement = one.make_agreement(inputs := case.inputs(getattr(torch, dtype), "cpu"))
    if one in (head, contrast):
        assert agreement._truth.keys() == {"loss", *(f"gradient of {name}" for name in inputs.leaves)}
    names = [name for name, provider in one.providers.items() if can_be_checked(one, case, dtype, provider)]
    assert {one.eager, "lt[reference]"} <= set(names)
    for name in names:
        agreement.check(name, one.make_step(name, inputs))


def gml(inputs, i, s, others):
    prior, label = inputs.log_prior.double(), inputs.target[i]
    total = F.cross_entropy(30 * inputs["logits"][i] + prior, label)
    other_ids = inputs["key_id"] != inputs["query_id"][i]
    for keep in (torch.ones_like(other_ids), other_ids):
        means = [s[keep & (inputs["key_label"] == c)].exp().mean().log() for c in range(11)]
        total = total + F.cross_entropy(torch.stack(means) + prior, label)
    return total


def bcl(inputs, i, s, others):
    means = [s[others & (inputs["key_label"] == c)].exp().mean() for c in range(5)]
    return torch.stack(means).sum().log() - s[others & (inputs["key_label"] == inputs.target[i])].mean()


def supcon(inputs, i, s, others):
    positive = others & (inputs["key_label"] == inputs.target[i])
    return s[others].logsumexp(0) - s[positive].mean() if positive.any() else s.new_zeros(())


def paco(inputs, i, s, others):
    adjusted = inputs["logits"][i] + (inputs.log_prior.double().exp() + 1e-9).log()
    positive = s[others & (inputs["key_label"] == inputs.target[i])]
    pulled = (adjusted[inputs.target[i]] + 0.05 * positive.sum()) / (1 + 0.05 * len(positive))
    return torch.cat([adjusted, s[others]]).logsumexp(0) - pulled


@pytest.mark.parametrize(
    ("case", "formula", "temperature"),
    [
        ("gml-9x40x6-c11", gml, 0.07),
        ("bcl-12x17x6", bcl, 0.1),
        ("supcon-7x33x5", supcon, 0.07),
        ("paco-5x32x6", paco, 0.2),
    ],
)
def test_contrasts_are_the_formulas(case, formula, temperature):
    """The dense forms against sums over keys, query by query."""
    inputs = contrast.cases[case].inputs(torch.float64, "cpu")
    query, key = contrastive.vectors(inputs)
    losses = [
        formula(inputs, i, (one * key).sum(1) / temperature, torch.arange(len(key)) != i) for i, one in enumerate(query)
    ]
    rounded = {"rtol": 1e-6, "atol": 0.0} if "logits" in inputs.tensors else {}  # their log prior is float32
    torch.testing.assert_close(contrast.make_step("dense", inputs)(), torch.stack(losses).mean(), **rounded)


def test_contrasts_say_where_they_are_not_measured_unasked(monkeypatch):
    def reason(name: str, case: str, dtype: str = "float32", device: str = "cpu") -> str | None:
        return contrast.providers[name].left_out(contrast.cases[case], dtype, device)

    memory, gml = "supcon-512x16384x128", "gml-128x16384x1024-c8142"
    assert reason("compile", memory) is reason("compile", gml, device="cuda") is None
    assert reason("compile", "supcon-2x256x128") is reason("compile", "supcon-2x64x128") is None
    assert memory in reason("compile", gml)
    assert reason("pml", "supcon-2x256x128") is reason("pml", "moco-256x65536x128") is None
    assert "query's own" in reason("pml", memory)
    assert reason("pml", gml) == "it has no such loss"
    assert "library chooses here" in reason("lt-materialize", memory)
    assert reason("lt-chunked", memory) is None
    assert "leaves the strategy to the library" in reason("lt-chunked", gml)
    assert "CUDA" in contrast.providers["lt-tiled"].unavailable("cpu")
    assert "not meant to be fast" in contrast.providers["lt[reference]"].unasked("cpu")
    for module in (
        "pytorch_metric_learning",
        *(f"pytorch_metric_learning.{name}" for name in ("losses", "distances", "reducers")),
    ):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pytorch_metric_learning" in contrast.providers["pml"].unavailable("cpu")


@pytest.mark.parametrize("case", ["views-10x10x5", "moco-5x41x6"])
def test_pytorch_metric_learning_is_called_properly(monkeypatch, case):
    """Norms as they are, and the mean over all queries."""
    calls = []

    class SupConLoss:
        def __init__(self, temperature, distance, reducer):
            calls.append((temperature, distance, reducer))

        def __call__(self, embeddings, labels, ref_emb=None, ref_labels=None):
            key, key_label = (embeddings, labels) if ref_emb is None else (ref_emb, ref_labels)
            return contrastive.dense_supcon(embeddings, key, labels, key_label, 0.07, ref_emb is None)

    package = "pytorch_metric_learning"
    install(monkeypatch, f"{package}.losses", SupConLoss=SupConLoss)
    distance = {"DotProductSimilarity": lambda normalize_embeddings: ("dot", normalize_embeddings)}
    install(monkeypatch, f"{package}.distances", **distance)
    install(monkeypatch, f"{package}.reducers", MeanReducer=lambda: "mean")
    assert contrast.providers["pml"].unavailable("cpu") is None
    contrast.check_agreement("pml", contrast.cases[case].inputs(torch.float32, "cpu"))
    assert calls == [(0.07, ("dot", False), "mean")]


PRODUCTS = [(one, case) for one, case in SMALL if one in (head, contrast)]


@pytest.mark.parametrize(("one", "case"), PRODUCTS, ids=[case.name for _, case in PRODUCTS])
def test_gemms_are_the_products_of_what_learns(one, case):
    inputs = case.inputs(torch.float32, "cpu")
    step = one.make_step("gemms", inputs)
    assert not one.providers["gemms"].is_loss
    for _ in range(2):  # into the same outputs
        step().backward()
    x, y = (inputs["features"], inputs["weight"]) if one is head else contrastive.vectors(inputs)
    x, y, learning = x.detach(), y.detach(), len(y)
    if one is contrast:
        learning = {"views": 0, "moco": len(x), "paco": len(x)}.get(case.method, 0 if case.frozen else len(y))
    torch.testing.assert_close(step.product, x @ y.T)
    torch.testing.assert_close(step.of_x, x @ y.T @ y)
    torch.testing.assert_close(step.of_y, (y @ x.T @ x)[:learning])
    assert all(leaf.grad is None for leaf in inputs.leaves.values())


def test_experts_are_the_published_loops():
    inputs = experts.ExpertCase("c", 7, 123).inputs(torch.float64, "cpu")
    prior = inputs.counts / inputs.counts.sum()

    def loss(target):
        pairs = zip(experts.experts_of(inputs), (-1, 1, 3), strict=True)
        each = [F.cross_entropy(x + tau * (prior + 1e-9).log(), target) for x, tau in pairs]
        return sum(each) / 3

    mixed = 0.7 * loss(inputs.target) + 0.3 * loss(inputs["mixed_target"])
    for name in ("published", "eager"):
        torch.testing.assert_close(balpoe.make_step(name, inputs)(), mixed, rtol=1e-6, atol=0.0)
    p = [x.softmax(1) for x in experts.experts_of(inputs)]
    mean = torch.stack(experts.experts_of(inputs)).mean(0).softmax(1)
    to_mean = sum((mean * (mean / q).log()).sum() for q in p) / 7
    torch.testing.assert_close(divergence.make_step("published", inputs)(), to_mean)
    pairs = sum((q * (q / r).log()).sum() for q in p for r in p) / 7
    inputs.case = dataclasses.replace(inputs.case, variant=divergence_module.PAIRWISE)
    torch.testing.assert_close(divergence.make_step("published", inputs)(), pairs)


def test_experts_are_compiled_in_headline_cases():
    for module in (balpoe, fusion, divergence):
        left_out = module.providers["compile"].left_out
        assert left_out(module.cases["inat18-e3-n512"], "float32", "cpu") is None
        assert "headline cases and small calls only" in left_out(module.cases["inat18-e6-n512"], "float32", "cpu")
        assert left_out(module.cases["inat18-e6-n512"], "float32", "cuda") is None


def test_heads_say_where_they_are_not_measured_unasked(monkeypatch):
    def reason(name: str, case: str, dtype: str = "float32", device: str = "cpu") -> str | None:
        return head.providers[name].left_out(head.cases[case], dtype, device)

    assert "takes many seconds" in reason("torch-linear-ce-chunked", "c100k-n512-d512", "bfloat16")
    assert reason("torch-linear-ce-chunked", "c100k-n512-d512") is None  # a target needs it
    assert reason("torch-linear-ce-chunked", "c1m-n1024-d256", device="cuda") is None
    for name in ("compile", "torch-linear-ce"):
        assert reason(name, "inat18-n512-d2048") is reason(name, "inat21-n512-d2048", device="cuda") is None
        assert "headline cases and small calls only" in reason(name, "inat21-n512-d2048")
    assert "library chooses here" in reason("lt-materialize", "inat18-n512-d2048")
    assert reason("lt-chunked", "inat18-n512-d2048") is None
    assert reason("lt-chunked", "c1m-n64-d256") == "one chunk holds all rows"
    assert "narrow heads" in reason("lt-tiled", "inat18-n8192-d2048", device="cuda")
    assert reason("lt-tiled", "c100k-n4096-d512", device="cuda") is None
    assert "library chooses here" in reason("lt-tiled", "c100k-n8192-d128", "bfloat16", "cuda")
    assert "CUDA" in head.providers["lt-tiled"].unavailable("cpu")
    assert "not meant to be fast" in head.providers["lt[reference]"].unasked("cpu")
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert "2.13" in head.providers["torch-linear-ce-chunked"].unavailable("cpu")
    for peer in ("liger", "cut-cross-entropy", "cut-cross-entropy-exact", "quack"):
        assert head.providers[peer].unavailable("cpu") == "its kernels need CUDA tensors"


def test_providers_that_cannot_run_say_why(monkeypatch):
    def reason(name: str, device: str) -> str | None:
        return op.providers[name].unavailable(device)

    for peer in ("liger", "flash-attn", "quack"):
        assert reason(peer, "cpu") == "its kernels need CUDA tensors"
    monkeypatch.setitem(sys.modules, "quack", None)  # as if it were not there, wherever this runs
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", None)
    assert "quack" in reason("quack", "cuda")
    assert "embeddings" in reason("cut-cross-entropy", "cuda")
    assert "code is that of compile" in op.providers["compile-max-autotune"].unasked("cpu")
    assert op.providers["compile-max-autotune"].unasked("cuda") is None


def test_a_peer_that_breaks_on_import_is_skipped_with_its_message(monkeypatch):
    def import_module(name):
        raise RuntimeError("needs another driver\nand more")

    monkeypatch.setattr(providers.importlib, "import_module", import_module)
    reason = op.providers["liger"].unavailable("cuda")
    assert reason == "liger_kernel.transformers cannot be imported: RuntimeError: needs another driver"


class InPlace(torch.autograd.Function):
    """Like Liger's: the gradient is made in the forward pass and written over the logits."""

    @staticmethod
    def forward(ctx, logits, target):
        probabilities = logits.softmax(1)
        loss = -probabilities.gather(1, target[:, None]).log().mean()
        probabilities.scatter_add_(1, target[:, None], -torch.ones_like(target[:, None], dtype=logits.dtype))
        logits.data.copy_(probabilities / len(target))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None


def install(monkeypatch, path: str, **members) -> None:
    """Make a module with ``members`` importable as ``path``."""
    names = path.split(".")
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), types.ModuleType(".".join(names[:end])))
    vars(sys.modules[path]).update(members)


class Peers:
    """Losses with the interfaces of other libraries; ``calls`` are their options."""

    def __init__(self, wrong: float = 1.0) -> None:
        self.calls, self.wrong = [], wrong

    def of_logits(self, logits, target, **options):
        assert logits.dim() == 2
        assert target.shape == logits.shape[:1]
        self.calls.append(options)
        return self.wrong * InPlace.apply(logits, target)

    def of_features(self, features, weight, target, bias, **options):
        assert (weight.shape, target.shape, bias.shape) == ((123, 19), (7,), (123,))
        self.calls.append(options)
        return F.cross_entropy(F.linear(features, weight, bias), target)

    def install(self, monkeypatch, one: Op, name: str) -> None:
        """Make the module of a provider importable."""
        peers = self

        class Liger(torch.nn.Module):
            def __init__(self, ignore_index=-100, reduction="mean"):
                super().__init__()

            def forward(self, logits, target):
                return peers.of_logits(logits, target)

        class FlashAttention(Liger):
            def __init__(self, ignore_index=-100, reduction="mean", inplace_backward=False):
                super().__init__()
                peers.calls.append({"inplace_backward": inplace_backward})

        class LigerLinear(torch.nn.Module):
            def forward(self, lin_weight, _input, target, bias=None):
                return peers.of_features(_input, lin_weight, target, bias)

        def quack(x, target, lse_partial=None, ignore_index=-100, reduction="none", inplace_backward=False):
            return self.of_logits(x, target, reduction=reduction, inplace_backward=inplace_backward)

        def quack_linear(x, weight, bias, target, ignore_index=-100, reduction="mean", inplace_backward=False):
            return self.of_features(x, weight, target, bias, reduction=reduction, inplace_backward=inplace_backward)

        def cut(e, c, targets, bias=None, impl="cce"):
            return self.of_features(e, c, targets, bias, impl=impl)

        path, member, value = {
            (op.name, "liger"): ("liger_kernel.transformers", "LigerCrossEntropyLoss", Liger),
            (op.name, "flash-attn"): ("flash_attn.losses.cross_entropy", "CrossEntropyLoss", FlashAttention),
            (op.name, "quack"): ("quack.cross_entropy", "cross_entropy", quack),
            (head.name, "liger"): ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", LigerLinear),
            (head.name, "cut-cross-entropy"): ("cut_cross_entropy", "linear_cross_entropy", cut),
            (head.name, "cut-cross-entropy-exact"): ("cut_cross_entropy", "linear_cross_entropy", cut),
            (head.name, "quack"): ("quack.linear_cross_entropy", "linear_cross_entropy_func", quack_linear),
        }[one.name, name]
        install(monkeypatch, path, **{member: value})


IN_PLACE = {"inplace_backward": True}
ROWS = {"liger": {}, "flash-attn": IN_PLACE, "quack": {"reduction": "mean", **IN_PLACE}}
HEADS = {
    "liger": {},
    "cut-cross-entropy": {"impl": "cce"},
    "cut-cross-entropy-exact": {"impl": "cce_exact"},
    "quack": {"reduction": "mean", **IN_PLACE},
}


@pytest.mark.parametrize(
    ("one", "case", "peer", "options"),
    [(op, case, *each) for case in ("odd-7x123", "map-2x19x6x7") for each in ROWS.items()]
    + [(head, "odd-7x19x123", *each) for each in HEADS.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_importable_peer_is_called_properly(monkeypatch, one, case, peer, options):
    peers = Peers()
    peers.install(monkeypatch, one, peer)
    assert one.providers[peer].unavailable("cuda") is None
    inputs = one.cases[case].inputs(torch.float32, "cpu")
    before = [leaf.detach().clone() for leaf in inputs.leaves.values()]
    for _ in range(2):
        one.check_agreement(peer, inputs)
    assert all(map(torch.equal, inputs.leaves.values(), before))  # it may write over its shifted copy, never over these
    assert peers.calls[0] == options


def test_a_peer_of_heads_without_a_bias_is_left_out(monkeypatch):
    install(monkeypatch, "cut_cross_entropy", linear_cross_entropy=lambda e, c, targets, impl="cce": None)
    for name in ("cut-cross-entropy", "cut-cross-entropy-exact"):
        assert "takes no bias" in head.providers[name].unavailable("cuda")


def test_a_wrong_peer_fails_the_agreement_check(monkeypatch, small_inputs):
    Peers(wrong=1.01).install(monkeypatch, op, "liger")
    with pytest.raises(AssertionError, match="liger loss: error"):
        op.check_agreement("liger", small_inputs)


# Agreement


def rejects_an_error(agreement, step, entry, what: str) -> None:
    """``entry`` returns an element of a leaf, whose gradient is made wrong; for None the loss is."""

    def spoiled(error: float):
        return step() + error * (1.0 if entry is None else entry() - entry().detach())

    agreement.check("same", lambda: spoiled(0.0))
    with pytest.raises(AssertionError, match=f"spoiled {what}"):
        agreement.check("spoiled", lambda: spoiled(0.01))


def test_agreement_rejects_a_wrong_gradient_in_the_last_row(small_inputs):
    agreement, step = op.make_agreement(small_inputs), op.make_step("eager", small_inputs)
    rejects_an_error(agreement, step, lambda: small_inputs["logits"][-1, 5], "gradient")


@pytest.mark.parametrize("case", ["odd-7x123", "map-2x19x6x7"])
def test_agreement_of_a_large_case_samples_rows_but_not_the_loss(monkeypatch, case):
    monkeypatch.setattr("lt_kernels.bench.agreement.CHECKED_LOGITS", 3 * op.cases[case].classes)  # three rows
    inputs = op.cases[case].inputs(torch.float32, "cpu")
    agreement = op.make_agreement(inputs)
    rows = inputs.target.numel()
    assert agreement._rows.tolist() == [0, (rows - 1) // 2, rows - 1]
    for provider in ("eager", "lt[reference]"):
        agreement.check(provider, op.make_step(provider, inputs))
    without_a_row = F.cross_entropy(
        inputs["logits"].detach()[1:] + rows_module.per_class(inputs.log_prior, inputs), inputs.target[1:]
    )
    with pytest.raises(AssertionError, match="short loss"):
        agreement.check("short", lambda: without_a_row + 0 * inputs["logits"].sum())


@pytest.mark.parametrize(
    ("one", "case", "plain"), [(head, "odd-33x45x507", "eager"), (contrast, "gml-9x40x6-c11", "masked")]
)
def test_agreement_is_exact_in_pieces_and_rejects_each_error(monkeypatch, one, case, plain):
    inputs = one.cases[case].inputs(torch.float32, "cpu")
    two_rows = 2 * one.cases[case].logits // len(inputs.target)
    monkeypatch.setattr("lt_kernels.bench.agreement.CHECKED_LOGITS", two_rows)
    monkeypatch.setattr(head_module, "CHECKED_ROWS", 3)
    whole, held = inputs.converted(torch.float64), one.make_agreement(inputs)
    loss = one.make_step(plain, whole)()
    loss.backward()
    true = {name: leaf.grad for name, leaf in whole.leaves.items()}
    if one is head:  # of these rows, and of classes that their targets are among
        rows = torch.tensor([0, 16, 32])
        classes = torch.tensor([0, 253, 506, *inputs.target[rows]]).unique()
        true = {"features": true["features"][rows], "weight": true["weight"][classes]}
    expected = {"loss": loss.detach(), **{f"gradient of {name}": gradient for name, gradient in true.items()}}
    torch.testing.assert_close(held._truth, expected)
    step = one.make_step(plain, inputs)
    for name, leaf in inputs.leaves.items():
        rejects_an_error(held, step, lambda leaf=leaf: leaf.reshape(-1)[-1], f"gradient of {name}")
    rejects_an_error(held, step, None, "loss")
    last = list(inputs.leaves)[-1]
    with pytest.raises(AssertionError, match=f"no gradient of {last}"):
        held.check("frozen", lambda: sum(leaf.sum() for name, leaf in inputs.leaves.items() if name != last))


@pytest.mark.parametrize("module", [balpoe, divergence], ids=lambda one: one.name)
def test_agreement_of_experts_is_exact_in_what_it_samples(monkeypatch, module):
    monkeypatch.setattr("lt_kernels.bench.agreement.CHECKED_LOGITS", 2 * 3 * 123)  # two samples
    for name in [name for name in module.cases if name.startswith("odd-3x7x123")]:
        inputs = module.cases[name].inputs(torch.float32, "cpu")
        agreement = module.make_agreement(inputs)
        loss = module.make_step(module.references[0], inputs)()
        loss.backward()
        torch.testing.assert_close(agreement._truth["loss"].float(), loss.detach(), rtol=1e-5, atol=0.0)
        gradient = torch.stack([x.grad[[0, 6]] for x in experts.experts_of(inputs)])
        torch.testing.assert_close(agreement._truth["gradient"].float(), gradient, rtol=1e-4, atol=1e-7)
        inputs.drop_gradients()
        step, last = module.make_step(module.references[0], inputs), experts.experts_of(inputs)[2]
        rejects_an_error(agreement, step, lambda last=last: last[-1, 5], "gradient")


def test_agreement_of_the_fusion_takes_any_of_equal_classes_and_no_other():
    inputs = fusion.cases["odd-3x7x123-top5"].inputs(torch.float32, "cpu")
    inputs["stacked"].data[:, 2, 7] = inputs["stacked"].data[:, 2, 9] = 20.0
    agreement = fusion.make_agreement(inputs)
    values, classes = fusion.make_step("eager", inputs)()
    swapped = classes.clone()
    swapped[2, :2] = classes[2, [1, 0]]
    agreement.check("another order", lambda: (values, swapped))
    swapped[3, :2] = classes[3, [1, 0]]
    with pytest.raises(AssertionError, match="wrong order logits"):
        agreement.check("wrong order", lambda: (values, swapped))
    with pytest.raises(AssertionError, match="too sure probabilities"):
        agreement.check("too sure", lambda: (values * 1.001, classes))
