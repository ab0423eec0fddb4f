"""Probes: what linear classifiers can read from activations."""
