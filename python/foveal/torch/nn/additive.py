"""Attention with additive scores, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.torch.additive import attend
from foveal.torch.nn._masks import masks


class AdditiveAttention(nn.Module):
    """Multi-head attention with additive scores: s = u . tanh(W_q x + W_k y), for each head.

    Of an encoder and a decoder, the query is the decoder's state and the keys are the encoder's outputs, which may have
    another width.

    Symbols: B batch, Sq queries, Skv keys, E embed_dim, Hq heads, A hidden_dim.

    Parameters
    ----------
    embed_dim, num_heads : int
        E and Hq.
    hidden_dim : int, optional
        A, of each head. Default: embed_dim / num_heads.
    kdim, vdim : int, optional
        Features of key and value; default: embed_dim.
    bias : bool
        Whether q_proj, v_proj and out_proj have a bias; one of k_proj would say nothing new.
    causal : bool
        Every call is causal, with the last query at the last key.
    normalizer : str
        As in :func:`foveal.attention`.
    dropout : float
        The chance of each weight to become 0, in training.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : nn.Linear
        W_q and W_k to Hq A features, the values' projection to E, and the output's.
    u : (Hq, A) Parameter

    Raises
    ------
    ValueError
        Numbers that do not fit together; the text says which.

    References
    ----------
    Bahdanau, Cho and Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and Translate".

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import AdditiveAttention
    >>> attention = AdditiveAttention(32, 4, kdim=48, vdim=48)
    >>> states, encoded = torch.randn(2, 1, 32), torch.randn(2, 20, 48)
    >>> context, _ = attention(states, encoded)
    >>> context.shape
    torch.Size([2, 1, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        hidden_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        normalizer: str = "softmax",
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"AdditiveAttention: embed_dim is {embed_dim}, expected a multiple of num_heads {num_heads}"
            )
        self.embed_dim, self.num_heads, self.causal, self.normalizer = embed_dim, num_heads, causal, normalizer
        self.hidden_dim = embed_dim // num_heads if hidden_dim is None else hidden_dim
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        if self.hidden_dim < 1:
            raise ValueError(f"AdditiveAttention: hidden_dim is {hidden_dim}, expected 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"AdditiveAttention: dropout is {dropout}, expected at least 0 and less than 1")
        self.dropout = dropout
        self.q_proj = nn.Linear(embed_dim, num_heads * self.hidden_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, num_heads * self.hidden_dim, False, **made)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **made)
        self.u = nn.Parameter(torch.empty(num_heads, self.hidden_dim, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        nn.init.uniform_(self.u, -(self.hidden_dim**-0.5), self.hidden_dim**-0.5)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Parameters
        ----------
        query : (B, Sq, E) Tensor
            What attends.
        key, value : (B, Skv, kdim) and (B, Skv, vdim) Tensor, optional
            Default: query, and key.
        key_padding_mask, attn_mask
            As in :class:`MultiHeadAttention`: True where a key is not seen, a floating mask is added to the scores.
        need_weights : bool
            Return the weights (B, Hq, Sq, Skv) too, without a gradient.

        Returns
        -------
        out : (B, Sq, E) Tensor
        weights : (B, Hq, Sq, Skv) Tensor or None
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, x, features in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.ndim != 3 or x.shape[-1] != features:
                raise ValueError(
                    f"AdditiveAttention: {name} has shape {tuple(x.shape)}, expected (batch, length, {features})"
                )
        shape = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        options: dict[str, Any] = masks("AdditiveAttention", attn_mask, key_padding_mask, shape).options()
        options |= {"causal": self.causal, "normalizer": self.normalizer, "layout": "bshd"}
        if self.training and self.dropout:
            options["dropout_p"] = self.dropout
        q, k = (x.unflatten(-1, (self.num_heads, -1)) for x in (self.q_proj(query), self.k_proj(key)))
        v = self.v_proj(value).unflatten(-1, (self.num_heads, -1))
        found = attend(q, k, v, self.u, options, None, {"return_weights": need_weights})
        out, weights = (found[0], found[2]) if need_weights else (found, None)
        return self.out_proj(out.flatten(2)), weights

    def extra_repr(self) -> str:
        """Show what is not in the submodules."""
        return f"{self.embed_dim}, {self.num_heads}, hidden_dim={self.hidden_dim}, causal={self.causal}"
