"""`fleetgate calibrate`: a load sweep against a live Deployment that measures its Profile."""
