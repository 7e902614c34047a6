"""Comparison of algorithms on the same tasks."""
