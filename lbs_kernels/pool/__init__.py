"""Maximum of codes or of a stream, and the global mean of a stream."""
