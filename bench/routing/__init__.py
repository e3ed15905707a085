"""How well requests are routed: public traces over a fleet of unlike GPUs on paper, beside the built-in baselines."""
