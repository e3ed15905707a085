"""The pure core: values in, values out; no clock, randomness, log or I/O. The core decides, its callers act."""
