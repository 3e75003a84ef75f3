import queue
from collections.abc import Hashable, Iterable, Iterator, Mapping
from types import GenericAlias
from typing import Any, Generic, Literal, Protocol, SupportsFloat, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self, disjoint_base

_Array: TypeAlias = Any  # what speaks DLPack, a list, a tuple
_Number: TypeAlias = SupportsFloat | SupportsIndex
_KeyT = TypeVar("_KeyT", bound=Hashable)
_DefaultT = TypeVar("_DefaultT")

class HostArray:
    def __dlpack__(
        self,
        *,
        stream: Any = ...,
        max_version: tuple[int, int] | None = ...,
        dl_device: tuple[int, int] | None = ...,
        copy: bool | None = ...,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

NORMALIZERS: tuple[str, ...]

def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    /,
) -> Any: ...
def attention_stats(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    top_k: Any,
    /,
) -> Any: ...
def attention_reference(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    /,
) -> Any: ...
def check_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    /,
) -> Any: ...
def attention_backward(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    lse: Any,
    dout: Any,
    dlse: Any,
    dentropy: Any,
    entropy: Any,
    mass: Any,
    bias_grad: Any,
    sinks_grad: Any,
    gate_grad: Any,
    span_grad: Any,
    u_grad: Any,
    /,
) -> Any: ...
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    /,
) -> Any: ...
def check_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    /,
) -> Any: ...
def attention_kvcache(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    new_k: Any,
    new_v: Any,
    block_table: Any,
    cache_batch_idx: Any,
    k_scale: Any,
    v_scale: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    rotary_interleaved: Any,
    /,
) -> Any: ...
def check_attention_kvcache(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    new_k: Any,
    new_v: Any,
    block_table: Any,
    cache_batch_idx: Any,
    k_scale: Any,
    v_scale: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    rotary_interleaved: Any,
    /,
) -> Any: ...
def attention_varlen_backward(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    lse: Any,
    dout: Any,
    dlse: Any,
    dentropy: Any,
    entropy: Any,
    mass: Any,
    bias_grad: Any,
    sinks_grad: Any,
    gate_grad: Any,
    span_grad: Any,
    u_grad: Any,
    /,
) -> Any: ...
def set_num_threads(count: int, /) -> None: ...
def get_num_threads() -> int: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str | None, /) -> None: ...
def run_fmas(threads: int, operations: float, /) -> float: ...
def read_bytes(threads: int, buffer: Any, /) -> None: ...
def register_torch_ops(libraries: list[str], /) -> str: ...
def take_torch_failure(message: str, /) -> BaseException | None: ...

class Empty(queue.Empty, KeyError): ...

def as_float(function: str, name: str, value: object, /) -> float: ...
def as_number(function: str, name: str, value: object, /) -> float: ...
def check_not_rounded(function: str, name: str, source: Any, array: NDArray[Any], /) -> None: ...

@disjoint_base
class IndexedHeap:
    @property
    def capacity(self) -> int: ...
    @property
    def max(self) -> bool: ...
    def __new__(cls, capacity: SupportsIndex, *, max: bool = False) -> Self: ...
    @classmethod
    def from_arrays(
        cls, ids: _Array, priorities: _Array, capacity: SupportsIndex | None = None, *, max: bool = False
    ) -> Self: ...
    def push(self, id: SupportsIndex, priority: _Number) -> None: ...
    def update(self, id: SupportsIndex, priority: _Number) -> None: ...
    def upsert(self, id: SupportsIndex, priority: _Number) -> bool: ...
    def remove(self, id: SupportsIndex) -> float: ...
    def discard(self, id: SupportsIndex) -> bool: ...
    def pop(self) -> tuple[int, float]: ...
    def peek(self) -> tuple[int, float]: ...
    def priority(self, id: SupportsIndex) -> float: ...
    def push_many(self, ids: _Array, priorities: _Array) -> None: ...
    def update_many(
        self, ids: _Array, priorities: _Array, *, missing: Literal["raise", "insert", "ignore"] = "raise"
    ) -> None: ...
    def pop_many(self, k: SupportsIndex, *, relaxed: bool = False) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
    def iter_sorted(self) -> Iterator[tuple[int, float]]: ...
    def clear(self) -> None: ...
    def copy(self) -> Self: ...
    def __copy__(self) -> Self: ...
    def __contains__(self, id: SupportsIndex, /) -> bool: ...
    def __iter__(self) -> Iterator[int]: ...
    def __len__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def __setstate__(self, state: tuple[_Array, _Array]) -> None: ...
    def __sizeof__(self) -> int: ...

@disjoint_base
class PriorityMap(Generic[_KeyT]):
    @property
    def max(self) -> bool: ...
    def __new__(
        cls, data: Mapping[_KeyT, _Number] | Iterable[tuple[_KeyT, _Number]] = (), /, *, max: bool = False
    ) -> Self: ...
    def __init__(
        self, data: Mapping[_KeyT, _Number] | Iterable[tuple[_KeyT, _Number]] = (), /, *, max: bool = False
    ) -> None: ...
    def push(self, key: _KeyT, priority: _Number) -> None: ...
    def update_priority(self, key: _KeyT, priority: _Number) -> None: ...
    def adjust(self, key: _KeyT, delta: _Number) -> float: ...
    def discard(self, key: _KeyT) -> bool: ...
    @overload
    def get(self, key: _KeyT, default: None = None) -> float | None: ...
    @overload
    def get(self, key: _KeyT, default: _DefaultT) -> float | _DefaultT: ...
    def setdefault(self, key: _KeyT, default: _Number | None = None) -> float: ...
    @overload
    def pop(self, key: _KeyT) -> float: ...
    @overload
    def pop(self, key: _KeyT, default: _DefaultT) -> float | _DefaultT: ...
    def popitem(self) -> tuple[_KeyT, float]: ...
    def peekitem(self) -> tuple[_KeyT, float]: ...
    def pushpop(self, key: _KeyT, priority: _Number) -> tuple[_KeyT, float]: ...
    def clear(self) -> None: ...
    def copy(self) -> Self: ...
    def __copy__(self) -> Self: ...
    def __getitem__(self, key: _KeyT, /) -> float: ...
    def __setitem__(self, key: _KeyT, priority: _Number, /) -> None: ...
    def __delitem__(self, key: _KeyT, /) -> None: ...
    def __contains__(self, key: object, /) -> bool: ...
    def __iter__(self) -> Iterator[_KeyT]: ...
    def __len__(self) -> int: ...
    def _items(self) -> list[tuple[_KeyT, float]]: ...
    def __getstate__(self) -> tuple[Any, ...]: ...
    def __setstate__(self, state: tuple[Any, ...]) -> None: ...
    def __sizeof__(self) -> int: ...
    def __class_getitem__(cls, item: Any, /) -> GenericAlias: ...

class _Random(Protocol):
    def random(self, size: int, /) -> NDArray[np.float64]: ...

@disjoint_base
class SumTree:
    @property
    def capacity(self) -> int: ...
    @property
    def total(self) -> float: ...
    def __new__(cls, capacity: SupportsIndex) -> Self: ...
    def update_many(self, ids: _Array, weights: _Array) -> None: ...
    def sample(
        self, k: SupportsIndex, *, rng: _Random, replace: bool = True, stratified: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
    def weights(self) -> NDArray[np.float64]: ...
    def __getitem__(self, id: SupportsIndex, /) -> float: ...
    def __setitem__(self, id: SupportsIndex, weight: _Number, /) -> None: ...
    def __sizeof__(self) -> int: ...
