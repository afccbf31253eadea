# SPDX-License-Identifier: MIT
"""python -m tbq is the command tbq."""

import sys

from tbq.cli.main import main

sys.exit(main())
