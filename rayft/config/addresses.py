"""Addresses in a config that can mean nothing on any machine: unknown schemes, names that no file
system takes. Buckets and options are storage's (`storage/remote.py`, exit 6); whether a place
exists, and may be written, only a run can find out.

A path is kept exactly as it is typed: two Unicode spellings of one letter are two folders on Linux,
so neither is put into a normal form.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from rayft.config.messages import Mistake
from rayft.config.parse import Keys, dotted
from rayft.config.run import Run

SCHEMES = ("s3", "gs", "gcs", "file")
NAME_BYTES = 255  # of one name, on every file system in use; UTF-8 bytes, not characters
PATH_BYTES = 700  # a key has at most 1,024 bytes on S3 and GCS, and a run's own files lie below

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SLIPS = re.compile(
    rf"({'|'.join(SCHEMES)})(?::/?(?!/)|//)(.*)|([a-z][a-z0-9+.-]*):/(?!/).*",
    re.IGNORECASE | re.DOTALL,
)


def mistakes(run: Run) -> list[Mistake]:
    """What is wrong with the addresses of `run`."""
    return [
        (keys, f"{dotted(keys)}: {said}") for keys, text in _addresses(run) if (said := wrong(text))
    ]


def _addresses(run: Run) -> Iterator[tuple[Keys, str]]:
    yield ("storage",), run.storage
    if run.data.cache is not None:
        yield ("data", "cache"), run.data.cache
    for split, sources in (("train", run.data.train), ("eval", run.data.eval)):
        for index, source in enumerate(sources):
            yield ("data", split, index, "path"), source.path


def wrong(text: str) -> str:
    """Why `text` can be no address, one sentence; "" when it can."""
    if not text.strip():
        return "is empty; `.` is the current folder"
    if not text.isprintable():
        return f"{text[:60]!r} holds a character that cannot be printed; no name should"
    found = _SCHEME.fullmatch(text)
    said = _uri(found[1]) if found else _local(text)
    return said or _long(found[2] if found else text)


def _uri(scheme: str) -> str:
    if scheme.lower() not in SCHEMES:
        near = difflib.get_close_matches(scheme.lower(), SCHEMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}://? " if near else ""
        return f"{scheme}:// is not known; {hint}(there are: local paths, s3://, gs://, file://)"
    return ""


def _local(text: str) -> str:
    if slip := _SLIPS.fullmatch(text):
        if slip[1]:
            meant = f"{slip[1].lower()}://{'/' * (slip[1].lower() == 'file')}{slip[2].lstrip('/')}"
            return f"did you mean {meant}? A local folder of that name is ./{text}"
        return f"{slip[3]}:/ is not known; a local path of that name is ./{text}"
    try:
        Path(text).expanduser()
    except RuntimeError:  # ~user/...
        return f"there is no user {text.partition('/')[0][1:]} on this machine"
    return ""


def _long(path: str) -> str:
    size = max(len(part.encode()) for part in path.split("/"))
    if size > NAME_BYTES:
        return f"a name of {size:,} bytes; file systems take {NAME_BYTES}"
    if len(path.encode()) > PATH_BYTES:
        return f"a path of {len(path.encode()):,} bytes; {PATH_BYTES} leave room for a run's files"
    return ""
