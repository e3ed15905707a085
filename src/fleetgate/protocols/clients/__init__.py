"""Client protocols, one file each."""
