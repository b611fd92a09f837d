"""CUDA kernels on chips that cannot place a large cluster of blocks."""

from __future__ import annotations

import pytest
import torch
from _engines import ENGINE
from test_rows import OPTIONS

from lt_kernels.functional import margin_cross_entropy
from lt_kernels.testing import check_margin_cross_entropy, sample_inputs

#: Blocks per cluster that a row of 8199 float32 takes, by LTK_EMULATED_DEVICE: largest cluster, shared memory per block
#: and per processor, processors of a cluster. 8 small blocks fit 4 processors and 2 large ones fit 2; a row without a
#: cluster takes two passes.
CLUSTERS = {
    "8 20496 21520": 8,
    "8 20496 21520 4": 8,
    "8 20496 21520 3": 2,
    "8 20496 21520 2": 2,
    "4 14336 19000": 4,
    "8 20496 21520 1": 1,
    "1 20496 21520": 1,
}


@pytest.mark.backends("native")
@pytest.mark.parametrize("option", ["plain", "weighted smoothing, mixed", "smoothed probabilities"])
@pytest.mark.parametrize("emulated", CLUSTERS)
def test_a_cluster_fits_the_chip(emulated, option, backend, monkeypatch):
    if ENGINE.name != "emulator":
        pytest.skip("the emulator has small chips")
    monkeypatch.setenv("LTK_EMULATED_DEVICE", emulated)
    only_logits = OPTIONS[option] | {"requires_grad": ("input",)}  # forward then writes the gradient, in one pass
    sample = sample_inputs(3, 8199, dtype=torch.float32, seed=1, ignored=0.2, **only_logits)
    check_margin_cross_entropy(margin_cross_entropy, sample)
    margin_cross_entropy(sample.input, sample.target, **sample.options)
    assert torch.ops.lt_kernels_emulated.last_cluster() == CLUSTERS[emulated]
