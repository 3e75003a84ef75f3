"""What the sweep asks of one architecture: the same calls with "eager" and with foveal, judged by float64."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from foveal.torch.transformers import attention_forward
from tiny_models import SEQLEN, Unbuilt, first_line, tiny_model, twin

Inputs = dict[str, torch.Tensor]
Tensors = list[torch.Tensor]
Check = Callable[[PreTrainedModel, Inputs], Tensors]

# How much further than "eager" in float32 foveal may be from "eager" in float64: both round, in other orders.
TIMES_EAGER = 8.0
NEW_TOKENS = 6


@dataclasses.dataclass
class Verdict:
    """What became of one architecture."""

    model_type: str
    model_class: str = ""
    calls: int = 0  # of foveal's attention function
    checks: dict[str, str] = dataclasses.field(default_factory=dict)  # name: "equal", "refused: ...", "different: ..."
    upstream: list[str] = dataclasses.field(default_factory=list)  # checks in which "sdpa" differs from "eager"
    unbuilt: str = ""

    @property
    def result(self) -> str:
        """The worst of the checks."""
        if self.unbuilt:
            return "not built"
        kinds = {found.split(":")[0] for found in self.checks.values()}
        return next((kind for kind in ("different", "refused") if kind in kinds), "equal")


# --- the checks -------------------------------------------------------------------------------------------------------


def _tensors(outputs: Any) -> Tensors:
    """Collect the floating tensors of a model's output, without caches, and without weights that nobody asked for."""
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        parts = [part for key, part in outputs.items() if not key.endswith(("cache", "past_key_values", "attentions"))]
        return [x for part in parts for x in _tensors(part)]
    if isinstance(outputs, list | tuple):
        return [x for part in outputs for x in _tensors(part)]
    return []


