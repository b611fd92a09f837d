"""Heads inside FSDP2, Accelerate and peft: sharded and offloaded parameters are made whole, and an adapter gives a
right loss or an error.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lt_kernels.losses import BalPoELoss, CosFaceLoss, ExpertHead, LDAMLoss, LinearHead, LogitAdjustmentLoss

N, D, C, E = 6, 16, 12, 3
COUNTS = list(range(C, 0, -1))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator), torch.randint(C, (N,), generator=generator)


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.head = head

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.head(self.body(x).relu(), target)


def make(loss: type = LogitAdjustmentLoss) -> Model:
    torch.manual_seed(1)
    return Model(LinearHead(D, C, loss(COUNTS)))


@pytest.mark.parametrize("buffers", [False, True], ids=["weights", "weights-and-buffers"])
def test_weights_and_buffers_that_accelerate_keeps_elsewhere(buffers):
    model, (x, target) = make(), batch()
    expected = model(x, target), model(x)
    preload = ["LinearHead"] if buffers else None
    cpu_offload(model, execution_device="cpu", offload_buffers=buffers, preload_module_classes=preload)
    assert model.head.weight.is_meta
    assert model.head.loss.class_bias.is_meta is buffers
    assert torch.equal(model(x, target), expected[0])
    assert torch.equal(model(x), expected[1])


class TestFullySharded:
    @pytest.fixture
    def mesh(self, tmp_path) -> Iterator[dist.DeviceMesh]:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    @pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "left-whole"])
    @pytest.mark.parametrize("shard", ["head", "head-and-model"])
    @pytest.mark.parametrize("loss", [LogitAdjustmentLoss, LDAMLoss])
    def test_every_method_before_and_after_training(self, mesh, loss, shard, reshard):
        model = make(loss)
        twin, (x, target) = copy.deepcopy(model), batch()
        fully_shard(model.head, mesh=mesh, reshard_after_forward=reshard)
        if shard == "head-and-model":
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        optimisers = [torch.optim.SGD(each.parameters(), 0.5) for each in (model, twin)]
        if shard == "head-and-model":
            model(x)  # FSDP2 wants its root to be called first, whatever the submodule
        for _ in range(2):
            assert torch.equal(model.head.logits(x), twin.head.logits(x))
            for ours, theirs in zip(model.head.predict(x, 2), twin.head.predict(x, 2), strict=True):
                assert torch.equal(ours, theirs)
            with torch.no_grad():
                assert torch.equal(model.head(x), twin.head(x))
            losses = [each(x, target) for each in (model, twin)]
            torch.testing.assert_close(*losses)
            for value, optimiser in zip(losses, optimisers, strict=True):
                value.backward()
                optimiser.step()
                optimiser.zero_grad()

    def test_gradients_through_the_logits_reach_the_shards(self, mesh):
        head, (x, target) = make().head, batch()
        twin = copy.deepcopy(head)
        fully_shard(head, mesh=mesh)
        for logits in (head.logits(x), head(x)):
            head.loss(logits, target).backward()
            twin.loss(twin.logits(x), target).backward()
            torch.testing.assert_close(head.weight.grad.full_tensor(), twin.weight.grad)

    def test_a_head_whose_model_alone_is_sharded(self, mesh):
        model = make()
        twin, (x, target) = copy.deepcopy(model), batch()
        fully_shard(model, mesh=mesh)
        for ours, theirs in zip(model.head.predict(x, 2), twin.head.predict(x, 2), strict=True):
            assert torch.equal(ours, theirs)
        with torch.no_grad():
            assert torch.equal(model.head.logits(x), twin.head.logits(x))
            assert torch.equal(model.head(x, target), twin.head(x, target))
        for call in (model.head.logits, model.head, lambda x: model.head(x, target)):
            with pytest.raises(
                RuntimeError, match=r"weight: got a sharded parameter outside the forward of the module"
            ):
                call(x)

    def test_a_margin_that_learns(self, mesh):
        torch.manual_seed(1)
        head, (x, target) = LinearHead(D, C, CosFaceLoss(nn.Parameter(torch.full((C,), 0.25)))), batch()
        twin, other = copy.deepcopy(head), copy.deepcopy(head)
        fully_shard(head, mesh=mesh)
        for each in (head, twin):
            each(x, target).backward()
        torch.testing.assert_close(head.loss.margin.grad.full_tensor(), twin.loss.margin.grad)
        fully_shard(nn.Sequential(other), mesh=mesh)
        with torch.no_grad():
            assert torch.equal(other(x, target), twin(x, target))

    def test_experts(self, mesh):
        torch.manual_seed(0)
        head = ExpertHead(D, C, E)
        twin, x, (_, target) = copy.deepcopy(head), torch.randn(E, N, D), batch()
        fully_shard(head, mesh=mesh)
        for _ in range(2):
            assert torch.equal(head.predict(x, 2).topk_values, twin.predict(x, 2).topk_values)
            for each in (head, twin):
                BalPoELoss(COUNTS)(each(x), target).backward()
            torch.testing.assert_close(head.weight.grad.full_tensor(), twin.weight.grad)
        model = nn.Sequential(nn.Linear(D, D), twin)
        expected = twin.predict(x)
        fully_shard(model, mesh=mesh)
        assert torch.equal(twin.predict(x).confidence, expected.confidence)


def options_of(config: type) -> dict[str, object]:
    """What a configuration needs besides ``target_modules`` to fit layers of 16 and 12 features."""
    small = {"total_step": 10, "feedforward_modules": [], "n_frequency": 8, "oft_block_size": 4, "vector_length": 4}
    return {name: value for name, value in small.items() if name in inspect.signature(config).parameters}


#: Adapters of nn.Linear that peft has long had.
KINDS = ["AdaLora", "FourierFT", "HRA", "IA3", "LoHa", "LoKr", "Lora", "OFT", "VBLoRA", "Vera"]


class TestAdapters:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("head", ["linear", "ours"])
    def test_a_head_is_refused_where_a_linear_layer_is_adapted(self, kind, head):
        model = make() if head == "ours" else Model(nn.Linear(D, C))
        config = getattr(peft, f"{kind}Config")
        config = config(target_modules=["body", "head"], **options_of(config))
        if head == "linear":
            assert type(get_peft_model(model, config).base_model.model.head) is not nn.Linear
            return
        message = r"target_modules: got a LinearHead, whose result is a loss, for peft\..*exclude_modules=\['head'\]"
        with pytest.raises(TypeError, match=message):
            get_peft_model(model, config)

    @pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
    def test_all_linear(self, options):
        with pytest.raises(TypeError, match="target_modules: got a LinearHead"):
            get_peft_model(make(), LoraConfig(target_modules="all-linear", **options))

    def test_a_head_left_out(self):
        plain, (x, target) = make(), batch()
        config = LoraConfig(target_modules="all-linear", exclude_modules=["head"])
        model = get_peft_model(copy.deepcopy(plain), config)
        assert torch.equal(model(x, target), plain(x, target))
        merged = model.merge_and_unload()
        assert type(merged.head) is LinearHead
        torch.testing.assert_close(merged(x, target), plain(x, target))

    def test_a_head_trained_whole(self):
        (x, target), config = batch(), LoraConfig(target_modules="all-linear", modules_to_save=["head"])
        model = get_peft_model(make(), config)
        learns = {name.split("model.")[-1] for name, p in model.named_parameters() if p.requires_grad}
        assert "head.modules_to_save.default.weight" in learns
        optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.5)
        losses = []
        for _ in range(5):
            optimiser.zero_grad()
            value = model(x, target)
            value.backward()
            optimiser.step()
            losses.append(value.item())
        assert losses[-1] < losses[0]
        head = model.base_model.model.head
        assert torch.equal(head.predict(x).classes[:, 0], head.logits(x).argmax(1))
        merged = model.merge_and_unload()
        assert type(merged.head) is LinearHead
        torch.testing.assert_close(merged(x, target), model(x, target))

    def test_a_saved_adapter_has_the_head_and_its_loss(self, tmp_path):
        (x, target), plain = batch(), make()
        config = LoraConfig(target_modules="all-linear", modules_to_save=["head"])
        model = get_peft_model(copy.deepcopy(plain), config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.requires_grad)
        model.base_model.model.head.update_counts(COUNTS[::-1])
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        assert torch.equal(loaded(x, target), model(x, target))
        assert not torch.equal(loaded(x, target), plain(x, target))

    @pytest.mark.parametrize("loss", [LogitAdjustmentLoss, LDAMLoss])
    def test_an_adapted_weight(self, loss):
        (x, target), plain = batch(), make(loss)
        config = LoraConfig(r=2, target_modules=["body"], target_parameters=["head.weight"])
        model = get_peft_model(copy.deepcopy(plain), config)
        factors = {name.split(".")[-3]: p for name, p in model.named_parameters() if ".head.lora_" in name}
        nn.init.normal_(factors["lora_B"])
        delta = factors["lora_B"] @ factors["lora_A"] * (8 / 2)  # lora_alpha / r
        features = plain.body(x).relu().detach()
        with torch.no_grad():
            plain.head.weight += delta
        value = model(x, target)
        torch.testing.assert_close(value, plain.head(features, target))
        torch.testing.assert_close(model(x), plain.head(features))
        value.backward()
        assert all(factor.grad.abs().sum() > 0 for factor in factors.values())
        torch.testing.assert_close(model.merge_and_unload()(x, target), plain.head(features, target))

    def test_a_head_by_itself_has_no_base_layer(self):
        head = make().head
        assert not hasattr(head, "base_layer")
        with pytest.raises(AttributeError, match="'LinearHead' object has no attribute 'base_layer'"):
            _ = head.base_layer
