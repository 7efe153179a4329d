"""Rows in, token batches out.

SourceSpec -> sources -> readers -> shapes -> render -> encode -> table -> stream -> Batch
"""
