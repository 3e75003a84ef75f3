"""Keys and values in pages: sequence b has token t in row t % page_size of page block_table[b, t // page_size]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_pages(function: str, block_table: Tensor, lens: Sequence[int], k: Tensor, v: Tensor) -> None:
    """Refuse a table that does not lead to ``lens`` tokens of each sequence. Entries past them may be anything."""
    if not isinstance(block_table, Tensor) or block_table.dtype not in (torch.int32, torch.int64):
        found = getattr(block_table, "dtype", type(block_table).__name__)
        raise TypeError(f"{function}: block_table has type {found}, expected an int32 or int64 torch.Tensor")
    if block_table.ndim != 2 or block_table.shape[0] != len(lens):
        raise ValueError(f"{function}: block_table.shape is {tuple(block_table.shape)}, expected ({len(lens)}, pages)")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"{function}: v has pages {tuple(v.shape[:2])}, expected {tuple(k.shape[:2])} (from k)")
    num_pages, page_size = k.shape[:2]
    capacity = block_table.shape[1] * page_size
    for b, length in enumerate(lens):
        if length > capacity:
            raise ValueError(
                f"{function}: sequence {b} has {length} keys, expected at most {capacity} (in block_table)"
            )
        used = block_table[b, : -(-length // page_size) if page_size else 0]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= num_pages):
            raise ValueError(f"{function}: block_table[{b}] is {used.tolist()}, expected pages below {num_pages}")


def gather_pages(x: Tensor, block_table: Tensor, lens: Sequence[int]) -> Tensor:
    """Copy the pages that hold ``lens`` tokens of each sequence together: (B, pages * page_size, H, D)."""
    page_size = x.shape[1]
    count = -(-max(lens, default=0) // page_size) if page_size else 0
    used = torch.tensor([-(-length // page_size) if page_size else 0 for length in lens], device=x.device)
    table = block_table[:, :count]
    # Pages that a shorter sequence does not have are read as page 0 and lie past its length.
    table = table.masked_fill(torch.arange(count, device=x.device) >= used[:, None], 0)
    return x[table].flatten(1, 2)
