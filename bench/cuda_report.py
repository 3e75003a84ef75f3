"""One command for the CUDA backend: correctness first, then speed against PyTorch's own backends.

    python bench/cuda_report.py --library libfoveal_cuda.so --json report.json

check     every case of `correctness_grid` and `gradient_grid` (cuda_problems.py) against float64 on the rounded inputs,
          outputs poisoned before each run, run twice for bitwise equality, and padded against unpadded batches
ceilings  device-to-device copy and 8192^3 matrix product
ratios    forward: ours, CUDNN, FLASH, EFFICIENT in turn in one process, median and spread over rounds
gradients the same of the backward pass alone
decode    one query row over a long cache, CUDA-graph replay over rotated caches larger than L2, in GB/s
sweep     every kernel variant on the shapes of `ratios`
tiny      a few small launches for compute-sanitizer

Stages stop at their share of `--minutes`. With the library of the emulated device (tests/cpp/cuda_emulation),
`--device cpu --small --stages check` runs without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from cuda_checks import stage_check, stage_tiny
from cuda_device import HostMemory, TorchMemory, cuda
from cuda_speed import stage_ceilings, stage_decode, stage_gradients, stage_ratios, stage_sweep

STAGES = {
    "check": stage_check,
    "tiny": stage_tiny,
    "ceilings": stage_ceilings,
    "ratios": stage_ratios,
    "gradients": stage_gradients,
    "decode": stage_decode,
    "sweep": stage_sweep,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="the backend's shared object")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the emulated device")
    parser.add_argument(
        "--stages", default="check,ceilings,ratios,gradients,decode,sweep", help="comma separated, in this order"
    )
    parser.add_argument("--small", action="store_true", help="sizes that an emulated device can run")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages together")
    parser.add_argument("--json", type=Path, help="where to write everything")
    args = parser.parse_args(argv)
    args.stages = args.stages.split(",")
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"--stages has {unknown[0]!r}, expected some of {', '.join(STAGES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the stages; exit status 1 when a check failed."""
    args = parse_arguments(argv)
    begin = time.monotonic()
    library = cuda.Library(args.library.resolve())
    report: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    if args.device == "cuda":
        memory: Any = TorchMemory()
        torch = memory.torch
        properties = torch.cuda.get_device_properties(0)
        report["machine"] = {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        print(json.dumps(report["machine"]))
    else:
        memory = HostMemory()
    passed = True
    for i, name in enumerate(args.stages):
        left = args.minutes * 60 - (time.monotonic() - begin)
        deadline = time.monotonic() + left / (len(args.stages) - i) * (1.5 if i + 1 < len(args.stages) else 1.0)
        started = time.monotonic()
        report[name] = STAGES[name](library, memory, args, deadline)
        report[name]["seconds"] = time.monotonic() - started
        passed &= report[name].get("passed", True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
