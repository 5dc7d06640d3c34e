"""`python -m modeltest`."""

from __future__ import annotations

import sys

from modeltest.command import main

sys.exit(main())
