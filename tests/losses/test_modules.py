"""Losses, heads and queues in other people's training code: the meta device, ``to_empty``, checkpoints of others, FSDP2
and transformers. Their tensors are never uninitialised memory.
"""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _loss_cases import CASES, CLASSIFIERS, COPIES, COUNTS, EXPERTS, OTHER, C, D, make_batch
from torch import Tensor, nn

from lt_kernels import (
    ArcFaceLoss,
    BalPoELoss,
    ClassQueue,
    CosFaceLoss,
    ELMLoss,
    ExpertHead,
    FeatureQueue,
    GMLLoss,
    LDAMLoss,
    LinearHead,
    LogitAdjustmentLoss,
    PaCoLoss,
    SupConLoss,
)
from lt_kernels.losses import MarginCrossEntropyBase
from lt_kernels.schedules import DeferredReweighting

BATCH = make_batch()


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values[0] if len(values) == 1 else values, device="cpu", dtype=torch.float32))


#: Modules with tensors of every kind: derived, given, learned, of queues. They are made inside a device's context.
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda case=case: case.make(COUNTS, **case.options) for name, case in CASES.items()},
    "counts-array": lambda: LogitAdjustmentLoss(np.array(COUNTS), weight=np.ones(C)),
    "counts-mapping": lambda: LogitAdjustmentLoss(dict(enumerate(COUNTS)), weight=dict(enumerate(COUNTS))),
    "margin": lambda: CosFaceLoss([0.1 * c for c in range(C)]),
    "margin-learned": lambda: CosFaceLoss(parameter(*(0.1 * c for c in range(C)))),
    "margin-scalar-learned": lambda: ArcFaceLoss(parameter(0.3), scale=parameter(20.0)),
    "temperature-learned": lambda: SupConLoss(parameter(0.2)),
    "temperatures": lambda: nn.ModuleList(
        [PaCoLoss(COUNTS, 0.05, temperature=parameter(0.3)), ELMLoss(COUNTS, embedding_margin=[0.1] * C)]
    ),
    "taus": lambda: BalPoELoss(COUNTS, np.array([[0.0] * C, [2.0] * C])),
    "taus-learned": lambda: BalPoELoss(COUNTS, parameter(0.5, 1.5)),
    "masked": lambda: BalPoELoss([*COUNTS[1:], 0], zero_counts="mask", persistent=False),
    "class-queue": lambda: ClassQueue(COUNTS, 64, 5),
    "feature-queue": lambda: FeatureQueue(8, 5),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(module: nn.Module, expected: nn.Module) -> None:
    assert tensors(module).keys() == tensors(expected).keys()
    for name, tensor in tensors(module).items():
        assert tensor.device.type == "cpu", name
        assert tensor.dtype == tensors(expected)[name].dtype, name
        assert torch.equal(tensor, tensors(expected)[name]), name


def poison(module: nn.Module) -> nn.Module:
    """Write over every tensor, as memory that nobody has initialised is."""
    with torch.no_grad():
        for tensor in tensors(module).values():
            tensor.fill_(77)
    return module


# ----------------------------------------------------------------------------------------------------- the meta device


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "to": lambda module: module.to("cpu"),
    "cpu": lambda module: module.cpu(),
    "half": lambda module: module.half().to("cpu").float() if floats_stay(module) else module.to("cpu"),
    "twice": lambda module: module.to_empty(device="cpu").to("meta").to_empty(device="cpu"),
    "bare": lambda module: nn.Sequential(module).to_empty(device="cpu")[0],
    "reset": lambda module: [poison(module.to_empty(device="cpu")), reset(module)][0],
    "copies": lambda module: COPIES["pickle"](copy.deepcopy(module)).to_empty(device="cpu"),
}


def floats_stay(module: nn.Module) -> bool:
    return not isinstance(module, ClassQueue | FeatureQueue | SupConLoss)


def reset(module: nn.Module) -> None:
    """As FSDP, Lightning and torchtitan do."""
    for each in module.modules():
        if tensors(each) and hasattr(each, "reset_parameters"):
            each.reset_parameters()


