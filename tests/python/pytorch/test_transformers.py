"""foveal as an attention implementation of Hugging Face transformers: small random models against "eager"."""

import copy
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import masking_utils  # noqa: E402

import foveal.torch  # noqa: E402
from foveal.torch import transformers as ours  # noqa: E402
from foveal.torch._visibility import Pattern, RuleMask, make_mask, pattern_of  # noqa: E402

foveal.torch.register_transformers()

VOCABULARY = 61
WINDOW = 6  # of the models that have one; shorter than the sequences
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
LOCAL = ["sliding_attention", "full_attention"]

# name: (model class, config class, config)
DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**COMMON, **HEADS}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**COMMON, **HEADS, "sliding_window": WINDOW}),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**COMMON, **HEADS, "head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LOCAL},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **COMMON,
            **HEADS,
            "head_dim": 8,
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 2.0,
            "sliding_window": WINDOW,
            "layer_types": LOCAL,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **COMMON,
            **HEADS,
            "head_dim": 8,
            "query_pre_attn_scalar": 3,
            "sliding_window": WINDOW,
            "layer_types": LOCAL,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **COMMON,
            **HEADS,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": WINDOW,
            "layer_types": LOCAL,
        },
    ),
    "deepseek_v3": (  # keys and values of different head dims
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **COMMON,
            **HEADS,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
}
ENCODERS = {
    "bert": ("BertModel", "BertConfig", {**COMMON, "num_attention_heads": 4, "max_position_embeddings": 64}),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {
            **COMMON,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "local_attention": WINDOW,
            "global_attn_every_n_layers": 2,
        },
    ),
}
PAIRS = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 10,
            "decoder_start_token_id": 0,
            **SPECIAL,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 32},
    ),
}
IMAGES = {
    "vit": (
        "ViTModel",
        "ViTConfig",
        {**COMMON, "num_attention_heads": 4, "image_size": 24, "patch_size": 4, "num_channels": 3},
    ),
}
MODELS = {**DECODERS, **ENCODERS, **PAIRS, **IMAGES}

_made = {}


def model_of(name, **changes):
    """Make a model whose attention is far from uniform, so that a wrong mask or scale shows."""
    key = (name, *changes.items())
    if key not in _made:
        model_class, config_class, config = MODELS[name]
        special = SPECIAL if name in (*DECODERS, *ENCODERS) else {}
        torch.manual_seed(0)
        made = getattr(transformers, model_class)(
            getattr(transformers, config_class)(**{**special, **config, **changes})
        ).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1 or parameter.shape == (4,):  # matrices, and the sinks
                    parameter.normal_(0, 0.3)
        _made[key] = made
    return _made[key]


