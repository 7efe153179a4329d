"""A driver process as the command line would be: `driver.py CONFIG_JSON`."""

import os
import sys

import stub

from rayft.config.run import Run
from rayft.core import process
from rayft.core.errors import RayftError
from rayft.training.driver import train

try:
    print(
        train(
            Run.model_validate_json(sys.argv[1]), engine=stub.execute, prepare=stub.prepare
        ).status
    )
except RayftError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
    if process.abandoned.is_set():
        sys.stderr.flush()
        os._exit(code)  # as rayft.entry does
    sys.exit(code)
