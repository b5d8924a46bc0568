"""What a command does with a run folder; `lbs.cli` parses and prints."""
