"""Fixtures and settings that the tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA backend for the emulated device (tests/cpp/cuda_emulation), built once: it takes half a minute."""
    source = Path(__file__).resolve().parents[1] / "cpp" / "cuda_emulation" / "build.py"
    spec = importlib.util.spec_from_file_location("build_emulated_cuda", source)
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    path = tmp_path_factory.mktemp("cuda") / "libfoveal_cuda_emulated.so"
    builder.build(path)
    return path
