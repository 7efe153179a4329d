"""Named places where a test can make a write fail: every step of saving has one.

`RAYFT_FAILPOINT=name:action:nth` acts on the nth time (from 1) that this process passes `name`;
`nth+` acts from then on. Actions: `kill` (SIGKILL to this process: nothing is flushed, no handler
runs), `oserror` (EIO), `enospc`, `sleep` (one second); `*:count` only counts the hits.
Unset, a point costs one look-up in the environment.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

VARIABLE = "RAYFT_FAILPOINT"
ACTIONS = ("kill", "oserror", "enospc", "sleep", "count")

POINTS = (
    "storage.write.open",  # before the temporary file exists
    "storage.write.data",  # half of the bytes are in the temporary file
    "storage.write.sync",  # all bytes written, not yet on disk
    "storage.write.rename",  # on disk under the temporary name
    "storage.write.done",  # renamed, the folder not yet on disk
    "checkpoint.shard.open",  # before the shard file exists
    "checkpoint.shard.data",  # before each piece of the shard
    "checkpoint.shard.close",  # all pieces written, not yet on disk
    "checkpoint.manifest",  # before this rank's manifest
    "checkpoint.gather",  # rank 0, before it waits for the manifests
    "checkpoint.commit",  # before COMMIT.json
    "checkpoint.committed",  # after COMMIT.json, before anything is deleted
    "checkpoint.uncommit",  # before COMMIT.json of an old checkpoint is deleted
    "checkpoint.delete",  # its COMMIT.json is gone, its shards are not
)

hits: Counter[str] = Counter()  # only counted while the variable is set


def hit(name: str) -> None:
    """Pass the point `name`.

    Raises:
        OSError: when the variable asks for it here.
    """
    wish = os.environ.get(VARIABLE)
    if not wish:
        return
    hits[name] += 1
    target, action, *rest = wish.split(":")
    if action not in ACTIONS:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}; actions: {', '.join(ACTIONS)}")
    if target != name:
        return
    nth = rest[0] if rest else "1"
    due = hits[name] >= int(nth[:-1]) if nth.endswith("+") else hits[name] == int(nth)
    if due:
        _act(name, action)


def _act(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "oserror":
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    elif action == "sleep":
        time.sleep(1.0)
