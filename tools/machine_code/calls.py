"""How each operator's configuration becomes a call on meta tensors, and how much work its kernels do.

A call runs the operator's own launchers. ``recording.py`` collects the kernel launches that they make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.contrastive_loss import arguments as contrastive
from lt_kernels.ops.contrastive_loss import configs as contrastive_configs
from lt_kernels.ops.contrastive_loss import triton as contrastive_kernels
from lt_kernels.ops.expert_cross_entropy import configs as experts_configs
from lt_kernels.ops.expert_cross_entropy import triton as experts
from lt_kernels.ops.expert_cross_entropy.arguments import Arguments as ExpertsArguments
from lt_kernels.ops.expert_divergence import configs as divergence_configs
from lt_kernels.ops.expert_divergence import triton as divergence
from lt_kernels.ops.expert_fusion import configs as fusion_configs
from lt_kernels.ops.expert_fusion import triton as fusion
from lt_kernels.ops.expert_fusion.arguments import Arguments as FusionArguments
from lt_kernels.ops.linear_margin_cross_entropy import arguments as linear
from lt_kernels.ops.linear_margin_cross_entropy import configs as linear_configs
from lt_kernels.ops.linear_margin_cross_entropy import triton as linear_tiles
from lt_kernels.ops.margin_cross_entropy import configs as rows_configs
from lt_kernels.ops.margin_cross_entropy import triton as rows
from lt_kernels.ops.margin_cross_entropy.arguments import DIFFERENTIABLE, Arguments
from lt_kernels.ops.partitioned_logsumexp import arguments as keys
from lt_kernels.ops.partitioned_logsumexp import configs as keys_configs
from lt_kernels.ops.partitioned_logsumexp import triton as keys_tiles
from lt_kernels.ops.partitioned_logsumexp.plan import Blocks


class Work(NamedTuple):
    """How many logits a program of a kernel handles."""

    logits: int
    trips: int = 1  # how often its loops run for these logits
    one_trip: bool = False  # count the instructions of one trip round the loop only
    wide: bool = True  # moves 16 bytes at a time if the configuration allows it


class Op(NamedTuple):
    """One operator as the gate sees it."""

    configs: Sequence[Any]
    call: Callable[[Any], None]  # run the launchers
    work: Callable[[str, Mapping[str, Any]], Work | None]  # by kernel and arguments; None: not counted
    by_target: bool = False  # whether launches depend on the GPU, so that rows record them for each


def meta(*shape: int, dtype: str | torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype, device="meta")


def row_options(
    options: Sequence[str], n: int, c: int, k: int, target: Tensor | None = None, scale: float = 1.0
) -> Any:
    """Return the options of a row's loss that a configuration names."""

    def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return meta(*shape, dtype=dtype) if name in options else None

    # as functional gives them for a class_bias on a GPU, which might mask classes
    smooth = option("smoothing", c) if "class_bias" in options else None
    weighted = "weight" in options or ("class_bias" in options and target is not None)
    return RowOptions(
        target=meta(n, k, dtype=torch.int64) if target is None else target,
        mixed_target=option("mixed", n, k, dtype=torch.int64),
        mix_lambda=option("mixed", n, k),
        weight=meta(c) if weighted else None,
        smooth_weight=smooth,
        class_bias=option("class_bias", c),
        class_scale=option("class_scale", c),
        class_margin=option("class_margin", c),
        learned_scale=option("learned_scale"),
        coefficient=meta(2 if "mixed" in options else 1),
        scale=scale,
        angular="angular" in options,
        label_smoothing=0.1 if "smoothing" in options else 0.0,
    )


def _margin_cross_entropy(config: Any) -> None:
    if isinstance(config, rows_configs.SmallConfig):
        return _beside_margin_cross_entropy(config)
    n, c, k = config.rows, config.classes, config.positions
    x = meta(n, c + config.padding, k, dtype=config.dtype)[:, :c]
    if config.transposed:
        x = meta(c, n, dtype=config.dtype).T[:, :, None]
    target = meta(n, c, k, dtype=config.dtype) if "soft" in config.options else None
    scale = 64.0 if "angular" in config.options else 1.0
    a = Arguments(x, row_options(config.options, n, c, k, target, scale))
    out = x if config.in_place else None
    if config.needs:
        needs = [name in config.needs for name in DIFFERENTIABLE]
        rows.backward(meta(), meta(n, k) if config.with_lse else None, meta(2, n, k), a, needs, out=out)
    else:
        rows.forward(a, "prediction" in config.options, config.with_grad, out=out)


def _beside_margin_cross_entropy(config: Any) -> None:
    if config.scales:
        rows.scale_gradient_(meta(config.rows, config.classes, dtype=config.dtype), meta())
        return
    target, mixed = (meta(config.rows, dtype=torch.int64) for _ in range(2))
    weight = meta(config.classes) if "weight" in config.options else None
    if not config.options and config.rows == 8192:
        rows.row_weights(target, mixed, meta(), -100, True, 1.0)
    rows.mean_coefficient(target, mixed if "mixed" in config.options else None, weight, -100, config.classes)


