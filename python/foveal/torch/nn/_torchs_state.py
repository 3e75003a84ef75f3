"""The state of torch.nn.MultiheadAttention in MultiHeadAttention: its names for parameters, read, loaded, copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_Module = TypeVar("_Module", bound=nn.Module)


class _Joined(Tensor):
    """The joined weights of the projections, for who reads them.

    A tensor of its own class makes torch's encoder layers and encoders leave their fused paths, which compute a plain
    self-attention from these weights.
    """


def joined(projections: Sequence[nn.Linear], name: str) -> Tensor | None:
    """Give the weights or biases of projections as one, a copy; None where they cannot be."""
    parts = [getattr(projection, name, None) for projection in projections]
    if any(part is None for part in parts) or len({part.shape[1:] for part in parts}) > 1:  # type: ignore[union-attr]
        return None
    whole = torch.cat(parts)  # type: ignore[arg-type]
    return whole if torch.compiler.is_compiling() else whole.as_subclass(_Joined)


def rename(state_dict: dict[str, Any], prefix: str, sizes: list[int]) -> None:
    """Rename and split, in place, what torch calls otherwise; `sizes` are those of q, k and v."""
    for name in ("weight", "bias"):
        whole = state_dict.get(f"{prefix}in_proj_{name}")
        if whole is not None and whole.shape[0] == sum(sizes):
            del state_dict[f"{prefix}in_proj_{name}"]
            for letter, part in zip("qkv", whole.split(sizes), strict=True):
                state_dict[f"{prefix}{letter}_proj.{name}"] = part
    for letter in "qkv":
        separate = state_dict.pop(f"{prefix}{letter}_proj_weight", None)
        if separate is not None:
            state_dict[f"{prefix}{letter}_proj.weight"] = separate


def made_from(cls: type[_Module], module: nn.MultiheadAttention, options: dict[str, Any]) -> _Module:
    """Make one of `cls`, a MultiHeadAttention, with the sizes, weights, device, dtype and mode of torch's module."""
    for name, has in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if has:
            raise ValueError(f"MultiHeadAttention: the module has {name}=True, expected False")
    weight = module.out_proj.weight
    made = cls(
        module.embed_dim,
        module.num_heads,
        module.dropout,
        module.in_proj_bias is not None,
        **{"kdim": module.kdim, "vdim": module.vdim, "batch_first": module.batch_first, **options},
        device=weight.device,
        dtype=weight.dtype,
    )
    missing, unexpected = made.load_state_dict(module.state_dict(), strict=False)
    own = {name for name, _ in made.named_parameters() if name.split(".")[0] not in _PROJECTIONS}
    if unexpected or set(missing) - own:
        raise ValueError(f"MultiHeadAttention: {missing} missing and {unexpected} unexpected, expected neither")
    return made.train(module.training)
