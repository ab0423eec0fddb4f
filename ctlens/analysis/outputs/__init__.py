"""What the next-token predictions say: logit lens, share of the gap recovered, cross-loss."""
