"""Masks of Hugging Face transformers that carry the rule which they follow.

transformers makes the mask of a forward pass by calling a function of index tensors. :func:`make_mask` recognises the
causal, the sliding and the unrestricted one, reads the padding of the batch, and returns a :class:`RuleMask`. It holds
a :class:`Rule`, which :func:`attention_options` turns into the causal, window and length options of
:func:`foveal.attention`. To everybody else it is the tensor that ``"eager"`` gets: 0 where a query sees a key and the
least number of the dtype elsewhere, so a model that indexes it, compares it or adds it to its own scores computes what
it does with ``"eager"``. What is not recognised is written out as a bool mask inside the rule, so an unknown pattern
costs speed, never correctness.

Nothing about visibility is left to the layers: no mask means that every query sees every key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Window = tuple[int | None, int | None]
Shape = tuple[int, int, int, int]

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
    """A pattern, the position of the first query, how many keys there are, and which of them are hidden besides."""

    pattern: Pattern
    q_offset: int
    kv_lens: Tensor | None  # (B,)
    mask: Tensor | None  # bool, broadcasts to (B, 1, Sq, Skv)

    def seen(self, shape: Shape, device: torch.device) -> Tensor:
        """Write out (B, 1, Sq, Skv), bool: True where the query sees the key."""
        keys = torch.arange(shape[3], device=device)
        queries = torch.arange(self.q_offset, self.q_offset + shape[2], device=device)
        seen = self.pattern.sees(queries[:, None], keys).expand(shape)
        if self.kv_lens is not None:
            seen = seen & (keys < self.kv_lens[:, None, None, None])
        return seen if self.mask is None else seen & self.mask

    def of_queries(self, begin: int, end: int) -> Rule:
        """Keep the queries from ``begin`` to ``end``."""
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, begin:end]
        return replace(self, q_offset=self.q_offset + begin, mask=mask)

    def of_keys(self, begin: int, end: int) -> Rule:
        """Keep the keys from ``begin`` to ``end``."""
        lens = None if self.kv_lens is None else (self.kv_lens - begin).clamp(0, end - begin)
        mask = None if self.mask is None else self.mask[..., begin:end]
        return replace(self, q_offset=self.q_offset - begin, kv_lens=lens, mask=mask)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Give what ``"eager"`` adds to scores: 0, and the least number where a key is hidden."""
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), torch.finfo(dtype).min)


class RuleMask(Tensor):
    """The floating mask (B, 1, Sq, Skv) of ``"eager"``, held as a rule.

    Cutting queries or keys off cuts the rule. Any other operation computes with the mask written out. One that gives a
    view of the mask or changes it writes it out for good, and the mask from which it was cut with it: from then on the
    values count.
    """

    held: Rule
    written: Tensor | None  # not None: written out for good
    origin: tuple[RuleMask, int, int, int] | None  # what it was cut from: dim, begin, end

    @staticmethod
    def __new__(cls, rule: Rule, shape: Shape, dtype: torch.dtype, device: torch.device) -> RuleMask:
        """Make a tensor without memory."""
        mask: RuleMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.held, mask.written, mask.origin = rule, None, None
        return mask

    @property
    def rule(self) -> Rule | None:
        """The rule, or None where the mask was written out for good."""
        if self.written is None and self.origin is not None and self.origin[0].rule is None:
            self._write_out()
        return self.held if self.written is None else None

    def dense(self) -> Tensor:
        """Write the mask out, for once."""
        if self.rule is None:
            return self._write_out()
        return additive(self.held.seen(self.shape, self.device), self.dtype)  # type: ignore[arg-type]

    def _write_out(self) -> Tensor:
        """Write the mask out for good, in the memory of the one that it was cut from."""
        if self.written is None and self.origin is not None:
            whole, dim, begin, end = self.origin
            self.written = whole._write_out().narrow(dim, begin, end - begin)
        elif self.written is None:
            self.written = self.dense()
        return self.written

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Keep a rule for what keeps it, else compute on the dense mask."""
        named = named or {}
        mask = arguments[0] if arguments else None
        if isinstance(mask, RuleMask) and mask.rule is not None:
            if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return mask._cut(0)
            if function is torch.ops.aten.slice.Tensor and (cut := mask._cut(*arguments[1:], **named)) is not None:
                return cut
        aliased = [argument.name for argument in function._schema.arguments if argument.alias_info is not None]
        places = [argument.name for argument in function._schema.arguments]
        for name, given in [*zip(places, arguments, strict=False), *named.items()]:
            if isinstance(given, RuleMask) and name in aliased:
                given._write_out()
        arguments, named = tree_map(lambda x: x.dense() if isinstance(x, RuleMask) else x, (arguments, named))
        return function(*arguments, **named)

    def _cut(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> RuleMask | None:
        """Cut off queries or keys; None where that leaves no rule."""
        dim = dim % self.ndim
        begin, end, _ = slice(start, end).indices(self.shape[dim])
        whole = (begin, end) == (0, self.shape[dim])
        if step != 1 or end <= begin or (dim < 2 and not whole):
            return None
        rule = self.held if whole else (self.held.of_queries if dim == 2 else self.held.of_keys)(begin, end)
        shape = (*self.shape[:dim], end - begin, *self.shape[dim + 1 :])
        cut = RuleMask(rule, shape, self.dtype, self.device)
        cut.origin = (self, dim, begin, end)
        return cut

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy as the tensor that others see."""
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the tensor that others see."""
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show the rule."""
        return f"RuleMask({self.rule}, shape={tuple(self.shape)})"


