"""Priors against their formulas in plain Python, the zero-count policies, and the bad-input table."""

from __future__ import annotations

import doctest
import math
import re
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _refused import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_kernels import datasets, priors
from lt_kernels.priors import SHOT_GROUPS, ClassPrior

COUNTS = [1280, 101, 100, 20, 19, 5]
TOTAL = sum(COUNTS)
count_lists = st.lists(st.integers(1, 10**9), min_size=1, max_size=20)


def exact(counts=COUNTS, **options) -> ClassPrior:
    return ClassPrior(counts, dtype=torch.float64, **options)


def assert_vector(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


class TestFormulas:
    def test_prior(self):
        assert_vector(exact().prior, [n / TOTAL for n in COUNTS])

    @pytest.mark.parametrize("tau", [0.0, 1.0, 2.5, -1.0], ids="tau={}".format)
    def test_log_prior(self, tau):
        assert_vector(exact().log_prior(tau), [tau * math.log(n / TOTAL) for n in COUNTS])

    def test_log_prior_with_the_epsilon_of_balpoe(self):
        assert_vector(exact().log_prior(2.0, eps=1e-9), [2 * math.log(n / TOTAL + 1e-9) for n in COUNTS])

    def test_log_prior_with_the_epsilon_of_logit_adjustment(self):
        expected = [math.log((n / TOTAL) ** 2 + 1e-12) for n in COUNTS]
        assert_vector(exact().log_prior(2.0, eps=1e-12, form="power"), expected)

    def test_epsilon_moves_the_rarest_inat_prior_as_documented(self):
        counts = datasets.class_counts("inat18_like")
        moved = exact(counts).log_prior(eps=1e-9) - exact(counts).log_prior()
        assert moved.max().item() == pytest.approx(2.2e-4, rel=0.01)

    def test_reversed_log_prior(self):
        ranks = [5, 19, 20, 100, 101, 1280]
        assert_vector(exact().reversed_log_prior(1.5, eps=1e-9), [1.5 * math.log(n / TOTAL + 1e-9) for n in ranks])
        assert_vector(exact([30, 5, 20]).reversed_log_prior(), [math.log(n / 55) for n in (5, 30, 20)])

    def test_reversed_log_prior_of_equal_counts(self):
        assert_vector(exact([7, 7, 5, 81]).reversed_log_prior(), [math.log(n / 100) for n in (7, 7, 81, 5)])
        assert_vector(exact([1, 1, 9]).reversed_log_prior(), [math.log(n / 11) for n in (9, 1, 1)])

    def test_log_counts(self):
        assert_vector(exact().log_counts(), [math.log(n) for n in COUNTS])

    @pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999], ids="beta={}".format)
    def test_effective_numbers(self, beta):
        expected = torch.tensor([sum(beta**k for k in range(n)) for n in COUNTS], dtype=torch.float64)
        torch.testing.assert_close(exact().effective_numbers(beta), expected, rtol=1e-10, atol=0)

    def test_effective_numbers_do_not_cancel_near_beta_1(self):
        assert exact([1]).effective_numbers(1 - 1e-12).item() == pytest.approx(1.0, rel=1e-4)

    def test_class_balanced_weight(self):
        raw = [(1 - 0.999) / (1 - 0.999**n) for n in COUNTS]
        torch.testing.assert_close(
            exact().class_balanced_weight(0.999),
            torch.tensor([w * len(raw) / sum(raw) for w in raw], dtype=torch.float64),
        )
        assert torch.equal(exact().class_balanced_weight(0.0), torch.ones(len(COUNTS), dtype=torch.float64))

    def test_ldam_margins(self):
        assert_vector(exact().ldam_margins(0.7), [0.7 * n**-0.25 / min(COUNTS) ** -0.25 for n in COUNTS])

    def test_vs_scales(self):
        assert_vector(exact().vs_scales(0.3), [(n / max(COUNTS)) ** 0.3 for n in COUNTS])

    def test_arcface_margins(self):
        a = (0.5 - 0.05) / (5**-0.25 - 1280**-0.25)
        expected = torch.tensor([a * n**-0.25 + 0.5 - a * 5**-0.25 for n in COUNTS], dtype=torch.float64)
        torch.testing.assert_close(exact().arcface_margins((0.05, 0.5), 0.25), expected)

    def test_arcface_margins_of_equal_counts(self):
        assert_vector(exact([7, 7]).arcface_margins((0.1, 0.4)), [0.4, 0.4])

    def test_ride_temperatures(self):
        w = [6 * n / TOTAL * 0.3 + 0.7 for n in COUNTS]
        assert_vector(exact().ride_temperatures(2.0, 0.3), [2 * each / max(w) for each in w])
        assert_vector(exact().ride_temperatures(1.5, 0.0), [1.5] * 6)

    def test_shot_groups(self):
        assert [SHOT_GROUPS[i] for i in exact().shot_groups()] == ["many", "many", "medium", "medium", "few", "few"]
        assert exact().shot_groups(many_above=1000, few_below=100).tolist() == [0, 1, 1, 2, 2, 2]

    def test_shot_groups_of_imagenet_lt(self):
        assert priors.shot_groups(datasets.class_counts("imagenet_lt")).bincount().tolist() == [385, 479, 136]


