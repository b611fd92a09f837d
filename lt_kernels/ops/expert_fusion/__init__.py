"""Product of experts at inference: weighted mean of logits, its largest classes and log-sum-exp, in one read."""
