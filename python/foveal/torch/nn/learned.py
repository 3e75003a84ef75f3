"""Attention with a learned threshold for each query, and with learned temperatures and spans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveal.torch.nn.cache import KeyValueCache
from foveal.torch.nn.multi_head import MultiHeadAttention


class _Learned(MultiHeadAttention):
    """A module whose calls have an option that caches and relative biases lack."""

    def _refuse_relative_bias(self, relative_bias: Any) -> None:
        if relative_bias is not None:
            raise ValueError(f"{type(self).__name__}: relative_bias is given, expected None")

    def _decode(self, *_: Any, cache: KeyValueCache | None = None) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__}: cache is given, expected None: caches have neither gate nor span"
        )


class ThresholdAttention(_Learned):
    """Multi-head attention with a soft threshold for each query and head, from a linear layer.

    ::

        s = scale * q k^T                                 (Sq, Skv), never held
        w is proportional to exp(s) sigmoid((s - tau(x)) / T)

    tau = threshold(x) of the query's input x, and T > 0 is learned for each head. A key whose score is far below the
    threshold loses its weight, one far above it keeps it.

    Parameters
    ----------
    embed_dim, num_heads : int
        As in :class:`MultiHeadAttention`.
    temperature : float
        T at the beginning, above 0.
    **options
        Further keyword arguments of :class:`MultiHeadAttention`, except ``relative_bias``.

    Attributes
    ----------
    threshold : nn.Linear
        From the query's input to tau, one a head; begins at 0 with a bias of -2, where most keys are let through.
    log_temperature : (Hq,) Parameter
        log T.

    Raises
    ------
    ValueError
        As :class:`MultiHeadAttention`; ``temperature`` is not above 0, or ``relative_bias`` is given.
    NotImplementedError
        A call with a cache.

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import ThresholdAttention
    >>> attention = ThresholdAttention(32, 4, batch_first=True)
    >>> out, _ = attention(torch.randn(2, 10, 32))
    >>> out.shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, temperature: float = 1.0, **options: Any):
        if not temperature > 0:
            raise ValueError(f"ThresholdAttention: temperature is {temperature}, expected above 0")
        self._refuse_relative_bias(options.get("relative_bias"))
        self.temperature = temperature
        super().__init__(embed_dim, num_heads, **options)
        made: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.threshold = nn.Linear(embed_dim, num_heads, **made)
        self.log_temperature = nn.Parameter(torch.empty(num_heads, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew, and set the threshold and its temperature to where they begin."""
        super().reset_parameters()
        if hasattr(self, "threshold"):
            nn.init.zeros_(self.threshold.weight)
            nn.init.constant_(self.threshold.bias, -2.0)
            nn.init.constant_(self.log_temperature, torch.tensor(self.temperature).log().item())

    def _learned(self, query: Tensor) -> dict[str, Any]:
        tau: Tensor = self.threshold(query)  # (B, S, Hq), or (S, B, Hq)
        tau = tau.permute(0, 2, 1) if self.batch_first else tau.permute(1, 2, 0)
        return {"gate": (tau, self.log_temperature.exp())}


class AdaptiveAttention(_Learned):
    """Multi-head attention with a learned temperature and a learned span for each head.

    A head sees keys up to z positions away, with a soft edge of ``ramp`` positions (Sukhbaatar et al. 2019, eq. 3-5);
    blocks of keys beyond the longest span of a group of heads are skipped. Its scores are divided by its temperature.

    Parameters
    ----------
    embed_dim, num_heads : int
        As in :class:`MultiHeadAttention`.
    max_span : float
        The largest z, above 0.
    ramp : float
        Above 0.
    init_span : float
        z at the beginning, as a share of ``max_span``, 0 to 1.
    **options
        Further keyword arguments of :class:`MultiHeadAttention`, except ``relative_bias``.

    Attributes
    ----------
    span : (Hq,) Parameter
        z / max_span, clamped to 0 to 1 when it is used.
    log_temperature : (Hq,) Parameter
        Of the scores; begins at 0.

    Raises
    ------
    ValueError
        As :class:`MultiHeadAttention`; a number out of its range, or ``relative_bias`` is given.
    NotImplementedError
        A call with a cache.

    References
    ----------
    Sukhbaatar et al. 2019, "Adaptive Attention Span in Transformers".

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import AdaptiveAttention
    >>> attention = AdaptiveAttention(32, 4, max_span=64, causal=True, batch_first=True)
    >>> out, _ = attention(torch.randn(2, 10, 32))
    >>> loss = out.square().mean() + 1e-3 * attention.span_loss()
    >>> loss.backward()
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        max_span: float = 1024.0,
        ramp: float = 32.0,
        init_span: float = 0.5,
        **options: Any,
    ):
        for name, value in (("max_span", max_span), ("ramp", ramp)):
            if not value > 0:
                raise ValueError(f"AdaptiveAttention: {name} is {value}, expected above 0")
        if not 0 <= init_span <= 1:
            raise ValueError(f"AdaptiveAttention: init_span is {init_span}, expected 0 to 1")
        self._refuse_relative_bias(options.get("relative_bias"))
        self.max_span, self.ramp, self.init_span = float(max_span), float(ramp), init_span
        super().__init__(embed_dim, num_heads, **options)
        made: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.span = nn.Parameter(torch.empty(num_heads, **made))
        self.log_temperature = nn.Parameter(torch.empty(num_heads, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew, and set spans and temperatures to where they begin."""
        super().reset_parameters()
        if hasattr(self, "log_temperature"):
            nn.init.constant_(self.span, self.init_span)
            nn.init.zeros_(self.log_temperature)

    def span_loss(self) -> Tensor:
        """Give the mean span of the heads, as a share of ``max_span``: the L1 term of the paper's eq. 6."""
        return self.span.clamp(0, 1).mean()

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._projected(query, key, value)
        return q * (-self.log_temperature).exp().to(q.dtype)[:, None], k, v

    def _learned(self, query: Tensor) -> dict[str, Any]:
        return {"span": (self.span.clamp(0, 1) * self.max_span, self.ramp)}
