"""Analyses of weights: in which of them a training lives, and the rank of its update."""
