"""What can go wrong, as a user meets it: one class per exit code, at most 15 lines of text.

An error says what happened, where (file:line, or rank and step), the likely cause and the next
command.
"""

from __future__ import annotations

from rayft.core.address import redact

MAX_LINES = 15
LONGEST, LONGEST_PASTED = 500, 4000  # characters of a line; of one that holds a path or a command


class RayftError(Exception):
    """Base of every refusal and failure that rayft itself reports. Its texts hold no credentials,
    whatever they were made of.

    Args:
        what: what is wrong, one sentence (further lines allowed for lists).
        where: `file:line`, or `rank 1, step 120`.
        cause: the likely cause, one sentence.
        fix: what to do or type next.
    """

    exit_code = 1
    label = "error"

    def __init__(self, what: str, *, where: str = "", cause: str = "", fix: str = "") -> None:
        what, where, cause, fix = (redact(text) for text in (what, where, cause, fix))
        super().__init__(what, where, cause, fix)
        self.what, self.where, self.cause, self.fix = what, where, cause, fix

    def __str__(self) -> str:
        tail = [
            f"  {label}: {line_of(text, LONGEST_PASTED)}"
            for label, text in (("where", self.where), ("cause", self.cause), ("next", self.fix))
            if text
        ]
        head = [line_of(line) for line in f"{self.label}: {self.what}".splitlines()]
        room = MAX_LINES - len(tail)
        if len(head) > room:
            head = [*head[: room - 1], f"  ... and {len(head) - room + 1} more"]
        return "\n".join(head + tail)

    def __reduce__(self):
        # Exceptions cross process borders (Ray pickles them): rebuild from the four texts.
        return _rebuild, (type(self), self.what, self.where, self.cause, self.fix)


def line_of(text: str, longest: int = LONGEST) -> str:
    """`text` as one line that any terminal can show: control characters and halves of characters
    (of a path that is no UTF-8) are escaped, the middle of a very long line is left out."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def _rebuild(kind: type[RayftError], what: str, where: str, cause: str, fix: str) -> RayftError:
    return kind(what, where=where, cause=cause, fix=fix)


class ConfigError(RayftError):
    """The config cannot mean anything, or asks for an impossible pair."""

    exit_code, label = 2, "config error"


class DataError(RayftError):
    """The data cannot be read, or too much of it is bad."""

    exit_code, label = 3, "data error"


class InfeasibleError(RayftError):
    """It will not fit, or the cluster has no such resources."""

    exit_code, label = 4, "infeasible"


class DivergedError(RayftError):
    """The loss or the gradient is no longer a number."""

    exit_code, label = 5, "diverged"


class DeadGradientError(RayftError):
    """Something that should train gets no gradient, or does not move: no attempt can change it.
    Exit 1."""

    label = "dead gradients"


class StorageError(RayftError):
    """Storage cannot be read or written, or holds nothing that can be trusted."""

    exit_code, label = 6, "storage error"


class PermanentStorageError(StorageError):
    """Storage refuses, and will refuse again until somebody mends it: full, read-only, gone, no
    permission, no such bucket."""


class DamagedError(StorageError):
    """No commit of a run can be used any more. Only its user can choose what happens next."""


class InterruptedRun(RayftError):
    """Stopped by a signal after a save; the same command continues it."""

    exit_code, label = 75, "interrupted"


class ClusterLostError(InterruptedRun):
    """Ray is gone under a run. Exit 75: the run is whole and nothing in it is at fault, so whoever
    starts jobs again should start this one again, on a cluster that lives; 1 would say that a
    person must look first."""


class InUseError(RayftError):
    """Another driver has this run or sweep. Exit 1: 2 would say that the config must change, 75
    that it is to be started again, and both are wrong while the other one lives."""

    label = "already running"


def first_line(text: str) -> str:
    """The first line that says something, at most 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
