"""Health of Endpoints: circuit breaker, outlier detection, timeouts, hedging, requests that end engines."""