@every_module
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_built_on_the_meta_device(make, move):
    expected = make()
    with torch.device("meta"):
        module = make()
    for tensor in module.buffers():
        assert tensor.is_meta
    assert_same(move(module), expected)


@every_module
def test_built_on_the_cpu_beside_a_default_device(make):
    """Values are derived on the CPU whatever the default device is, and are moved by one call."""
    with torch.device("meta"):
        module = make()
        assert_same(module.to_empty(device="cpu"), make().to_empty(device="cpu"))
        module.reset_parameters() if hasattr(module, "reset_parameters") else None
    assert_same(module, make())


@every_module
def test_to_empty_keeps_values(make):
    module = make()
    with torch.no_grad():
        for n, tensor in enumerate(tensors(module).values()):
            tensor.add_(n + 1)
    expected = copy.deepcopy(module)
    assert_same(module.to_empty(device="cpu"), expected)
    assert_same(module.share_memory(), expected)
    for tensor in tensors(module).values():
        assert tensor.is_shared()


def test_counts_on_the_device_of_a_tensor_and_of_the_context():
    counts = torch.tensor(COUNTS)
    with torch.device("meta"):
        assert not LogitAdjustmentLoss(counts).class_bias.is_meta
        assert not LogitAdjustmentLoss(counts, weight=[1.0] * C).weight.is_meta
        assert LogitAdjustmentLoss(COUNTS, weight=counts).weight.is_meta
        with pytest.raises(ValueError, match="class_counts: got a tensor on the meta device, which has no values"):
            LogitAdjustmentLoss(torch.tensor(COUNTS))
        with pytest.raises(ValueError, match="weight: got a tensor on the meta device, which has no values"):
            LogitAdjustmentLoss(COUNTS, weight=torch.ones(C))
        with pytest.raises(ValueError, match="taus: got a tensor on the meta device, which has no values"):
            BalPoELoss(COUNTS, nn.Parameter(torch.tensor([0.5, 1.5])))
        with pytest.raises(ValueError, match="temperature: got a tensor on the meta device, which has no values"):
            SupConLoss(nn.Parameter(torch.tensor(0.2)))
        with pytest.raises(ValueError, match="scale: got a tensor on the meta device, which has no values"):
            CosFaceLoss(scale=nn.Parameter(torch.tensor(3.0)))
    loss = LogitAdjustmentLoss(counts, device="meta").double().to_empty(device="cpu")
    assert torch.equal(loss.class_bias, LogitAdjustmentLoss(counts, dtype=torch.float64).class_bias)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.from_counts])
def test_updates_on_the_meta_device_are_kept(name):
    case = CASES[name]
    with torch.device("meta"):
        loss = case.make(COUNTS, **case.options)
        loss.update_counts(OTHER)
    assert_same(loss.to_empty(device="cpu"), case.make(OTHER, **case.options))
    loss.update_counts(COUNTS)
    poison(loss).reset_parameters()
    assert_same(loss, case.make(COUNTS, **case.options))


@pytest.mark.parametrize("name", [*CLASSIFIERS, *EXPERTS])
def test_weights_of_a_schedule_are_kept(name):
    case = CASES[name]
    with torch.device("meta"):
        loss = case.make(COUNTS)
        schedule = DeferredReweighting(loss, COUNTS, switch_epoch=3)
    loss.to_empty(device="cpu")
    assert torch.equal(loss.weight, torch.ones(C))
    schedule.step(3)
    weight = loss.weight.clone()
    loss.to("meta").to_empty(device="cpu")
    assert torch.equal(loss.weight, weight)
    poison(loss).reset_parameters()
    assert torch.equal(loss.weight, weight)
    assert weight[0] < weight[-1]


@pytest.mark.parametrize("name", [*CLASSIFIERS, *EXPERTS])
def test_weights_that_are_set_are_kept(name):
    """``criterion.weight = w`` is how training scripts reweight; no start was known of such a tensor."""
    loss = CASES[name].make(COUNTS)
    loss.weight = torch.arange(1.0, C + 1)
    loss.reset_parameters()
    loss.to("meta").to_empty(device="cpu")
    assert loss.weight.tolist() == list(range(1, C + 1))
    assert_same(loss, CASES[name].make(COUNTS, weight=range(1, C + 1)))


