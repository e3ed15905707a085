"""What processes hand one another: formats and shared memory, whatever carries them."""
