"""Adapt a learner to a few samples per class, and predict others."""
