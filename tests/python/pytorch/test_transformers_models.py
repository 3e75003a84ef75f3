"""Models of transformers whose attention asks for something out of the ordinary, beside "eager"."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

import foveal.torch  # noqa: E402
from foveal.torch import transformers as ours  # noqa: E402
from foveal.torch._visibility import make_mask  # noqa: E402

foveal.torch.register_transformers()

TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
DECODER = {**TINY, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 0}
PAIR = {
    "vocab_size": 50,
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
INDEXER = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 2}
GEMMA4 = {
    **DECODER,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "vocab_size_per_layer_input": 50,
    "hidden_size_per_layer_input": 8,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_kv_shared_layers": 2,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def pair_of(name, config, **changes):
    """Make the same model with "eager" and with foveal, its attention far from uniform."""
    model_class, config_class = (getattr(transformers, part) for part in name)
    models = []
    for implementation in ("eager", "foveal"):
        torch.manual_seed(0)
        made = config_class(**{**config, **changes})
        model = model_class._from_config(copy.deepcopy(made), attn_implementation=implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
        models.append(model)
    return models


def tokens(seqlen=12, batch=2):
    return torch.randint(3, 50, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def result_of(model, *arguments, **named):
    with torch.no_grad():
        outputs = model(*arguments, **named)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * max(1.0, expected.abs().max().item()))


# --- what modules say of themselves counts for nothing ----------------------------------------------------------------

PAIRS = {
    "pegasus_x": (("PegasusXForConditionalGeneration", "PegasusXConfig"), PAIR),
    "bart": (("BartForConditionalGeneration", "BartConfig"), PAIR),
    "marian": (("MarianMTModel", "MarianConfig"), {**PAIR, "pad_token_id": 0, "decoder_start_token_id": 1}),
}


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_never_sees_the_future(name, says):
    eager, model = pair_of(*PAIRS[name])
    for module in model.modules():
        if says is not None and hasattr(module, "is_causal"):
            module.is_causal = says
    given = {"input_ids": tokens(8), "decoder_input_ids": tokens(6)}
    expected, found = (result_of(x, **given) for x in (eager, model))
    assert_close(found, expected)
    given["decoder_input_ids"][:, 5] = 3
    assert torch.equal(result_of(model, **given)[:, :5], found[:, :5])


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel"])
def test_any_model_whose_modules_say_otherwise(name, says):
    config = name.replace("ForCausalLM", "").replace("Model", "") + "Config"
    eager, model = pair_of((name, config), {**TINY, "num_hidden_layers": 2})
    for module in model.modules():
        module.is_causal = says
    assert_close(result_of(model, tokens()), result_of(eager, tokens()))


# --- queries cut off after the mask was made --------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("kept", [1, 2, 3, 11])
def test_layers_that_need_the_last_queries_only(kept, padding):
    eager, model = pair_of(("Gemma4ForCausalLM", "Gemma4TextConfig"), GEMMA4)
    real = torch.ones(2, 12, dtype=torch.int64)
    real[0, :padding] = 0
    given = {"input_ids": tokens(), "attention_mask": real}
    found = result_of(model, **given, logits_to_keep=kept)
    rows = real[:, -kept:].bool()
    assert_close(found[rows], result_of(eager, **given, logits_to_keep=kept)[rows])
    assert_close(found[rows], result_of(model, **given)[:, -kept:][rows])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_they_generate(cache):
    eager, model = pair_of(("Gemma4ForCausalLM", "Gemma4TextConfig"), GEMMA4)
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model.generate(tokens(), **given), eager.generate(tokens(), **given))


# --- keys chosen by an indexer ----------------------------------------------------------------------------------------

SPARSE_TINY = {**DECODER, **LATENT, **INDEXER, "num_key_value_heads": 4}
SPARSE = {
    "deepseek_v32": (("DeepseekV32ForCausalLM", "DeepseekV32Config"), SPARSE_TINY),
    "glm_moe_dsa": (("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig"), SPARSE_TINY),
}


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_models(name, padding):
    eager, model = pair_of(*SPARSE[name])
    real = torch.ones(2, 20, dtype=torch.int64)
    real[0, :padding] = 0
    given = {"input_ids": tokens(20), "attention_mask": real}
    expected, found = (result_of(x, **given) for x in (eager, model))
    assert_close(found[real.bool()], expected[real.bool()])
    everything = pair_of(SPARSE[name][0], {**SPARSE[name][1], "index_topk": 20})[1]
    assert (result_of(everything, **given) - found).abs().max() > 0.1  # so the choice counts


def layer_inputs(num_queries=5, num_keys=9):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, num_queries, 8, generator=generator)
    return q, *torch.randn(2, 2, 2, num_keys, 8, generator=generator).unbind()


def test_indices_choose_among_what_the_mask_leaves():
    q, k, v = layer_inputs()
    indices = torch.tensor([[0, 3, 3], [8, 1, -1], [4, 2, 0], [7, 6, 8], [-1, -1, -1]], dtype=torch.int32).expand(
        2, 5, 3
    )
    seen = torch.zeros(2, 1, 5, 9, dtype=torch.bool)
    for query in range(5):
        for key in indices[0, query].tolist():
            seen[:, :, query, key] |= 0 <= key <= query + 4
    found, _ = ours.attention_forward(torch.nn.Module(), q, k, v, make_mask(2, 5, 9, q_offset=4), indices=indices)
    assert torch.equal(found, foveal.attention(q, k, v, mask=seen).transpose(1, 2))


def test_block_indices_choose_by_head():
    q, k, v = layer_inputs()
    indices = torch.tensor([[[0, -1]] * 5, [[2, 1]] * 5]).expand(2, 2, 5, 2)
    module = torch.nn.Module()
    module.indexer = torch.nn.Module()
    module.indexer.block_size = 4
    found, _ = ours.attention_forward(module, q, k, v, None, block_indices=indices)
    seen = torch.zeros(1, 4, 1, 9, dtype=torch.bool)
    seen[:, :2, :, :4] = True
    seen[:, 2:, :, 4:] = True
    assert torch.equal(found, foveal.attention(q, k, v, mask=seen.expand(2, 4, 5, 9)).transpose(1, 2))
    with pytest.raises(TypeError, match=r"^attention: block_indices came from Module, expected one whose indexer"):
        ours.attention_forward(torch.nn.Module(), q, k, v, None, block_indices=indices)


# --- other keywords ---------------------------------------------------------------------------------------------------


def test_a_sink_for_every_query():
    q, k, v = (x.requires_grad_() for x in layer_inputs())
    sinks = torch.randn(2, 4, 5, 1, requires_grad=True)
    found, _ = ours.attention_forward(torch.nn.Module(), q, k, v, make_mask(2, 5, 9, q_offset=4), 0.3, sinks=sinks)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3 + make_mask(2, 5, 9, q_offset=4)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    for ours_grad, grad in zip(
        *(torch.autograd.grad(x.sum(), (q, k, v, sinks)) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours_grad, grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        _, found_weights = ours.attention_forward(
            torch.nn.Module(), q, k, v, make_mask(2, 5, 9, q_offset=4), 0.3, sinks=sinks, output_attentions=True
        )
    torch.testing.assert_close(found_weights, weights.detach())


def test_weights_before_the_sink():
    eager, foveal_model = pair_of(("GraniteSWAForCausalLM", "GraniteSWAConfig"), DECODER)
    with torch.no_grad():
        for model in (eager, foveal_model):
            for layer in model.model.layers:
                layer.self_attn.sinks.normal_(0, 3, generator=torch.Generator().manual_seed(2))
        expected, found = (model(tokens(), output_attentions=True) for model in (eager, foveal_model))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for ours_, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_packed_by_lengths():
    q, k, v = (x[:1] for x in layer_inputs(9))
    begins = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": 5, "max_length_k": 5}
    found, _ = ours.attention_forward(torch.nn.Module(), q, k, v, make_mask(1, 9, 9), **given)
    for begin, end in ((0, 4), (4, 9)):
        part = foveal.attention(*(x[:, :, begin:end] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(found[:, begin:end], part.transpose(1, 2))
    with pytest.raises(ValueError, match=r"^attention: a batch of 2 has cu_seq_lens_q , expected both"):
        ours.attention_forward(torch.nn.Module(), *layer_inputs(), None, cu_seq_lens_q=begins)


def test_an_unknown_keyword_is_refused_by_name():
    q, k, v = layer_inputs()
    with pytest.raises(TypeError, match=r"^attention: key_selection is not known to foveal, expected None.*eager"):
        ours.attention_forward(torch.nn.Module(), q, k, v, None, key_selection=torch.zeros(1))
    harmless = dict.fromkeys(ours.IGNORED, 1)
    found, _ = ours.attention_forward(torch.nn.Module(), q, k, v, None, key_selection=None, **harmless)
    assert torch.equal(found, foveal.attention(q, k, v).transpose(1, 2))
    _, model = pair_of(("LlamaForCausalLM", "LlamaConfig"), DECODER)
    with pytest.raises(TypeError, match=r"^attention: key_selection is not known"):
        model(tokens(), key_selection=1)


# --- models that compute their attention themselves -------------------------------------------------------------------

OWN = {
    "mpnet": (("MPNetModel", "MPNetConfig"), {**TINY, "num_hidden_layers": 2}),
    "bloom": (("BloomForCausalLM", "BloomConfig"), {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "xglm": (
        ("XGLMForCausalLM", "XGLMConfig"),
        {"vocab_size": 50, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 32, "pad_token_id": 0},
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_padding_is_hidden(name, compiled):
    eager, model = pair_of(*OWN[name])
    real = torch.ones(2, 12, dtype=torch.int64)
    real[0, 7:] = 0
    given = {"input_ids": tokens(), "attention_mask": real}
    run = torch.compile(model, backend="eager") if compiled else model
    assert_close(result_of(run, **given)[real.bool()], result_of(eager, **given)[real.bool()])
