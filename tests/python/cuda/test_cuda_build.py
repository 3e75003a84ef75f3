"""What of the CUDA backend needs nvcc but no GPU: it compiles for every shipped chip, spills nothing, and loads.

Takes two minutes of compiling, so it runs where FOVEAL_TEST_NVCC=1 says so, as .ci/cuda does when nvcc is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench"))
from cuda_device import HOPPER_SHARED, cuda  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("FOVEAL_TEST_NVCC") != "1", reason="FOVEAL_TEST_NVCC is not 1"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library as CMake builds it, and what the compiler said."""
    assert shutil.which("nvcc"), "FOVEAL_TEST_NVCC=1, but there is no nvcc"
    folder = tmp_path_factory.mktemp("cuda")
    options = ["-DFOVEAL_CUDA=ON", "-DFOVEAL_BUILD_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
    command = ["cmake", "--build", folder, "--target", "foveal_cuda", "--parallel", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.rglob("libfoveal_cuda.so")), result.stdout + result.stderr


def test_every_kernel_is_compiled_for_every_chip(build: tuple[Path, str]) -> None:
    entries = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", build[1])
    per_chip = {chip: {name for name, found in entries if found == chip} for _, chip in entries}
    assert set(per_chip) == {"sm_80", "sm_90a"}
    assert per_chip["sm_80"] == per_chip["sm_90a"]
    assert len(per_chip["sm_80"]) == 2 * (10 + 6 + 1 + 10) + 2 + 10


def test_no_kernel_spills(build: tuple[Path, str]) -> None:
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", build[1])
    assert len(stacks) > 0
    assert all(numbers == ("0", "0", "0") for numbers in stacks)


def test_the_library_loads_and_fails_cleanly_without_a_gpu(build: tuple[Path, str]) -> None:
    library = cuda.Library(build[0])
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(cuda.CudaError) as refusal:
        library.device_count()
    assert refusal.value.code in (35, 100)  # no driver; a driver without a device
    problem = cuda.Problem()
    for i, name in enumerate(("q", "k", "v", "out")):
        setattr(problem, name, cuda.view((i + 1) << 44, "float16", (1, 1, 64, 64), (4096, 4096, 64, 1)))
    with pytest.raises(cuda.CudaError):
        library.forward(problem)
    plan = library.plan(problem, HOPPER_SHARED)
    assert plan["path"] == "decode"
