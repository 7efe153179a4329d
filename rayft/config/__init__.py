"""The menu: every knob of rayft as frozen, strict pydantic specs. Imports no torch, so it answers
at once."""
