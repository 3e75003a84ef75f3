"""What the examples' command lines share: numbers that must be at least one, and files to write in the end."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def output_file(text: str) -> Path:
    """A path whose folder is there now, not only when hours of work want to be written."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path
