"""Evaluation: perplexity on text, and lm_eval tasks."""
