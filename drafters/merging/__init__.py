"""Merging of several drafters' trees."""