def attention_options(mask: Tensor, batch: int, num_queries: int, num_keys: int) -> dict[str, Any]:
    """Give the options of :func:`foveal.attention` that say what ``mask`` says.

    ``mask`` is one of :func:`make_mask`, or any bool mask (True: seen) or floating one (added to the scores).
    """
    rule = getattr(mask, "rule", None)
    if rule is None:
        mask = mask.dense() if isinstance(mask, RuleMask) else mask
        return {"bias" if mask.is_floating_point() else "mask": mask}
    for dim, expected, whose in ((2, num_queries, "query"), (3, num_keys, "key")):
        if mask.shape[dim] != expected:
            raise ValueError(
                f"attention: attention_mask.shape[{dim}] is {mask.shape[dim]}, expected {expected} (from {whose})"
            )
    return {
        "causal": rule.pattern.causal,
        "window": rule.pattern.window,
        "q_offset": rule.q_offset,
        "kv_lens": None if rule.kv_lens is None else rule.kv_lens.expand(batch),
        "mask": rule.mask,
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
    local_size: int | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Make a mask as transformers asks of an attention implementation; its ``eager_mask`` documents the arguments.

    None, where it may be, means that every query sees every key. ``allow_is_causal_skip`` is False where transformers
    hands the mask to a compiled model, or joins it to another.
    """
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    tracing = is_tracing(attention_mask)
    pattern = None if use_vmap or tracing else pattern_of(mask_function)
    shape = (batch_size, 1, q_length, kv_length)
    if pattern is not None:
        offset = int(q_offset) - int(kv_offset)
        pattern = _simplest(pattern, offset, q_length, kv_length)
        rule = Rule(pattern, offset, *_padding(attention_mask, kv_offset, kv_length))
        hides = pattern.causal or pattern.window != (None, None) or rule.kv_lens is not None or rule.mask is not None
        fits = local_size is None or kv_length < local_size
        if allow_is_bidirectional_skip and fits and not hides:
            return None
    else:
        seen: Tensor | None = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
        if seen is None:
            return None
        rule = Rule(Pattern(causal=False), 0, None, seen)
        shape = (batch_size, seen.shape[1], q_length, kv_length)
        if tracing:
            # A graph has no room for the subclass, but for the mask of "eager" with a note. What the graph does not
            # use of the two, it drops. Code that writes into its mask in place must not be traced.
            noted: Any = additive(seen, dtype)
            noted.rule = rule
            return noted  # type: ignore[no-any-return]
    mask = RuleMask(rule, shape, dtype, torch.device(device))
    # The step of a static cache is compiled on its own and takes the mask as an input.
    return mask.dense() if q_length == 1 and not allow_is_causal_skip else mask


def _simplest(pattern: Pattern, offset: int, num_queries: int, num_keys: int) -> Pattern:
    """Drop the limits that hide no key of this call."""
    left, right = pattern.window
    if left is not None and left >= offset + num_queries - 1:
        left = None
    if right is not None and offset + right >= num_keys - 1:
        right = None
    return Pattern(pattern.causal and offset < num_keys - 1, (left, right))


def _padding(attention_mask: Tensor | None, kv_offset: int, num_keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Read (kv_lens, mask (B, 1, 1, Skv)), of which one or both are None, from the (B, tokens) mask of a batch."""
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
    return None, real[:, None, None]