def test_starts_take_eight_bytes_for_each_class():
    tracemalloc.start()
    module = nn.ModuleList([LDAMLoss(torch.ones(2**16)), ClassQueue(torch.ones(2**16), 2**16, 1, base=1)])
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2 * 10 * 2**16, "Python's numbers take 32"
    assert_same(copy.deepcopy(module).to("meta").to_empty(device="cpu"), module)


def test_skip_init():
    head = nn.utils.skip_init(LinearHead, D, C, LogitAdjustmentLoss(COUNTS))
    assert_same(head.loss, LogitAdjustmentLoss(COUNTS))
    with torch.device("meta"):
        head = LinearHead(D, C, LDAMLoss(COUNTS))
    assert_same(head.to_empty(device="cpu").loss, LDAMLoss(COUNTS))
    assert_same(nn.utils.skip_init(ClassQueue, COUNTS, 64, 5), ClassQueue(COUNTS, 64, 5))


@pytest.mark.parametrize("make", [lambda loss: LinearHead(D, C, loss), lambda loss: LinearHead.from_linear(
    nn.Linear(D, C), loss)], ids=["built", "from-linear"])  # fmt: skip
def test_a_loss_moves_to_the_weight_of_its_head(make):
    head = make(LogitAdjustmentLoss(COUNTS, device="meta"))
    assert_same(head.loss, LogitAdjustmentLoss(COUNTS))
    with pytest.raises(ValueError, match="features: got device meta, expected cpu as the head"):
        head(torch.empty(2, D, device="meta"))


def test_a_head_whose_weight_was_replaced():
    head = LinearHead(D, C, LDAMLoss(COUNTS))
    head.weight = nn.Parameter(torch.ones(C + 1, D))
    with pytest.raises(ValueError, match="class_counts: got 10 classes, expected 11 as weight"):
        head(BATCH.embeddings, BATCH.target)


def test_expert_heads_reset_their_scale():
    with torch.device("meta"):
        head = ExpertHead(D, C, 3, scale=20.0, learn_scale=True)
    assert head.to_empty(device="cpu").scale.item() == 20.0
    poison(head).reset_parameters()
    assert head.scale.item() == 20.0
    torch.testing.assert_close(head.weight.norm(dim=-1), torch.ones(3, C))


def test_queues_start_anew():
    queue = ClassQueue(COUNTS, 64, 5, fill="random")
    assert torch.equal(queue.labels, queue._owners())
    queue.enqueue(torch.ones(4, 5), torch.tensor([0, 0, 1, 9]))
    queue.update_counts(OTHER)
    other = ClassQueue(COUNTS, 64, 5)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.reset_parameters()
        assert torch.equal(each.sizes, ClassQueue(OTHER, 64, 5).sizes)
        assert not each.pointers.any()
    assert torch.equal(queue.labels, queue._owners())
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(64))
    assert_same(other, ClassQueue(OTHER, 64, 5))


# -------------------------------------------------------------------------------------------------------- checkpoints


def classifier(loss: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"fc": nn.Linear(D, C), "criterion": loss})


WITH_CLASS_TENSORS = [name for name in CASES if name not in ("supcon", "bcl")]


@pytest.mark.parametrize("name", WITH_CLASS_TENSORS)
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checkpoints_of_cross_entropy_load_strictly(name, assign, device):
    if device == "meta" and not assign:
        return  # torch leaves the layer on the meta device
    source = classifier(nn.CrossEntropyLoss())
    with torch.device(device):
        model = classifier(CASES[name].make(COUNTS))
    model.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert_same(model["criterion"], CASES[name].make(COUNTS))
    assert torch.equal(model["fc"].weight, source["fc"].weight)
    with torch.device(device):
        head = None if name not in CLASSIFIERS else LinearHead(D, C, CASES[name].make(COUNTS), bias=False)
    if head is not None:
        head.load_state_dict(nn.Linear(D, C, bias=False).state_dict(), strict=True, assign=assign)
        assert_same(head.loss, CASES[name].make(COUNTS))
    CASES[name].make(COUNTS).load_state_dict({}, strict=True)


