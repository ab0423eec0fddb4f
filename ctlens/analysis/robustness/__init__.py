"""What a repair is worth when it is pushed: fine-tuned back, or attacked by somebody who adapts to it."""
