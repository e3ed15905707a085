"""What a run came to: scores, and how they are shown."""
