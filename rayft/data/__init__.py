"""Rows in, token batches out."""
