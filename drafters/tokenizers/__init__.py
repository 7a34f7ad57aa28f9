"""Draft models with another tokenizer."""
