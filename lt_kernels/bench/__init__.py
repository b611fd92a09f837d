"""Benchmarks: named cases, providers to compare, and a runner that checks, measures and makes records.

``lt-kernels bench`` is the command. ``benchmarks/`` in the repository publishes: it holds the committed results, the
report, the comparison and the pytest-benchmark entry points.
"""
