"""Passes of a model compiled ahead of time by torch: one function per model, whatever the sizes."""
