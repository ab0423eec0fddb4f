"""What tests share: tiny models and tokenizers, planted organisms, study folders, a browser, published codes."""
