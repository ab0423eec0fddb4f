"""Activations of one model put into another."""
