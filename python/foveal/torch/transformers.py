"""foveal as an attention implementation of Hugging Face transformers 5.

transformers asks an implementation for two functions: one makes a mask for a whole forward pass (``_visibility``), the
other is every layer's attention (here). Keys and values come with their own head count and (B, H, S, D) views, which
are read in place; the result is written as (B, S, H, D), which is how the layer goes on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveal._attention import attention
from foveal.torch._visibility import RuleMask, attention_options, make_mask


def register_transformers(name: str = "foveal") -> None:
    """Make ``attn_implementation=name`` mean foveal in Hugging Face transformers (5.0 or newer).

    Every model that takes its attention from transformers' ``AttentionInterface`` can use it, with sliding windows,
    softcaps, sinks (``s_aux``), position biases and padding on either side. The result is that of ``"eager"`` up to
    rounding, except for queries that see no key, such as those at padding tokens on the left: they give 0 here and a
    mean of the values there, and in both no real token depends on it. ``output_attentions=True`` as an argument of a
    forward call returns the weights; in a config transformers refuses it for any implementation but ``"eager"``.

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
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute a layer's attention as transformers asks for it.

    Parameters
    ----------
    module : nn.Module
        The layer; its ``is_causal`` (default True) stands in for the argument.
    query, key, value : Tensor
        (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv).
    attention_mask : Tensor, optional
        From ``make_mask``, or any mask (bool, True: attend) or bias (floating) that broadcasts to (B, Hq, Sq, Skv).
        None: all keys, or where the layer is causal and Sq > 1 the keys j <= i.
    is_causal : bool, optional
        Counts where there is no mask.
    scaling, dropout, softcap, s_aux, position_bias
        ``scale``, ``dropout_p``, ``softcap``, ``sinks`` and ``bias`` of :func:`foveal.attention`.
    sliding_window : int, optional
        Of effect without a mask only, since a mask has the window in it.
    **others
        ``output_attentions=True`` asks for the weights. What models pass for other implementations is ignored.

    Returns
    -------
    (Tensor, Tensor or None)
        (B, Sq, Hq, Dv), and the weights (B, Hq, Sq, Skv) where they are asked for.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    options: dict[str, Any] = {}
    bias = position_bias
    if isinstance(attention_mask, RuleMask):
        options = attention_options(attention_mask, num_keys)
    elif attention_mask is not None:
        if attention_mask.is_floating_point():
            bias = attention_mask if bias is None else bias + attention_mask
        else:
            options["mask"] = attention_mask
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # One query is the newest token and sees the whole cache; several without a mask begin with the first key.
        if causal and num_queries > 1:
            options = {"causal": True, "q_offset": 0 if num_keys != num_queries else None}
        if sliding_window is not None:
            options["window"] = (sliding_window - 1, None if causal else sliding_window - 1)

    if query.shape[0] != key.shape[0]:  # queries that a model learns are the same for the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    return_weights = _weights_wanted(others)
    result: Any = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        bias=bias,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        layout="bshd",
        return_weights=return_weights,
        **options,
    )
    return (result.out, result.weights) if return_weights else (result, None)


def _weights_wanted(others: dict[str, Any]) -> bool:
    """Tell whether the caller of the model asked for weights: not every layer passes the argument on."""
    if others.get("output_attentions"):
        return True
    from transformers.utils.output_capturing import _active_collector

    wanted = _active_collector.get()
    return bool(wanted) and any(key.endswith("attentions") for key in wanted)
