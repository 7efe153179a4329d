"""Nouns and contracts. Nothing here knows a technique; `errors`, `record` and `storage` import no
torch."""
