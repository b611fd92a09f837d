"""Margin-shifted softmax cross-entropy of several experts, each with its own share of a log prior."""
