"""Masks of Hugging Face transformers kept as the rule that they follow, instead of one byte for every (query, key).

transformers makes the mask of a layer by calling a function of index tensors. :func:`make_mask` recognises the causal,
the sliding and the unrestricted one, reads the padding of the batch, and returns a :class:`RuleMask`: a bool tensor of
the usual shape (B, 1, Sq, Skv) to whoever looks at it, that :func:`attention_options` turns into the causal, window and
length options of :func:`foveal.attention`. What is not recognised, and what somebody will combine with something else
or trace, becomes transformers' own dense mask, so an unknown pattern costs speed, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Window = tuple[int | None, int | None]

_MODULE = "transformers.masking_utils"


@dataclass(frozen=True)
class Pattern:
    """Query at position p sees key j where j <= p if causal, and p - left <= j <= p + right."""

    causal: bool
    window: Window = (None, None)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Say it of integer tensors that broadcast."""
        left, right = self.window
        distance = key - query
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen &= distance <= 0
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        return seen


@dataclass(frozen=True)
class Rule:
    """A pattern, the position of the first query, and the padding: keys past kv_lens, or False in key_mask."""

    pattern: Pattern
    q_offset: int
    kv_lens: Tensor | None = None  # (B,)
    key_mask: Tensor | None = None  # (B, Skv)


class RuleMask(Tensor):
    """A bool tensor (B, 1, Sq, Skv) that holds a rule; any operation on it sees the tensor written out."""

    rule: Rule

    @staticmethod
    def __new__(cls, rule: Rule, shape: tuple[int, int, int, int], device: torch.device) -> RuleMask:
        """Make a tensor without memory."""
        mask: RuleMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.rule = rule
        return mask

    def dense(self) -> Tensor:
        """Write the mask out."""
        batch, _, num_queries, num_keys = self.shape
        rule, keys = self.rule, torch.arange(self.shape[3], device=self.device)
        queries = torch.arange(rule.q_offset, rule.q_offset + num_queries, device=self.device)
        seen = rule.pattern.sees(queries[:, None], keys).expand(batch, 1, num_queries, num_keys)
        if rule.kv_lens is not None:
            seen = seen & (keys < rule.kv_lens[:, None, None, None])
        if rule.key_mask is not None:
            seen = seen & rule.key_mask[:, None, None]
        return seen

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Compute on the dense mask."""
        arguments, named = tree_map(lambda x: x.dense() if isinstance(x, RuleMask) else x, (arguments, named or {}))
        return function(*arguments, **named)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show the rule."""
        return f"RuleMask({self.rule}, shape={tuple(self.shape)})"


def attention_options(mask: RuleMask, num_keys: int) -> dict[str, Any]:
    """Give the options of :func:`foveal.attention` that say what ``mask`` says."""
    if mask.shape[-1] != num_keys:
        raise ValueError(f"attention: attention_mask.shape[3] is {mask.shape[-1]}, expected {num_keys} (from key)")
    rule = mask.rule
    return {
        "causal": rule.pattern.causal,
        "window": rule.pattern.window,
        "q_offset": rule.q_offset,
        "kv_lens": rule.kv_lens,
        "mask": None if rule.key_mask is None else rule.key_mask[:, None, None],
    }


# --- from transformers' mask functions --------------------------------------------------------------------------------


def pattern_of(function: Callable[..., Tensor]) -> Pattern | None:
    """Recognise a mask function of transformers; None: unknown.

    It is recognised by names that transformers may give another meaning some day, so the pattern counts only if it
    agrees with the function where a change would show.
    """
    pattern = _named_pattern(function)
    if pattern is None:
        return None
    if pattern not in _confirmed:
        _confirmed[pattern] = _agrees(pattern, function)
    return pattern if _confirmed[pattern] else None


_confirmed: dict[Pattern, bool] = {}


