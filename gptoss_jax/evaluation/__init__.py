"""Perplexity on text, and the tasks of lm_eval."""
