"""The parts that all analyses share: results, forward passes, recordings, token positions."""
