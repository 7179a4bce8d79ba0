"""What all fuzzing shares: few examples, always the same ones, so that a red test is red again for everyone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    derandomize=True,
    database=None,
    deadline=None,  # a slow machine is no bug
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Tests take the profile that is loaded while their module is imported: that of this folder is for it alone."""
    before = settings.get_current_profile_name()
    settings.load_profile("fuzz")
    try:
        return (yield)
    finally:
        settings.load_profile(before)
