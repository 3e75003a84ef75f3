"""Queries of several tasks over shared keys: each task with its own breadth, all with one budget.

::

    q_t = W_q (queries of task t)                learned, n for each task
    out_t = T budget_t attention(q_t / temperature_t, W_k x, W_v x)
    budget = softmax(logits + urgency)           over the T tasks, with the sum 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveal.torch.nn import _breadth
from foveal.torch.nn.multi_head import MultiHeadAttention
from foveal.torch.nn.rotary import accumulator


class MultiTaskOutput(NamedTuple):
    """What :class:`MultiTaskAttention` gives."""

    out: Tensor
    budget: Tensor


class MultiTaskAttention(nn.Module):
    """Learned queries for each of several tasks over shared keys and values.

    Keys and values are projected once for all tasks. Learned queries over a set are those of the Set Transformer (Lee
    et al. 2019) and Perceiver (Jaegle et al. 2021). The breadth of a row of weights w is exp(-sum w log w), the number
    of keys that it attends to in effect.

    Parameters
    ----------
    embed_dim, num_heads : int
        As in :class:`MultiHeadAttention`.
    num_tasks, queries_per_task : int
        T, and n.
    breadth : float, sequence of T floats, "learned" or None
        How many keys a query of each task attends to, 1 or more: each call finds the temperature of every row by
        iteration, and backward takes it for a constant. "learned": a learned temperature for each task and head. None:
        the temperature 1.
    kdim, vdim : int, optional
        Features of key and value; default: embed_dim.
    **options
        ``dropout``, ``bias``, ``num_kv_heads``, ``head_dim``, ``scale``, ``device`` and ``dtype`` of
        :class:`MultiHeadAttention`.

    Attributes
    ----------
    queries : (T, n, E) Parameter
    budget_logits : (T,) Parameter
    log_temperature : (T, Hq) Parameter or None

    Raises
    ------
    ValueError
        ``breadth`` has another number of tasks, or is below 1; a number of tasks or queries is below 1.

    References
    ----------
    Lee et al. 2019, "Set Transformer", section 3.2. Jaegle et al. 2021, "Perceiver: General Perception with Iterative
    Attention".

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import MultiTaskAttention
    >>> tasks = MultiTaskAttention(32, 4, num_tasks=2, queries_per_task=3, breadth=[2.0, 20.0])
    >>> x = torch.randn(5, 100, 32)
    >>> out, budget = tasks(x)
    >>> out.shape, budget.sum(-1)
    (torch.Size([5, 2, 3, 32]), tensor([1., 1., 1., 1., 1.], grad_fn=<SumBackward1>))
    >>> tasks.measured_breadth(x)[0].round(decimals=1)
    tensor([ 2., 20.])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_tasks: int,
        queries_per_task: int = 1,
        *,
        breadth: float | Sequence[float] | str | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        **options: Any,
    ):
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("queries_per_task", queries_per_task)):
            if value < 1:
                raise ValueError(f"MultiTaskAttention: {name} is {value}, expected 1 or more")
        for name in options:
            if name not in ("dropout", "bias", "num_kv_heads", "head_dim", "scale", "device", "dtype"):
                raise TypeError(f"MultiTaskAttention: {name} is given, expected none: it has no meaning here")
        self.num_tasks, self.queries_per_task = num_tasks, queries_per_task
        self.breadth = _breadths(breadth, num_tasks)
        made: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.attention = MultiHeadAttention(embed_dim, num_heads, kdim=kdim, vdim=vdim, batch_first=True, **options)
        self.queries = nn.Parameter(torch.empty(num_tasks, queries_per_task, embed_dim, **made))
        self.budget_logits = nn.Parameter(torch.empty(num_tasks, **made))
        self.log_temperature = nn.Parameter(torch.empty(num_tasks, num_heads, **made)) if breadth == "learned" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw queries and projections anew, with an equal budget and the temperature 1."""
        self.attention.reset_parameters()
        nn.init.normal_(self.queries)
        nn.init.zeros_(self.budget_logits)
        if self.log_temperature is not None:
            nn.init.zeros_(self.log_temperature)

    def forward(
        self,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        urgency: Tensor | None = None,
    ) -> MultiTaskOutput:
        """Attend from every task's queries to ``key``.

        Parameters
        ----------
        key, value : (B, Skv, kdim) and (B, Skv, vdim) Tensor
            ``value`` is ``key`` by default.
        key_padding_mask : (B, Skv) bool or floating Tensor, optional
            True: the key is padding. With a target of the breadth, bool alone.
        urgency : (T,) or (B, T) Tensor, optional
            Added to the logits of the budget.

        Returns
        -------
        out : (B, T, n, E) Tensor
            What each task reads, times its budget and T.
        budget : (B, T) Tensor
            The shares of the tasks, with the sum 1.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong dtype or shape; the text says which.
        """
        inner = self.attention
        if not inner._check_inputs(None, key, value):
            raise ValueError("MultiTaskAttention: key has 2 dimensions, expected 3")
        q, k, hidden = self._rows(key, key_padding_mask)
        v = inner._heads(inner.v_proj(key if value is None else value))
        out, _ = inner._weighted(q, k, v, False, False, inner._options() | hidden)
        budget = self._budget(urgency, key.shape[0])
        out = out.flatten(2).unflatten(1, (self.num_tasks, self.queries_per_task))
        out = inner.out_proj(out)
        return MultiTaskOutput(out * (self.num_tasks * budget)[..., None, None].to(out.dtype), budget)

    def measured_breadth(self, key: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Give the breadth of each task (B, T), the mean over its queries and heads; without a gradient."""
        with torch.no_grad():
            q, k, hidden = self._rows(key, key_padding_mask)
            q, k = (x.to(accumulator(x.dtype)) for x in (q, k))
            reached = _breadth.entropy(q, k, self._scale, **hidden).exp()
            mean: Tensor = reached.unflatten(2, (self.num_tasks, self.queries_per_task)).mean((1, 3))
            return mean

    @property
    def _scale(self) -> float:
        scale = self.attention.scale
        return self.attention.head_dim**-0.5 if scale is None else scale

    def _rows(self, key: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Give q, divided by its temperature, k and what hides keys."""
        inner = self.attention
        q = inner._heads(inner.q_proj(self.queries.flatten(0, 1))).expand(key.shape[0], -1, -1, -1)
        k = inner._heads(inner.k_proj(key))
        hidden = inner._hidden(q, k, key_padding_mask, None).options()
        if self.log_temperature is not None:
            colder = (-self.log_temperature).exp().repeat_interleave(self.queries_per_task, dim=0)
            q = q * colder[..., None].to(q.dtype)
        elif self.breadth is not None:
            if "bias" in hidden:
                raise TypeError(
                    "MultiTaskAttention: key_padding_mask adds to scores, expected a bool tensor with a breadth"
                )
            asked = torch.tensor(self.breadth, device=q.device).repeat_interleave(self.queries_per_task)
            found = _breadth.temperature(q, k, asked, self._scale, **hidden)
            q = q / found.transpose(1, 2)[..., None].to(q.dtype)
        return q, k, hidden

    def _budget(self, urgency: Tensor | None, batch: int) -> Tensor:
        logits: Tensor = self.budget_logits
        if urgency is not None:
            if tuple(urgency.shape) not in ((self.num_tasks,), (batch, self.num_tasks)):
                raise ValueError(
                    f"MultiTaskAttention: urgency has shape {tuple(urgency.shape)}, expected {(self.num_tasks,)} or "
                    f"{(batch, self.num_tasks)}"
                )
            logits = logits + urgency
        return logits.softmax(-1).expand(batch, -1)

    def extra_repr(self) -> str:
        """Show the tasks."""
        return f"num_tasks={self.num_tasks}, queries_per_task={self.queries_per_task}, breadth={self.breadth}"


def _breadths(breadth: float | Sequence[float] | str | None, num_tasks: int) -> tuple[float, ...] | None:
    if breadth is None or breadth == "learned":
        return None
    if isinstance(breadth, str):
        raise ValueError(f"MultiTaskAttention: breadth is {breadth!r}, expected numbers, 'learned' or None")
    values = (float(breadth),) * num_tasks if isinstance(breadth, (int, float)) else tuple(map(float, breadth))
    if len(values) != num_tasks or not all(value >= 1 for value in values):
        raise ValueError(
            f"MultiTaskAttention: breadth is {breadth}, expected a number of keys from 1 on, or one for each of the "
            f"{num_tasks} tasks"
        )
    return values
