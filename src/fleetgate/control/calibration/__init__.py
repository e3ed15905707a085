"""`fleetgate calibrate` measures the Profile of a live Deployment with a load sweep."""