FUNCTIONS = {
    "log_prior": lambda f, c: f.log_prior(*c, 0.5, eps=1e-3, form="power"),
    "reversed_log_prior": lambda f, c: f.reversed_log_prior(*c, 0.5, eps=1e-3),
    "log_counts": lambda f, c: f.log_counts(*c),
    "effective_numbers": lambda f, c: f.effective_numbers(*c, 0.9),
    "class_balanced_weight": lambda f, c: f.class_balanced_weight(*c, 0.9),
    "ldam_margins": lambda f, c: f.ldam_margins(*c, 0.3),
    "vs_scales": lambda f, c: f.vs_scales(*c, 0.2),
    "arcface_margins": lambda f, c: f.arcface_margins(*c, (0.2, 0.3), 0.5),
    "ride_temperatures": lambda f, c: f.ride_temperatures(*c, 2.0, 0.3),
    "shot_groups": lambda f, c: f.shot_groups(*c, 50, 10),
}


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_functions_are_the_methods(call):
    assert torch.equal(call(priors, [COUNTS]), call(ClassPrior(COUNTS), []))


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_functions_pass_the_zero_count_policy_on(call):
    with_zero = call(ClassPrior([9, 0], zero_counts="mask"), [])
    assert with_zero.shape == (2,)
    assert not with_zero.isnan().any()


class TestProperties:
    @given(count_lists)
    @settings(deadline=None)
    def test_invariants(self, counts):
        prior = exact(counts)
        rarest, commonest = counts.index(min(counts)), counts.index(max(counts))
        assert prior.log_prior().exp().sum().item() == pytest.approx(1.0)
        assert prior.class_balanced_weight().mean().item() == pytest.approx(1.0)
        assert prior.ldam_margins(0.5)[rarest].item() == pytest.approx(0.5)
        assert prior.vs_scales()[commonest] == 1
        margins = prior.arcface_margins((0.1, 0.6))
        assert margins[rarest].item() == pytest.approx(0.6)
        assert margins.min() >= 0.1 - 1e-12
        assert (prior.effective_numbers() <= torch.tensor(counts, dtype=torch.float64) * (1 + 1e-9)).all()

    @given(count_lists, st.randoms(use_true_random=False))
    @settings(deadline=None)
    def test_permuting_classes_permutes_everything(self, counts, random):
        order = list(range(len(counts)))
        random.shuffle(order)
        for name, call in FUNCTIONS.items():
            if name == "reversed_log_prior" and len(set(counts)) < len(counts):
                continue  # equal counts are ranked by their order
            torch.testing.assert_close(call(exact([counts[i] for i in order]), []), call(exact(counts), [])[order])