def _named_pattern(function: Callable[..., Tensor]) -> Pattern | None:
    if getattr(function, "__module__", None) != _MODULE:
        return None
    name, held = function.__qualname__, _held(function)
    if name == "causal_mask_function":
        return Pattern(causal=True)
    if name == "bidirectional_mask_function":
        return Pattern(causal=False)
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return _windowed(held.get("sliding_window"), 1, None)
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return _windowed(held.get("sliding_window"), 0, 0)
    if name == "and_masks.<locals>.and_mask":
        parts = [_named_pattern(part) for part in held.get("mask_functions", ())]
        windows = [part.window for part in parts if part is not None and part.window != (None, None)]
        if parts and None not in parts and len(windows) <= 1:
            causal = any(part.causal for part in parts if part is not None)
            return Pattern(causal, *windows)
    return None


def _windowed(width: Any, less_left: int, less_right: int | None) -> Pattern | None:
    if not isinstance(width, int) or width < 1:
        return None
    return Pattern(False, (width - less_left, None if less_right is None else width - less_right))


def _held(function: Callable[..., Tensor]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _agrees(pattern: Pattern, function: Callable[..., Tensor]) -> bool:
    """Compare at every distance next to an edge, from queries near and far from the beginning."""
    edges = [0, *(side for side in pattern.window if side is not None)]
    near = sorted({sign * edge + step for edge in edges for sign in (-1, 1) for step in (-2, -1, 0, 1, 2)})
    furthest = max(edges) + 2
    queries = torch.tensor([furthest, furthest + 1, 3 * furthest])[:, None]
    keys = queries + torch.tensor(near)
    zero = torch.zeros((), dtype=torch.int64)
    seen = function(zero, zero, queries, keys).expand_as(keys)
    return torch.equal(seen, pattern.sees(queries, keys))


# --- making a mask ----------------------------------------------------------------------------------------------------


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Make a mask as transformers asks of an attention implementation; its ``sdpa_mask`` documents the arguments.

    None means what it means to ``sdpa``: no restriction, or for several queries of a causal module causal from the
    first key.
    """
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    pattern = None if use_vmap or is_tracing(attention_mask) else pattern_of(mask_function)
    # Where transformers forbids to leave the mask out, it joins it to another or hands it to a compiled model.
    if pattern is None or not (allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip):
        dense: Tensor | None = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
        return dense

    offset = int(q_offset) - int(kv_offset)
    pattern = _simplest(pattern, offset, q_length, kv_length)
    kv_lens, key_mask = _padding(attention_mask, kv_offset, kv_length)
    if kv_lens is None and key_mask is None and pattern.window == (None, None):
        if pattern.causal:
            if q_length > 1 and offset == 0:
                return None
        # A causal module reads None as causal, even in a model configured to be bidirectional.
        elif q_length == 1 or getattr(others.get("config"), "is_causal", True):
            return None
    return RuleMask(
        Rule(pattern, offset, kv_lens, key_mask), (batch_size, 1, q_length, kv_length), torch.device(device)
    )


def _simplest(pattern: Pattern, offset: int, num_queries: int, num_keys: int) -> Pattern:
    """Drop the limits that hide no key of this call."""
    left, right = pattern.window
    if left is not None and left >= offset + num_queries - 1:
        left = None
    if right is not None and offset + right >= num_keys - 1:
        right = None
    return Pattern(pattern.causal and offset < num_keys - 1, (left, right))


def _padding(attention_mask: Tensor | None, kv_offset: int, num_keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Read (kv_lens, key_mask), of which one or both are None, from the (B, tokens) mask of a batch."""
    if attention_mask is None:
        return None, None
    real = attention_mask[:, kv_offset : kv_offset + num_keys]
    if real.shape[1] < num_keys:
        real = torch.nn.functional.pad(real, (0, num_keys - real.shape[1]))
    if bool(real.all()):
        return None, None
    lens = real.sum(1)
    if bool((real == (torch.arange(num_keys, device=real.device) < lens[:, None])).all()):
        return lens, None
    return None, real.contiguous()
