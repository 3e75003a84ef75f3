"""Several attention mechanisms over the same queries, keys and values, mixed by learned gates.

::

    g = softmax(W x) or sigmoid(W x)             a gate for each query and mechanism
    out = out_proj(sum over m of g_m attention_m(q, k, v))

A mechanism that starts a little worse gets a smaller gate, hence smaller gradients, and dies. The balance loss, the
divergence KL(u || p) of the mean gates p from the uniform distribution u, holds against it: its slope in the logit of
mechanism m is p_m - 1/n, which does not vanish with the gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.torch.nn.multi_head import MultiHeadAttention
from foveal.torch.nn.relative_bias import Window
from foveal.torch.nn.rotary import accumulator


class Mechanism(NamedTuple):
    """One way to attend: how scores become weights, how far a query sees, and how sharply."""

    normalizer: str = "softmax"
    window: Window = (None, None)
    temperature: float = 1.0


class MixtureOutput(NamedTuple):
    """What :class:`MixtureOfAttention` gives."""

    out: Tensor
    balance_loss: Tensor


class MixtureOfAttention(nn.Module):
    """Attention by several mechanisms at once, mixed by gates that each query sets.

    The mechanisms share their projections; each costs one call of the kernel. Mixtures with gates are those of Jacobs
    et al. 1991, here all of them are computed; the balance loss takes the place of the importance loss of Shazeer et
    al. 2017.

    Parameters
    ----------
    embed_dim, num_heads : int
        As in :class:`MultiHeadAttention`.
    mechanisms : sequence of Mechanism
        One or more. A window counts beside that of the module.
    gate : "softmax" or "sigmoid"
        Gates that compete, with the sum 1, or that are independent. They begin equal, with the sum 1.
    **options
        Further keyword arguments of :class:`MultiHeadAttention`, except ``window``, ``normalizer`` and ``batch_first``.

    Attributes
    ----------
    attention : MultiHeadAttention
        The projections.
    gates : nn.Linear
        From a query to the logits of its gates.

    Raises
    ------
    ValueError
        There is no mechanism, a temperature is not above 0, or ``gate`` is unknown.

    References
    ----------
    Jacobs et al. 1991, "Adaptive Mixtures of Local Experts". Shazeer et al. 2017, "Outrageously Large Neural Networks",
    section 4.

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import Mechanism, MixtureOfAttention
    >>> mixture = MixtureOfAttention(32, 4, [Mechanism(window=(2, 2)), Mechanism(temperature=0.5)])
    >>> out, balance_loss = mixture(torch.randn(2, 10, 32))
    >>> out.shape, mixture.usage()
    (torch.Size([2, 10, 32]), tensor([0.5000, 0.5000]))
    """

    _usage: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mechanisms: Sequence[Mechanism],
        *,
        gate: str = "softmax",
        **options: Any,
    ):
        super().__init__()
        self.mechanisms = tuple(Mechanism(*mechanism) for mechanism in mechanisms)
        if not self.mechanisms:
            raise ValueError("MixtureOfAttention: mechanisms is empty, expected one or more")
        for index, mechanism in enumerate(self.mechanisms):
            if not mechanism.temperature > 0:
                raise ValueError(
                    f"MixtureOfAttention: mechanisms[{index}].temperature is {mechanism.temperature}, expected above 0"
                )
        if gate not in ("softmax", "sigmoid"):
            raise ValueError(f"MixtureOfAttention: gate is {gate!r}, expected 'softmax' or 'sigmoid'")
        for name in ("window", "normalizer", "batch_first"):
            if name in options:
                raise TypeError(f"MixtureOfAttention: {name} is given, expected it in the mechanisms or not at all")
        self.gate = gate
        self.attention = MultiHeadAttention(embed_dim, num_heads, batch_first=True, **options)
        made: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.gates = nn.Linear(embed_dim, len(self.mechanisms), **made)
        self.register_buffer("_usage", torch.zeros(len(self.mechanisms), **made), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew and set all gates equal."""
        self.attention.reset_parameters()
        nn.init.zeros_(self.gates.weight)
        # Of n independent gates, each is 1/n then.
        nn.init.constant_(self.gates.bias, 0 if self.gate == "softmax" else -math.log(max(len(self.mechanisms) - 1, 1)))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> MixtureOutput:
        """Attend from ``query`` (B, Sq, E) to ``key`` (B, Skv, kdim) and ``value`` (B, Skv, vdim).

        The arguments are those of :meth:`MultiHeadAttention.forward`, with the batch first.

        Returns
        -------
        out : (B, Sq, E) Tensor
        balance_loss : () Tensor
            0 where all mechanisms are used alike; to be added to the loss, times a weight such as 0.01. In
            self-attention, queries that a bool ``key_padding_mask`` marks do not count.
        """
        inner = self.attention
        if not inner._check_inputs(query, key, value):
            raise ValueError("MixtureOfAttention: query has 2 dimensions, expected 3")
        counted = None
        if key is None and key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
            counted = key_padding_mask.logical_not()
        key = query if key is None else key
        gates = self._gates(query)
        q, k, v = inner._projected(query, key, key if value is None else value)
        hidden = inner._hidden(q, k, key_padding_mask, None if is_causal else attn_mask).options()
        q, k = inner._turned(q, k, is_causal)
        scale = inner.head_dim**-0.5 if inner.scale is None else inner.scale
        mixed: Tensor | None = None
        for index, mechanism in enumerate(self.mechanisms):
            changed = {"window": mechanism.window, "scale": scale / mechanism.temperature}
            if mechanism.normalizer != "softmax":
                changed["normalizer"] = mechanism.normalizer
            out, _ = inner._weighted(q, k, v, is_causal, False, inner._options() | hidden | changed)
            part = out.flatten(2) * gates[..., index, None].to(out.dtype)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return MixtureOutput(inner.out_proj(mixed), self._balance(gates, counted))

    def _gates(self, query: Tensor) -> Tensor:
        logits: Tensor = self.gates(query)
        logits = logits.to(accumulator(logits.dtype))
        return logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()

    def _balance(self, gates: Tensor, counted: Tensor | None) -> Tensor:
        """Give KL(u || p) for the mean gates p, and note them."""
        if counted is None:
            mean = gates.flatten(0, -2).mean(0)
        else:
            weight = counted[..., None].to(gates.dtype)
            mean = (gates * weight).flatten(0, -2).sum(0) / weight.sum().clamp(min=1)
        if not torch._C._are_functorch_transforms_active():  # a transform has no one mean to note
            with torch.no_grad():
                self._usage.copy_(mean)
        least = torch.finfo(mean.dtype).tiny
        share = mean.clamp(min=least) / mean.sum().clamp(min=least)
        divergence: Tensor = -(share * len(self.mechanisms)).log().mean()
        return divergence

    def usage(self) -> Tensor:
        """Say how much each mechanism was used: its mean gate in the last forward pass, (mechanisms,)."""
        return self._usage.clone()

    def extra_repr(self) -> str:
        """Show the mechanisms."""
        return f"gate={self.gate!r}, mechanisms={[tuple(mechanism) for mechanism in self.mechanisms]}"
