"""Fixtures and settings that the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from foveal import _core

hypothesis.settings.register_profile(
    "foveal",
    deadline=None,  # the machine may be busy, and instruction sets differ in speed by a factor of 30
    max_examples=150,
    print_blob=True,
    # The fixture `isa` stays as it is for all examples of a test.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("foveal")


@pytest.fixture(params=_core.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once on every instruction set of this build and machine."""
    _core.use_isa(request.param)
    assert _core.isa() == request.param
    yield request.param
    assert _core.isa() == request.param
    _core.use_isa(None)
