"""`python -m bench`: see bench/table.py."""

from __future__ import annotations

import sys

from bench.table import main

sys.exit(main())
