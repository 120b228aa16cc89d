"""Leaves the tests inside to processes that interpret Triton: the switch cannot be thrown later."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["inside", "stand_in"]
