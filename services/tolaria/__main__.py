"""``python -m services.tolaria``: trains a network, grown and ungrown, and reports."""

from __future__ import annotations

import sys

from services.tolaria.command import main

if __name__ == "__main__":
    sys.exit(main())
