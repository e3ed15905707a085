"""`fleetgate replay`: take recorded decisions again, and compare them with those of another fleet file."""
