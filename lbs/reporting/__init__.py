"""Reads what a run wrote and shows it; computes nothing new. `lbs.report(run_dir)` writes the page."""
