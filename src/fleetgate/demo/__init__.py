"""`fleetgate demo`: the tour, and the fleet that it runs on."""
