"""load: a config file, a mapping or a Run, with overrides, to a checked Run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rayft.config import space
from rayft.config.menu_tree import tidy
from rayft.config.messages import Mistake
from rayft.config.override import override, plain
from rayft.config.parse import ConfigSource, dotted, parse, read
from rayft.config.run import Run
from rayft.config.validate import refusal, ruled, validated
from rayft.core.address import above, clean
from rayft.core.errors import ConfigError
from rayft.storage.folder import Storage


def load(source: str | Path | Mapping[str, object] | Run, overrides: Sequence[str] = ()) -> Run:
    """Read, override, validate, and refuse what is impossible.

    Paths inside a config (data, models, storage) are relative to the current directory, not to the
    config file, as in the tools people come from: the same file works from a project's root
    wherever it is kept.

    Args:
        source: path or URI of a YAML or JSON file, the same as a mapping, or a Run.
        overrides: `a.b=c`, the value in YAML, list entries by number: `methods.0.rank=8`. An
            override stands over the file; the last one wins.

    Raises:
        ConfigError: all mistakes at once (up to 8), each with its line, or a pair of settings that
            cannot work (rayft.config.rules).
        StorageError: a URI cannot be read.
    """
    if isinstance(source, str) and "://" in source:
        found = _fetched(source)
    elif isinstance(source, str | Path):
        found = read(Path(source))
    else:
        try:
            data = source.resolved() if isinstance(source, Run) else plain(source)
        except RecursionError:
            raise ConfigError("the mapping nests without end, or contains itself") from None
        found = ConfigSource("config", data)
    if found.data is None:
        found.data = {}
    if not isinstance(found.data, dict):
        raise ConfigError("a config is a mapping (key: value) at the top", where=found.name)
    wrong: list[Mistake] = []
    tidy(found, wrong)
    for text in overrides:
        override(found, text)
        wrong.clear()  # it may have put a mistake right
        tidy(found, wrong)
    run = validated(found, [(keys, f"{dotted(keys)} {said}") for keys, said in wrong])
    if run.sweep is not None and (astray := space.mistakes(run)):
        raise refusal(found, astray)
    ruled(found, run)
    if said := space.hopeless(run):
        raise refusal(found, [(("sweep", "space"), said)])
    return run


def _fetched(uri: str) -> ConfigSource:
    """A config that lies on storage, as best/config.yaml of a sweep does."""
    address, name = above(clean(uri))
    folder = Storage.open(address).hasty()
    try:
        text = folder.read_text(name)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {folder.shown(name)}") from None
    except UnicodeDecodeError as error:
        what = f"{folder.shown(name)} is not UTF-8 text (byte {error.start})"
        raise ConfigError(what) from None
    return parse(text, folder.shown(name))