class TestZeroCounts:
    def test_error_names_the_classes(self):
        with pytest.raises(ValueError, match=re.escape("got 0 for 2 of 4 classes (1, 3), expected counts > 0")):
            ClassPrior([3, 0, 5, 0])
        with pytest.raises(ValueError, match=re.escape("(0, 1, 2, 3, 4, 5, 6, 7, ...)")):
            ClassPrior([0] * 20 + [1])

    def test_a_number_replaces_them(self):
        replaced, plain = exact([10, 0, 4], zero_counts=0.5), exact([10, 0.5, 4])
        for call in FUNCTIONS.values():
            assert torch.equal(call(replaced, []), call(plain, []))
        assert replaced.class_counts.tolist() == [10, 0.5, 4]

    @pytest.mark.parametrize("tau", [-1.0, 0.0, 2.0], ids="tau={}".format)
    @pytest.mark.parametrize("form", ["prior", "power"])
    def test_mask_is_minus_infinity_whatever_tau_and_eps(self, tau, form):
        masked = exact([10, 0, 4], zero_counts="mask").log_prior(tau, eps=1e-9, form=form)
        assert masked[1].item() == -math.inf
        torch.testing.assert_close(masked[[0, 2]], exact([10, 4]).log_prior(tau, eps=1e-9, form=form))

    def test_mask_elsewhere(self):
        masked, present = exact([10, 0, 4], zero_counts="mask"), exact([10, 4])
        for name, absent in {
            "log_counts": -math.inf,
            "reversed_log_prior": -math.inf,
            "effective_numbers": 0.0,
            "class_balanced_weight": 0.0,
            "vs_scales": 0.0,
            "ldam_margins": 0.5,
            "arcface_margins": 0.5,
        }.items():
            value = getattr(masked, name)()
            assert value[1].item() == absent, name
            torch.testing.assert_close(value[[0, 2]], getattr(present, name)())
        torch.testing.assert_close(masked.ride_temperatures(), exact([10, 4, 4]).ride_temperatures()[[0, 1, 2]])
        assert masked.shot_groups().tolist() == [2, 2, 2]

    @pytest.mark.parametrize("policy", ["one", 0, -1, float("nan"), float("inf")], ids=str)
    def test_unknown_policy(self, policy):
        with pytest.raises(ValueError, match="zero_counts: got .*, expected 'error', 'mask' or a positive number"):
            ClassPrior([1, 2], zero_counts=policy)

    def test_policy_of_another_type(self):
        with pytest.raises(TypeError, match="zero_counts: got NoneType, expected a number"):
            ClassPrior([1, 2], zero_counts=None)


LABELS = [c for c, n in enumerate(COUNTS) for _ in range(n)]
KINDS = {
    "list": COUNTS,
    "tuple": tuple(COUNTS),
    "numpy-int64": np.array(COUNTS),
    "numpy-uint16": np.array(COUNTS, np.uint16),
    "numpy-float64": np.array(COUNTS, np.float64),
    "numpy-strided": np.repeat(COUNTS, 2)[::2],
    "tensor-int32": torch.tensor(COUNTS, dtype=torch.int32),
    "tensor-float32": torch.tensor(COUNTS, dtype=torch.float32),
    "tensor-strided": torch.tensor(COUNTS).repeat_interleave(2)[::2],
    "tensor-requires-grad": torch.tensor(COUNTS, dtype=torch.float32, requires_grad=True),
    "floats": [float(n) for n in COUNTS],
    "mapping": dict(reversed(list(enumerate(COUNTS)))),
    "counter": Counter(reversed(LABELS)),
    "numpy-keys": OrderedDict((np.int64(c), np.int32(n)) for c, n in reversed(list(enumerate(COUNTS)))),
    "series": pd.Series(COUNTS, name="samples"),
    "series-of-floats": pd.Series(COUNTS, dtype=float)[::-1],
    "value-counts": pd.Series(LABELS).value_counts(ascending=True),
    "value-counts-of-categories": pd.Series(LABELS).astype("category").value_counts(ascending=True),
    "group-sizes": pd.DataFrame({"label": LABELS}).groupby("label").size(),
}


@pytest.mark.parametrize("counts", KINDS.values(), ids=KINDS.keys())
def test_kinds_of_counts(counts):
    prior = ClassPrior(counts)
    assert prior.class_counts.tolist() == COUNTS
    assert ClassPrior(range(1, 4)).class_counts.tolist() == [1, 2, 3]
    assert not prior.log_prior().requires_grad