def _forward(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Any:
    torch.manual_seed(0)
    return model(**inputs, **options)


def plain(model: PreTrainedModel, inputs: Inputs) -> Tensors:
    """No token is padding."""
    return _tensors(_forward(model, inputs))


def _padded(inputs: Inputs, side: str) -> Inputs:
    real = torch.ones_like(inputs["attention_mask"])
    real[0, slice(0, 5) if side == "left" else slice(SEQLEN - 5, None)] = 0
    ids = inputs["input_ids"].masked_fill(real == 0, 0)
    return {**inputs, "input_ids": ids, "attention_mask": real}


def padding(side: str) -> Check:
    """Five tokens of padding; real tokens are compared."""

    def check(model: PreTrainedModel, inputs: Inputs) -> Tensors:
        given = _padded(inputs, side)
        real = given["attention_mask"].bool()
        found = _tensors(_forward(model, given))
        return [x[real] if x.shape[:2] == real.shape else x for x in found if x.shape[:1] == real.shape[:1]]

    return check


def packed(model: PreTrainedModel, inputs: Inputs) -> Tensors:
    """Two sequences in every row, told apart by their positions."""
    positions = torch.tensor([[*range(6), *range(SEQLEN - 6)], [*range(10), *range(SEQLEN - 10)]])
    given = {"input_ids": inputs["input_ids"], "position_ids": positions}
    return _tensors(_forward(model, given, use_cache=False))


def chunks(model: PreTrainedModel, inputs: Inputs) -> Tensors:
    """A cache filled by pieces of 6, 1 and 10 tokens, with padding on the left."""
    given = _padded(inputs, "left")
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, found = None, []
    for begin, end in ((0, 6), (6, 7), (7, SEQLEN)):
        part = {"input_ids": given["input_ids"][:, begin:end], "attention_mask": given["attention_mask"][:, :end]}
        outputs = _forward(model, part, use_cache=True, **{name: cache})
        cache = outputs.get("cache", outputs.get("past_key_values"))
        if cache is None:
            raise ValueError("no cache came back")
        found.append(outputs["logits"])
    logits = torch.cat(found, 1)
    return [logits[given["attention_mask"].bool()]]


def generation(**options: Any) -> Check:
    """Greedy, with padding on the left; the scores of every step."""

    def check(model: PreTrainedModel, inputs: Inputs) -> Tensors:
        given = {name: x for name, x in inputs.items() if name != "decoder_input_ids"}
        if "attention_mask" in given and "decoder_input_ids" not in inputs:
            given = _padded(given, "left")
        torch.manual_seed(0)
        outputs = model.generate(
            **given,
            do_sample=False,
            num_beams=1,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        logits = torch.stack(outputs.logits, 1)
        return [logits, outputs.sequences[:, -logits.shape[1] :]]

    return check


def keep(model: PreTrainedModel, inputs: Inputs) -> Tensors:
    """Only the last three logits."""
    return [_forward(model, inputs, logits_to_keep=3)["logits"]]


def attentions(model: PreTrainedModel, inputs: Inputs) -> Tensors:
    """The weights too."""
    outputs = _forward(model, inputs, output_attentions=True)
    found = [
        outputs.get(name) for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    ]
    weights = [layer for layers in found if layers is not None for layer in layers if layer is not None]
    if not weights:
        raise ValueError("no weights came back")
    return [x.detach() for x in weights] + _tensors(outputs)


def gradient(model: PreTrainedModel, inputs: Inputs) -> Tensors:
    """The gradients of all parameters, as one vector a parameter."""
    model.zero_grad()
    sum(x.square().mean() for x in _tensors(_forward(model, inputs)) if x.requires_grad).backward()  # type: ignore[union-attr]
    grads = [x.grad for _, x in sorted(model.named_parameters()) if x.grad is not None]
    largest = max(x.abs().max() for x in grads)
    if not torch.isfinite(largest):
        raise ValueError("the gradients are not finite")
    return [torch.cat([(x / largest).flatten() for x in grads])]


def checks_for(model: PreTrainedModel, inputs: Inputs) -> Iterator[tuple[str, Check]]:
    """Give the checks that make sense for a model; those that fail with "eager" are left out later."""
    takes = inspect.signature(model.forward).parameters
    text = "input_ids" in inputs and "attention_mask" in inputs
    decodes = model.can_generate() and not model.config.is_encoder_decoder
    yield "no mask", plain
    if text:
        yield "left padding", padding("left")
        yield "right padding", padding("right")
    if text and "position_ids" in takes:
        yield "packed", packed
    if text and decodes:
        yield "chunks", chunks
    if model.can_generate():
        yield "greedy", generation()
        yield "static cache", generation(cache_implementation="static")
    if text and "logits_to_keep" in takes:
        yield "logits_to_keep", keep
    yield "output_attentions", attentions
    yield "gradient", gradient


# --- the judgement ----------------------------------------------------------------------------------------------------


def compare(found: Tensors, expected: Tensors, truth: Tensors | None, shaken: Tensors | None = None) -> str:
    """Say "" where ``found`` is as near to ``truth`` as ``expected`` is, else by how much it is not.

    ``expected`` is "eager" in float32, ``truth`` in float64 (None: it does not run), ``shaken`` "eager" in float32 with
    every parameter off by at most half a unit of its last place. Without the truth, what float32 may lose is taken to
    be what that changes, and 8 units of the last place of the largest value at least. Where "eager" gives no number,
    it says nothing.
    """
    if [x.shape for x in found] != [x.shape for x in expected]:
        return f"shapes {[tuple(x.shape) for x in found]}, expected {[tuple(x.shape) for x in expected]}"[:120]
    worst = ""
    for place, (ours, eager) in enumerate(zip(found, expected, strict=True)):
        if eager.numel() == 0:
            continue
        finite = eager.isfinite()
        if (finite & ~ours.isfinite()).any():
            return "not finite where eager is"
        if not finite.any():
            continue
        known = truth is not None and len(truth) > place and truth[place].shape == eager.shape
        right = truth[place].double() if known else eager.double()  # type: ignore[index]
        finite &= right.isfinite()
        largest = right[finite].abs().max().item()
        ulp = torch.finfo(torch.float32).eps * largest
        if known:
            own = max((eager.double() - right)[finite].abs().max().item(), ulp)
        else:
            own = 8 * ulp
            if shaken is not None and len(shaken) > place and shaken[place].shape == eager.shape:
                own = max((shaken[place].double() - right)[finite].abs().max().item(), own)
        bound = TIMES_EAGER * own
        error = (ours.double() - right)[finite].abs().max().item()
        if not error <= bound:
            scale = max(largest, 1e-300)
            worst = f"off by {error / scale:.1e} of the largest value, allowed {bound / scale:.1e}"
    return worst


def same_prefix(results: list[Tensors | None]) -> list[Tensors | None]:
    """Cut the scores of a generation where any two runs first chose other tokens: from there on the inputs differ."""
    present = [x for x in results if x is not None]
    ids = [x[1] for x in present]
    steps = min(x.shape[1] for x in ids)
    equal = torch.ones(steps, dtype=torch.bool)
    for x in ids[1:]:
        equal &= (x[:, :steps] == ids[0][:, :steps]).all(0)
    steps = min(steps, int(equal.cumprod(0).sum()) + 1)
    return [None if x is None else [x[0][:, :steps]] for x in results]


def _attempt(check: Check, model: PreTrainedModel | None, inputs: Inputs) -> tuple[Tensors | None, str]:
    if model is None:
        return None, ""
    wide = next(model.parameters()).dtype == torch.float64
    given = {name: x.double() if wide and x.is_floating_point() else x for name, x in inputs.items()}
    try:
        with torch.set_grad_enabled(check is gradient):
            return [x.detach() for x in check(model, given)], ""
    except Exception as error:
        return None, first_line(error)


def _shaken(model: PreTrainedModel) -> PreTrainedModel:
    moved = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + (torch.rand_like(parameter) - 0.5) * torch.finfo(parameter.dtype).eps)
    return moved


def sweep_one(model_type: str) -> Verdict:
    """Run every check on one architecture."""
    verdict = Verdict(model_type)

    def counted(*arguments: Any, **named: Any) -> Any:
        verdict.calls += 1
        return attention_forward(*arguments, **named)

    AttentionInterface.register("foveal", counted)
    try:
        eager, inputs = tiny_model(model_type)
    except Unbuilt as error:
        verdict.unbuilt = str(error)
        return verdict
    verdict.model_class = type(eager).__name__
    wide, moved = copy.deepcopy(eager).double(), _shaken(eager)
    try:
        ours = twin(eager, "foveal")
    except Exception as error:
        verdict.checks["building"] = f"refused: {first_line(error)}"
        return verdict
    try:
        sdpa: PreTrainedModel | None = twin(eager, "sdpa")
    except Exception:
        sdpa = None

    for name, check in checks_for(eager, inputs):
        expected, _ = _attempt(check, eager, inputs)
        if expected is None or not any(x.isfinite().any() for x in expected):
            continue
        truth, _ = _attempt(check, wide, inputs)
        found, refusal = _attempt(check, ours, inputs)
        shaken, _ = _attempt(check, None if truth is not None else moved, inputs)
        other, _ = _attempt(check, sdpa if name not in ("gradient", "output_attentions") else None, inputs)
        if name in ("greedy", "static cache"):
            expected, truth, shaken, found, other = same_prefix(  # type: ignore[assignment]
                [expected, truth, shaken, found, other]
            )
        if found is None:
            verdict.checks[name] = f"refused: {refusal}"
        else:
            difference = compare(found, expected, truth, shaken)  # type: ignore[arg-type]
            verdict.checks[name] = f"different: {difference}" if difference else "equal"
        if other is not None and compare(other, expected, truth):  # type: ignore[arg-type]
            verdict.upstream.append(name)
    if not verdict.checks:
        verdict.unbuilt = "no check runs with eager"
    return verdict
