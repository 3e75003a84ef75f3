"""Padded batches to packed sequences and back, by the names that flash-attn's users import beside its functions.

A padded batch is (B, S, ...) with a mask (B, S), true at real tokens; packed, it is (tokens, ...) of the real ones in
order, with ``cu_seqlens`` (B + 1,) saying where each sequence begins. All of it is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Give the rows of (rows, ...) that ``indices`` names."""
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Give (first_axis_dim, ...) with ``values`` in the rows that ``indices`` names, and 0 elsewhere."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack a padded batch.

    Parameters
    ----------
    hidden_states : Tensor
        (B, S, ...).
    attention_mask : Tensor
        (B, S), bool or integer, nonzero at real tokens.
    unused_mask : Tensor, optional
        (B, S), nonzero at tokens to keep though they are not real.

    Returns
    -------
    (Tensor, Tensor, Tensor, int, Tensor)
        The packed tokens; their places in the flattened batch; cu_seqlens (B + 1,) int32; the longest length; the
        number of real tokens of each sequence, int32.
    """
    kept = attention_mask != 0 if unused_mask is None else (attention_mask + unused_mask) != 0
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    real = (attention_mask != 0).sum(-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, real


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo :func:`unpad_input`: (B, S, ...) with 0 at the tokens that were left out."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.reshape(batch, seqlen, *rows.shape[1:])
