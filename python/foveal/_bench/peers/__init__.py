"""The list of peers. Each has a module here, whose `ways` are all those in which its users would do a piece of work."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..work import Inputs, Way, Work
from . import jax, numpy, onnxruntime, openvino, torch


@dataclass(frozen=True)
class Peer:
    modules: tuple[str, ...]  # that it needs
    ways: Callable[[Work, Sequence[Inputs]], Iterator[Way]]
    does: Callable[[Work], bool] = lambda work: True  # among works without a window

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.modules if importlib.util.find_spec(module) is None]


def _in_numpy(work: Work) -> bool:
    """Whether somebody would wait for it, too."""
    return work.dtype == "float32" and work.num_kv_heads == work.heads and work.num_scores <= 1 << 25


PEERS = {
    "torch": Peer(("torch",), torch.ways),
    "openvino": Peer(("openvino",), openvino.ways),
    "onnxruntime": Peer(("onnxruntime", "onnx"), onnxruntime.ways, lambda work: work.dtype != "bfloat16"),
    "jax": Peer(("jax",), jax.ways, lambda work: work.dtype != "float16"),
    "numpy": Peer(("numpy",), numpy.ways, _in_numpy),
    "numpy textbook": Peer(("numpy",), numpy.textbook_ways, lambda work: False),  # only when asked for by name
}


def peers_of(work: Work) -> list[str]:
    """The installed peers that can do it, in a time and a memory that somebody would wait for."""
    if work.window is not None:
        return []
    if work.normalizer != "softmax":
        return ["numpy"]
    return [name for name, peer in PEERS.items() if peer.does(work) and not peer.missing]


def left_out() -> list[str]:
    """A line for each peer that is not installed."""
    return [
        f"{name}: left out; it is measured too after: pip install {' '.join(peer.missing)}"
        for name, peer in PEERS.items()
        if peer.missing
    ]
