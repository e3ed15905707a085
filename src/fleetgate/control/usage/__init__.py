"""The workers' usage journals are read into the store."""
