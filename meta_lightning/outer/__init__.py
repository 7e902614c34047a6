"""The outer loop: how θ moves from one meta-iteration to the next."""
