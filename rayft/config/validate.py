"""Data to a Run, or one error that lists every mistake with its place."""

from __future__ import annotations

import re

from pydantic import ValidationError

from rayft.config import addresses, rules
from rayft.config.messages import Mistake, sentences
from rayft.config.parse import ConfigSource, split
from rayft.config.run import Run
from rayft.core.errors import ConfigError

LISTED = 8  # mistakes shown at once
NAMED = 100  # mistakes that are put into words: the nearest name takes milliseconds each


def validated(found: ConfigSource, wrong: list[Mistake]) -> Run:
    """The Run that `found` is, all mistakes (those already known in `wrong`) at once.

    Raises:
        ConfigError: up to `LISTED` mistakes, each with its place.
    """
    run: Run | None = None
    try:
        run = Run.model_validate(found.data)
    except ValidationError as error:
        known = {keys for keys, _ in wrong}
        details = error.errors(include_url=False)[:NAMED]
        wrong = [*wrong, *(m for m in sentences(details, found.data) if m[0] not in known)]
    else:
        wrong = [*wrong, *addresses.mistakes(run)]
    if wrong or run is None:
        raise refusal(found, wrong)
    return run


def ruled(found: ConfigSource, run: Run) -> Run:
    """`run`, unless rules refuse it: then all of them, each with the place of its key.

    Raises:
        ConfigError: a pair of settings cannot work.
    """
    refused = rules.matching(run)
    if refused:
        told = [(split(rule.key), rule.sentence(run)) for rule in refused]
        raise refusal(found, told, "reason to refuse")
    return run


def refusal(found: ConfigSource, wrong: list[Mistake], noun: str = "mistake") -> ConfigError:
    """One error for all mistakes, in the order of the file."""

    def order(mistake: Mistake) -> int:
        number = re.search(r":(\d+)$", found.where(mistake[0]))
        return int(number[1]) if number else 1 << 30

    wrong = sorted(wrong, key=order)
    names = any(" is not a key" in said or " is missing" in said for _, said in wrong)
    fix = "`rayft check --schema` lists every key" if names else ""
    if len(wrong) == 1:
        keys, said = wrong[0]
        return ConfigError(said, where=found.where(keys), fix=fix)
    nouns = "reasons to refuse" if noun != "mistake" else "mistakes"
    many = "or more " if len(wrong) >= NAMED else ""
    lines = [f"{len(wrong)} {many}{nouns} in {found.name}"]
    lines += [f"  {found.where(keys)}: {said}" for keys, said in wrong[:LISTED]]
    if len(wrong) > LISTED:
        lines.append(f"  ... and {len(wrong) - LISTED} more")
    return ConfigError("\n".join(lines), fix=fix)
