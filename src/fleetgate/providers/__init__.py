"""The kinds of place that can run replicas, one file each."""
