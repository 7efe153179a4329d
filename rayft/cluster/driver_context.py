"""What a process elsewhere needs so that paths and addresses mean there what they mean to the
driver: its working directory, and the credentials that must not travel where Ray logs.

Ray writes runtime environments and the command line of the driver into its logs and its job table;
arguments of tasks and actors it only carries. So secrets go as arguments, in a class that does not
print them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray

from rayft.core.address import Credentials, redact, remember, remembered

PASSED_ON = ("NCCL_", "GLOO_", "HF_", "RAYFT_", "TORCH_NCCL_", "FI_", "UCX_")  # driver -> workers
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(_|^)KEY($|_)", re.IGNORECASE)


@dataclass(frozen=True)
class DriverContext:
    """Taken with `here` in one process, taken over with `enter` in another."""

    cwd: str
    credentials: Mapping[str, Credentials] = field(default_factory=dict, repr=False)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # secret variables

    @staticmethod
    def here() -> DriverContext:
        """Of this process."""
        return DriverContext(str(Path.cwd()), remembered(), _variables(secret=True))

    def enter(self) -> None:
        """Make this process like that one."""
        if Path(self.cwd).is_dir():
            os.chdir(self.cwd)
        remember(self.credentials)
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)


def passed_on() -> dict[str, str]:
    """The driver's variables that workers need as well (a local Ray inherits them anyway), for a
    runtime environment: without secrets, which `DriverContext` carries."""
    return _variables(secret=False)


def _variables(*, secret: bool) -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON)
        and secret == bool(_SECRET.search(name) or redact(value) != value)
    }


def hide_arguments() -> None:
    """Take credentials out of the command line that the system, and so Ray's job table, shows.

    Ray has no public call for this; the private one is held by a test.
    """
    line = " ".join(sys.orig_argv)
    if redact(line) != line:
        raylet = ray._raylet  # pyright: ignore[reportAttributeAccessIssue]  # see above
        raylet.setproctitle(redact(line))
