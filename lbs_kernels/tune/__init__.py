"""Measuring what implementations take."""
