"""The keys and values that an attention module has seen, for decoding token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class KeyValueCache:
    """Room for the keys and values of a batch of sequences.

    ``MultiHeadAttention.new_cache`` makes one that fits the module. ::

        contiguous   k (B, capacity, Hkv, D)               row b belongs to sequence b
        paged        k (num_pages, page_size, Hkv, D)      token t of sequence b is row t % page_size of page
                                                           block_table[b, t // page_size]

    Pages are handed out when a sequence grows into them, so sequences of unequal length share a pool that is smaller
    than B * capacity.

    Parameters
    ----------
    batch_size, capacity : int
        Sequences, and the tokens that each may have.
    num_kv_heads, head_dim : int
        Of the keys.
    value_dim : int, optional
        Head dim of the values; default: head_dim.
    page_size : int, optional
        Tokens in a page; None: contiguous.
    num_pages : int, optional
        Pages in the pool. Default: as many as all sequences need at full length.
    dtype, device
        As in torch.empty.

    Attributes
    ----------
    k, v : Tensor
        The tokens, as drawn above.
    lens : (B,) int64 Tensor
        How many tokens each sequence has.
    block_table : (B, pages a sequence) int32 Tensor or None
        Which pages a sequence has.
    rotary : (cos, sin) or None
        The angles of every position, where the module turns keys and queries.
    grows : bool
        Whether a forward pass adds tokens; False for the memory of a cross-attention.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: Any = None,
        device: Any = None,
    ):
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"KeyValueCache: {name} is {value}, expected 1 or more")
        if page_size is not None and page_size < 1:
            raise ValueError(f"KeyValueCache: page_size is {page_size}, expected 1 or more")
        if page_size is None and num_pages is not None:
            raise ValueError(f"KeyValueCache: num_pages is {num_pages} without a page_size, expected None")
        self.batch_size, self.capacity, self.page_size, self.grows = batch_size, capacity, page_size, True
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.lens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.block_table: Tensor | None = None
        self._free: list[int] = []
        self._pages: list[list[int]] = []  # of each sequence
        rows = (batch_size, capacity)
        if page_size is not None:
            per_sequence = -(-capacity // page_size)
            num_pages = batch_size * per_sequence if num_pages is None else num_pages
            self.block_table = torch.zeros(batch_size, per_sequence, dtype=torch.int32, device=device)
            self._free = list(range(num_pages))[::-1]
            self._pages = [[] for _ in range(batch_size)]
            rows = (num_pages, page_size)
        self.k, self.v = (
            torch.zeros(*rows, num_kv_heads, dim, dtype=dtype, device=device)
            for dim in (head_dim, head_dim if value_dim is None else value_dim)
        )

    @property
    def max_tokens(self) -> int:
        """The keys that a mask or bias has a column for: the capacity, in whole pages."""
        return self.capacity if self.block_table is None else self.block_table.shape[1] * self.k.shape[1]

    def reserve(self, num_tokens: int) -> None:
        """See to it that each sequence has pages for ``num_tokens`` more.

        A forward pass does it by itself, except in a compiled one, which needs the pages before.

        Raises
        ------
        ValueError
            A sequence would be longer than the capacity, or the pool has too few free pages; nothing has changed then.
        """
        lens = self.lens.tolist()
        longest = max(lens) + num_tokens
        if longest > self.capacity:
            raise ValueError(
                f"KeyValueCache: {num_tokens} more tokens make {longest}, expected at most the capacity {self.capacity}"
            )
        if self.block_table is None or self.page_size is None:
            return
        missing = [
            max(-(-(held + num_tokens) // self.page_size) - len(pages), 0)
            for held, pages in zip(lens, self._pages, strict=True)
        ]
        if sum(missing) > len(self._free):
            raise ValueError(
                f"KeyValueCache: {num_tokens} more tokens for each sequence need {sum(missing)} pages, expected at "
                f"most the {len(self._free)} that are free"
            )
        for sequence, count in enumerate(missing):
            for _ in range(count):
                page = self._free.pop()
                self.block_table[sequence, len(self._pages[sequence])] = page
                self._pages[sequence].append(page)

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Forget the tokens of some sequences (None: of all) and take their pages back."""
        for sequence in range(self.batch_size) if sequences is None else sequences:
            self.lens[sequence] = 0
            if self._pages:
                self._free += self._pages[sequence][::-1]
                self._pages[sequence] = []

    def __repr__(self) -> str:
        """Show shapes and lengths."""
        kind = "contiguous" if self.page_size is None else f"{len(self._free)} of {self.k.shape[0]} pages free"
        return f"KeyValueCache(k {tuple(self.k.shape)} {self.k.dtype}, {kind}, lens {self.lens.tolist()})"
