"""The commit protocol: written by every rank, read by any number of them. Knows no world size."""
