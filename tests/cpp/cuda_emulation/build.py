"""Build the CUDA backend for the emulated device: the kernels' own source, the host's C++ compiler, no CUDA.

python tests/cpp/cuda_emulation/build.py libfoveal_cuda_emulated.so
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CPP = ROOT / "cpp"
# The judge of arguments, as CMake lists it.
CANONICAL = re.findall(r"add_library\(foveal_canonical STATIC\s+([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())[0]
SOURCES = [
    *sorted((CPP / "cuda").glob("*.cu")),
    *sorted((CPP / "cuda").glob("*.cc")),
    *(ROOT / name for name in CANONICAL.split()),
    HERE / "emulator.cc",
]
# This folder comes first: its cuda/device.h and cuda/launch.h stand in for the real ones.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{HERE}", f"-I{CPP}", f"-I{CPP / 'include'}"]


def build(target: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile and link; raises with the compiler's words when it refuses."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            target = str(Path(folder) / (source.name + ".o"))
            command = [compiler, *FLAGS, "-Wno-unknown-pragmas", *extra, "-x", "c++", "-c", str(source), "-o", target]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{source.name}:\n{result.stderr}")
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        subprocess.run([compiler, "-shared", *extra, *objects, "-o", str(target)], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
