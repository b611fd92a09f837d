"""Margin-shifted softmax cross-entropy over logits in memory (the rows kernel)."""
