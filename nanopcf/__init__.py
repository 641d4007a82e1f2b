"""nanopcf: the Plasticity-Ceiling Framework and the SFT-then-RL pipeline, from scratch (arXiv 2512.11470)."""

__version__ = "0.1.0"
