"""Threats in plain English, for models from elsewhere: short questions of our own, and wrappers around them."""
