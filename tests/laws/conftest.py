"""Every law runs on every row of the table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from table import INSTANCES, Instance  # beside this file


@pytest.fixture(params=INSTANCES, ids=lambda i: i.id)
def case(request: pytest.FixtureRequest) -> Instance:
    """One row of the table."""
    return request.param