def test_classes_that_a_mapping_lacks_have_no_samples():
    for counts in ({3: 4, 1: 2}, Counter([3, 3, 3, 3, 1, 1]), pd.Series({3: 4, 1: 2}), defaultdict(int, {3: 4, 1: 2})):
        assert ClassPrior(counts, zero_counts="mask").class_counts.tolist() == [0, 2, 0, 4]
        assert ClassPrior(counts, zero_counts=0.5).class_counts.tolist() == [0.5, 2, 0.5, 4]
        with pytest.raises(ValueError, match=r"class_counts: got 0 for 2 of 4 classes \(0, 2\)"):
            ClassPrior(counts)
    assert len(ClassPrior({0: 3, 9: 0}, zero_counts="mask")) == 10


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_values_are_real_whatever_the_default_device(call, device):
    expected = call(priors, [COUNTS])
    with torch.device(device):
        for counts in (COUNTS, np.array(COUNTS), dict(enumerate(COUNTS)), torch.tensor(COUNTS, device="cpu")):
            assert torch.equal(call(priors, [counts]), expected)
        assert datasets.class_counts("cifar10_lt_if100").device.type == "cpu"


def test_large_counts_are_exact():
    assert exact([2.0**24 + 1, 1.0]).class_counts.tolist() == [2**24 + 1, 1]
    assert exact(torch.tensor([2**40 + 1, 1])).class_counts.tolist() == [2**40 + 1, 1]


def test_the_prior_does_not_share_memory_with_its_counts():
    counts = torch.tensor([3.0, 1.0], dtype=torch.float64)
    prior = exact(counts)
    counts[0] = 100
    prior.class_counts[0] = 50
    assert prior.class_counts.tolist() == [3, 1]


def test_dtype_and_device():
    assert ClassPrior(COUNTS).log_prior().dtype == torch.float32
    assert ClassPrior(COUNTS, dtype=torch.bfloat16).log_prior().dtype == torch.bfloat16
    assert ClassPrior(COUNTS, device="meta").shot_groups().device.type == "meta"
    assert len(ClassPrior(COUNTS)) == 6
    assert repr(ClassPrior(COUNTS)) == "ClassPrior(6 classes, 1525 samples, min 5, max 1280)"


@refused(
    "counts",
    ([1, -2, -3], ValueError, "class_counts: got -2 at class 1 and 1 more, expected counts >= 0"),
    ([1.0, float("nan")], ValueError, "class_counts: got nan at class 1, expected finite numbers"),
    (torch.tensor([1.0, float("inf")]), ValueError, "class_counts: got inf at class 1, expected finite"),
    (torch.tensor(3), ValueError, "class_counts: got shape (), expected a 1-D vector [C]"),
    (np.array(3), ValueError, "class_counts: got shape (), expected a 1-D vector [C]"),
    ([[1, 2], [3, 4]], ValueError, "class_counts: got shape (2, 2), expected a 1-D vector [C]"),
    ([], ValueError, "class_counts: got no elements, expected one per class"),
    ([[1, 2], [3]], TypeError, "class_counts: got list"),
    ([0, 0], ValueError, "class_counts: got 0 for 2 of 2 classes (0, 1), expected counts > 0"),
    ("12", TypeError, "class_counts: got str, expected a 1-D sequence, array or tensor of numbers"),
    (["1", "2"], TypeError, "class_counts: got list"),
    (np.array(["1", "2"]), TypeError, "class_counts: got ndarray"),
    ([True, False], TypeError, "class_counts: got dtype torch.bool, expected integers or real"),
    (torch.ones(2, dtype=torch.complex64), TypeError, "class_counts: got dtype torch.complex64"),
    (3, TypeError, "class_counts: got int, expected a 1-D sequence, array or tensor of numbers"),
    (None, TypeError, "class_counts: got NoneType, expected a 1-D sequence, array or tensor of numbers"),
    (torch.ones(2, device="meta"), ValueError, "class_counts: got a tensor on the meta device, which has no values"),
    (torch.ones(2).to_sparse(), TypeError, "class_counts: got a tensor of layout torch.sparse_coo"),
    ({}, ValueError, "class_counts: got no elements, expected one per class"),
    ({"cat": 3, "dog": 2}, TypeError, "class_counts: got 'cat' (str) as a class, expected ints 0, 1, ..."),
    ({0: 3, 1.0: 2}, TypeError, "class_counts: got 1.0 (float) as a class, expected ints"),
    ({0: 3, True: 2}, TypeError, "class_counts: got True (bool) as a class, expected ints"),
    (Counter(torch.tensor([0, 0])), TypeError, "class_counts: got tensor(0) (Tensor) as a class, expected ints"),
    ({0: 3, -1: 2}, ValueError, "class_counts: got -1 as a class, expected 0, 1, ..."),
    ({0: 3, 2**40: 2}, ValueError, "class_counts: got 1099511627776 as a class, expected one below 2^31"),
    ({0: "3"}, TypeError, "class_counts: got dict"),
    ({0: -3}, ValueError, "class_counts: got -3 at class 0, expected counts >= 0"),
    ({0: 3, 2: 1}, ValueError, "class_counts: got 0 for 1 of 3 classes (1), expected counts > 0"),
    (Counter([1, 1, 2]), ValueError, "class_counts: got 0 for 1 of 3 classes (0), expected counts > 0"),
    ({3, 5}, TypeError, "class_counts: got set"),
    ({0: 3}.values(), TypeError, "class_counts: got dict_values"),
    (pd.Series(["b", "a", "b"]).value_counts(), TypeError, "class_counts: got 'b' (str) as a class, expected ints"),
    (pd.Series([3, 2], index=[0.0, 1.0]), TypeError, "class_counts: got 0.0 (float) as a class, expected ints"),
    (pd.Series([3, 2, 1], index=[0, 1, 1]), ValueError, "class_counts: got class 1 twice, expected each class once"),
    (pd.Series([3, None], dtype="Int64"), TypeError, "class_counts: got Series"),
    (pd.DataFrame({"label": [0, 1]}).value_counts(), TypeError, "class_counts: got (0,) (tuple) as a class"),
    (pd.DataFrame({"n": [3, 2]}), ValueError, "class_counts: got a DataFrame of shape (2, 1), expected a 1-D vector"),
)
def test_bad_counts(counts, refusal):
    with refusal:
        ClassPrior(counts)


