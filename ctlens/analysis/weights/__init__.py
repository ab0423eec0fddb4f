"""Where in the weights a training lives."""
