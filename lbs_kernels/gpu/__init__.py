"""The GPU back end: which kernel runs a step, and a program as a list of launches."""