@pytest.mark.parametrize("name", WITH_CLASS_TENSORS)
def test_losses_that_are_not_persistent_load_strictly_both_ways(name):
    case = CASES[name]
    loss = case.make(COUNTS, persistent=False)
    assert set(loss.state_dict()) == {key for key, _ in loss.named_parameters()}
    before = copy.deepcopy(loss)
    if name != "gml":  # its temperature is learned
        classifier(nn.CrossEntropyLoss()).load_state_dict(classifier(loss).state_dict(), strict=True)
        loss.load_state_dict({}, strict=True)
        assert_same(loss, before)
    loss.load_state_dict(case.make(COUNTS).state_dict(), strict=True)
    assert_same(loss, before)
    assert set(loss.state_dict()) == {key for key, _ in loss.named_parameters()}
    assert_same(copy.deepcopy(loss).to("meta").to_empty(device="cpu"), before)
    if case.from_counts:  # what a checkpoint has is loaded nevertheless
        loss.load_state_dict({**before.state_dict(), **case.make(OTHER).state_dict()})
        assert loss.class_counts.tolist() == OTHER


def test_class_weights_of_cross_entropy():
    source = nn.CrossEntropyLoss(weight=torch.arange(1.0, C + 1))
    loss = LogitAdjustmentLoss(COUNTS, weight=[1.0] * C)
    loss.load_state_dict(source.state_dict(), strict=True)  # the checkpoint's weights, and the constructor's counts
    assert_same(loss, LogitAdjustmentLoss(COUNTS, weight=source.weight))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        LogitAdjustmentLoss(COUNTS).load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"margin"'):
        CosFaceLoss(parameter(*[0.1] * C), weight=[1.0] * C).load_state_dict(source.state_dict())


