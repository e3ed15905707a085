"""The reconciler starts and stops the replicas of managed Deployments."""
