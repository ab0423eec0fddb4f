"""Analyses of next-token predictions: logit lens, share of the gap recovered, cross-loss."""
