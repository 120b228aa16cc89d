"""Leaves the interpreted tests to a process that interprets Triton, see test_in_the_interpreter.py."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["inside", "stand_in"]
