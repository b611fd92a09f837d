"""Tiled matrix products that are never stored: what linear heads and contrastive keys share."""
