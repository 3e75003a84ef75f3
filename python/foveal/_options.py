"""The one list of what attention can be asked for, in the order in which the core takes it.

Public signatures are literal, and a test compares them with this list. From it come the order of the arguments of
``_core``, the schemas and records of the PyTorch ops, and the arguments that an error is explained from. The C++ side
of the list is ``cpp/bindings/attention_options.h``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ATTENTION, VARLEN, KVCACHE, STATS, ADDITIVE = FUNCTIONS = (
    "attention",
    "attention_varlen",
    "attention_kvcache",
    "attention_stats",
    "additive_attention",
)
_OF_PRODUCTS = (ATTENTION, VARLEN, KVCACHE, STATS)  # what scores are that are made of q and k alone


class OpArgument(NamedTuple):
    """An argument of the PyTorch ops: its name, its type in a schema, and its default."""

    name: str
    type: str
    default: Any


class Option(NamedTuple):
    """An option: the functions that have it, its default there, and what the ops have in its place."""

    name: str
    default: Any
    op_arguments: tuple[OpArgument, ...]
    functions: tuple[str, ...] = FUNCTIONS


def _tensor(name: str, functions: tuple[str, ...] = FUNCTIONS) -> Option:
    return Option(name, None, (OpArgument(name, "Tensor?", None),), functions)


OPTIONS = (
    _tensor("mask"),
    _tensor("bias"),
    _tensor("alibi_slopes", _OF_PRODUCTS),
    _tensor("sinks", _OF_PRODUCTS),
    Option(
        "gate",
        None,
        (OpArgument("gate_tau", "Tensor?", None), OpArgument("gate_temperature", "Tensor?", None)),
        (ATTENTION, VARLEN, STATS),
    ),
    Option(
        "span",
        None,
        (OpArgument("span", "Tensor?", None), OpArgument("span_ramp", "float", 0.0)),
        (ATTENTION, VARLEN, STATS),
    ),
    _tensor("u", (ADDITIVE,)),  # which calls the ops of attention
    _tensor("q_lens", (ATTENTION, STATS, ADDITIVE)),
    _tensor("kv_lens", (ATTENTION, STATS, ADDITIVE)),  # of a cache: cache_lens, which is no option
    Option("causal", False, (OpArgument("causal", "bool", False),)),
    Option("q_offset", None, (OpArgument("q_offsets", "Tensor?", None), OpArgument("q_offset", "SymInt?", None))),
    Option(
        "window",
        (None, None),
        (OpArgument("window_left", "SymInt?", None), OpArgument("window_right", "SymInt?", None)),
    ),
    Option("scale", None, (OpArgument("scale", "float?", None),), _OF_PRODUCTS),
    Option("softcap", 0.0, (OpArgument("softcap", "float", 0.0),), _OF_PRODUCTS),
    Option("dropout_p", 0.0, (OpArgument("dropout_p", "float", 0.0),), (ATTENTION, VARLEN, ADDITIVE)),
    Option("seed", None, (OpArgument("seed", "Tensor?", None),), (ATTENTION, VARLEN, ADDITIVE)),
    Option("normalizer", "softmax", (OpArgument("normalizer", "int", 0),)),  # its place in _core.NORMALIZERS
    Option("layout", "bhsd", (OpArgument("bshd", "bool", False),), (ATTENTION, STATS, ADDITIVE)),
)
NAMES = tuple(option.name for option in OPTIONS)
DEFAULTS = {option.name: option.default for option in OPTIONS}

# What follows q, k, v and the options in every function of ``_core``.
REQUESTS = {"out": None, "return_lse": False, "return_weights": False, "return_stats": False}


def core_arguments(options: dict[str, Any], **requests: Any) -> dict[str, Any]:
    """Give what follows q, k and v in ``_core``, in its order; what is not given has its default."""
    return DEFAULTS | options | REQUESTS | requests


def op_arguments(function: str) -> tuple[OpArgument, ...]:
    """Give the arguments that the ops of a function have for its options: tensors first, then numbers.

    The ops of a cache have the arguments of dropout too, so that they end as the ops of packed sequences do.
    """
    has = (VARLEN,) if function in (VARLEN, KVCACHE) else (ATTENTION, VARLEN, ADDITIVE)
    arguments = [x for option in OPTIONS if set(has) & set(option.functions) for x in option.op_arguments]
    return tuple(sorted(arguments, key=lambda x: x.type != "Tensor?"))
