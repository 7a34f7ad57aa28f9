"""Rows of a batch: tokens, ends, streams and random draws."""