def test_masking_every_class_is_an_error():
    with pytest.raises(ValueError, match="class_counts: got 0 for all 2 classes, expected at least one count > 0"):
        ClassPrior([0, 0], zero_counts="mask")


@refused(
    "call",
    (lambda p: p.log_prior(float("nan")), ValueError, "tau: got nan, expected a finite number"),
    (lambda p: p.log_prior(True), TypeError, "tau: got bool, expected a number"),
    (lambda p: p.log_prior(eps=-1.0), ValueError, "eps: got -1.0, expected a number >= 0"),
    (lambda p: p.log_prior(form="code"), ValueError, "form: got 'code', expected 'prior' or 'power'"),
    (lambda p: p.effective_numbers(1.0), ValueError, "beta: got 1.0, expected 0 <= beta < 1"),
    (lambda p: p.class_balanced_weight(-0.1), ValueError, "beta: got -0.1, expected 0 <= beta < 1"),
    (lambda p: p.ldam_margins(-1.0), ValueError, "max_margin: got -1.0, expected a number >= 0"),
    (lambda p: p.vs_scales(float("inf")), ValueError, "gamma: got inf, expected a finite number"),
    (lambda p: p.arcface_margins(power=-1.0), ValueError, "power: got -1.0, expected a number > 0"),
    (lambda p: p.arcface_margins((0.5, 0.1)), ValueError, "bounds: got (0.5, 0.1), expected lower"),
    (lambda p: p.arcface_margins((0.5,)), ValueError, "bounds: got (0.5,), expected (lower"),
    (lambda p: p.shot_groups(10, 20), ValueError, "few_below: got 20, expected at most many_above + 1 = 11"),
    (lambda p: ClassPrior([1], dtype=torch.int64), TypeError, "dtype: got torch.int64, expected a floating"),
)
def test_bad_arguments(call, refusal):
    with refusal:
        call(ClassPrior(COUNTS))


def test_examples_in_docstrings():
    assert doctest.testmod(priors) == doctest.TestResults(failed=0, attempted=4)


def test_the_module_needs_torch_and_the_checks_alone():
    code = (
        "import sys, types; package = types.ModuleType('lt_kernels'); package.__path__ = [sys.argv[1]];"
        "sys.modules['lt_kernels'] = package; from lt_kernels import priors;"
        "print(priors.ClassPrior([1, 1]), sorted(name for name in sys.modules if name.startswith('lt_kernels.')))"
    )
    folder = str(Path(priors.__file__).parent)
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    prior, modules = result.stdout.strip().split(") ")
    assert prior == "ClassPrior(2 classes, 2 samples, min 1, max 1"
    assert modules == "['lt_kernels._checks', 'lt_kernels._settings', 'lt_kernels.priors']"
