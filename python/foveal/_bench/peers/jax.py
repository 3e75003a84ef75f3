"""jax.nn.dot_product_attention and the formula in jax.numpy, both compiled for the shapes, on arrays in place."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import foveal

from ..work import Array, Inputs, Way, Work, as_float32, cycled, visible, way_name, without_groups


def ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    if (started := start()) != (threads := foveal.get_num_threads()):
        raise RuntimeError(f"bench: JAX runs {started} threads in this process, expected {threads}")
    import jax
    import jax.numpy as jnp

    attend = functools.partial(jax.nn.dot_product_attention, is_causal=work.causal)
    mask = jnp.asarray(visible(work)) if work.causal else None

    def formula(q: Any, k: Any, v: Any) -> Any:
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = product("bhqd,bhkd->bhqk", q, k) * work.head_dim**-0.5
        weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)

    def way(name: str, function: Any, arrays: Sequence[Sequence[Array]], bshd: bool) -> Way:
        compiled = jax.jit(function)
        placed = [tuple(jnp.asarray(np.ascontiguousarray(x)) for x in triple) for triple in arrays]
        read = (lambda out: as_float32(out).swapaxes(1, 2)) if bshd else as_float32
        return Way(name, cycled(lambda q, k, v: compiled(q, k, v).block_until_ready(), placed), read=read)

    swapped = [tuple(x.swapaxes(1, 2) for x in triple) for triple in inputs]
    yield way(way_name("jax", "dot_product_attention"), attend, swapped, bshd=True)
    for name, arranged in without_groups(work, inputs):
        yield way(way_name("jax", "formula", name), formula, arranged, bshd=False)


@functools.cache
def start() -> int:
    """Starts JAX on the CPU with as many threads as foveal uses, for the whole process; returns their number."""
    threads = foveal.get_num_threads()
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(threads)  # what XLA sizes its pool by, once
    try:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # each call waits for its result: no detour
        jax.devices()
    finally:
        if before is None:
            del os.environ["NPROC"]
        else:
            os.environ["NPROC"] = before
    return threads
