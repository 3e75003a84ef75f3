"""Every architecture of the installed transformers that builds from a tiny config, with foveal beside "eager".

    python bench/transformers_sweep.py [NAME ...] [--quick] [--jobs N] [--limit SECONDS] [--write docs/models.md]

Each runs in a process of its own: without a mask, with padding on either side, with packed sequences, with a cache
filled in pieces, generating with a dynamic and a static cache, with ``logits_to_keep``, with ``output_attentions``, and
backwards (sweep_checks.py; tiny_models.py makes the models). Exits with 1 where any result differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import sys
import time
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path

# What a process needs is imported once, here; no parallel region runs before the processes part.
import torch
import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING

import foveal
import foveal.torch
from sweep_checks import Verdict, first_line, sweep_one

# Every kind of mask, keyword and call: decoders, windows, chunks, sinks, softcaps, indexers, shared layers, latent
# heads, linear layers beside attention, encoders, encoder-decoders, pictures, sounds, several at once, own attention.
QUICK = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gpt_oss",
    "gpt2",
    "qwen3",
    "llama4_text",
    "deepseek_v3",
    "deepseek_v32",
    "falcon",
    "bloom",
    "gpt_neo",
    "jamba",
    "bert",
    "modernbert",
    "mpnet",
    "deberta-v2",
    "t5",
    "bart",
    "pegasus_x",
    "whisper",
    "vit",
    "clip",
    "siglip",
    "wav2vec2",
    "llava",
    "qwen2_vl",
    "minimax_m3_vl_text",
]


def in_a_process(model_type: str, pipe: Connection) -> None:
    """Send the verdict on one architecture."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    foveal.torch.register_transformers()
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        try:
            verdict = sweep_one(model_type)
        except Exception as error:
            verdict = Verdict(model_type, unbuilt=f"the sweep failed: {first_line(error)}")
    pipe.send(verdict)


def sweep(names: list[str], jobs: int, limit: float) -> list[Verdict]:
    """Run the architectures, ``jobs`` at a time; one that crashes or takes too long costs only itself."""
    context = multiprocessing.get_context("fork")
    waiting, verdicts = list(reversed(names)), []
    running: dict[str, tuple[multiprocessing.process.BaseProcess, Connection, float]] = {}
    with tqdm(total=len(names), unit="model", dynamic_ncols=True, smoothing=0.1) as progress:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=in_a_process, args=(name, theirs))
                process.start()
                theirs.close()
                running[name] = (process, ours, time.monotonic())
            wait([pipe for _, pipe, _ in running.values()], timeout=0.5)
            for name, (process, pipe, began) in list(running.items()):
                late = time.monotonic() - began > limit
                if not pipe.poll() and process.is_alive() and not late:
                    continue
                try:
                    verdict = pipe.recv() if pipe.poll() else None
                except EOFError:
                    verdict = None
                if verdict is None:
                    if late:
                        process.kill()
                    process.join()
                    why = f"took longer than {limit:.0f} s" if late else f"the process ended with {process.exitcode}"
                    verdict = Verdict(name, unbuilt=why)
                process.join()
                del running[name]
                verdicts.append(verdict)
                progress.set_postfix_str(name)
                progress.update()
                if verdict.result in ("different", "refused"):
                    progress.write(f"{name}: {verdict.checks}", file=sys.stderr)
    return sorted(verdicts, key=lambda verdict: verdict.model_type)


HEADING = """# Which models of transformers run with foveal

Written by `python bench/transformers_sweep.py --write docs/models.md`: foveal {foveal}, transformers {transformers}
and torch {torch}, in float32. Every architecture is built small, with random weights, and runs with `"eager"` and with
foveal: without a mask, with padding on either side, packed, with a cache filled in pieces, generating with a dynamic
and a static cache, with `logits_to_keep`, with `output_attentions`, and backwards, wherever `"eager"` itself does.

- Equal: no further from `"eager"` in float64 than 8 times what `"eager"` in float32 is, or than 8 units in the last
  place of the largest value; where it does not run in float64, than 8 times what half a unit in the last place of its
  parameters changes. Padding is not compared.
- Refused: an error says why.
- Computes its attention itself: the model never calls foveal, whatever `attn_implementation` says.
"""


# --- the table --------------------------------------------------------------------------------------------------------


def summary(verdicts: list[Verdict]) -> str:
    """Count the results."""
    count = {kind: sum(v.result == kind for v in verdicts) for kind in ("equal", "refused", "different", "not built")}
    built = len(verdicts) - count["not built"]
    share = f" ({100 * count['equal'] / built:.1f}%)" if built else ""
    return (
        f"{len(verdicts)} architectures, {built} built: {count['equal']} equal{share}, {count['refused']} refused, "
        f"{count['different']} different; {count['not built']} not built"
    )


def lines_of(verdicts: list[Verdict]) -> list[str]:
    """Write the rows of the table of those that were built."""
    rows = ["| architecture | class | result | checks | remarks |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        if verdict.unbuilt:
            continue
        remarks = [f"{name}: {found}" for name, found in verdict.checks.items() if found != "equal"]
        if not verdict.calls:
            remarks.append("computes its attention itself")
        if verdict.upstream:
            remarks.append(f"`sdpa` differs from `eager`: {', '.join(verdict.upstream)}")
        equal = sum(found == "equal" for found in verdict.checks.values())
        text = "; ".join(remarks).replace("|", "\\|")
        rows.append(
            f"| {verdict.model_type} | {verdict.model_class} | {verdict.result} | {equal} of {len(verdict.checks)} "
            f"| {text} |"
        )
    return rows


def document(verdicts: list[Verdict]) -> str:
    """Write docs/models.md."""
    unbuilt = [f"| {v.model_type} | {v.unbuilt.replace('|', '/')} |" for v in verdicts if v.unbuilt]
    return "\n".join(
        [
            HEADING.format(
                foveal=foveal.__version__, transformers=transformers.__version__, torch=torch.__version__.split("+")[0]
            ),
            summary(verdicts) + ".",
            "",
            *lines_of(verdicts),
            "",
            "## Not built",
            "",
            "| architecture | why |",
            "|---|---|",
            *unbuilt,
            "",
        ]
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare foveal with eager on every architecture of transformers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; all without any")
    parser.add_argument("--quick", action="store_true", help=f"only {len(QUICK)} architectures that cover every path")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one architecture")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to a Markdown file")
    arguments = parser.parse_args()

    unknown = sorted(set(arguments.names) - set(CONFIG_MAPPING.keys()))
    if unknown:
        parser.error(f"not a model type of transformers {transformers.__version__}: {', '.join(unknown)}")
    names = arguments.names or (QUICK if arguments.quick else sorted(CONFIG_MAPPING.keys()))
    verdicts = sweep(list(names), arguments.jobs, arguments.limit)
    print("\n".join(lines_of(verdicts)))
    for verdict in verdicts:
        if verdict.unbuilt:
            print(f"not built: {verdict.model_type}: {verdict.unbuilt}")
    print(summary(verdicts))
    if arguments.write:
        arguments.write.write_text(document(verdicts))
    return int(any(verdict.result == "different" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
