"""`fleetgate demo`: the tour and the fleet it runs on."""
