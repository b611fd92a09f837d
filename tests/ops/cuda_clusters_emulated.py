"""Chips that cannot place a large cluster of blocks: run by ``test_cuda.py`` with the plugin ``emulated_cuda``."""

from __future__ import annotations

import pytest
import torch
from cuda_emulated import OPTIONS, emulated  # noqa: F401

from lt_kernels.functional import margin_cross_entropy
from lt_kernels.testing import check_margin_cross_entropy, sample_inputs

#: The chip, see emulated_device.h, and the blocks per cluster that a row of 8199 float32 needs on it. Small blocks, of
#: which a processor holds two, need 8; large ones, of which it holds one, need 2; without clusters a row needs two passes.
CHIPS = {
    "8 20496 21520": 8,
    "8 20496 21520 4": 8,
    "8 20496 21520 3": 2,
    "8 20496 21520 2": 2,
    "8 20496 21520 1": 1,
    "1 20496 21520": 1,
}


@pytest.mark.parametrize("option", ["plain", "weighted smoothing, mixed", "probabilities"])
@pytest.mark.parametrize("chip", CHIPS)
def test_a_cluster_fits_the_chip(chip, option, monkeypatch):
    monkeypatch.setenv("LTK_EMULATED_DEVICE", chip)
    sample = sample_inputs(3, 8199, dtype=torch.float32, seed=1, ignored=0.2, **OPTIONS[option])
    check_margin_cross_entropy(margin_cross_entropy, sample)
    margin_cross_entropy(sample.input, sample.target, **sample.options)
    assert torch.ops.lt_kernels_emulated.last_cluster() == CHIPS[chip]
