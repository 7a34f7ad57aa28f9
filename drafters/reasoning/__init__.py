"""Reasoning steps for SpecReason."""
