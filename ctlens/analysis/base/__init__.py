"""What every analysis stands on: results, forward passes, recordings, token positions."""
