"""Indexes of n-grams for Lookahead."""
