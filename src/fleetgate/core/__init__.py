"""The pure core: values in, values out; no clock, dice, log or I/O. DESIGN: the core decides, the shells act."""
