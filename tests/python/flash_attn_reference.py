"""flash-attn's functions written out in plain torch operations, float64; what the tests of these names share."""

import math

import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_attention(
    q,
    k,
    v,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
):
    """(B,S,H,D) tensors in; out (B,Sq,Hq,Dv) rounded to q's dtype, and lse (B,Hq,Sq), as float64."""
    dtype, (num_queries, num_keys), group = q.dtype, (q.shape[1], k.shape[1]), q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[..., None, None] * distance.abs()
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    left, right = window_size
    if causal:
        seen &= distance <= 0
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2).to(dtype), lse


def assert_close(found, expected, magnitude=0.0):
    """Allow float32 sums over few keys, scores up to 50, two roundings of the output, and one of each bfloat16 weight.

    `magnitude` is the result with the absolute values of v: a few rows to a head may round their weights
    to bfloat16 (docs/numerics.md), which moves the result by 2^-8 of it at most.
    """
    eps = torch.finfo(found.dtype).eps
    work = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    same = found == expected  # infinities
    difference = torch.where(same, 0.0, found - expected).abs()
    finite = torch.where(same, 0.0, expected.abs())
    weights = eps / 2 * magnitude if eps == torch.finfo(torch.bfloat16).eps else 0.0
    assert (difference <= 200 * work + 1.5 * eps * finite + weights).all(), difference.max()