def _linear_margin_cross_entropy(config: Any) -> None:
    n, c, d = config.rows, config.classes, config.width
    norm = "norm" in config.options
    a = linear.Arguments(
        input=meta(n, d, dtype=config.dtype),
        linear_weight=meta(c, d, dtype=config.dtype),
        weight_copy=None,
        linear_bias=meta(c, dtype=config.dtype) if "linear_bias" in config.options else None,
        options=row_options(config.options, n, c, 1, scale=30.0 if norm else 1.0),
        normalize=norm,
    )
    needs = [config.every_gradient or name in ("input", "linear_weight") for name in linear.DIFFERENTIABLE]
    norms = meta(c) if norm else None
    linear_tiles.forward(a, norms, "prediction" in config.options)
    linear_tiles.backward(meta(), None, meta(2, n, 1), a, norms, needs)


def _stacked(config: Any) -> Tensor:
    """Return the logits of several experts."""
    e, n, c = config.experts, config.rows, config.classes
    if getattr(config, "samples_first", False):
        return meta(n, e, c, dtype=config.dtype).transpose(0, 1)
    return meta(e, n, c, dtype=config.dtype)


def _expert_cross_entropy(config: Any) -> None:
    e, n, c = config.experts, config.rows, config.classes
    options = row_options(config.options, n, c, 1, scale=30.0 if "scale" in config.options else 1.0)
    mix_lambda = meta() if "mixed" in config.options else None
    class_bias = meta(e, c) if "expert_bias" in config.options else None
    options = options._replace(mix_lambda=mix_lambda, class_bias=class_bias)
    a = ExpertsArguments(
        logits=[_stacked(config)],
        options=options,
        log_prior=meta(c) if "log_prior" in config.options else None,
        ensemble_coefficient=options.coefficient,
        taus=[1.0 + each for each in range(e)],
    )
    experts.forward(a, "ensemble" in config.options, True)


def _expert_fusion(config: Any) -> None:
    e, c = config.experts, config.classes
    a = FusionArguments(
        [_stacked(config)],
        meta(e) if "expert_weight" in config.options else None,
        meta(c) if "class_shift" in config.options else None,
        meta() if "learned_scale" in config.options else None,
        [1.0 / e] * e,
        1.0,
        normalize=True,
    )
    fusion.forward(a, config.k, "log_probs" in config.options)


def _expert_divergence(config: Any) -> None:
    e, n, c = config.experts, config.rows, config.classes
    temperature = meta(c) if "temperature" in config.options else None
    kind = "pairwise" if "pairwise" in config.options else "to_mean"
    if not config.backward:
        divergence.forward([_stacked(config)], temperature, kind, meta(n))
        return
    detached = "detached" in config.options
    divergence.backward(meta(e, n), meta(3 * e + 2, n), [_stacked(config)], temperature, kind, detached, meta(n))


def _partitioned_logsumexp(config: Any) -> None:
    n, m = config.rows, config.columns

    def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return meta(*shape, dtype=dtype) if name in config.options else None

    labels = meta(n, dtype=torch.int32), meta(m, dtype=torch.int32)
    exclude = option("exclude", n, dtype=torch.int32)
    vectors = option("key_bias", m), option("key_scale", m), option("learned_scale")
    slopes, sums = "slopes" in config.options, [f"key_{name}" in config.options for name in ("bias", "scale")]
    if config.width == 0:  # in a buffer whose rows start at multiples of 64 bytes
        z, dz = (meta(n, triton.cdiv(m, 32) * 32, dtype=config.dtype)[:, :m] for _ in range(2))
        block = keys.Block(z, *labels, exclude, 0, *vectors, 10.0)
        keys_tiles.forward(block, slopes)
        keys_tiles.backward(block, meta(keys.N_TERMS, n), [True, *sums], dz)
        return
    alone, bounded = "alone" in config.options, "bounded" in config.options
    query = meta(n, config.width, dtype=config.dtype)
    key = None if alone else meta(m, config.width, dtype=config.dtype)
    a = keys.Arguments(query, key, *labels, exclude, *vectors, 10.0, 0, m, bounded)
    keys_tiles.tiled_forward(a, slopes)
    keys_tiles.tiled_backward(a, meta(keys.N_TERMS, n), [True, not alone, *sums])


