"""Rejects weak symbols in the objects that are compiled once per instruction set: isa_symbols.py NM OBJECT...

A weak symbol is an inline function or template that several objects define and of which the linker keeps one. Were it
the AVX-512 copy, every caller, on any machine, would run AVX-512 code. So the kernels define nothing that is shared.
"""

import subprocess
import sys


def weak_definitions(nm: str, path: str) -> list[str]:
    listing = subprocess.run([nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    if not symbols:
        sys.exit(f"isa_symbols: {path} defines nothing: not the object that was meant")
    return [f"{path}: {kind} {name}" for kind, name in symbols if kind in "WVu"]


nm, *paths = sys.argv[1:]
if not paths:
    sys.exit("isa_symbols: no objects named")
weak = [line for path in paths for line in weak_definitions(nm, path)]
if weak:
    sys.exit("isa_symbols: weak symbols, which must be static or in an anonymous namespace:\n" + "\n".join(weak))
print(f"no weak symbols in {len(paths)} objects")
