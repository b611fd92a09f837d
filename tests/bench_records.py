"""Records of measurements that nobody took, for the tests of the benchmarks."""

from __future__ import annotations

from lt_kernels.bench.records import Record


def record(**changes) -> Record:
    """Logits in memory, eager."""
    fields = {
        "op": "margin_cross_entropy",
        "provider": "eager",
        "backend": None,
        "case": "inat18-n512",
        "sizes": {"N": 512, "C": 8142},
        "dtype": "float32",
        "direction": "fwd_bwd",
        "ms_median": 8.0,
        "ms_p20": 7.9,
        "ms_p80": 8.2,
        "repetitions": 20,
        "peak_bytes": 33_000_000,
        "bytes_moved": 33_349_632,
        "flops": 33_349_632,
        "gbps": 4.2,
        "copy_gbps": 20.0,
        "fraction_of_floor": 0.21,
        "device": "A CPU, 2 threads, AVX2",
        "device_slug": "cpu-a-cpu-2c",
        "versions": {"torch": "2.13.0", "triton": None},
        "git": "0123456789ab",
    }
    return Record(**{**fields, **changes})


def head_record(**changes) -> Record:
    """A linear head, eager."""
    fields = {
        "op": "linear_margin_cross_entropy",
        "case": "inat18-n512-d2048",
        "sizes": {"N": 512, "D": 2048, "C": 8142},
        "ms_median": 700.0,
        "ms_p20": 690.0,
        "ms_p80": 720.0,
        "repetitions": 3,
        "peak_bytes": 137_592_832,  # gradients, and four times the logits
        "bytes_moved": 141_787_136,
        "flops": 51_223_461_888,
        "gbps": 0.2,
        "copy_gbps": None,
        "fraction_of_floor": 0.8,
    }
    return record(**{**fields, **changes})
