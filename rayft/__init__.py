"""rayft: fine-tune language models on a Ray cluster, and find the best way to do it."""

__version__ = "0.1.0"
