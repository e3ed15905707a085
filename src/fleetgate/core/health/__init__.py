"""Circuit breaker, outlier detection and timeouts of Endpoints."""
