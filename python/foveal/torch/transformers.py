"""foveal as an attention implementation of Hugging Face transformers 5.

transformers asks an implementation for two functions: one makes a mask for a whole forward pass (``_visibility``), the
other is every layer's attention (here). Keys and values come with their own head count and (B, H, S, D) views, which
are read in place; the result is written as (B, S, H, D), which is how the layer goes on. What a layer asks for is
honoured, known to change nothing, or refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal._attention.dense import attention
from foveal.torch._visibility import attention_options, make_mask

# Keywords that layers pass on and that change nothing here, with the reason.
IGNORED = {
    "cache_position": "the mask has the positions",
    "deterministic": "the result is always the same",
    "labels": "of the loss",
    "logits_to_keep": "of the model's head",
    "max_length_k": "follows from cu_seq_lens_k",
    "max_length_q": "follows from cu_seq_lens_q",
    "num_items_in_batch": "of the loss",
    "output_hidden_states": "of the model",
    "output_router_logits": "of the model",
    "position_ids": "the mask and the rotation have the positions",
    "return_dict": "of the model",
    "seq_idx": "of state-space layers; the mask has the packed sequences",
    "use_cache": "of the model",
}


# Models whose "eager" attention returns the weights as they are before the sink takes its part.
_SINK_AFTER_WEIGHTS = (".modeling_granite_swa", ".modeling_granitemoe_swa")


def register_transformers(name: str = "foveal") -> None:
    """Make ``attn_implementation=name`` mean foveal in Hugging Face transformers (5.0 or newer).

    Every model that takes its attention from transformers' ``AttentionInterface`` can use it, with sliding windows,
    softcaps, sinks, position biases, keys chosen by an indexer, and padding on either side. A model that computes its
    attention itself does so as with ``"eager"``. The result is that of ``"eager"`` up to rounding, except for queries
    that see no key, such as those at padding tokens on the left: they give 0 here and a mean of the values there, and
    in both no real token depends on it. ``output_attentions=True`` as an argument of a forward call returns the
    weights; in a config transformers refuses it for any implementation but ``"eager"``.

    Parameters
    ----------
    name : str
        A name of its own: not one that transformers has an implementation for, nor one that it treats specially.

    Raises
    ------
    ImportError
        transformers is not installed, or older than 5.0.
    ValueError
        ``name`` is taken.

    Examples
    --------
    ::

        foveal.torch.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="foveal")
        model.set_attn_implementation("foveal")    # or later
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask as sdpa_mask
        from transformers.utils.output_capturing import _active_collector as _active_collector
    except ImportError as error:
        raise ImportError(
            f"register_transformers: expected Hugging Face transformers 5.0 or newer ({error}); "
            "pip install 'transformers>=5'"
        ) from error

    if name == "eager" or any(part in name for part in ("flash", "flex_attention", "paged|", "/")) or not name:
        raise ValueError(f"register_transformers: name is {name!r}, expected one without a meaning in transformers")
    present = AttentionInterface().get(name)
    if present not in (None, attention_forward):
        raise ValueError(f"register_transformers: name is {name!r}, expected one that no implementation has")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute a layer's attention as transformers asks for it.

    Parameters
    ----------
    module : nn.Module
        The layer.
    query, key, value : Tensor
        (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv).
    attention_mask : Tensor, optional
        From ``make_mask``, or any mask (bool, True: attend) or bias (floating) that broadcasts to (B, Hq, Sq, Skv).
        None: every query sees every key, as with ``"eager"``.
    is_causal, sliding_window : optional
        Of no effect beside a mask, which has them in it, as with ``"eager"``. Without one, ``is_causal=True`` needs
        Sq = Skv, and a window must be as wide as the keys.
    scaling, dropout, softcap, s_aux, position_bias
        ``scale``, ``dropout_p``, ``softcap``, ``sinks`` and ``bias`` of :func:`foveal.attention`.
    sinks : Tensor, optional
        (B, Hq, Sq, 1): a sink for every query.
    indices : Tensor, optional
        (B, Sq, n) integers: the keys that a query sees, of those that the mask leaves. Negative ones choose nothing.
    block_indices : Tensor, optional
        (B, H, Sq, n) integers, H a divisor of Hq: the same for blocks of ``module.indexer.block_size`` keys.
    cu_seq_lens_q, cu_seq_lens_k : Tensor, optional
        Where the sequences of a packed batch of one begin and end; none sees another.
    output_attentions : bool, optional
        Return the weights.
    **others
        Keywords that change nothing (``IGNORED``), or None.

    Returns
    -------
    (Tensor, Tensor or None)
        (B, Sq, Hq, Dv), and the weights (B, Hq, Sq, Skv) where they are asked for.

    Raises
    ------
    TypeError
        A keyword that is not known here is not None.
    ValueError
        The mask is for other lengths, or is missing.
    """
    for name, other in others.items():
        if other is not None and name not in IGNORED:
            raise TypeError(
                f"attention: {name} is not known to foveal, expected None; it may change the result, so load the model "
                'with attn_implementation="eager"'
            )
    if query.shape[0] != key.shape[0]:  # queries that a model learns are the same for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]

    options: dict[str, Any] = {}
    if attention_mask is not None:
        options = attention_options(attention_mask, batch, num_queries, num_keys)
    else:
        _refuse_guessing(is_causal, sliding_window, num_queries, num_keys)
        options["causal"] = bool(is_causal)
    chosen = [options.pop("mask", None)]
    if indices is not None:
        chosen.append(_chosen(indices, num_keys)[:, None])
    if block_indices is not None:
        chosen.append(_chosen_blocks(block_indices, module, num_heads, num_keys))
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        chosen.append(_same_document(cu_seq_lens_q, cu_seq_lens_k, batch, num_queries, num_keys))
    for mask in chosen:
        if mask is not None:
            options["mask"] = options["mask"] & mask if "mask" in options else mask
    if position_bias is not None:
        options["bias"] = options["bias"] + position_bias if "bias" in options else position_bias

    return_weights = bool(output_attentions) or _weights_recorded()
    sink_follows = return_weights and type(module).__module__.endswith(_SINK_AFTER_WEIGHTS)
    if sink_follows and s_aux is not None:
        sinks, s_aux = s_aux[None, :, None, None], None
    result: Any = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        layout="bshd",
        return_lse=sinks is not None,
        return_weights=return_weights,
        **options,
    )
    if sinks is None:
        return (result.out, result.weights) if return_weights else (result, None)
    kept = torch.sigmoid(result.lse - sinks[..., 0]).to(query.dtype)[..., None]  # the weight that no sink absorbs
    weights = result.weights if return_weights else None
    if weights is not None and not sink_follows:
        weights = weights * kept
    return result.out * kept.transpose(1, 2), weights


def _refuse_guessing(is_causal: bool | None, sliding_window: int | None, num_queries: int, num_keys: int) -> None:
    """Refuse a restriction that only a mask could say in full."""
    if is_causal and num_queries != num_keys:
        raise ValueError(
            f"attention: is_causal is True without a mask, with {num_queries} queries and {num_keys} keys, expected a "
            "mask, which says where the queries begin"
        )
    # Windows of two keys and of one more are both in use, according to whether they count the query.
    if sliding_window is not None and num_keys > sliding_window + 1:
        raise ValueError(
            f"attention: sliding_window is {sliding_window} for {num_keys} keys without a mask, expected a mask, which "
            "says on which sides it is"
        )


def _chosen(indices: Tensor, count: int) -> Tensor:
    """Turn (..., n) numbers into (..., count) bool: True at each of them; negative ones choose nothing."""
    slots = torch.where(indices < 0, count, indices).long()
    chosen = torch.zeros((*indices.shape[:-1], count + 1), dtype=torch.bool, device=indices.device)
    return chosen.scatter(-1, slots, True)[..., :count]


def _chosen_blocks(indices: Tensor, module: nn.Module, num_heads: int, num_keys: int) -> Tensor:
    """Turn (B, H, Sq, n) numbers of blocks into (B, Hq, Sq, Skv) bool."""
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if not isinstance(size, int):
        raise TypeError(
            f"attention: block_indices came from {type(module).__name__}, expected one whose indexer.block_size is an "
            'int; load the model with attn_implementation="eager"'
        )
    blocks = _chosen(indices, -(-num_keys // size))
    keys = blocks.repeat_interleave(size, dim=-1)[..., :num_keys]
    return keys.repeat_interleave(num_heads // indices.shape[1], dim=1)


def _same_document(
    begins_q: Tensor | None, begins_k: Tensor | None, batch: int, num_queries: int, num_keys: int
) -> Tensor:
    """Give (1, 1, Sq, Skv) bool: True where query and key are of one sequence."""
    if begins_q is None or begins_k is None or batch != 1:
        raise ValueError(
            f"attention: a batch of {batch} has {'' if begins_q is None else 'cu_seq_lens_q '}"
            f"{'' if begins_k is None else 'cu_seq_lens_k'}, expected both, and a batch of 1"
        )
    documents = [
        torch.searchsorted(begins, torch.arange(count, device=begins.device, dtype=begins.dtype), right=True)
        for begins, count in ((begins_q, num_queries), (begins_k, num_keys))
    ]
    return (documents[0][:, None] == documents[1])[None, None]


def _weights_recorded() -> bool:
    """Tell whether the caller of the model asked for weights: not every layer passes the argument on."""
    from transformers.utils.output_capturing import _active_collector

    wanted = _active_collector.get()
    return bool(wanted) and any(key.endswith("attentions") for key in wanted)
