"""The options of an op as a record, and as the text of its schema: both made from :mod:`foveal._options`."""

from __future__ import annotations

import collections
from typing import Any

from foveal._options import ATTENTION, VARLEN, OpArgument, op_arguments

_namedtuple: Any = collections.namedtuple  # whose plugin of mypy wants literals


def _record(name: str, function: str, *requests: OpArgument) -> Any:
    """Make a named tuple of a function's options and of what an op is asked for beside, with the ops' defaults.

    Torch drops trailing defaults on the way to a rule, so a record is made of as many values as there are.
    """
    arguments = (*op_arguments(function), *requests)
    record: Any = _namedtuple(name, [x.name for x in arguments], defaults=[x.default for x in arguments])
    record.schema = ", ".join(f"{x.type} {x.name}={x.default}" for x in arguments)
    record.num_tensors = sum(x.type == "Tensor?" for x in op_arguments(function))  # which come first
    return record


# What a backward op is asked for beside dq, dk and dv, in the order of its results; the gate has two.
ASKED = ("bias_grad", "sinks_grad", "gate_grad", "span_grad", "u_grad")
# What it reads beside the output and its gradient, where the entropy of the rows has a gradient.
SAVED = ("dentropy", "entropy", "mass")
_GRADIENTS = (*(OpArgument(name, "bool", False) for name in ASKED), *(OpArgument(x, "Tensor?", None) for x in SAVED))
OPTION_GRADIENTS = {  # by the argument whose gradient it is: what asks for it
    "bias": "bias_grad",
    "sinks": "sinks_grad",
    "gate_tau": "gate_grad",
    "gate_temperature": "gate_grad",
    "span": "span_grad",
    "u": "u_grad",
}
GRADIENTS_SCHEMA = ", ".join(f"Tensor d{name}" for name in ("q", "k", "v", *OPTION_GRADIENTS))
SAVED_SCHEMA = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse"  # what a backward op begins with

# What follows q, k and v in attention_forward and in attention_backward.
StatsOptions = _record("StatsOptions", ATTENTION, OpArgument("top_k", "SymInt", 0))  # of attention_stats
Options = _record("Options", ATTENTION, OpArgument("return_weights", "bool", False))
BackwardOptions = _record("BackwardOptions", ATTENTION, *_GRADIENTS)
# What the ops of packed sequences and caches end with, and that of the packed backward pass.
PackedOptions = _record("PackedOptions", VARLEN)
PackedBackwardOptions = _record("PackedBackwardOptions", VARLEN, *_GRADIENTS)


def as_dense(packed: Any, **others: Any) -> Any:
    """Give the options of a packed op as those of the dense one."""
    own = {name: x for name, x in packed._asdict().items() if name in Options._fields}
    return Options(**{**own, "bshd": True, **others})
