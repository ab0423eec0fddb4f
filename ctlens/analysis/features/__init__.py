"""Features: what a dictionary of directions (SAE, transcoder, crosscoder) reads in models before and after training."""
