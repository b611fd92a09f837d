"""What every kernel over rows of logits shares: the options of a row's loss and the mathematics of its scalars."""
