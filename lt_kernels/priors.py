"""Class counts -> the class tensors that long-tailed losses are made of.

``ClassPrior`` validates the counts once and derives everything else; the functions of the same names are shorthands for
a single use. All values are computed in float64 on the CPU and returned in the dtype and on the device asked for.

Zero counts are an explicit choice, ``zero_counts``:

* ``"error"`` (default): ``ValueError`` naming the classes.
* a positive number: a class without samples is treated as if it had that many, e.g. ``zero_counts=1``.
* ``"mask"``: its prior is 0 and its log prior -inf, so it takes no part in the softmax, in label smoothing or in class
  probabilities (Mixup). Its scale and its weight are 0, its margin is that of the rarest class. A sample of a masked
  class has an infinite loss; with ``set_checks(True)`` it is an error, and so is probability on a masked class.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ._checks import (
    ClassVector,
    as_class_vector,
    as_device,
    as_dtype,
    check_choice,
    check_each_class,
    check_number,
    check_positive,
)

ZeroCounts: TypeAlias = Literal["error", "mask"] | float

#: Names of the groups that ``shot_groups`` numbers 0, 1, 2.
SHOT_GROUPS = ("many", "medium", "few")

_MAX_NAMED = 8  # classes listed in an error message


def check_zero_counts(zero_counts: Any) -> ZeroCounts:
    """Return ``zero_counts`` if it says what a class without samples means."""
    policies = "'error', 'mask' or a positive number"
    if not isinstance(zero_counts, str):
        return check_positive("zero_counts", zero_counts, policies)
    check_choice("zero_counts", zero_counts, ("error", "mask"), policies)
    return zero_counts  # type: ignore[return-value]  # one of the two words


def _as_counts(class_counts: ClassVector, zero_counts: ZeroCounts) -> Tensor:
    counts = as_class_vector("class_counts", class_counts, gap=0.0)
    check_each_class("class_counts", counts, counts >= 0, "counts >= 0")
    zero_counts = check_zero_counts(zero_counts)
    if not isinstance(zero_counts, str):
        return counts.masked_fill(counts == 0, zero_counts)
    empty = (counts == 0).nonzero().flatten().tolist()
    if zero_counts == "error" and empty:
        named = ", ".join(map(str, empty[:_MAX_NAMED])) + (", ..." if len(empty) > _MAX_NAMED else "")
        raise ValueError(
            f"class_counts: got 0 for {len(empty)} of {len(counts)} classes ({named}), expected counts > 0; "
            "to allow them choose zero_counts='mask' or a number such as zero_counts=1"
        )
    if len(empty) == len(counts):
        raise ValueError(f"class_counts: got 0 for all {len(counts)} classes, expected at least one count > 0")
    return counts


class ClassPrior:
    """Class counts [C] and what the losses derive from them.

    Args:
        class_counts: training samples per class, [C]: a list, tuple, numpy array or tensor of any real dtype, in the
            order of the classes; or by class: a mapping {class: samples} such as a ``Counter``, or a pandas ``Series``
            whose index has the classes, such as ``labels.value_counts()``. Classes that those lack, up to the largest
            one there, have no samples: give the last class a 0 if it has none.
        zero_counts: what a class without samples means: ``"error"``, ``"mask"`` or a positive number (see the module).
        device: device of the results; by default that of ``class_counts``.
        dtype: of the results; default ``torch.get_default_dtype()``.

    Raises:
        TypeError: counts that are not numbers, or classes that are not ints.
        ValueError: counts that are negative, NaN, infinite, empty, not 1-D, or zero where ``zero_counts="error"``.

    Example:
        >>> prior = ClassPrior([900, 90, 10])
        >>> prior.log_prior()
        tensor([-0.1054, -2.4079, -4.6052])
        >>> prior.ldam_margins()
        tensor([0.1623, 0.2887, 0.5000])
        >>> [SHOT_GROUPS[group] for group in prior.shot_groups()]
        ['many', 'medium', 'few']
    """

    def __init__(
        self,
        class_counts: ClassVector,
        *,
        zero_counts: ZeroCounts = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._counts = _as_counts(class_counts, zero_counts)
        self.zero_counts = zero_counts
        default = class_counts.device if isinstance(class_counts, Tensor) else "cpu"
        self.device = as_device("device", device, default)
        self.dtype = as_dtype("dtype", dtype)

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        n = self._counts
        return f"ClassPrior({len(n)} classes, {n.sum():g} samples, min {n.min():g}, max {n.max():g})"

    def _give(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype)

    @property
    def _present(self) -> Tensor:
        return self._counts > 0

    @property
    def class_counts(self) -> Tensor:
        """n, after ``zero_counts``; [C]."""
        return self._give(self._counts.clone())

    @property
    def prior(self) -> Tensor:
        """pi = n / sum(n); [C]."""
        return self._give(self._counts / self._counts.sum())

    def log_prior(self, tau: float = 1.0, *, eps: float = 0.0, form: Literal["prior", "power"] = "prior") -> Tensor:
        """Return tau * log(pi + eps), or log(pi^tau + eps) with ``form="power"``; [C]. Without eps both agree.

        ``eps=1e-9`` is what BalPoE's published code adds; ``form="power", eps=1e-12`` is that of logit adjustment.
        Masked classes are -inf whatever tau and eps.
        """
        tau, eps = check_number("tau", tau), check_number("eps", eps, 0.0)
        check_choice("form", form, ("prior", "power"), "'prior' or 'power'")
        pi = self._counts / self._counts.sum()
        value = (pi.pow(tau) + eps).log() if form == "power" and eps > 0 else tau * (pi + eps).log()
        return self._give(value.masked_fill(~self._present, -math.inf))

    def reversed_log_prior(self, tau: float = 1.0, *, eps: float = 0.0) -> Tensor:
        """Return tau * log(pi_rev + eps): pi with its ranks reversed, the largest class has the least (SADE); [C].

        The first of several classes with equal counts ranks lower, so that even they may get different pi_rev. Masked
        classes are -inf; the ranks of the others are reversed among themselves.
        """
        tau, eps = check_number("tau", tau), check_number("eps", eps, 0.0)
        pi = self._counts / self._counts.sum()
        value, order = pi[self._present].sort(stable=True)
        pi[self._present] = torch.empty_like(value).scatter(0, order, value.flip(0))
        return self._give((tau * (pi + eps).log()).masked_fill(~self._present, -math.inf))

    def log_counts(self) -> Tensor:
        """Return log n (balanced softmax); [C]."""
        return self._give(self._counts.log())

    def effective_numbers(self, beta: float = 0.9999) -> Tensor:
        """Return (1 - beta^n) / (1 - beta), the effective number of samples (Cui et al., 2019); [C]."""
        return self._give(self._effective_numbers(beta))

    def _effective_numbers(self, beta: float) -> Tensor:
        beta = check_number("beta", beta, 0.0, expected="0 <= beta < 1")
        if beta >= 1:
            raise ValueError(f"beta: got {beta}, expected 0 <= beta < 1")
        log_beta = math.log(beta) if beta > 0 else -math.inf
        return torch.where(self._present, -torch.expm1(self._counts * log_beta) / (1 - beta), 0.0)

    def class_balanced_weight(self, beta: float = 0.9999) -> Tensor:
        """Return 1 / effective number, with mean 1 over the classes that have samples; [C]. beta = 0: all ones."""
        present = self._present
        weight = torch.where(present, 1 / self._effective_numbers(beta), 0.0)
        return self._give(weight * (present.sum() / weight.sum()))

    def _at_least_the_rarest(self) -> Tensor:
        """Return n; a class without samples counts as the rarest one."""
        return self._counts.clamp_min(self._counts[self._present].min().item())

    def _inverse_power(self, power: float) -> Tensor:
        return self._at_least_the_rarest().pow(-power)

    def ldam_margins(self, max_margin: float = 0.5) -> Tensor:
        """Return max_margin * n^-1/4 / max(n^-1/4): the rarest class has ``max_margin`` (Cao et al., 2019); [C]."""
        max_margin = check_number("max_margin", max_margin, 0.0)
        root = self._inverse_power(0.25)
        return self._give(max_margin * root / root.max())

    def vs_scales(self, gamma: float = 0.3) -> Tensor:
        """Return (n / max(n))^gamma: the multiplicative part of the VS loss (Kini et al., 2021) and of CDT; [C]."""
        gamma = check_number("gamma", gamma)
        scales = (self._counts / self._counts.max()).pow(gamma)
        return self._give(scales.masked_fill(~self._present, 0.0))

    def arcface_margins(self, bounds: tuple[float, float] = (0.05, 0.5), power: float = 0.25) -> Tensor:
        """Return a * n^-power + b, the largest class at ``bounds[0]`` and the smallest at ``bounds[1]``; [C].

        Where all counts are equal, every class has ``bounds[1]``.
        """
        lower, upper = angles("bounds", bounds)
        power = check_positive("power", power)
        x = self._inverse_power(power)
        low, high = x.min(), x.max()
        rarity = torch.where(high > low, (x - low) / (high - low), 1.0)
        return self._give(lower + (upper - lower) * rarity)

    def ride_temperatures(self, temperature: float = 1.0, reweight_factor: float = 0.05) -> Tensor:
        """Return temperature * w / max(w), w = C pi reweight_factor + 1 - reweight_factor (Wang et al., 2021); [C].

        A class without samples counts as the rarest one.
        """
        temperature = check_positive("temperature", temperature)
        factor = check_number("reweight_factor", reweight_factor, 0.0, 1.0)
        n = self._at_least_the_rarest()
        w = len(n) * n / n.sum() * factor + 1 - factor
        return self._give(temperature * w / w.max())

    def shot_groups(self, many_above: float = 100, few_below: float = 20) -> Tensor:
        """Return the group of each class, int64 [C], an index of ``SHOT_GROUPS``.

        0 many: n > many_above. 2 few: n < few_below. 1 medium: the rest (20..100 by default).
        """
        many_above, few_below = check_number("many_above", many_above), check_number("few_below", few_below)
        if few_below > many_above + 1:
            raise ValueError(f"few_below: got {few_below:g}, expected at most many_above + 1 = {many_above + 1:g}")
        groups = torch.ones_like(self._counts, dtype=torch.int64)
        groups[self._counts < few_below] = 2
        groups[self._counts > many_above] = 0
        return groups.to(self.device)


def angles(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return ``bounds`` as (lower, upper) floats; ValueError if they are not two angles in order, in radians."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{name}: got {bounds!r}, expected (lower, upper)")
    lower, upper = (check_number(name, bound, 0.0, math.pi, expected="angles in [0, pi]") for bound in bounds)
    if lower > upper:
        raise ValueError(f"{name}: got {bounds!r}, expected lower <= upper")
    return lower, upper


def log_prior(
    class_counts: ClassVector,
    tau: float = 1.0,
    *,
    eps: float = 0.0,
    form: Literal["prior", "power"] = "prior",
    zero_counts: ZeroCounts = "error",
) -> Tensor:
    """Return tau * log(pi + eps), or log(pi^tau + eps); see ``ClassPrior.log_prior``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).log_prior(tau, eps=eps, form=form)


