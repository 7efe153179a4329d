"""Trying again: which storage errors pass by themselves, and how long to wait for them."""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from rayft.core.errors import StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

_PERMANENT = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG, errno.EINVAL,
}  # fmt: skip
_DENIED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|Expired ?Token|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH"
    r"|INVALID_CLIENT_TOKEN|Bucket '[^']*' not found|HTTP status 40[13]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Retry:
    """Waits are uniform in [0, min(longest, first * 2^n)] seconds."""

    attempts: int = 5
    first: float = 0.2
    longest: float = 5.0

    def run(self, doing: str, place: str, action: Callable[[], T]) -> T:
        """`action()`, again after transient errors; it must be safe to repeat.

        Raises:
            StorageError: still failing; says `doing`, `place` and the reason.
            FileNotFoundError: as raised by `action`.
        """
        for n in range(self.attempts):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if n + 1 == self.attempts or not is_transient(error):
                    raise StorageError(
                        f"cannot {doing} {place}: {error.strerror or error}", cause=_cause(error)
                    ) from error
                log.warning("cannot %s %s, trying again: %s", doing, place, error)
                time.sleep(random.uniform(0, min(self.longest, self.first * 2**n)))
        raise ValueError("a Retry needs at least one attempt")


def is_transient(error: OSError) -> bool:
    """Whether trying again can help."""
    if error.errno is not None:
        return error.errno not in _PERMANENT
    return not isinstance(error, FileNotFoundError) and not _DENIED.search(str(error))


def shown(uri: str) -> str:
    """An address for people: without credentials and options."""
    parts = urlsplit(uri)
    if not parts.scheme:
        return uri
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _cause(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk or the quota is full"
    if error.errno == errno.EROFS:
        return "the file system is mounted read-only"
    if re.search("NO_SUCH_BUCKET|Bucket .* not found", str(error)):
        return "the bucket does not exist; rayft creates none"
    if error.errno in (errno.EACCES, errno.EPERM) or _DENIED.search(str(error)):
        return "no permission, or credentials that are missing or expired"
    return ""
