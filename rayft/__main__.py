"""python -m rayft"""

import sys

from rayft.entry import main

sys.exit(main())
