"""How numbers change over a training, and along the line through the weights before and after it."""
