"""Directions of the residual stream, and what changing them does."""
