"""Algorithms on the same tasks, in one table."""
