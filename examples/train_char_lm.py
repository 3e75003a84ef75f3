"""Train a small causal transformer on Python's documentation, letter by letter: python examples/train_char_lm.py.

The text is `pydoc_data.topics` (what help("topics") knows; every Python has it). Two models start from the same weights
and see the same batches; one has the attention of foveal, the other torch's scaled_dot_product_attention, and they take
turns step by step, so that a machine which slows down for a while slows down both. In the end: the loss of each on text
that neither has seen, the seconds of each, and what foveal's model writes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"train_char_lm: {error}; this example needs: pip install torch tqdm")

import foveal
from command_line import positive

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v (B,S,H,D), dropout -> (B,S,H,D)
HELD_OUT = 0.05  # of the text


def main() -> None:
    options = parse_arguments()
    text = documentation()
    alphabet = sorted(set(text))
    letters = torch.tensor([alphabet.index(x) for x in text])
    training, unseen = letters.tensor_split([int(len(letters) * (1 - HELD_OUT))])
    print(f"{len(text)} letters of {len(alphabet)} kinds; {options.layers} layers of {options.width}, ", end="")
    print(f"{options.heads} heads, {options.batch_size} pieces of {options.context} letters a step")

    names = list(ATTENTIONS) if options.attention == "both" else [options.attention]
    runs = []
    for name in names:
        torch.manual_seed(options.seed)  # the same weights for all
        model = Transformer(len(alphabet), options, ATTENTIONS[name])
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps)
        runs.append(Run(name, model, optimizer, schedule))
    train(runs, training, options)

    for run in runs:
        print(f"{run.name}: loss {loss_on(run.model, unseen, options):.3f} on unseen text, ", end="")
        print(f"{run.seconds:.1f} s, of which attention {run.model.attention.seconds:.1f} s forward")
    if len(runs) == 2:
        apart = max(abs(a - b) for a, b in zip(*(run.losses for run in runs), strict=True))
        print(f"The losses of the two are at most {apart:.1e} apart in {options.steps} steps; ", end="")
        print(f"{runs[1].name} took {runs[1].seconds / runs[0].seconds:.2f} times as long.")
    prompt = torch.tensor([alphabet.index(x) for x in options.prompt if x in alphabet])
    print(f"\n{''.join(alphabet[x] for x in write(runs[0].model, prompt, options))}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=positive, default=1200)
    parser.add_argument("--batch-size", type=positive, default=2)
    parser.add_argument("--context", type=positive, default=512, help="letters that the model sees at once")
    parser.add_argument("--layers", type=positive, default=3)
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention weights")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--attention", choices=[*ATTENTIONS, "both"], default="both")
    parser.add_argument("--prompt", default="The statement ")
    parser.add_argument("--letters", type=int, default=300, help="to write in the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.width % options.heads:
        parser.error(f"--width is {options.width}, expected a multiple of the {options.heads} heads")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout is {options.dropout}, expected at least 0 and less than 1")
    return options


def documentation() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


# --- the model -------------------------------------------------------------------------------------------------------


def foveal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return foveal.attention(q, k, v, causal=True, dropout_p=dropout, layout="bshd")


def torch_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).transpose(1, 2)


ATTENTIONS: dict[str, Attention] = {"foveal": foveal_attention, "torch": torch_attention}


@dataclass
class Timed:
    """An attention, and the seconds that were spent in it."""

    attention: Attention
    seconds: float = 0.0

    def __call__(self, *arguments: Tensor | float) -> Tensor:
        start = time.perf_counter()
        result = self.attention(*arguments)  # type: ignore[arg-type]
        self.seconds += time.perf_counter() - start
        return result


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, attention: Timed):
        super().__init__()
        self.heads, self.dropout, self.attention = heads, dropout, attention
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.mix(self.attention(q, k, v, self.dropout if self.training else 0.0).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Letters (B, S) -> logits of the letter after each (B, S, alphabet)."""

    def __init__(self, alphabet: int, options: argparse.Namespace, attention: Attention):
        super().__init__()
        self.attention = Timed(attention)
        self.letter = nn.Embedding(alphabet, options.width)
        self.place = nn.Embedding(options.context, options.width)
        self.blocks = nn.Sequential(
            *(Block(options.width, options.heads, options.dropout, self.attention) for _ in range(options.layers))
        )
        self.norm, self.read_out = nn.LayerNorm(options.width), nn.Linear(options.width, alphabet)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.letter(letters) + self.place.weight[: letters.shape[1]]
        return self.read_out(self.norm(self.blocks(x)))

    def loss(self, letters: Tensor) -> Tensor:
        return F.cross_entropy(self(letters[:, :-1]).flatten(0, 1), letters[:, 1:].flatten())


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    name: str
    model: Transformer
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        loss = self.model.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start


def train(runs: list[Run], letters: Tensor, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    said = max(1, options.steps // 6)
    with tqdm(total=options.steps, unit="step", mininterval=1) as bar:
        for number in range(1, options.steps + 1):
            batch = pieces(letters, options, generator)
            for run in runs if number % 2 else reversed(runs):
                run.step(batch)
            bar.update()
            if number == 1 or number % said == 0:
                bar.write(f"step {number:4}: loss " + ", ".join(f"{run.losses[-1]:.4f} ({run.name})" for run in runs))


def pieces(letters: Tensor, options: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """A batch from random places, one letter longer than the context: each letter has a next one."""
    begin = torch.randint(len(letters) - options.context, (options.batch_size, 1), generator=generator)
    return letters[begin + torch.arange(options.context + 1)]


@torch.no_grad()
def loss_on(model: Transformer, letters: Tensor, options: argparse.Namespace) -> float:
    model.eval()
    seconds = model.attention.seconds
    generator = torch.Generator().manual_seed(1)
    losses = [model.loss(pieces(letters, options, generator)).item() for _ in range(4)]
    model.attention.seconds = seconds  # what is reported is training
    return sum(losses) / len(losses)


@torch.no_grad()
def write(model: Transformer, prompt: Tensor, options: argparse.Namespace) -> list[int]:
    generator = torch.Generator().manual_seed(options.seed)
    written = prompt.tolist() or [0]
    for _ in range(options.letters):
        logits = model(torch.tensor([written[-options.context :]]))[0, -1]
        written.append(int(torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator)))
    return written


if __name__ == "__main__":
    main()
