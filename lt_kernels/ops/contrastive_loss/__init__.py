"""A contrastive loss in one operator: sums over keys, rows' losses, their reduction, and the gradients of all of it."""