def inputs_of(name, padding="left", seqlen=17):
    """Make a batch of two; the first has five tokens of padding."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, seqlen), generator=generator)
    real = torch.ones_like(ids)
    real[0, slice(0, 5) if padding == "left" else slice(seqlen - 5, None)] = 0
    ids[real == 0] = 0
    if name in ("t5", "bart"):
        decoder_ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": real, "decoder_input_ids": decoder_ids}
    if name == "whisper":
        return {
            "input_features": torch.randn(2, 8, 30, generator=generator),
            "decoder_input_ids": ids[:, :7].clamp(min=3),
        }
    return {"input_ids": ids} if padding == "none" else {"input_ids": ids, "attention_mask": real}


class Calls:
    """Records (output, weights, mask) of every attention call of a model."""

    def __init__(self, function):
        self.function = function
        self.seen = []

    def __call__(self, module, query, key, value, attention_mask, **others):
        out, weights = self.function(module, query, key, value, attention_mask, **others)
        self.seen.append((out, weights, attention_mask))
        return out, weights


def run(model, implementation, monkeypatch, **inputs):
    """Run a forward pass; returns what the model returns, and the calls."""
    model.set_attn_implementation(implementation)
    with torch.no_grad(), monkeypatch.context() as patch:
        if implementation == "eager":
            module = sys.modules[type(model).__module__]
            calls = Calls(module.eager_attention_forward)
            patch.setattr(module, "eager_attention_forward", calls)
        else:
            calls = Calls(ours.attention_forward)
            patch.setitem(transformers.AttentionInterface._global_mapping, implementation, calls)
        return model(**inputs), calls.seen


def rows_that_see(eager_mask, out):
    """(B, Sq) of a call: which queries see a key, by the float mask that "eager" was given."""
    if eager_mask is None:
        return torch.ones(out.shape[:2], dtype=torch.bool)
    return (eager_mask > -1e30).any(-1)[:, 0].expand(out.shape[:2])


def assert_close(found, expected):
    """Allow what float32 sums in another order lose on values of this size, some layers deep."""
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * max(1.0, expected.abs().max().item()))


def result_of(outputs):
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_parity(name, padding, monkeypatch):
    model, inputs = model_of(name), inputs_of(name, padding)
    expected, expected_calls = run(model, "eager", monkeypatch, **inputs)
    found, calls = run(model, "foveal", monkeypatch, **inputs)

    assert len(calls) == len(expected_calls) >= 2
    for (out, weights, mask), (expected_out, _, expected_mask) in zip(calls, expected_calls, strict=True):
        rows = rows_that_see(expected_mask, expected_out)
        assert out.is_contiguous()
        assert out.shape == expected_out.shape
        assert_close(out[rows], expected_out[rows])
        assert weights is None
        assert mask is None or isinstance(mask, RuleMask)  # no call got a dense mask
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        real = inputs["attention_mask"].bool()
        assert_close(result_of(found)[real], result_of(expected)[real])
    else:
        assert_close(result_of(found), result_of(expected))


@pytest.mark.parametrize("name", MODELS)
def test_gradient_parity(name):
    model, inputs = model_of(name), inputs_of(name, "none")
    found = {}
    for implementation in ("eager", "foveal"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        result_of(model(**inputs)).square().mean().backward()
        found[implementation] = {n: x.grad for n, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    assert found["foveal"].keys() == found["eager"].keys()
    for n, expected in found["eager"].items():
        size = expected.abs().max().item()
        torch.testing.assert_close(
            found["foveal"][n], expected, rtol=0, atol=1e-3 * size + 1e-6, msg=lambda m, n=n: f"{n}: {m}"
        )


def test_the_cases_cover_what_they_should():
    """A window that hides nothing, or even attention, would make the parity above a weak statement."""
    for name in ("mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "modernbert"):
        model = model_of(name)
        assert model.config.sliding_window in (WINDOW, WINDOW // 2)
        with torch.no_grad():
            weights = model(**inputs_of(name, "none"), output_attentions=True).attentions
        assert any((layer[:, :, -1, 0] == 0).all() for layer in weights)
        assert all(layer.max(-1).values.mean() > 0.3 for layer in weights)


@pytest.mark.parametrize("name", MODELS)
def test_weights(name, monkeypatch):
    model, inputs = model_of(name), inputs_of(name)
    expected, expected_calls = run(model, "eager", monkeypatch, **inputs, output_attentions=True)
    found, calls = run(model, "foveal", monkeypatch, **inputs, output_attentions=True)
    for (out, weights, _), (expected_out, expected_weights, mask) in zip(calls, expected_calls, strict=True):
        rows = rows_that_see(mask, expected_out)
        assert weights.shape == expected_weights.shape
        assert_close(weights.transpose(1, 2)[rows], expected_weights.transpose(1, 2)[rows])
        assert_close(out[rows], expected_out[rows])
    for key in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert (key in found) == (key in expected)
        if key in expected:
            assert [x.shape for x in found[key]] == [x.shape for x in expected[key]]
    assert len(found.get("attentions", found.get("decoder_attentions"))) == 2


def generate(model, implementation, inputs, **options):
    model.set_attn_implementation(implementation)
    inputs = {key: x for key, x in inputs.items() if key != "decoder_input_ids"}
    return model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)


@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_greedy_generation(name):
    model, inputs = model_of(name), inputs_of(name)
    expected = generate(model, "eager", inputs)
    assert expected.shape[1] >= 10
    assert torch.equal(generate(model, "foveal", inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_with_a_static_cache(name):
    model, inputs = model_of(name), inputs_of(name)
    expected = generate(model, "eager", inputs)
    assert torch.equal(generate(model, "foveal", inputs, cache_implementation="static"), expected)


def test_generation_in_pieces(monkeypatch):
    """Several new queries against a cache: aligned at the last key."""
    model, inputs = model_of("mistral"), inputs_of("mistral", seqlen=21)
    results = {}
    for implementation in ("eager", "foveal"):
        cache = transformers.DynamicCache(config=model.config)
        for part in (slice(0, 9), slice(9, 10), slice(10, 21)):
            outputs, _ = run(
                model,
                implementation,
                monkeypatch,
                input_ids=inputs["input_ids"][:, part],
                attention_mask=inputs["attention_mask"][:, : part.stop],
                past_key_values=cache,
            )
        results[implementation] = outputs.logits
    assert_close(results["foveal"], results["eager"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, monkeypatch):
    """The weights and scores that eager rounds on the way stay float32 here, so foveal is nearer to the truth."""
    model, inputs = model_of("llama"), inputs_of("llama", "none")
    truth = result_of(run(model, "eager", monkeypatch, **inputs)[0])
    try:
        model.to(dtype)
        eager = result_of(run(model, "eager", monkeypatch, **inputs)[0])
        found = result_of(run(model, "foveal", monkeypatch, **inputs)[0])
    finally:
        _made.clear()
    assert found.dtype == dtype
    assert (found - truth).abs().mean() <= 1.1 * (eager - truth).abs().mean()


# --- masks that are no rule ------------------------------------------------------------------------------------------


def test_packed_sequences(monkeypatch):
    model = model_of("llama")
    inputs = {
        "input_ids": inputs_of("llama", "none")["input_ids"],
        "position_ids": torch.tensor([[*range(6), *range(11)], [*range(15), 0, 1]]),
        "use_cache": False,  # as in training; with a cache, positions do not tell where sequences begin
    }
    expected, _ = run(model, "eager", monkeypatch, **inputs)
    found, calls = run(model, "foveal", monkeypatch, **inputs)
    assert_close(found.logits, expected.logits)
    assert all(isinstance(mask, RuleMask) and mask.rule.mask.shape == (2, 1, 17, 17) for _, _, mask in calls)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_a_mask_of_the_user(kind, monkeypatch):
    model, ids = model_of("llama"), inputs_of("llama", "none")["input_ids"]
    seen = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(2)) > 0.5
    seen |= torch.eye(17, dtype=torch.bool)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected, _ = run(model, "eager", monkeypatch, input_ids=ids, attention_mask=bias)
    mask = seen if kind == torch.bool else bias
    found, _ = run(model, "foveal", monkeypatch, input_ids=ids, attention_mask=mask)
    assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_decoder_configured_to_see_both_ways(padding, monkeypatch):
    model, inputs = model_of("llama"), inputs_of("llama", padding)
    causal, _ = run(model, "eager", monkeypatch, **inputs)
    model.config.is_causal = False
    try:
        expected, _ = run(model, "eager", monkeypatch, **inputs)
        found, _ = run(model, "foveal", monkeypatch, **inputs)
    finally:
        del model.config.is_causal
    real = inputs.get("attention_mask", torch.ones(2, 17)).bool()
    assert (expected.logits - causal.logits).abs().max() > 0.1
    assert_close(found.logits[real], expected.logits[real])


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bert"])
def test_compiled_whole(name):
    torch._dynamo.reset()
    model, inputs = model_of(name), inputs_of(name)
    model.set_attn_implementation("foveal")
    with torch.no_grad():
        expected = result_of(model(**inputs))
        found = result_of(torch.compile(model, fullgraph=True, backend="eager")(**inputs))
    real = slice(None) if name == "t5" else inputs["attention_mask"].bool()
    assert_close(found[real], expected[real])


# --- the rule of a mask ----------------------------------------------------------------------------------------------

PATTERNS = {
    "causal": (masking_utils.causal_mask_function, Pattern(True)),
    "both ways": (masking_utils.bidirectional_mask_function, Pattern(False)),
    "causal window": (masking_utils.sliding_window_causal_mask_function(4), Pattern(True, (3, None))),
    "causal window of one": (masking_utils.sliding_window_causal_mask_function(1), Pattern(True, (0, None))),
    "window": (masking_utils.sliding_window_bidirectional_mask_function(4), Pattern(False, (4, 4))),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_recognised(name):
    function, pattern = PATTERNS[name]
    assert pattern_of(function) == pattern


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
        masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function),
        masking_utils.and_masks(masking_utils.sliding_window_overlay(3), masking_utils.sliding_window_overlay(4)),
        masking_utils.add_offsets_to_mask_function(masking_utils.causal_mask_function, 1, 0),
        lambda batch, head, query, key: key <= query,
    ],
)
def test_other_patterns_are_not(function):
    assert pattern_of(function) is None


def test_a_name_with_another_meaning_is_not_believed(monkeypatch):
    function = masking_utils.sliding_window_causal_mask_function(5)
    monkeypatch.setattr("foveal.torch._visibility._confirmed", {})
    monkeypatch.setattr("foveal.torch._visibility._windowed", lambda width, *_: Pattern(False, (width, None)))
    assert pattern_of(function) is None


PADDINGS = {
    "none": None,
    "full": [[1] * 12, [1] * 12],
    "left": [[0, 0, 0] + [1] * 9, [1] * 12],
    "right": [[1] * 9 + [0] * 3, [1] * 12],
    "both": [[0] + [1] * 9 + [0] * 2, [1] * 12],
    "all of one": [[0] * 12, [1] * 12],
    "short": [[1] * 10, [0] * 2 + [1] * 8],
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("sizes", [(12, 12, 0, 0), (1, 12, 11, 0), (3, 12, 9, 0), (3, 12, 2, 0), (3, 8, 9, 4)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_rules_say_what_the_dense_mask_says(name, sizes, padding):
    num_queries, num_keys, q_offset, kv_offset = sizes
    given = PADDINGS[padding]
    common = {
        "batch_size": 2,
        "q_length": num_queries,
        "kv_length": num_keys,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": PATTERNS[name][0],
        "attention_mask": None if given is None else torch.tensor(given, dtype=torch.bool),
    }
    dense = masking_utils.sdpa_mask(**common, allow_is_causal_skip=False)
    found = make_mask(**common, allow_is_bidirectional_skip=True)
    if found is None:
        assert dense.all()

    q, k = torch.zeros(2, num_queries, 1, 4), torch.zeros(2, num_keys, 1, 4)
    v = torch.eye(num_keys).expand(2, 1, num_keys, num_keys)  # so that the output is the row of weights
    out, _ = ours.attention_forward(torch.nn.Module(), q.transpose(1, 2), k.transpose(1, 2), v, found)
    assert torch.equal(out[:, :, 0] > 0, dense[:, 0])
    if found is not None:
        assert isinstance(found, RuleMask)
        assert found.shape == dense.shape
        assert torch.equal(found.rule.seen(found.shape, found.device), dense)
        assert torch.equal(found.dense(), masking_utils.eager_mask(**common))


def test_a_rule_is_the_mask_of_eager_to_others():
    """So a model that computes its attention itself does so as with "eager"."""
    dense = masking_utils.eager_mask(2, 5, 7, q_offset=2)
    rule, scores = make_mask(2, 5, 7, q_offset=2), torch.randn(2, 3, 5, 7)
    assert isinstance(rule, RuleMask)
    assert (rule.dtype, rule.device, rule.ndim, rule.shape) == (dense.dtype, dense.device, 4, dense.shape)
    assert torch.equal(scores + rule, scores + dense)
    assert torch.equal(rule == 0, dense == 0)
    assert torch.equal(rule.to(torch.float64), dense.to(torch.float64))
    assert torch.equal(torch.cat([rule, dense]), torch.cat([dense, dense]))
    assert torch.equal(scores.masked_fill(rule < -1, 0), scores.masked_fill(dense < -1, 0))
    assert type(rule.clone()) is torch.Tensor
    assert torch.equal(copy.deepcopy(rule), dense)
    assert "causal=True" in repr(rule)
    assert rule.rule is not None
    assert torch.equal(rule[:, 0], dense[:, 0])
    assert make_mask(2, 5, 7, dtype=torch.bfloat16).dtype == torch.bfloat16


CUTS = [
    (slice(None), slice(None), slice(-3, None)),
    (slice(None), slice(None), slice(1, 4)),
    (..., slice(None, 5)),
    (..., slice(2, None)),
    (slice(None), slice(None), slice(2, None), slice(3, 6)),
]


@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_cut_rule_stays_right(name, cut, padding):
    """As where a model needs the last queries only."""
    given = None if PADDINGS[padding] is None else torch.tensor(PADDINGS[padding], dtype=torch.bool)
    rule = make_mask(2, 6, 12, q_offset=6, mask_function=PATTERNS[name][0], attention_mask=given)
    dense = rule.dense()
    found = rule[cut]
    assert isinstance(found, RuleMask)
    assert found.rule is not None
    assert torch.equal(found.dense(), dense[cut])
    num_keys = found.shape[3]
    q, k = torch.zeros(2, 1, found.shape[2], 4), torch.zeros(2, 1, num_keys, 4)
    v = torch.eye(num_keys).expand(2, 1, num_keys, num_keys)
    out, _ = ours.attention_forward(torch.nn.Module(), q, k, v, found)
    assert torch.equal(out[:, :, 0] > 0, dense[cut][:, 0] == 0)


def test_what_is_written_into_a_mask_counts():
    dense = masking_utils.eager_mask(2, 5, 7, q_offset=2)
    for write in (
        lambda mask: mask[:, :, 1].fill_(0),
        lambda mask: mask[:, :, 1:3].mul_(0),
        lambda mask: mask.masked_fill_(mask < -1, -5.0),
        lambda mask: mask.__setitem__((slice(None), slice(None), slice(0, 2), 3), 0.0),
    ):
        rule, expected = make_mask(2, 5, 7, q_offset=2), dense.clone()
        cut = rule[:, :, :4]
        write(rule)
        write(expected)
        q, k = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 7, 4)
        for mask, wanted in ((rule, expected), (cut, expected[:, :, :4])):
            assert torch.equal(mask.dense(), wanted)
            found, _ = ours.attention_forward(torch.nn.Module(), q[:, :, : mask.shape[2]], k, k, mask)
            right, _ = ours.attention_forward(torch.nn.Module(), q[:, :, : mask.shape[2]], k, k, wanted)
            assert torch.equal(found, right)


def test_what_a_compiled_step_takes_is_plain():
    """A static cache is stepped by a compiled model, which gets the mask as an input."""
    assert type(make_mask(1, 1, 5, q_offset=3, allow_is_causal_skip=False)) is torch.Tensor
    assert isinstance(make_mask(1, 5, 5, allow_is_causal_skip=False), RuleMask)


def test_no_mask_is_no_restriction():
    both = masking_utils.bidirectional_mask_function
    assert make_mask(1, 2, 2, mask_function=both, allow_is_bidirectional_skip=True) is None
    assert isinstance(make_mask(1, 2, 2, mask_function=both), RuleMask)
    for sizes in ((5, 5, 0), (1, 5, 4), (3, 8, 0)):
        assert isinstance(make_mask(1, *sizes, allow_is_bidirectional_skip=True), RuleMask | None)
        assert isinstance(make_mask(1, *sizes), RuleMask)


# --- the attention function on its own -------------------------------------------------------------------------------


def layer_inputs():
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, 5, 8, generator=generator)
    return q, *torch.randn(2, 2, 2, 9, 8, generator=generator).unbind()


def test_options_reach_attention():
    q, k, v = layer_inputs()
    module = torch.nn.Module()
    bias, sinks = torch.randn(1, 4, 5, 9), torch.randn(4)
    mask = torch.rand(2, 1, 5, 9) > 0.3
    found, weights = ours.attention_forward(
        module, q, k, v, mask, 0.4, softcap=3.0, s_aux=sinks, position_bias=bias, output_attentions=True
    )
    expected = foveal.attention(q, k, v, mask=mask, bias=bias, scale=0.4, softcap=3.0, sinks=sinks, return_weights=True)
    assert torch.equal(found, expected.out.transpose(1, 2))
    assert torch.equal(weights, expected.weights)
    floating = torch.zeros(2, 1, 5, 9).masked_fill(~mask, -torch.inf)
    found, _ = ours.attention_forward(
        module, q, k, v, floating, 0.4, softcap=3.0, s_aux=sinks, position_bias=bias, output_attentions=True
    )
    torch.testing.assert_close(found, expected.out.transpose(1, 2))


@pytest.mark.parametrize(
    "arguments", [{}, {"is_causal": False}, {"sliding_window": 8}, {"sliding_window": 20}], ids=str
)
@pytest.mark.parametrize("says", [True, False])
def test_without_a_mask_all_keys_are_seen(says, arguments):
    """Whatever the module says: the mask has what a model means."""
    q, k, v = layer_inputs()
    module = torch.nn.Module()
    module.is_causal = says
    found, _ = ours.attention_forward(module, q, k, v, None, **arguments)
    assert torch.equal(found, foveal.attention(q, k, v).transpose(1, 2))


def test_causal_without_a_mask():
    q, k, v = layer_inputs()
    q = q.repeat(1, 1, 2, 1)[:, :, :9]
    found, _ = ours.attention_forward(torch.nn.Module(), q, k, v, None, is_causal=True)
    assert torch.equal(found, foveal.attention(q, k, v, causal=True).transpose(1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"is_causal": True},
            r"^attention: is_causal is True without a mask, with 5 queries and 9 keys, expected a mask",
        ),
        ({"sliding_window": 3}, r"^attention: sliding_window is 3 for 9 keys without a mask, expected a mask"),
    ],
)
def test_a_restriction_without_a_mask_is_refused(arguments, message):
    q, k, v = layer_inputs()
    with pytest.raises(ValueError, match=message):
        ours.attention_forward(torch.nn.Module(), q, k, v, None, **arguments)


@pytest.mark.parametrize("says", [True, False])
def test_beside_a_mask_keywords_count_for_nothing(says):
    """Some layers pass on what their class says, which the mask knows better."""
    q, k, v = layer_inputs()
    for pattern in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        mask = make_mask(2, 5, 9, q_offset=4, mask_function=pattern)
        plain, _ = ours.attention_forward(torch.nn.Module(), q, k, v, mask)
        found, _ = ours.attention_forward(torch.nn.Module(), q, k, v, mask, is_causal=says, sliding_window=2)
        assert torch.equal(found, plain)


def test_one_query_without_a_mask_sees_all():
    q, k, v = layer_inputs()
    found, _ = ours.attention_forward(torch.nn.Module(), q[:, :, :1], k, v, None)
    torch.testing.assert_close(found, foveal.attention(q[:, :, :1], k, v).transpose(1, 2))


def test_queries_of_one_batch_element():
    q, k, v = layer_inputs()
    found, _ = ours.attention_forward(torch.nn.Module(), q[:1], k, v, None, is_causal=False)
    assert torch.equal(found, foveal.attention(q[:1].expand(2, -1, -1, -1), k, v).transpose(1, 2))


def test_a_rule_of_another_length_is_refused():
    q, k, v = layer_inputs()
    with pytest.raises(ValueError, match=r"^attention: attention_mask\.shape\[3\] is 7, expected 9 \(from key\)"):
        ours.attention_forward(torch.nn.Module(), q, k, v, make_mask(2, 5, 7, q_offset=2))
    with pytest.raises(ValueError, match=r"^attention: attention_mask\.shape\[2\] is 6, expected 5 \(from query\)"):
        ours.attention_forward(torch.nn.Module(), q, k, v, make_mask(2, 6, 9, q_offset=2))


@pytest.mark.parametrize("name", ["", "eager", "sdpa", "flash_attention_2", "my_flash", "owner/kernel", "paged|foveal"])
def test_names_that_are_taken(name):
    before = dict(transformers.AttentionInterface._global_mapping)
    with pytest.raises(ValueError, match=r"^register_transformers: name is "):
        foveal.torch.register_transformers(name)
    assert transformers.AttentionInterface._global_mapping == before


def test_another_name_and_twice():
    for _ in range(2):
        foveal.torch.register_transformers("foveal_again")
    model = model_of("llama")
    model.set_attn_implementation("foveal_again")
    with torch.no_grad():
        assert model(**inputs_of("llama")).logits.isfinite().all()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^register_transformers: expected Hugging Face transformers 5"):
        foveal.torch.register_transformers()
