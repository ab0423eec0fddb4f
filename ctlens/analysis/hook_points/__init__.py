"""What is at a hook point: a table of all of them, activations at any, and what one patch there does."""
