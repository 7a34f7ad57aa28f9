"""Drafting with a small causal LM."""
