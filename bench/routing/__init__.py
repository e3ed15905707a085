"""Quality of routing: public traces over a simulated fleet of different GPUs, compared with the built-in baselines."""
