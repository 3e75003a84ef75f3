"""Multi-head attention as a module: torch.nn.MultiheadAttention's place and state, with every option of the kernels.

::

    query (B, Sq, E) --q_proj--> q (B, Sq, Hq, D)  --+
    key (B, Skv, kdim) --k_proj--> k (B, Skv, Hkv, D) +-- foveal.attention --> (B, Sq, Hq * D) --out_proj--> (B, Sq, E)
    value (B, Skv, vdim) --v_proj--> v (B, Skv, Hkv, D)

The projections are called as modules, so whatever stands in their place (an adapter, a quantised layer) is called. They
are three, not one: on the CPU one product for all of q, k and v is slower, 150 ms against 3 times 41 for (8, 512, 768)
on two Zen 3 cores. Heads are never moved in memory; the kernel reads (B, S, H, D) in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveal._attention.dense import attention
from foveal._attention.sequences import attention_kvcache
from foveal.torch.nn import relative_bias as _relative
from foveal.torch.nn._masks import Masks, masks, right_padding
from foveal.torch.nn._torchs_state import joined, made_from, rename
from foveal.torch.nn.cache import KeyValueCache
from foveal.torch.nn.relative_bias import LearnedRelativeBias, T5RelativeBias, Window, alibi_slopes
from foveal.torch.nn.rotary import RotaryEmbedding, accumulator


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), for self- and cross-attention, training and decoding.

    It takes the place of :class:`torch.nn.MultiheadAttention`: the same first arguments, masks and results, its
    state_dict loads, and it can stand in torch's encoder and decoder layers. The differences: weights are returned only
    when asked for, a query that sees no key gives the bias of ``out_proj`` where torch gives NaN, and ``is_causal``
    needs no mask beside it.

    Symbols: B batch, Sq queries, Skv keys, E embed_dim, Hq and Hkv heads, D head_dim.

    Parameters
    ----------
    embed_dim, num_heads : int
        E and Hq.
    dropout : float
        The chance of each weight to become 0, in training.
    bias : bool
        Whether the four projections have a bias.
    kdim, vdim : int, optional
        Features of key and value; default: embed_dim.
    batch_first : bool
        Inputs and output are (B, S, E); False, as in torch: (S, B, E).
    num_kv_heads : int, optional
        Hkv, a divisor of Hq: grouped queries (Ainslie et al. 2023). Default: Hq.
    head_dim : int, optional
        D. Default: embed_dim / num_heads.
    causal : bool
        Every call is causal, with the last query at the last key.
    window : (int or None, int or None)
        How many keys before and behind its own position a query sees, in every call.
    scale : float, optional
        Of the scores. Default: 1 / sqrt(D).
    softcap : float
        Scores become softcap * tanh(score / softcap); 0: none.
    alibi : bool
        ALiBi (Press et al. 2022), with the slopes of :func:`alibi_slopes`.
    relative_bias : T5RelativeBias or LearnedRelativeBias, optional
        Added to the scores.
    rotary : RotaryEmbedding, optional
        Turns queries and keys.
    sinks : bool
        A learned logit for each head in the denominator alone (Xiao et al. 2023; as in gpt-oss).
    normalizer : str
        As in :func:`foveal.attention`.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : nn.Linear
        The projections.
    sinks : (Hq,) Parameter or None

    Raises
    ------
    ValueError
        Numbers that do not fit together; the text says which.

    References
    ----------
    Vaswani et al. 2017, "Attention Is All You Need".

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import MultiHeadAttention
    >>> attention = MultiHeadAttention(64, 8, num_kv_heads=2, causal=True, batch_first=True)
    >>> out, _ = attention(torch.randn(2, 10, 64))
    >>> out.shape
    torch.Size([2, 10, 64])
    """

    # What torch's layers read: the weights lie in separate projections, so no fused path takes them.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        window: Window = (None, None),
        scale: float | None = None,
        softcap: float = 0.0,
        alibi: bool = False,
        relative_bias: T5RelativeBias | LearnedRelativeBias | None = None,
        rotary: RotaryEmbedding | None = None,
        sinks: bool = False,
        normalizer: str = "softmax",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._check(head_dim, relative_bias, rotary)
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.causal, self.window, self.scale, self.softcap = causal, window, scale, softcap
        self.normalizer = normalizer
        self.slopes = alibi_slopes(num_heads) if alibi else None
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, self.num_kv_heads * self.head_dim, bias, **made)
        self.v_proj = nn.Linear(self.vdim, self.num_kv_heads * self.head_dim, bias, **made)
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias, **made)
        self.relative_bias, self.rotary = relative_bias, rotary
        self.sinks = nn.Parameter(torch.empty(num_heads, **made)) if sinks else None
        self.reset_parameters()

    def _check(self, head_dim: int | None, relative_bias: Any, rotary: RotaryEmbedding | None) -> None:
        def refuse(what: str, expected: str) -> None:
            raise ValueError(f"MultiHeadAttention: {what}, expected {expected}")

        for name in ("embed_dim", "num_heads", "num_kv_heads", "kdim", "vdim"):
            if getattr(self, name) < 1:
                refuse(f"{name} is {getattr(self, name)}", "1 or more")
        if not 0 <= self.dropout < 1:
            refuse(f"dropout is {self.dropout}", "at least 0 and less than 1")
        if self.num_heads % self.num_kv_heads:
            refuse(f"num_kv_heads is {self.num_kv_heads}", f"a divisor of num_heads {self.num_heads}")
        if head_dim is None and self.embed_dim % self.num_heads:
            refuse(f"embed_dim is {self.embed_dim}", f"a multiple of num_heads {self.num_heads}, or a head_dim")
        size = self.embed_dim // self.num_heads if head_dim is None else head_dim
        if size < 1:
            refuse(f"head_dim is {size}", "1 or more")
        if rotary is not None and rotary.dim > size:
            refuse(f"rotary turns {rotary.dim} features", f"at most head_dim {size}")
        if relative_bias is not None and relative_bias.num_heads != self.num_heads:
            refuse(f"relative_bias has {relative_bias.num_heads} heads", f"num_heads {self.num_heads}")

    def reset_parameters(self) -> None:
        """Draw the parameters anew, from the distributions of torch.nn.MultiheadAttention."""
        together = self.kdim == self.vdim == self.embed_dim and self.num_kv_heads * self.head_dim == self.embed_dim
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            # torch draws one (3 E, E) weight there, whose Xavier bound is smaller by sqrt(2).
            nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5 if together else 1.0)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> MultiHeadAttention:
        """Make one with the sizes, weights, device, dtype and mode of torch's module.

        ``options`` are further keyword arguments of the class.

        Raises
        ------
        ValueError
            The module has ``add_bias_kv`` or ``add_zero_attn``.
        """
        return made_from(cls, module, options)

    # --- torch's names ------------------------------------------------------------------------------------------------

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The weights of q, k and v, joined, where they have one width; a copy."""
        return joined((self.q_proj, self.k_proj, self.v_proj), "weight")

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases of q, k and v, joined; a copy."""
        return joined((self.q_proj, self.k_proj, self.v_proj), "bias")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Rename and split what torch.nn.MultiheadAttention calls otherwise."""
        rename(state_dict, prefix, [projection.out_features for projection in (self.q_proj, self.k_proj, self.v_proj)])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # --- the forward pass ---------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Parameters
        ----------
        query : (B, Sq, E) Tensor
            (Sq, B, E) unless ``batch_first``; (Sq, E) without a batch.
        key, value : (B, Skv, kdim) and (B, Skv, vdim) Tensor, optional
            Default: query, and key.
        key_padding_mask : (B, Skv) bool or floating Tensor, optional
            True: the key is padding. A floating one is added to the scores. A bool one with all padding on the right,
            and a floating one of 0 and -inf that says so, become lengths: what is behind them costs nothing.
        need_weights : bool
            Return the weights too, an array of all pairs; without a gradient, and not with a cache.
        attn_mask : (Sq, Skv) or (B * Hq, Sq, Skv) bool or floating Tensor, optional
            True: the query does not see the key. A floating one is added to the scores.
        average_attn_weights : bool
            Weights are averaged over the heads.
        is_causal : bool
            Query i sees the keys up to i: aligned at the first key, as in torch. It says that ``attn_mask``, if given,
            is this mask, which then is not read.
        cache : KeyValueCache, optional
            Append the keys and values of this call to those of the calls before, and attend to all; without a gradient.
            The last query sits at the last key. ``key_padding_mask`` then marks padding behind the new tokens (bool,
            in a causal module), which is not kept. With one of :meth:`remember`: attend to that memory; no key.

        Returns
        -------
        out : Tensor
            The shape of query.
        weights : Tensor or None
            (B, Sq, Skv), or (B, Hq, Sq, Skv) if not averaged; without B as query is.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong dtype or shape, or does not go together with another; the text says which.
        NotImplementedError
            Weights of a call that is differentiated, a cache with gradients, or what :func:`foveal.attention` lacks.
        """
        batched = self._check_inputs(query, key, value)
        if not batched:
            query, key, value = (x if x is None else x.unsqueeze(self._batch_axis) for x in (query, key, value))  # type: ignore[assignment]
            key_padding_mask = key_padding_mask if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if cache is None:
            key = query if key is None else key
            q, k, v = self._projected(query, key, key if value is None else value)
            learned = self._learned(query)
            out, weights = self._attend(q, k, v, key_padding_mask, attn_mask, is_causal, need_weights, learned)
        else:
            if need_weights or attn_mask is not None:
                given = "need_weights" if need_weights else "attn_mask"
                raise ValueError(f"MultiHeadAttention: {given} is given with a cache, expected one of them")
            out, weights = self._decode(query, key, value, key_padding_mask, is_causal, cache), None
        out = self.out_proj(out.flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return out, weights
        return out.squeeze(self._batch_axis), None if weights is None else weights.squeeze(0)

    def new_cache(
        self, batch_size: int, capacity: int, *, page_size: int | None = None, num_pages: int | None = None
    ) -> KeyValueCache:
        """Make an empty cache for this module: see :class:`KeyValueCache`."""
        weight = self.out_proj.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else None
        cache = KeyValueCache(
            batch_size,
            capacity,
            self.num_kv_heads,
            self.head_dim,
            page_size=page_size,
            num_pages=num_pages,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device,
        )
        if self.rotary is not None:
            positions = torch.arange(cache.max_tokens, device=weight.device)
            cache.rotary = self.rotary.tables(positions, accumulator(weight.dtype))
        return cache

    def remember(
        self, key: Tensor, value: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> KeyValueCache:
        """Project the memory of a cross-attention once, for the ``cache`` of many calls.

        ``key_padding_mask`` is bool with all padding on the right. No key has a position then, so the module must have
        none: ValueError with ``causal``, ``window``, ``rotary``, ``alibi`` or ``relative_bias``.
        """
        of_positions = {
            "causal": self.causal,
            "window": self.window != (None, None),
            "rotary": self.rotary is not None,
            "alibi": self.slopes is not None,
            "relative_bias": self.relative_bias is not None,
        }
        for name, given in of_positions.items():
            if given:
                raise ValueError(f"MultiHeadAttention: remember is called in a module with {name}, expected none")
        if not self._check_inputs(None, key, value):
            raise ValueError("MultiHeadAttention: key has 2 dimensions, expected 3: a cache has a batch")
        k, v = self._heads(self.k_proj(key)), self._heads(self.v_proj(key if value is None else value))
        batch, tokens = k.shape[:2]
        cache = KeyValueCache(batch, max(tokens, 1), 0, 0, device=k.device)
        cache.k, cache.v, cache.grows = k, v, False
        if key_padding_mask is None:
            cache.lens.fill_(tokens)
        else:
            cache.lens = right_padding("MultiHeadAttention", key_padding_mask, batch, tokens)
        return cache

    # --- its parts ----------------------------------------------------------------------------------------------------

    @property
    def _batch_axis(self) -> int:
        return 0 if self.batch_first else 1

    def _check_inputs(self, query: Tensor | None, key: Tensor | None, value: Tensor | None) -> bool:
        """Refuse shapes that do not fit; say whether there is a batch."""
        features = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        given = {name: x for name, x in zip(features, (query, key, value), strict=True) if x is not None}
        first, shape = next(iter(given.items()))
        for name, x in given.items():
            if x.is_nested:
                raise TypeError(f"MultiHeadAttention: {name} is a nested tensor, expected a padded one with a mask")
            if x.ndim != shape.ndim or x.ndim not in (2, 3):
                expected = f"{shape.ndim} (from {first})" if shape.ndim in (2, 3) else "3, or 2 without a batch"
                raise ValueError(f"MultiHeadAttention: {name} has {x.ndim} dimensions, expected {expected}")
            if x.shape[-1] != features[name]:
                raise ValueError(f"MultiHeadAttention: {name}.shape[-1] is {x.shape[-1]}, expected {features[name]}")
            self._check_extent(name, x, self._batch_axis, "batch", first, shape)
        if key is not None and value is not None:
            self._check_extent("value", value, 1 - self._batch_axis, "length", "key", key)
        return shape.ndim == 3

    def _check_extent(self, name: str, x: Tensor, axis: int, what: str, source: str, y: Tensor) -> None:
        if x.ndim == 2:
            if what == "batch":
                return
            axis = 0
        if x.shape[axis] != y.shape[axis]:
            raise ValueError(
                f"MultiHeadAttention: {name}.shape[{axis}] is {x.shape[axis]}, expected {what} {y.shape[axis]} "
                f"(from {source})"
            )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._heads(self.q_proj(query)),
            self._heads(self.k_proj(key)),
            self._heads(self.v_proj(value)),
        )

    def _heads(self, x: Tensor) -> Tensor:
        """Make (B, S, H, D), a view."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return x if self.batch_first else x.transpose(0, 1)

    def _options(self) -> dict[str, Any]:
        """Give the options of every call, but for causal, window and where the queries sit."""
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        if self.slopes is not None:
            options["alibi_slopes"] = torch.tensor(self.slopes, device=self.out_proj.weight.device)
        if self.normalizer != "softmax":
            options["normalizer"] = self.normalizer
        return options

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
        learned: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        hidden = self._hidden(q, k, key_padding_mask, None if is_causal else attn_mask)
        q, k = self._turned(q, k, is_causal)
        options = self._options() | hidden.options() | {"window": self.window} | (learned or {})
        return self._weighted(q, k, v, is_causal, need_weights, options)

    def _learned(self, query: Tensor) -> dict[str, Any]:
        """Give the options that a subclass makes of the query and of parameters of its own."""
        return {}

    def _hidden(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Masks:
        shape = (q.shape[0], self.num_heads, q.shape[1], k.shape[1])
        return masks("MultiHeadAttention", attn_mask, key_padding_mask, shape)

    def _turned(self, q: Tensor, k: Tensor, is_causal: bool = False) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by their positions."""
        if self.rotary is None:
            return q, k
        positions = torch.arange(q.shape[1], device=q.device) + _offset(q, k, is_causal)
        return self.rotary(q, positions), self.rotary(k, torch.arange(k.shape[1], device=k.device))

    def _weighted(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, need_weights: bool, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Give the values' weighted sums (B, Sq, Hq, D); ``options`` are those of the kernel."""
        if self.training and self.dropout:
            options["dropout_p"] = self.dropout
        offset, causal = _offset(q, k, is_causal), self.causal or is_causal
        call = functools.partial(_dense, k=k, v=v, return_weights=need_weights)
        if self.relative_bias is None:
            return call(q, causal=causal, q_offset=offset, **options)
        return self._attend_by_distance(call, q, k.shape[1], offset, causal, options)

    def _attend_by_distance(
        self,
        call: Callable[..., Any],
        q: Tensor,
        num_keys: int,
        offset: int | Tensor,
        causal: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the relative bias, and with ALiBi, whose distances the kernel would take from reversed rows."""
        assert self.relative_bias is not None
        distance = _relative.distances(q.shape[1], num_keys, offset, q.device)
        bias = self.relative_bias(distance)
        slopes = options.pop("alibi_slopes", None)
        if slopes is not None:
            bias = bias - slopes.to(bias.dtype).view(-1, *(1,) * distance.ndim) * distance.abs()
        visible = _relative.seen(distance, causal, options.pop("window"))
        if distance.ndim == 2:  # (Hq, B, line) and (B, line)
            bias, visible = bias.transpose(0, 1), visible if visible is None else visible[:, None]
        return _relative.attend(call, q, num_keys, bias, visible, options)

    def _decode(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        cache: KeyValueCache,
    ) -> Tensor:
        if not cache.grows:
            if key is not None or value is not None or key_padding_mask is not None or is_causal:
                raise ValueError(
                    "MultiHeadAttention: key, value, key_padding_mask or is_causal is given with a cache of remember, "
                    "expected none"
                )
            return _cached(self._heads(self.q_proj(query)), cache, **self._options())[0]
        causal = self.causal or is_causal
        key = query if key is None else key
        q, k, v = self._projected(query, key, key if value is None else value)
        batch, num_new = k.shape[:2]
        if q.shape[1] != num_new:
            raise ValueError(
                f"MultiHeadAttention: key has {num_new} tokens, expected the {q.shape[1]} of query with a cache"
            )
        if batch != cache.batch_size:
            raise ValueError(
                f"MultiHeadAttention: query has a batch of {batch}, expected {cache.batch_size} (from cache)"
            )
        if (self.rotary is None) != (cache.rotary is None):
            raise ValueError("MultiHeadAttention: cache is of another module, expected one of this module's new_cache")
        added: int | Tensor = num_new
        if key_padding_mask is not None:
            if not causal:
                raise ValueError(
                    "MultiHeadAttention: key_padding_mask is given with a cache in a module that is not causal, where "
                    "queries would see the padding; expected causal=True"
                )
            added = right_padding("MultiHeadAttention", key_padding_mask, batch, num_new)
        if not torch.compiler.is_compiling():
            cache.reserve(num_new)
        options = self._options() | {"window": self.window}
        if self.relative_bias is None:
            turning = {}
            if self.rotary is not None and cache.rotary is not None:
                cos, sin = cache.rotary
                turning = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": self.rotary.interleaved}
            out, _ = _cached(q, cache, k, v, causal=causal, **turning, **options)
        else:
            if self.rotary is not None and cache.rotary is not None:
                positions = cache.lens[:, None] + torch.arange(num_new, device=q.device)
                cos, sin = (table[positions] for table in cache.rotary)
                q, k = self.rotary.turn(q, cos, sin), self.rotary.turn(k, cos, sin)
            call = functools.partial(_cached, cache=cache, k=k, v=v)  # once, as there is no gradient
            out, _ = self._attend_by_distance(call, q, cache.max_tokens, cache.lens, causal, options)
        cache.lens += added
        return out

    def extra_repr(self) -> str:
        """Show what is not in the submodules."""
        text = f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"
        shown = {
            "num_kv_heads": (self.num_kv_heads, self.num_heads),
            "causal": (self.causal, False),
            "window": (self.window, (None, None)),
            "scale": (self.scale, None),
            "softcap": (self.softcap, 0.0),
            "alibi": (self.slopes is not None, False),
            "normalizer": (self.normalizer, "softmax"),
        }
        return text + "".join(f", {name}={value!r}" for name, (value, default) in shown.items() if value != default)


def _offset(q: Tensor, k: Tensor, is_causal: bool) -> int:
    """Say at which key's position the first query sits."""
    return 0 if is_causal else k.shape[1] - q.shape[1]


def _dense(q: Tensor, k: Tensor, v: Tensor, return_weights: bool, **options: Any) -> tuple[Tensor, Tensor | None]:
    found: Any = attention(q, k, v, layout="bshd", return_weights=return_weights, **options)
    return (found.out, found.weights) if return_weights else (found, None)


def _cached(
    q: Tensor, cache: KeyValueCache, k: Tensor | None = None, v: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    lens, table = cache.lens, cache.block_table
    return attention_kvcache(q, cache.k, cache.v, cache_lens=lens, k=k, v=v, block_table=table, **options), None
