"""Providers: the kinds of Cluster that can run replicas, one file each."""
