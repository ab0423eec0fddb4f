"""From text to aligned tokens: chat, pairs, file formats, alignment, batches."""