def test_a_part_of_a_loss_is_an_error():
    state = LogitAdjustmentLoss(COUNTS).state_dict()
    del state["class_bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"class_bias"'):
        LogitAdjustmentLoss(COUNTS).load_state_dict(state)
    state = GMLLoss(COUNTS).state_dict()
    del state["log_temperature"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"log_temperature"'):
        GMLLoss(COUNTS).load_state_dict(state)
    assert LogitAdjustmentLoss(COUNTS).load_state_dict(LDAMLoss(COUNTS).state_dict(), strict=False) is not None
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"margin"'):
        LogitAdjustmentLoss(COUNTS).load_state_dict(LDAMLoss(COUNTS).state_dict())


def test_resuming_and_resetting_keep_what_was_loaded():
    def make(**options: Any) -> tuple[LDAMLoss, DeferredReweighting]:
        loss = LDAMLoss(COUNTS, **options)
        return loss, DeferredReweighting(loss, COUNTS, switch_epoch=2)

    source, schedule = make()
    source.update_counts(OTHER)
    schedule.step(2)
    for options in ({}, {"persistent": False}):
        loss, _ = make(**options)
        loss.load_state_dict(source.state_dict())
        assert_same(loss, source)
        loss.to_empty(device="cpu").reset_parameters()
        assert_same(loss, source)
        assert_same(loss.to("meta").to_empty(device="cpu"), source)
    loss, resumed = make(persistent=False)
    loss.load_state_dict(make(persistent=False)[0].state_dict())
    assert loss.class_counts.tolist() == COUNTS  # not persistent: the caller hands over counts and schedule
    resumed.load_state_dict(schedule.state_dict())
    loss.update_counts(OTHER)
    assert_same(loss, source)


@pytest.mark.parametrize("name", ["supcon", "bcl", "paco", "elm-pairwise"])
def test_resetting_keeps_a_temperature_that_was_loaded(name):
    source, loss = (CASES[name].make(COUNTS, temperature=torch.tensor(value)) for value in (0.5, 0.25))
    loss.load_state_dict(source.state_dict())
    poison(loss).reset_parameters()
    assert loss.temperature.item() == 0.5
    assert loss.to("meta").to_empty(device="cpu").temperature.item() == 0.5


def test_resetting_keeps_digits_that_float32_has_not():
    counts = [2**24 + 1, 5, 1]
    loss = LogitAdjustmentLoss(counts)
    loss.load_state_dict(LogitAdjustmentLoss(counts).state_dict())
    loss.double().reset_parameters()
    assert_same(loss, LogitAdjustmentLoss(counts, dtype=torch.float64))


def test_learned_tensors_start_anew():
    loss = CosFaceLoss(parameter(*[0.1] * C), scale=parameter(20.0))
    poison(loss)
    loss.load_state_dict(copy.deepcopy(loss.state_dict()))
    held = dict(loss.named_parameters())
    loss.reset_parameters()
    assert_same(loss, CosFaceLoss(parameter(*[0.1] * C), scale=parameter(20.0)))
    assert all(loss.get_parameter(name) is value for name, value in held.items())


# ------------------------------------------------------------------------------------------- distributed, transformers


@pytest.fixture
def one_process(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.head = LinearHead(D, C, LogitAdjustmentLoss(COUNTS, weight=range(1, C + 1), persistent=persistent))
        self.margins = CosFaceLoss(parameter(*(0.1 * (c + 1) for c in range(C))))
        self.queue = ClassQueue(COUNTS, 64, D)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        z = self.body(x)
        return self.head(z, target) + self.margins(torch.tanh(z[:, :C]), target)


@pytest.mark.parametrize("calls_reset", [False, True], ids=["to_empty", "reset"])
def test_fsdp2_with_deferred_initialisation(one_process, calls_reset):
    from torch.distributed.fsdp import fully_shard

    expected, batch = Net(), BATCH.to(torch.float32)
    with torch.device("meta"):
        model = Net()
    for module in (model.head, model):
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    model.to_empty(device="cpu")
    if calls_reset:
        reset(model)
    assert_same(model.head.loss, expected.head.loss)
    assert_same(model.queue, expected.queue)
    assert torch.equal(model.margins.margin.full_tensor(), expected.margins.margin)
    with torch.no_grad():
        for name in ("body", "head"):
            for key in ("weight", "bias"):
                getattr(model.get_submodule(name), key).full_tensor().copy_(getattr(expected.get_submodule(name), key))
    actual, value = model(batch.embeddings, batch.target), expected(batch.embeddings, batch.target)
    torch.testing.assert_close(actual, value)
    actual.backward()
    value.backward()
    torch.testing.assert_close(model.margins.margin.grad.full_tensor(), expected.margins.margin.grad)


@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "not-persistent"])
@pytest.mark.parametrize("initialises", [False, True], ids=["default", "init_weights"])
@pytest.mark.parametrize("saved", ["whole", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_from_pretrained(tmp_path, monkeypatch, persistent, initialises, saved, dtype):
    from transformers import PretrainedConfig, PreTrainedModel

    class TinyConfig(PretrainedConfig):
        model_type = "lt-kernels-tiny"

    class Tiny(PreTrainedModel):
        config_class = TinyConfig

        def __init__(self, config: TinyConfig) -> None:
            super().__init__(config)
            self.net = Net(persistent)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if initialises and isinstance(module, MarginCrossEntropyBase | ClassQueue):
                module.reset_parameters()

    source = Tiny(TinyConfig())
    if saved == "whole":
        source.net.head.loss.update_counts(OTHER)
        source.net.queue.enqueue(torch.ones(2, D), torch.tensor([0, 9]))
        source.save_pretrained(tmp_path)
    else:
        kept = {key: value for key, value in source.state_dict().items() if "loss" not in key and "margins" not in key}
        kept = {key: value for key, value in kept.items() if "queue" not in key}
        source.save_pretrained(tmp_path, state_dict=kept)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(77))  # what memory may hold
    model = Tiny.from_pretrained(tmp_path, dtype=dtype)
    monkeypatch.undo()
    source.to(dtype)
    if saved == "whole" and not persistent:
        source.net.head.loss.update_counts(COUNTS)
    assert_same(model, source)
    poison(model.net.head.loss).reset_parameters()
    assert_same(model.net.head.loss, source.net.head.loss)
