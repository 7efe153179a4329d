"""Part: the tests that need a CUDA device (tests/gpu); those that cannot run say why."""

from __future__ import annotations

import sys

import pytest
from part import ROOT, Part


class Telling:
    """Passes on each test's outcome as it ends."""

    def __init__(self, part: Part) -> None:
        self.part, self.counts = part, {"passed": 0, "failed": 0, "skipped": 0}
        self.why: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        if report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2]
            said = report.longrepr
            text = said[2] if isinstance(said, tuple) else str(said).strip().split("\n")[-1]
            self.why[name] = text.removeprefix("Skipped: ")[:200]
        self.part.note(**self.counts, **({"not passed": self.why} if self.why else {}))


def main() -> None:
    part = Part()
    part.need("pytest")
    telling = Telling(part)
    where = [
        str(ROOT / "tests" / "gpu"),
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    # no cache: the checkout is left as it is; a warning, not an error, without pytest-timeout
    code = pytest.main(["-m", "gpu", "-v", "-p", "no:cacheprovider", *where], plugins=[telling])
    if code == pytest.ExitCode.OK and not telling.counts["passed"]:
        part.skip("; ".join(sorted(set(telling.why.values()))) or "no test was found")
    if telling.counts["failed"]:
        part.fail(f"{telling.counts['failed']} tests failed")
    sys.exit(int(code))


if __name__ == "__main__":
    main()
