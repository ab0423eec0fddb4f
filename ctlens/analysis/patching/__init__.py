"""Activation patching, exact and to first order."""
