"""Floats to codes: the way into a packed region."""
