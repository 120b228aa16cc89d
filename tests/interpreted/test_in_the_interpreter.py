"""The tests that need interpreted Triton run in a process of their own: the switch cannot be thrown later.

They can also be run by hand, see docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.timeout(3600)
def test_interpreted(interpreted: Any) -> None:
    process, log = interpreted
    code = process.wait()
    log.seek(0)
    assert code == 0, log.read()[-8000:].decode(errors="replace")
