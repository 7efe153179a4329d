"""This process, and others on this machine."""

from __future__ import annotations

import threading

abandoned = threading.Event()
"""Set when threads are left behind that no clean exit can end: leave by `os._exit`."""
