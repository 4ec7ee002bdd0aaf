"""From text to batches: corpus, tokenizer, pipeline."""
