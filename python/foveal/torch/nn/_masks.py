"""The masks of torch.nn.MultiheadAttention as options of :func:`foveal.attention`.

True in torch's masks means that a key is not seen, and a floating mask is added to the scores. No mask is written out
larger than it came, except for two floating ones that have to be added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """What hides keys and changes scores; each broadcasts to (B, Hq, Sq, Skv)."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lens: Tensor | None = None

    def options(self) -> dict[str, Any]:
        """Give those that are there."""
        return {name: x for name, x in self._asdict().items() if x is not None}


def masks(
    module: str,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    shape: tuple[int, int, int, int],
) -> Masks:
    """Read both masks; ``shape`` is (B, Hq, Sq, Skv), and errors begin with ``module``."""
    attn = _attn_mask(module, attn_mask, shape)
    if key_padding_mask is None:
        return attn
    batch, _, _, num_keys = shape
    padding = _checked(module, "key_padding_mask", key_padding_mask)
    if tuple(padding.shape) != (batch, num_keys):
        raise ValueError(
            f"{module}: key_padding_mask has shape {tuple(padding.shape)}, expected (batch, keys) = {batch, num_keys}"
        )
    padding = _as_bool(padding)
    if padding.is_floating_point():
        bias = padding[:, None, None, :]
        return attn._replace(bias=bias if attn.bias is None else attn.bias + bias)
    if num_keys == 0:
        return attn
    real = padding.logical_not()
    lens = (real * torch.arange(1, num_keys + 1, device=real.device)).amax(1)  # the keys behind are all padding
    rest = None if _is_readable(real) and not (padding[:, :-1] & real[:, 1:]).any() else real[:, None, None, :]
    if rest is None or attn.mask is None:
        return attn._replace(kv_lens=lens, mask=attn.mask if rest is None else rest)
    # Both as one mask would be a (B, 1, Sq, Skv) array.
    hidden = torch.zeros(rest.shape, dtype=torch.float32, device=rest.device).masked_fill(~rest, -torch.inf)
    return attn._replace(kv_lens=lens, bias=hidden)


def right_padding(module: str, key_padding_mask: Tensor, batch: int, num_keys: int) -> Tensor:
    """Give the lengths (B,) of sequences that are padded on the right, as a bool mask (B, Skv) says."""
    if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (batch, num_keys):
        raise ValueError(
            f"{module}: key_padding_mask is {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}, "
            f"expected a bool tensor of shape {batch, num_keys} with a cache"
        )
    real = key_padding_mask.logical_not()
    if _is_readable(real) and bool((key_padding_mask[:, :-1] & real[:, 1:]).any()):
        raise ValueError(
            f"{module}: key_padding_mask has padding before a token, expected it behind all tokens with a cache"
        )
    return real.sum(1)


def _attn_mask(module: str, attn_mask: Tensor | None, shape: tuple[int, int, int, int]) -> Masks:
    if attn_mask is None:
        return Masks()
    x = _checked(module, "attn_mask", attn_mask)
    batch, heads, num_queries, num_keys = shape
    allowed = {2: (num_queries, num_keys), 3: (batch * heads, num_queries, num_keys)}
    if tuple(x.shape) != allowed.get(x.ndim):
        raise ValueError(
            f"{module}: attn_mask has shape {tuple(x.shape)}, expected (queries, keys) = {allowed[2]} or "
            f"(batch * heads, queries, keys) = {allowed[3]}"
        )
    if x.ndim == 3:
        x = x.unflatten(0, (batch, heads))
    return Masks(bias=x) if x.is_floating_point() else Masks(mask=x.logical_not())


def _checked(module: str, name: str, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{module}: {name} has dtype {mask.dtype}, expected torch.bool or a floating dtype")
    return mask


def _as_bool(padding: Tensor) -> Tensor:
    """Turn a floating mask of 0 and -inf alone, which torch's layers make of a bool one, back."""
    if padding.is_floating_point() and not padding.requires_grad and _is_readable(padding):
        hidden = padding == -torch.inf
        if bool((hidden | (padding == 0)).all()):
            return hidden
    return padding


def _is_readable(x: Tensor) -> bool:
    """Say whether a decision may depend on the values: not while a graph is made of them, nor far from this CPU."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(x) is Tensor
    )
