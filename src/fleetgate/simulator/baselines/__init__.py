"""Balancers to compare with: simple ones, as other products run them, and an oracle."""
