"""SADE: three experts for long-tailed, uniform and inversely long-tailed data, and their weights at test time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import ClassVector, check_choice, check_int, check_number
from ..priors import ClassPrior
from ._base import LossOptions
from ._experts_base import ExpertLossBase, stacked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..functional.experts import ExpertLogits

EXPERTS = 3


class SADELoss(ExpertLossBase):
    """The training loss of SADE's three experts, summed over them.

    Zhang, Hooi, Hong, Feng, *Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed
    Recognition*, NeurIPS 2022:

        loss = CE(z_0, y) + CE(z_1 + log(pi + eps), y) + CE(z_2 + log(pi + eps) - tau log(pi_rev + eps), y)

    pi_rev are the same priors with their ranks reversed: the largest class has the prior of the smallest. The first
    of several classes with equal counts ranks lower, so that even they may get different pi_rev. Sets ``class_bias``,
    float32 [3, C]. At test time weigh the experts by [`fit_expert_weights`][lt_kernels.losses.fit_expert_weights], or
    equally, in [`expert_fusion`][lt_kernels.functional.expert_fusion].

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        tau: of the third expert; published: 2, and 1 for Places-LT and iNaturalist 2018.
        eps: the published code adds 1e-9 to the priors.
        scale: multiplies the logits; for heads that hand over cosines. An ``nn.Parameter``, 0-dim, is learned.
        options: ``weight``, ``ignore_index``, ``reduction`` (over rows), ``empty_mean``, ``label_smoothing``,
            ``zero_counts``, ``device``, ``dtype``, ``persistent``;
            [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them, shapes and errors.
            ``zero_counts="mask"`` masks classes without samples in every expert; the others' ranks are reversed among
            themselves.

    Example:
        >>> import torch
        >>> loss = SADELoss([900, 90, 10])
        >>> loss.class_bias[2]  # log pi - 2 log pi_rev
        tensor([ 9.1050,  2.4079, -4.3944])
        >>> loss(torch.zeros(3, 2, 3), torch.tensor([0, 2]))
        tensor(10.2048)
    """

    expert_reduction = "sum"

    def __init__(
        self,
        class_counts: ClassVector,
        tau: float = 2.0,
        eps: float = 1e-9,
        *,
        scale: float | Tensor = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.tau, self.eps = check_number("tau", tau), check_number("eps", eps, 0.0)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        log_prior = prior.log_prior(eps=self.eps)
        masked = log_prior == -math.inf
        away = log_prior - prior.reversed_log_prior(self.tau, eps=self.eps)
        bias = torch.stack([torch.zeros_like(log_prior), log_prior, away])
        return {"class_bias": bias.masked_fill(masked, -math.inf)}

    def loss(self, logits: ExpertLogits, target: Tensor, **mixed: Any) -> Tensor:
        is_experts = logits.dim() >= 3 if isinstance(logits, Tensor) else isinstance(logits, (list, tuple))
        if is_experts and len(logits) != EXPERTS:
            raise ValueError(f"logits: got {len(logits)} experts, expected {EXPERTS}")
        return super().loss(logits, target, **mixed)


class ExpertWeightsPreset(NamedTuple):
    """Published settings of one data set for [`fit_expert_weights`][lt_kernels.losses.fit_expert_weights]."""

    lr: float
    weight_decay: float
    entropy_weight: float = 0.0  #: of the experts' weights
    prediction_entropy_weight: float = 0.0
    min_weight: float = 0.045  #: the scripts compare weights rounded to two decimals with 0.05
    stop_after: Literal["step", "epoch"] = "epoch"


#: The test-time scripts and configurations that SADE's authors published, by data set.
EXPERT_WEIGHTS_PRESETS: Mapping[str, ExpertWeightsPreset] = MappingProxyType(
    {
        "cifar100-lt": ExpertWeightsPreset(lr=0.1, weight_decay=5e-4),
        "imagenet-lt": ExpertWeightsPreset(lr=0.025, weight_decay=5e-4),
        "places-lt": ExpertWeightsPreset(lr=0.01, weight_decay=4e-4),
        "inat2018": ExpertWeightsPreset(lr=0.2, weight_decay=2e-4, prediction_entropy_weight=0.01),
    }
)
_DEFAULT = ExpertWeightsPreset(0.025, 5e-4, entropy_weight=0.01, min_weight=0.05, stop_after="step")


@torch.inference_mode(False)
@torch.enable_grad()
def fit_expert_weights(
    view1_logits: ExpertLogits,
    view2_logits: ExpertLogits,
    *,
    preset: Literal["cifar100-lt", "imagenet-lt", "places-lt", "inat2018"] | None = None,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    entropy_weight: float | None = None,
    prediction_entropy_weight: float | None = None,
    min_weight: float | None = None,
    stop_after: Literal["step", "epoch"] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fit weights of experts to unlabelled test data of an unknown class distribution.

    SADE's test-time aggregation (Zhang et al., NeurIPS 2022): weights w = softmax(a), with a equal for all experts at
    first, such that two augmented views of a sample get similar predictions p = softmax(sum_e w_e z_e),

        maximise  mean over samples of cos(p^1, p^2)
                  + entropy_weight H(w) + prediction_entropy_weight mean over samples of [H(p^1) + H(p^2)] / C

    by SGD with Nesterov momentum over batches in order, until all epochs are done or a weight is below ``min_weight``.
    The weights at that moment are returned.

    ``preset`` takes what the authors' script and configuration of a data set have, except that the scripts draw new
    views and a new order in each epoch (for the order hand over a ``generator``):

    | preset | lr | weight_decay | prediction_entropy_weight |
    |---|---|---|---|
    | ``"cifar100-lt"`` | 0.1 | 5e-4 | 0 |
    | ``"imagenet-lt"`` | 0.025 | 5e-4 | 0 |
    | ``"places-lt"`` | 0.01 | 4e-4 | 0 |
    | ``"inat2018"`` | 0.2 | 2e-4 | 0.01 |

    all with ``entropy_weight=0``, ``min_weight=0.045`` and ``stop_after="epoch"`` (a weight that is below 0.05 once
    rounded to two decimals). The default is no published setting: the optimiser of ImageNet-LT, ``entropy_weight=0.01``
    (the entropy of the weights keeps all experts in use), and a look at ``min_weight=0.05`` after each step.

    Args:
        view1_logits: the experts' logits of one view, [E, N, C] or a list of E [N, C]. Classes that are masked by
            -inf take no part, except in the C of the predictions' entropy.
        view2_logits: the same for the other view.
        preset: a key of ``EXPERT_WEIGHTS_PRESETS``; arguments that are given take precedence over it.
        epochs: passes over the samples.
        batch_size: samples per step; the last batch may be smaller.
        lr: of SGD.
        momentum: of SGD; Nesterov's unless 0.
        weight_decay: of SGD.
        entropy_weight: factor of the weights' entropy.
        prediction_entropy_weight: factor of the predictions' entropy, the mean over samples and classes of -p log p, of
            both views.
        min_weight: a weight below it ends the fit.
        stop_after: when weights are compared with ``min_weight``: after each ``"step"`` or ``"epoch"``.
        generator: shuffles the samples anew for each epoch, if given; a generator of the CPU.

    Returns:
        w, [E], float32 (float64 for float64 logits), without gradient: the ``expert_weight`` of
        [`expert_fusion`][lt_kernels.functional.expert_fusion]. The same inputs give the same weights. Each step (or
        epoch, see ``stop_after``) waits for a GPU, to see whether to stop.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> views = torch.randn(2, 3, 64, 10, generator=torch.Generator().manual_seed(0))
        >>> fit_expert_weights(views[0], views[1], epochs=0)
        tensor([0.3333, 0.3333, 0.3333])
    """
    first, second = _two_views(view1_logits, view2_logits)
    if preset is not None:
        check_choice("preset", preset, tuple(EXPERT_WEIGHTS_PRESETS))
    check_int("epochs", epochs, 0)
    check_int("batch_size", batch_size, 1)
    given = {
        "lr": lr,
        "weight_decay": weight_decay,
        "entropy_weight": entropy_weight,
        "prediction_entropy_weight": prediction_entropy_weight,
        "min_weight": min_weight,
    }
    check_number("momentum", momentum, 0.0)
    for name, value in given.items():
        if value is not None:
            check_number(name, value, 0.0)
    if stop_after is not None:
        check_choice("stop_after", stop_after, ("step", "epoch"))
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise TypeError(f"generator: got {generator!r}, expected a torch.Generator of the CPU or None")
    chosen = {name: value for name, value in {**given, "stop_after": stop_after}.items() if value is not None}
    settings = (_DEFAULT if preset is None else EXPERT_WEIGHTS_PRESETS[preset])._replace(**chosen)  # type: ignore[arg-type]

    experts, rows, _ = first.shape
    dtype = torch.promote_types(first.dtype, torch.float32)
    lowest = torch.finfo(dtype).min / 4
    a = torch.full((experts,), 1.0 / experts, dtype=dtype, device=first.device, requires_grad=True)
    optimizer = torch.optim.SGD([a], settings.lr, momentum, weight_decay=settings.weight_decay, nesterov=momentum > 0)
    for _ in range(epochs):
        order = None if generator is None else torch.randperm(rows, generator=generator).to(first.device)
        for start in range(0, rows, batch_size):
            batch = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            # copies: logits of inference mode cannot be saved for backward; 0 times the -inf of a masked class is NaN
            z1, z2 = (view[:, batch].to(dtype, copy=True).clamp_min_(lowest) for view in (first, second))
            optimizer.zero_grad()
            _disagreement(a.softmax(0), z1, z2, settings).backward()
            optimizer.step()
            last = start + batch_size >= rows
            if (last or settings.stop_after == "step") and bool((a.detach().softmax(0) < settings.min_weight).any()):
                return a.detach().softmax(0)
    return a.detach().softmax(0)


def _disagreement(w: Tensor, z1: Tensor, z2: Tensor, settings: ExpertWeightsPreset) -> Tensor:
    """Return what is minimised, 0-dim, for experts' weights [E] and two views' logits [E, n, C]."""
    u1, u2 = (torch.einsum("e,enc->nc", w, z) for z in (z1, z2))
    value = -F.cosine_similarity(u1.softmax(1), u2.softmax(1), dim=1).mean()
    if settings.entropy_weight != 0:
        value = value + settings.entropy_weight * (w * w.log()).sum()
    if settings.prediction_entropy_weight != 0:
        negentropy = (u1.softmax(1) * u1.log_softmax(1)).mean() + (u2.softmax(1) * u2.log_softmax(1)).mean()
        value = value + settings.prediction_entropy_weight * negentropy
    return value


def _two_views(view1_logits: ExpertLogits, view2_logits: ExpertLogits) -> tuple[Tensor, Tensor]:
    """Return the logits of both views, each [E, N, C]."""
    first, second = stacked("view1_logits", view1_logits).detach(), stacked("view2_logits", view2_logits).detach()
    for what in ("shape", "dtype", "device"):
        here, there = getattr(second, what), getattr(first, what)
        if here != there:
            shown = [tuple(value) if isinstance(value, torch.Size) else value for value in (here, there)]
            raise ValueError(f"view2_logits: got {what} {shown[0]}, expected {shown[1]} as view1_logits")
    return first, second
