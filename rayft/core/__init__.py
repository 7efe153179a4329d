"""Nouns and contracts. Nothing here knows a technique."""
