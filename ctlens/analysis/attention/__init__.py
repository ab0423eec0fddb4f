"""Analyses of attention: what the heads attend to, and whether it matters for the answer."""
