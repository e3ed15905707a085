"""`fleetgate replay`: recorded decisions taken again, and compared with what another file would decide."""