def reversed_log_prior(
    class_counts: ClassVector, tau: float = 1.0, *, eps: float = 0.0, zero_counts: ZeroCounts = "error"
) -> Tensor:
    """Return tau * log(pi + eps) with the ranks of pi reversed; see ``ClassPrior.reversed_log_prior``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).reversed_log_prior(tau, eps=eps)


def log_counts(class_counts: ClassVector, *, zero_counts: ZeroCounts = "error") -> Tensor:
    """Return log n; see ``ClassPrior.log_counts``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).log_counts()


def effective_numbers(class_counts: ClassVector, beta: float = 0.9999, *, zero_counts: ZeroCounts = "error") -> Tensor:
    """Return (1 - beta^n) / (1 - beta); see ``ClassPrior.effective_numbers``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).effective_numbers(beta)


def class_balanced_weight(
    class_counts: ClassVector, beta: float = 0.9999, *, zero_counts: ZeroCounts = "error"
) -> Tensor:
    """Return 1 / effective number with mean 1; see ``ClassPrior.class_balanced_weight``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).class_balanced_weight(beta)


def ldam_margins(class_counts: ClassVector, max_margin: float = 0.5, *, zero_counts: ZeroCounts = "error") -> Tensor:
    """Return max_margin * n^-1/4 / max(n^-1/4); see ``ClassPrior.ldam_margins``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).ldam_margins(max_margin)


def vs_scales(class_counts: ClassVector, gamma: float = 0.3, *, zero_counts: ZeroCounts = "error") -> Tensor:
    """Return (n / max(n))^gamma; see ``ClassPrior.vs_scales``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).vs_scales(gamma)


def arcface_margins(
    class_counts: ClassVector,
    bounds: tuple[float, float] = (0.05, 0.5),
    power: float = 0.25,
    *,
    zero_counts: ZeroCounts = "error",
) -> Tensor:
    """Return a * n^-power + b within ``bounds``; see ``ClassPrior.arcface_margins``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).arcface_margins(bounds, power)


def ride_temperatures(
    class_counts: ClassVector,
    temperature: float = 1.0,
    reweight_factor: float = 0.05,
    *,
    zero_counts: ZeroCounts = "error",
) -> Tensor:
    """Return RIDE's temperature of each class; see ``ClassPrior.ride_temperatures``."""
    return ClassPrior(class_counts, zero_counts=zero_counts).ride_temperatures(temperature, reweight_factor)


def shot_groups(class_counts: ClassVector, many_above: float = 100, few_below: float = 20) -> Tensor:
    """Return 0 for many, 1 for medium, 2 for few; see ``ClassPrior.shot_groups``.

    A class without training samples is a few-shot class here, never an error.
    """
    return ClassPrior(class_counts, zero_counts="mask").shot_groups(many_above, few_below)
