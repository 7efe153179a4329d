"""What is held back. No kind is built yet; the list is part of every config so that kinds can be
added to it."""

from __future__ import annotations

Penalties = tuple[()]
