"""Benchmarks: named cases, providers to compare, a runner that writes records, and the report made from them.

``lt-kernels bench`` is the command; ``benchmarks/`` in the repository holds the pytest-benchmark entry points and the
committed results.
"""
