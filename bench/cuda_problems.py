"""The problems on which the CUDA backend is checked, and their float64 answers. CPU only.

A `Case` is a shape and options by name; `make_inputs` draws them (rounded to the case's dtype, NaN put where a mask
hides it); `reference` computes the answer from the rounded inputs row by row in float64, straight from the definition.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

# ||out - ref|| / ||ref||, and the absolute error of lse. float32 and float64: sums of up to a few thousand terms.
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 2e-6, "float64": 1e-13}
GRADIENT_TOLERANCE = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 4e-6, "float64": 1e-13}
LSE_TOLERANCE = {"bfloat16": 1e-4, "float16": 1e-4, "float32": 1e-4, "float64": 1e-12}


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; `None` and zero mean an option is absent."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    value_dim: int
    dtype: str
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    q_offset: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    mask: bool = False
    bias: str | None = None  # dtype of the bias
    bias_axes: str = "hqk"  # those of b, h, q, k along which it is not broadcast
    alibi: bool = False
    sinks: bool = False
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    layout: str = "bhsd"
    strided: bool = False  # the last axis of q, k, v has stride 2
    poison: bool = False  # NaN in every key and value that no row sees, and in some that only some rows see
    poison_rows: str = ""  # "q" or "dout", which has NaN in row 2: the keys that this row does not see stay without
    variant: int = -1

    def name(self) -> str:
        """Shape, then every option that differs from its default."""
        head = (
            f"b{self.batch} h{self.num_heads}/{self.num_kv_heads} s{self.seqlen_q}x{self.seqlen_kv} "
            f"d{self.head_dim}/{self.value_dim} {self.dtype}"
        )
        extras = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)[8:]
            if getattr(self, f.name) != f.default
        ]
        return " ".join([head, *extras])


def to_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the named dtype, bfloat16 by ml_dtypes."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)


def visible(case: Case, batch: int, mask: np.ndarray | None) -> np.ndarray:
    """(Hq,Sq,Skv) bool: which keys each row sees."""
    q_len = case.q_lens[batch] if case.q_lens else case.seqlen_q
    kv_len = case.kv_lens[batch] if case.kv_lens else case.seqlen_kv
    offset = kv_len - q_len if case.q_offset is None else case.q_offset
    position = offset + np.arange(case.seqlen_q)[:, None]
    key = np.arange(case.seqlen_kv)[None, :]
    seen = np.broadcast_to(key < kv_len, (case.seqlen_q, case.seqlen_kv)).copy()
    if case.causal:
        seen &= key <= position
    left, right = case.window
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    seen[q_len:] = False
    result = np.broadcast_to(seen, (case.num_heads, *seen.shape))
    return result & mask[batch] if mask is not None else result


def make_inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays by argument name, contiguous in (B,H,S,D); lens are int32, q_offset is kept in the case."""
    rng = np.random.default_rng([seed, case.batch, case.seqlen_q, case.seqlen_kv, case.head_dim])
    kv_shape = (case.batch, case.num_kv_heads, case.seqlen_kv)
    arrays = {
        "q": rng.standard_normal((case.batch, case.num_heads, case.seqlen_q, case.head_dim)),
        "k": rng.standard_normal((*kv_shape, case.head_dim)),
        "v": rng.standard_normal((*kv_shape, case.value_dim)),
    }
    arrays = {name: to_dtype(a, case.dtype) for name, a in arrays.items()}
    scores = (case.batch, case.num_heads, case.seqlen_q, case.seqlen_kv)
    if case.mask:
        mask = rng.random(scores) < 0.7
        if case.seqlen_q > 2:
            mask[:, :, 1] = False  # a fully masked row
        arrays["mask"] = mask
    if case.bias:
        shape = [n if axis in case.bias_axes else 1 for axis, n in zip("bhqk", scores, strict=True)]
        arrays["bias"] = to_dtype(rng.standard_normal(shape), case.bias)
    if case.alibi:
        arrays["alibi_slopes"] = (2.0 ** -np.arange(1, case.num_heads + 1)).astype(np.float32)
    if case.sinks:
        arrays["sinks"] = rng.standard_normal(case.num_heads).astype(np.float32)
    for name in ("q_lens", "kv_lens"):
        lens = getattr(case, name)
        if lens is not None:
            arrays[name] = np.array(lens, np.int32)
    if case.poison:
        group = case.num_heads // case.num_kv_heads
        for b in range(case.batch):
            seen = visible(case, b, arrays.get("mask")).reshape(case.num_kv_heads, group, case.seqlen_q, -1)
            hidden = ~seen.any(axis=(1, 2))
            if case.causal and case.seqlen_kv > 3:
                hidden[:, -2] = True  # seen by the last rows alone: theirs is NaN, the others' must not be
            arrays["k"][b][hidden] = np.nan
            arrays["v"][b][hidden] = np.nan
    if case.poison_rows == "q":
        arrays["q"][:, :, 2] = np.nan
    return arrays


