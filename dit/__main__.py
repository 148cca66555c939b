"""`python -m dit key=value ...`, the same as dit/main.py."""

from __future__ import annotations

import sys

from dit.main import main

sys.exit(main())
