"""JSON that tells damage: a crc32 (zlib) as the last key of every line of a log, and of records.

    {"step":20,"split":"eval","loss":3.91,"line":41,"crc":"9ae0daaf"}

`line` counts from 1 over all parts of a log, so that lines which are gone are missed too; `crc` is
over the bytes before it. Both stay plain JSON for jq and pandas. No single bit and no burst of up
to 32 escapes a crc32, and of larger damages one in 4e9.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

LINE, CRC = "line", "crc"
"""Keys of a line that belong to the log, not to the row."""
_SEAL = re.compile(rb',"crc":"([0-9a-f]{8})"}')
_SEAL_BYTES = 18
_TRIAL = re.compile(rb'"trial":"([\w-]{1,64})"')
RECORD_CRC = "crc32"

Sound = Callable[[Mapping[str, object]], bool]
"""Whether a row is what its reader understands."""


@dataclass(frozen=True)
class DamagedLines:
    """Lines `first` to `last` of a log cannot be used, or are gone."""

    first: int
    last: int
    trials: tuple[str, ...] = ()  # named in what is left of them

    def __str__(self) -> str:
        lines = (
            f"line {self.first}" if self.first == self.last else f"lines {self.first}-{self.last}"
        )
        return f"{lines} ({', '.join(self.trials)})" if self.trials else lines


@dataclass(frozen=True)
class SealedLog:
    """What a log holds: rows in their order, without LINE and CRC."""

    rows: tuple[dict[str, object], ...] = ()
    damage: tuple[DamagedLines, ...] = ()
    last: int = 0  # number of the last line


def damage_sentence(path: str, damage: tuple[DamagedLines, ...]) -> str:
    """`2 lines of trials.jsonl are damaged and not used: line 14 (t0003), line 20`; "" without."""
    if not damage:
        return ""
    count = sum(one.last - one.first + 1 for one in damage)
    named = [str(one) for one in damage]
    shown = named if len(named) <= 6 else [*named[:5], f"and {len(named) - 5} other places"]
    some = f"{count} lines of {path} are" if count > 1 else f"1 line of {path} is"
    return f"{some} damaged and not used: {', '.join(shown)}"


def line_of(row: Mapping[str, object], number: int) -> bytes:
    """One line, with its end."""
    body = json.dumps({**row, LINE: number}, separators=(",", ":")).encode()[:-1]
    return body + b',"crc":"%08x"}\n' % zlib.crc32(body)


def number_of(line: bytes) -> int | None:
    """The number of a whole line (without its end); None where a byte differs from what was
    written, or where it was written without a checksum."""
    body, seal = line[:-_SEAL_BYTES], _SEAL.fullmatch(line[-_SEAL_BYTES:])
    if seal is None or b"%08x" % zlib.crc32(body) != seal.group(1):
        return None
    return int(body.rpartition(b'"line":')[2])


def any_row(row: Mapping[str, object]) -> bool:
    """The Sound of a reader that takes any row."""
    return True


def read_lines(parts: Iterable[bytes], sound: Sound = any_row) -> SealedLog:
    """A whole log from its parts.

    Lines written before there were checksums count as long as no line with one came before them.
    A last line without an end was being written when its writer died: it is dropped in silence.

    Args:
        sound: what a line without a checksum must be.
    """
    return _LogReader(sound).read(parts)


class _LogReader:
    def __init__(self, sound: Sound) -> None:
        self._sound = sound
        self._rows: list[dict[str, object]] = []
        self._damage: list[DamagedLines] = []
        self._seen: set[bytes] = set()
        self._sealed = False  # a line with a checksum was met
        self._last = 0  # number of the last good line
        self._bad: list[bytes] = []  # pieces since then

    def read(self, parts: Iterable[bytes]) -> SealedLog:
        for piece, ended in (piece for part in parts for piece in _pieces(part)):
            number = number_of(piece)
            row = None if number is None and self._sealed else _row(piece, number is None)
            if row is not None and (number is not None or self._sound(row)):
                self._take(piece, row, number)
            elif ended:
                self._bad.append(piece)
        if self._bad:
            self._lost(self._last + len(self._bad))
        return SealedLog(tuple(self._rows), tuple(self._damage), self._last)

    def _take(self, piece: bytes, row: dict[str, object], number: int | None) -> None:
        if number is None:
            number = self._last + len(self._bad) + 1
        elif piece in self._seen:
            return  # a copy
        else:
            self._sealed = True
            self._seen.add(piece)
        # A lower number is a second writer's, which died slowly.
        if number > self._last + 1:
            self._lost(number - 1)
        self._bad.clear()
        self._last = max(self._last, number)
        self._rows.append(row)

    def _lost(self, last: int) -> None:
        names = dict.fromkeys(name.decode() for bad in self._bad for name in _TRIAL.findall(bad))
        self._damage.append(DamagedLines(self._last + 1, last, tuple(names)))
        self._last = last


def _pieces(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Lines, and whether they have an end. Where a line's end was overwritten two lines are one;
    the checksum of the first says where it ends."""
    lines = data.split(b"\n")
    for index, line in enumerate(lines):
        ended, rest = index < len(lines) - 1, line
        for seal in _SEAL.finditer(line):
            start = len(line) - len(rest)
            if seal.end() < len(line) and number_of(line[start : seal.end()]) is not None:
                yield line[start : seal.end()], True
                rest = line[seal.end() + 1 :]
        if rest.strip():
            yield rest, ended


def _row(piece: bytes, old: bool) -> dict[str, object] | None:
    """The row of a line; None where it is none. Of an old line only if it never had a checksum."""
    try:
        row = json.loads(piece)
    except ValueError:  # also bytes that are not UTF-8
        return None
    if not isinstance(row, dict) or (old and (LINE in row or CRC in row)):
        return None
    row.pop(LINE, None)
    row.pop(CRC, None)
    return row


# --- records: one JSON object in a file of its own ---


class BadRecord(ValueError):
    """A file that is not what was written; the text says how."""


def seal(record: Mapping[str, object]) -> str:
    """Readable JSON with the checksum of its values: reformatting it does no harm."""
    return json.dumps({**record, RECORD_CRC: _crc(record)}, indent=2, sort_keys=True) + "\n"


def unseal(data: bytes) -> dict[str, object]:
    """The record, without its checksum; one written before there were checksums is taken as it is.

    Raises:
        BadRecord: it is damaged.
    """
    try:
        raw = json.loads(data)
    except RecursionError as error:
        raise BadRecord("it is nested too deep") from error
    except ValueError as error:
        raise BadRecord(f"it is not JSON: {error}" if data.strip() else "it is empty") from error
    if not isinstance(raw, dict):
        raise BadRecord(f"it holds a {type(raw).__name__}")
    known = raw.pop(RECORD_CRC, None)
    if known is not None and known != _crc(raw):
        raise BadRecord("its checksum does not match")
    return raw


def _crc(record: Mapping[str, object]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"
