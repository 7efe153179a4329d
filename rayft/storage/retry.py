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

from rayft.core.errors import PermanentStorageError, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

_PERMANENT = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG, errno.EINVAL,
}  # fmt: skip
_SILENCE = re.compile("NETWORK_CONNECTION|curlCode", re.IGNORECASE)  # nothing answered
_DENIED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|Expired ?Token|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH"
    r"|INVALID_CLIENT_TOKEN|Bucket '[^']*' not found|HTTP status 40[13]",
    re.IGNORECASE,
)


class RootGone(OSError):
    """A folder that must be there is not: deleted, or its file system is not mounted any more."""


@dataclass(frozen=True)
class RetryPolicy:
    """Waits are uniform in [0, min(longest, first * 2^n)] seconds."""

    attempts: int = 5
    first: float = 0.2
    longest: float = 5.0
    silent: bool = True  # whether a store that does not answer at all is asked again

    def run(self, doing: str, place: str, action: Callable[[], T]) -> T:
        """`action()`, again after transient errors; it must be safe to repeat.

        Raises:
            StorageError: still failing; says `doing`, `place` and the reason.
            PermanentStorageError: it would fail again.
            FileNotFoundError: as raised by `action`.
        """
        for n in range(self.attempts):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                passing = is_transient(error)
                unheard = not self.silent and _SILENCE.search(str(error)) is not None
                if n + 1 == self.attempts or unheard or not passing:
                    kind = StorageError if passing else PermanentStorageError
                    what = f"cannot {doing} {place}: {error.strerror or error}"
                    raise kind(what, cause=_cause(error), fix=_fix(error, place)) from error
                log.warning("cannot %s %s, trying again: %s", doing, place, error)
                time.sleep(random.uniform(0, min(self.longest, self.first * 2**n)))
        raise ValueError("a Retry needs at least one attempt")


def is_transient(error: OSError) -> bool:
    """Whether trying again can help."""
    if error.errno is not None:
        return error.errno not in _PERMANENT
    return not isinstance(error, FileNotFoundError | RootGone) and not _DENIED.search(str(error))


def _cause(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk or the quota is full"
    if isinstance(error, RootGone):
        return "somebody deleted it, or its file system is not mounted any more"
    if error.errno == errno.EROFS:
        return "the file system is mounted read-only"
    if re.search("NO_SUCH_BUCKET|Bucket .* not found", str(error)):
        return "the bucket does not exist; rayft creates none"
    if error.errno in (errno.EACCES, errno.EPERM) or _DENIED.search(str(error)):
        return "no permission, or credentials that are missing or expired"
    return ""


def _fix(error: OSError, place: str) -> str:
    if place.startswith("s3://") and _DENIED.search(str(error)):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) for that bucket"
    return ""
