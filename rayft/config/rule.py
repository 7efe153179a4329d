"""Rule: one refusal, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rayft.config.run import Run


@dataclass(frozen=True)
class Rule:
    """One refusal.

    Attributes:
        when: true for a run that must not start.
        say: what is wrong and what to do instead; `{run...}` is filled in with the run. Or what
            finds that sentence.
        key: dotted path of the setting to change, for the line number.
    """

    when: Callable[[Run], bool]
    say: str | Callable[[Run], str]
    key: str

    def sentence(self, run: Run) -> str:
        """`say` for this run."""
        return self.say.format(run=run) if isinstance(self.say, str) else self.say(run)
