"""Registered operators, one folder each: ``op.py`` (schema, autograd, backends) beside its backends."""
