from typing import Any

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

def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    q_lens: Any,
    kv_lens: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    /,
) -> Any: ...
def attention_reference(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    q_lens: Any,
    kv_lens: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    /,
) -> Any: ...
def check_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    q_lens: Any,
    kv_lens: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
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