def _contrastive_loss(config: Any) -> None:
    n, m, options = config.rows, config.columns, config.options

    def option(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return meta(*shape, dtype=dtype) if name in options else None

    labels = torch.int32 if "int32" in options else torch.int64
    alone, block = "alone" in options, config.width == 0
    width = 512 if block else config.width
    a = contrastive.Arguments(
        query=meta(n, width, dtype=config.dtype),
        key=None if alone else meta(m, width, dtype=config.dtype),
        query_label=meta(n, dtype=labels),
        key_label=meta(m, dtype=labels),
        exclude=option("exclude", n, dtype=labels),
        key_bias=option("key_bias", m),
        pos_offset=option("pos_offset", n),
        extra=option("rows", n),
        pulled=option("rows", n),
        constant=option("rows", n),
        counted=option("rows", n, dtype=torch.bool),
        learned_scale=option("learned_scale"),
        scale=10.0,
        alpha=1.0,
        beta=0.0,
        key_grad_begin=0,
        key_grad_end=m,
        exclude_self="self" in options,
        two="two" in options,
        normalized="bounded" in options,
        reduction="none" if "none" in options else "mean",
        empty_is_zero=False,
    )
    blocks, slopes = Blocks(n, m), "learned_scale" in options
    kept = meta(n, triton.cdiv(m, 32) * 32, dtype=config.dtype)[:, :m] if block else None
    strategy = "materialize" if block else "tiled"
    made = contrastive_kernels.forward(a, strategy, blocks, slopes, kept)
    upstream = meta(n) if "none" in options else meta()
    needs = ["keys" not in options, "queries" not in options, "rows" in options, "rows" in options, slopes]
    contrastive_kernels.backward(upstream, a, made.terms, made.share, strategy, blocks, kept, needs)


def _rows_work(kernel: str, a: Mapping[str, Any]) -> Work | None:
    if "_rows_" in kernel and a.get("BODY") != "parts":
        block = a["GROUP"] * a["LANES"] * a["REPEAT"]
        if kernel.endswith("_rows_forward_kernel"):
            return Work(a["classes"], triton.cdiv(a["classes"], block))
        columns = a["part_groups"] * a["GROUP"] if kernel.endswith("_rows_statistics_kernel") else block
        return Work(columns, triton.cdiv(columns, block))
    if kernel.endswith("_tiles_forward_kernel"):
        return Work(a["classes"] * a["BLOCK_K"], triton.cdiv(a["classes"], a["REPEAT"] * a["LANES"]))
    if kernel.endswith("_soft_mass_kernel"):
        return Work(a["classes"] * a["BLOCK_K"], triton.cdiv(a["classes"], a["BLOCK_C"]), wide=False)
    if kernel.endswith("_tiles_backward_kernel"):
        return Work(a["blocks_per_program"] * a["BLOCK_C"] * a["BLOCK_K"], a["blocks_per_program"])
    return None


def _experts_work(kernel: str, a: Mapping[str, Any]) -> Work | None:
    if kernel == "expert_cross_entropy_forward_kernel":
        return Work(a["EXPERTS"] * a["classes"], triton.cdiv(a["classes"], a["GROUP"] * a["LANES"] * a["SWEEP"]))
    if kernel in ("expert_fusion_forward_kernel", "expert_fusion_log_probs_kernel"):
        return Work(len(a["x_ptrs"]) * min(a["classes"], a["part_groups"] * a["GROUP"]))
    if kernel == "expert_divergence_forward_kernel":
        block = a["GROUP"] * a["LANES"] * a["REPEAT"]
        return Work(len(a["x_ptrs"]) * a["classes"], triton.cdiv(a["classes"], block))
    if kernel == "expert_divergence_backward_kernel":
        return Work(len(a["x_ptrs"]) * min(a["classes"], a["GROUP"] * a["LANES"] * a["REPEAT"]))
    return _rows_work(kernel, a)


def makes_products(a: Mapping[str, Any]) -> bool:
    """Return whether a kernel with these arguments multiplies matrices."""
    return "f" in a and "BLOCK_N" in a


def _keys_work(kernel: str, a: Mapping[str, Any]) -> Work | None:
    if makes_products(a):
        return Work(a["BLOCK_N"] * a["BLOCK_C"], one_trip=True)
    if "GROUP" in a:
        return Work(a["LANES"] * a["GROUP"] * a.get("ROWS", 1), one_trip=True)
    return None


OPS = {
    "contrastive_loss": Op(contrastive_configs.CONFIGS, _contrastive_loss, _keys_work, by_target=True),
    "margin_cross_entropy": Op((*rows_configs.CONFIGS, *rows_configs.SMALL_CONFIGS), _margin_cross_entropy, _rows_work),
    "linear_margin_cross_entropy": Op(
        linear_configs.CONFIGS, _linear_margin_cross_entropy, lambda kernel, a: None, by_target=True
    ),
    "expert_cross_entropy": Op(experts_configs.CONFIGS, _expert_cross_entropy, _experts_work),
    "expert_fusion": Op(fusion_configs.CONFIGS, _expert_fusion, _experts_work),
    "expert_divergence": Op(divergence_configs.CONFIGS, _expert_divergence, _experts_work),
    "partitioned_logsumexp": Op(keys_configs.CONFIGS, _partitioned_logsumexp, _keys_work, by_target=True),
}