def scores_of(case: Case, arrays: dict[str, np.ndarray], b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """(Sq,Skv) scores of one head in float64, and their derivative by scale * q.k."""
    q = arrays["q"][b, h].astype(np.float64)
    k = arrays["k"][b, h // (case.num_heads // case.num_kv_heads)].astype(np.float64)
    s = (q @ k.T) * softmax_scale(case)
    slope = np.ones_like(s)
    if case.softcap:
        slope = 1.0 - np.tanh(s / case.softcap) ** 2
        s = case.softcap * np.tanh(s / case.softcap)
    if "bias" in arrays:
        bias = arrays["bias"].astype(np.float64)
        s = s + bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0]
    if "alibi_slopes" in arrays:
        q_len, kv_len = lengths(case, b)
        offset = kv_len - q_len if case.q_offset is None else case.q_offset
        distance = np.abs(offset + np.arange(case.seqlen_q)[:, None] - np.arange(case.seqlen_kv)[None])
        s = s - float(arrays["alibi_slopes"][h]) * distance
    return s, slope


def softmax_scale(case: Case) -> float:
    return 1.0 / math.sqrt(case.head_dim) if case.scale is None else case.scale


def lengths(case: Case, b: int) -> tuple[int, int]:
    q_len = case.q_lens[b] if case.q_lens else case.seqlen_q
    return q_len, case.kv_lens[b] if case.kv_lens else case.seqlen_kv


def reference(case: Case, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64."""
    group = case.num_heads // case.num_kv_heads
    out = np.zeros((case.batch, case.num_heads, case.seqlen_q, case.value_dim))
    lse = np.full((case.batch, case.num_heads, case.seqlen_q), -np.inf)
    with np.errstate(invalid="ignore"):
        for b in range(case.batch):
            seen = visible(case, b, arrays.get("mask"))
            for h in range(case.num_heads):
                v = arrays["v"][b, h // group].astype(np.float64)
                s, _ = scores_of(case, arrays, b, h)
                for i in range(lengths(case, b)[0]):
                    keys = np.flatnonzero(seen[h, i])
                    logits = s[i, keys]
                    if "sinks" in arrays:
                        logits = np.append(logits, float(arrays["sinks"][h]))
                    if logits.size == 0:
                        continue
                    top = logits.max()
                    total = np.exp(logits - top).sum()
                    lse[b, h, i] = top + np.log(total)
                    out[b, h, i] = (np.exp(s[i, keys] - top) / total) @ v[keys]
    return out, lse


def make_gradients(case: Case, seed: int = 1) -> dict[str, np.ndarray]:
    """Draw dout (rounded to the case's dtype) and dlse; NaN in the rows of dout past q_len, which nothing may read."""
    rng = np.random.default_rng([seed, case.batch, case.seqlen_q, case.seqlen_kv, case.head_dim])
    dout = to_dtype(rng.standard_normal((case.batch, case.num_heads, case.seqlen_q, case.value_dim)), case.dtype)
    dlse = rng.standard_normal(dout.shape[:3]).astype(np.float64 if case.dtype == "float64" else np.float32)
    for b in range(case.batch):
        dout[b, :, lengths(case, b)[0] :] = np.nan
        dlse[b, :, lengths(case, b)[0] :] = np.nan
    if case.poison_rows == "dout":
        dout[:, :, 2] = np.nan
    return {"dout": dout, "dlse": dlse}


def reference_gradients(
    case: Case, arrays: dict[str, np.ndarray], given: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gradients of sum(out * dout) + sum(lse * dlse) in float64, row by row from the definition; and magnitudes.

    Those are dbias and dsinks with the absolute value of every term, for dsinks of every product in dout . out. Terms
    of both signs add up to them, each with the rounding error of its row's out, so an error is to be measured by their
    size and not by what is left of them.
    """
    group = case.num_heads // case.num_kv_heads
    out, lse = reference(case, arrays)
    result = {"d" + name: np.zeros(arrays[name].shape) for name in ("q", "k", "v", "bias", "sinks") if name in arrays}
    magnitude = {name: np.zeros_like(result[name]) for name in ("dbias", "dsinks") if name in result}
    with np.errstate(invalid="ignore"):
        for b in range(case.batch):
            seen = visible(case, b, arrays.get("mask"))
            for h in range(case.num_heads):
                kv = (b, h // group)
                q, dout = (a[b, h].astype(np.float64) for a in (arrays["q"], given["dout"]))
                k, v = (arrays[name][kv].astype(np.float64) for name in ("k", "v"))
                s, slope = scores_of(case, arrays, b, h)
                for i in range(lengths(case, b)[0]):
                    keys = np.flatnonzero(seen[h, i])
                    if lse[b, h, i] == -np.inf:
                        continue
                    delta = out[b, h, i] @ dout[i] - float(given["dlse"][b, h, i])
                    weight = np.exp(s[i, keys] - lse[b, h, i])
                    db = weight * (v[keys] @ dout[i] - delta)
                    ds = db * slope[i, keys] * softmax_scale(case)
                    result["dq"][b, h, i] = ds @ k[keys]
                    result["dk"][kv][keys] += ds[:, None] * q[i]
                    result["dv"][kv][keys] += weight[:, None] * dout[i]
                    if "dbias" in result:
                        shape = result["dbias"].shape
                        at = tuple(n if shape[axis] > 1 else 0 for axis, n in enumerate((b, h, i)))
                        columns = keys if shape[3] > 1 else np.zeros_like(keys)
                        np.add.at(result["dbias"][at], columns, db)
                        np.add.at(magnitude["dbias"][at], columns, np.abs(db))
                    if "dsinks" in result:
                        own = np.exp(float(arrays["sinks"][h]) - lse[b, h, i])
                        result["dsinks"][h] -= own * delta
                        products = np.abs(out[b, h, i]) @ np.abs(dout[i]) + abs(float(given["dlse"][b, h, i]))
                        magnitude["dsinks"][h] += own * products
    return result, magnitude


def gradient_errors(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], magnitude: dict[str, np.ndarray]
) -> dict[str, float]:
    """Relative errors by name, of what `reference_gradients` gave."""
    errors = {name: relative_error(array, expected[name]) for name, array in found.items()}
    for name, terms in magnitude.items():
        size = float(np.linalg.norm(terms[~np.isnan(terms)]))
        own = float(np.linalg.norm(expected[name][~np.isnan(terms)]))
        errors[name] *= own / size if own > 0 else 1.0
    return errors


# What either pass is asked, beside options of its own.
_OPTIONS: list[dict[str, Any]] = [
    {"alibi": True, "causal": True},
    {"sinks": True},
    {"sinks": True, "mask": True, "softcap": 20.0, "bias": "float16", "alibi": True, "window": (40, 5)},
    {"scale": -0.2},
    {"scale": 0.0},
    {"layout": "bshd", "causal": True},
    {"strided": True, "causal": True, "sinks": True},
    {"poison": True, "causal": True},
    {"poison": True, "window": (5, 5)},
    {"poison": True, "mask": True, "causal": True},
    {"head_dim": 40, "value_dim": 72},
    {"head_dim": 36, "value_dim": 30},
    {"head_dim": 192, "value_dim": 128, "causal": True},
]


def correctness_grid(small: bool) -> Iterator[Case]:
    """Every option on every path; `small` keeps to sizes that an emulated GPU can run."""
    # The middle sizes have no ragged key block: what is wrong there cannot hide behind a mask.
    sizes = [(1, 1), (63, 65), (65, 128), (130, 70)]
    if not small:
        sizes = [(1, 1), (63, 65), (127, 1000), (512, 512), (1000, 127), (1000, 1000)]
    for dtype in ("bfloat16", "float16"):
        for head_dim in (64, 128) if small else (64, 128, 256):
            for sq, skv in sizes:
                for causal in (False, True):
                    yield Case(1, 2, 1, sq, skv, head_dim, head_dim, dtype, causal=causal)
    base: dict[str, Any] = {"batch": 2, "num_heads": 4, "num_kv_heads": 2, "seqlen_q": 70, "seqlen_kv": 90}
    base |= {"head_dim": 64, "value_dim": 64}
    few = {**base, "seqlen_q": 5, "seqlen_kv": 600}  # the decoding path, several splits
    options: list[dict[str, Any]] = [
        {"causal": True, "window": (17, None)},
        {"window": (9, 3)},
        {"causal": True, "q_offset": 0},
        {"q_offset": -40, "causal": True},
        {"softcap": 5.0},
        {"mask": True},
        {"bias": "float32"},
        {"bias": "bfloat16", "causal": True},
        *_OPTIONS,
    ]
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        for shape in (base, few):
            for extra in options:
                yield Case(**{**shape, "dtype": dtype, **extra})
            lens = {"kv_lens": (shape["seqlen_kv"] - 37, 0), "q_lens": (shape["seqlen_q"] - 2, 3)}
            yield Case(**shape, dtype=dtype, causal=True, **lens)
            yield Case(**shape, dtype=dtype, kv_lens=(40, shape["seqlen_kv"]), poison=True, sinks=True)
    for head_dim in (64, 128, 256):
        for sq, skv in ((1, 1), (1, 257), (16, 1000), (7, 256)):
            yield Case(2, 8, 2, sq, skv, head_dim, head_dim, "bfloat16", causal=True)
    # Every tensor-core kernel by its id.
    plain = {"batch": 1, "num_heads": 2, "num_kv_heads": 2, "seqlen_q": 150, "seqlen_kv": 170, "causal": True}
    forward = {64: (0, 1, 20), 128: (2, 3, 4, 21), 256: (5, 6, 22)}
    decode = {64: (40, 41), 128: (42, 43), 256: (44, 45)}
    for dtype in ("bfloat16", "float16"):
        for dim, variants in forward.items():
            for variant in variants:
                softcap = 9.0 if variant >= 20 else 0.0  # those are the kernels with policies
                yield Case(**plain, head_dim=dim, value_dim=dim, dtype=dtype, variant=variant, softcap=softcap)
        for dim, variants in decode.items():
            for variant in variants:
                yield Case(2, 8, 2, 3, 700, dim, dim, dtype, causal=True, variant=variant)


def gradient_grid(small: bool) -> Iterator[Case]:
    """Every option of the backward pass on both of its paths."""
    sizes = [(63, 65), (64, 128), (130, 70)]
    if not small:
        sizes = [(1, 1), (63, 65), (127, 1000), (512, 512), (1000, 127), (1000, 1000)]
    for dtype in ("bfloat16", "float16"):
        for head_dim in (64, 128, 256):
            for sq, skv in sizes:
                for causal in (False, True):
                    if not small or head_dim == 64 or (causal == (dtype == "float16")):
                        yield Case(1, 2, 1, sq, skv, head_dim, head_dim, dtype, causal=causal)
    base: dict[str, Any] = {"batch": 2, "num_heads": 4, "num_kv_heads": 2, "seqlen_q": 40, "seqlen_kv": 70}
    base |= {"head_dim": 64, "value_dim": 64}
    options: list[dict[str, Any]] = [
        {"causal": True, "window": (17, None)},
        {"window": (9, 3)},
        {"causal": True, "q_offset": 0},
        {"q_offset": -20, "causal": True},
        {"softcap": 5.0},
        {"mask": True},
        {"bias": "float32", "bias_axes": "bhqk"},
        {"bias": "bfloat16", "causal": True},
        {"bias": "float32", "bias_axes": "k", "kv_lens": (70, 33)},
        {"bias": "float16", "bias_axes": "bq"},
        {"bias": "float32", "bias_axes": "h", "q_lens": (40, 7)},
        *_OPTIONS,
        {"kv_lens": (33, 0), "q_lens": (38, 3), "causal": True},
        {"kv_lens": (20, 70), "poison": True, "sinks": True, "seqlen_q": 70},
        {"poison_rows": "q", "causal": True, "q_offset": 0, "seqlen_q": 130},
        {"poison_rows": "dout", "causal": True, "q_offset": 0, "seqlen_q": 130},
        {"poison_rows": "dout", "window": (9, 3)},
    ]
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        for extra in options:
            yield Case(**{**base, "dtype": dtype, **extra})
        yield Case(1, 2, 1, 1, 300, 256, 256, dtype, causal=True, sinks=True)
    # Every kernel that is no default, by its id.
    for dtype in ("bfloat16", "float16"):
        for dim, variants in {64: (83, 93), 128: (84, 94)}.items():
            for variant in variants:
                yield Case(1, 2, 1, 140, 150, dim, dim, dtype, causal=True, variant=variant)
                yield Case(1, 2, 1, 128, 128, dim, dim, dtype, softcap=9.0, variant=variant)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||; inf where NaN or an unwritten element differs from the reference."""
    if not np.array_equal(np.isnan(found), np.isnan(expected)):
        return math.inf
    known = ~np.isnan(expected)
    norm = float(np.linalg.norm(expected[known]))
    difference = float(np.linalg.norm(found[known] - expected[known]))
    return difference / norm if norm > 0 else difference


def absolute_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference; infinities and NaN must agree exactly."""
    if not all(np.array_equal(kind(found), kind(expected)) for kind in (np.isnan, np.isposinf, np.isneginf)):
        return math.inf
    finite = np.isfinite(expected)
    return float(np.abs(found[finite] - expected[finite]).max(initial=0.0))
