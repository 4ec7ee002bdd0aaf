"""From text to batches: sources, tokenizers, token cache, packing, Harmony."""
