"""Kullback-Leibler divergences between the predictions of experts."""
