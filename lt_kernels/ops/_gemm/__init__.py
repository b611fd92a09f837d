"""Matrix products of linear heads and contrastive keys: tiles that are never stored, and blocks in buffers."""
