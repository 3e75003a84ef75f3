"""all-MiniLM-L6-v2 in NumPy: a sentence encoder whose attention is foveal's.

A BERT encoder (Devlin et al. 2019): token and position embeddings, then six layers of attention and feed-forward, each
added to its input and layer-normalised. A sentence is the mean of its token states, scaled to unit length (Reimers &
Gurevych 2019), so that the dot product of two sentences is their cosine similarity.

Symbols: B sentences in a batch, S tokens of the longest of them, H heads of D features, E = H*D features in all. A
batch is padded to S; `lengths` (B,) says how much of each row is real, and attention never looks past it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import foveal

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
Lengths = NDArray[np.int64]
Attention = Callable[[Array, Array, Array, Lengths], Array]  # q, k, v (B,S,H,D), lengths (B,) -> (B,S,H,D)


def foveal_attention(q: Array, k: Array, v: Array, lengths: Lengths) -> Array:
    """Attention within each sentence: one call, no copy of q, k or v, no (S,S) array."""
    return foveal.attention(q, k, v, layout="bshd", q_lens=lengths, kv_lens=lengths)


def numpy_attention(q: Array, k: Array, v: Array, lengths: Lengths) -> Array:
    """softmax(q k^T / sqrt(D)) v, as NumPy has it: the (B,H,S,S) scores are written out and read back."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = (q * np.float32(q.shape[-1] ** -0.5)) @ k.swapaxes(2, 3)
    padding = np.arange(k.shape[2]) >= lengths[:, None]
    np.copyto(scores, -np.inf, where=padding[:, None, None, :])
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return (scores @ v).swapaxes(1, 2)


@dataclass(frozen=True)
class Linear:
    weight: Array  # (out, in)
    bias: Array  # (out,)

    def __call__(self, x: Array) -> Array:
        y = x @ self.weight.T
        y += self.bias
        return y


@dataclass(frozen=True)
class LayerNorm:
    weight: Array
    bias: Array
    epsilon: float

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.einsum("...e,...e->...", centred, centred)[..., None] / np.float32(x.shape[-1])
        centred *= self.weight / np.sqrt(variance + np.float32(self.epsilon))
        centred += self.bias
        return centred


@dataclass(frozen=True)
class Layer:
    qkv: Linear  # query, key and value in one product
    attention_out: Linear
    attention_norm: LayerNorm
    widen: Linear
    narrow: Linear
    norm: LayerNorm

    def __call__(self, x: Array, lengths: Lengths, num_heads: int, attention: Attention) -> Array:
        batch, seqlen, features = x.shape
        qkv = self.qkv(x).reshape(batch, seqlen, 3, num_heads, features // num_heads)
        context = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], lengths)
        x = self.attention_norm(x + self.attention_out(context.reshape(batch, seqlen, features)))
        return self.norm(x + self.narrow(gelu(self.widen(x))))


class MiniLM:
    """The encoder. `directory` holds model.safetensors, tokenizer.json and config.json, as the model is published."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")

        def linear(*names: str) -> Linear:
            return Linear(*(np.concatenate([weights[f"{n}.{part}"] for n in names]) for part in ("weight", "bias")))

        def norm(name: str) -> LayerNorm:
            return LayerNorm(weights[f"{name}.weight"], weights[f"{name}.bias"], config["layer_norm_eps"])

        def layer(name: str) -> Layer:
            projections = (f"{name}.attention.self.{role}" for role in ("query", "key", "value"))
            return Layer(
                qkv=linear(*projections),
                attention_out=linear(f"{name}.attention.output.dense"),
                attention_norm=norm(f"{name}.attention.output.LayerNorm"),
                widen=linear(f"{name}.intermediate.dense"),
                narrow=linear(f"{name}.output.dense"),
                norm=norm(f"{name}.output.LayerNorm"),
            )

        self.num_heads: int = config["num_attention_heads"]
        self.features: int = config["hidden_size"]
        self._words = weights["embeddings.word_embeddings.weight"]
        # Every token is of sentence type 0, so its type embedding is a constant of the position.
        self._positions = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self._norm = norm("embeddings.LayerNorm")
        self._layers = [layer(f"encoder.layer.{i}") for i in range(config["num_hidden_layers"])]
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(
            json.loads((directory / "sentence_bert_config.json").read_text())["max_seq_length"]
        )

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def forward(self, ids: Ids, lengths: Lengths, attention: Attention = foveal_attention) -> Array:
        """Token ids (B,S), padded with anything, to unit sentence embeddings (B,E)."""
        x = self._norm(self._words[ids] + self._positions[: ids.shape[1]])
        for layer in self._layers:
            x = layer(x, lengths, self.num_heads, attention)
        real = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.float32)
        sentences = np.einsum("bse,bs->be", x, real)  # the sum: its length, and so the mean's divisor, drops out below
        return sentences / np.linalg.norm(sentences, axis=-1, keepdims=True)

    def encode(self, texts: Sequence[str], attention: Attention = foveal_attention, batch_size: int = 32) -> Array:
        """Unit embeddings (len(texts),E)."""
        embeddings = np.empty((len(texts), self.features), np.float32)
        for rows, ids, lengths in batches(self.tokenize(texts), batch_size):
            embeddings[rows] = self.forward(ids, lengths, attention)
        return embeddings


def batches(sentences: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[NDArray[np.int64], Ids, Lengths]]:
    """Batches of like lengths, so that little is padding: which sentences, their ids (B,S), their lengths (B,)."""
    lengths = np.array([len(sentence) for sentence in sentences], np.int64)
    order = np.argsort(-lengths, kind="stable")  # longest first: the progress bar errs on the safe side
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = np.zeros((len(rows), lengths[rows].max()), np.int64)
        for row, sentence in zip(ids, rows, strict=True):
            row[: lengths[sentence]] = sentences[sentence]
        yield rows, ids, lengths[rows]


def gelu(x: Array) -> Array:
    """x * Phi(x) in place, Phi the normal distribution function (Hendrycks & Gimpel 2016); returns x.

    Written as max(x, 0) - |x| * Phi(-|x|), where Phi(-|x|) = erfc(|x|/sqrt 2)/2 comes from Abramowitz & Stegun 7.1.26:
    free of cancellation and within 4e-7 of the truth. Worked in pieces that stay in cache.
    """
    flat = x.reshape(-1)
    for piece in np.split(flat, range(1 << 15, flat.size, 1 << 15)):
        magnitude = np.abs(piece)
        t = 1 / (1 + np.float32(0.3275911 * 0.5**0.5) * magnitude)
        tail = np.full_like(t, 0.5 * 1.061405429)
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            tail *= t
            tail += np.float32(0.5 * coefficient)
        tail *= t
        tail *= magnitude
        magnitude *= magnitude
        magnitude *= np.float32(-0.5)
        tail *= np.exp(magnitude, out=magnitude)
        np.maximum(piece, 0, out=piece)
        piece -= tail
    return x
