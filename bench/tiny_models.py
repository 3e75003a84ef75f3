"""Small random models of the architectures of transformers: configs shrunk by the names of their sizes, and inputs."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

LAYERS, HEADS, WIDTH, HEAD_DIM, VOCABULARY = 2, 4, 64, 16, 160
MOST_PARAMETERS = 40_000_000
SPECIAL = 32  # token ids below this are kept for special tokens
SEQLEN = 17

# The first pattern that fits a name says what an int of that name becomes; None: keep it.
NAMED: list[tuple[str, int | None]] = [
    (r"num_(labels|channels)|in_channels|num_mel_bins|feature_size|input_feat.*|num_codebooks", None),
    (r"num_feat_extract_layers", None),
    (r"attn_layer_period|attn_layer_offset|expert_layer_period|expert_layer_offset", 2),
    (r"(.*_)?vocab_size(_per_layer_input)?|.*vocab_size", VOCABULARY),
    (r"n_layers?|depth|.*_layers", LAYERS),
    (r"(.*_)?num_(key_value|kv)_heads|.*num_key_value_heads|n_kv_heads|num_kv_heads", -1),
    (r".*num_attention_heads|.*attention_heads|n_heads?|num_heads|.*_num_heads", HEADS),
    (r"qk_rope_head_dim|qk_nope_head_dim", HEAD_DIM // 2),
    (r"qk_head_dim|(.*_)?head_dim|head_size|d_kv|attention_head_size|v_head_dim|attention_key_size", HEAD_DIM),
    (r".*lora_rank|hidden_size_per_layer_input", HEAD_DIM),
    (r"index_topk", 4),
    (r"index_n_heads", 2),
    (r"index_block_size", 4),
    (r"index_topk_blocks", 2),
    (r"(num_experts_per_tok|moe_topk|moe_k|num_selected_experts|top_k_experts|experts_per_token|.*top_?k)", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r".*num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r".*(intermediate|ffn|feedforward|feed_forward).*(size|dim)|d_ff|d_inner|n_inner|mlp_dim", WIDTH),
    (r"hidden_size|.*_hidden_size|d_model|n_embd|(.*_)?embed_dim|embedding_size|hidden_dim|dim|d_embed|out_hidden_size|"
     r"projection_dim|.*_embed_size|lru_width", WIDTH),
    (r"sliding_window(_size)?|local_attention|attention_window|attention_chunk_size", 8),
    (r"max_(source|target)_positions|max_position_embeddings|n_positions|n_ctx|max_sequence_length", 128),
    (r"image_size", 32),
    (r"patch_size", 8),
]  # fmt: skip


class Unbuilt(Exception):
    """No tiny model of this architecture could be built, or none would run."""


# --- configs ----------------------------------------------------------------------------------------------------------


def tiny_config(config_class: type[PreTrainedConfig], widths: bool = True) -> PreTrainedConfig:
    """Make a config with few layers and a small vocabulary, and where ``widths`` says so, narrow ones."""
    return config_class(**_changes(config_class(), widths))


def _changes(config: PreTrainedConfig, widths: bool) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    values = config.to_dict()
    types = list(dict.fromkeys(values.get("layer_types") or ()))[:4]
    num_layers = max(LAYERS, len(types))
    default_layers = next((values[n] for n in ("num_hidden_layers", "num_layers", "n_layer") if values.get(n)), None)
    default_heads = values.get("num_attention_heads")
    for place, (name, value) in enumerate(values.items()):
        nested = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(nested, PreTrainedConfig):
            changes[name] = {**_changes(nested, widths), "model_type": nested.model_type}
        elif isinstance(value, bool) or value is None:
            continue
        elif re.fullmatch(r".*_token_(id|index)|.*_token_ids", name):
            changes[name] = _token(name, value, place)
        elif isinstance(value, int):
            target = _target(name, widths)
            if name.endswith("_layer_offset") and widths:
                changes[name] = min(value, 1)
            elif target == LAYERS:
                changes[name] = min(value, num_layers)
            elif target == -1:
                changes[name] = HEADS if value == default_heads else 1 if value == 1 else HEADS // 2
            elif name == "head_dim" and value == values.get("qk_rope_head_dim") and widths:
                changes[name] = HEAD_DIM // 2  # the rotated part only
            elif target is not None:
                changes[name] = min(value, target)
        elif name == "layer_types":
            changes[name] = (types * num_layers)[:num_layers]
        elif isinstance(value, list | tuple) and default_layers and len(value) == default_layers > num_layers:
            changes[name] = list(value[:num_layers])
        elif name == "rope_parameters" and isinstance(value, dict) and widths and _mentions(config, "mrope_section"):
            changes[name] = {**value, "mrope_section": [2, 3, 3]}
    return changes


def _target(name: str, widths: bool) -> int | None:
    for pattern, target in NAMED:
        if re.fullmatch(pattern, name):
            narrow = target in (LAYERS, VOCABULARY) or "expert" in pattern
            return target if widths or narrow else None
    return None


def _token(name: str, value: Any, place: int) -> Any:
    token = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}.get(
        name, 3 + place % (SPECIAL - 3)
    )
    return [token] if isinstance(value, list) else token


def _mentions(config: PreTrainedConfig, word: str) -> bool:
    """Tell whether the models of a config use a word."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None and word in Path(spec.origin).read_text()


# --- models -----------------------------------------------------------------------------------------------------------

_GENERATIVE = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM")


def class_name_of(model_type: str) -> str | None:
    """Choose a model class: the one that generates where there is one, else the bare model."""
    names = {key: getattr(modeling_auto, key) for key in dir(modeling_auto) if key.endswith("_MAPPING_NAMES")}
    order = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _GENERATIVE]
    if model_type in names["MODEL_FOR_MASKED_LM_MAPPING_NAMES"] and model_type not in names[order[0]]:
        order = []
    for key in [*order, "MODEL_MAPPING_NAMES", *names]:
        found = names[key].get(model_type)
        if found:
            return found if isinstance(found, str) else str(found[0])
    return None


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model with "eager" whose attention is far from uniform and no part of which is switched off by zeros."""
    with torch.device("meta"):
        count = sum(x.numel() for x in model_class._from_config(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise Unbuilt(f"{count / 1e6:.0f} million parameters when shrunk")
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if re.search(r"(q_proj|k_proj|query|key|qkv|c_attn|q_b_proj|kv_b_proj|in_proj)\b.*weight", name):
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
            elif not parameter.any() and "bias" not in name:
                parameter.normal_(0, 0.1)
    return model


def twin(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Make the same model with another attention."""
    config = copy.deepcopy(model.config)
    torch.manual_seed(0)
    other = type(model)._from_config(config, attn_implementation=implementation).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


# --- inputs -----------------------------------------------------------------------------------------------------------


def candidate_inputs(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """List what the forward function may take, simplest first."""
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    text: dict[str, torch.Tensor] = {}
    config = model.config.get_text_config()
    if "input_ids" in takes:
        size = getattr(config, "vocab_size", None) or VOCABULARY
        text["input_ids"] = torch.randint(SPECIAL, max(size, SPECIAL + 1), (2, SEQLEN), generator=generator)
        if "attention_mask" in takes:
            text["attention_mask"] = torch.ones(2, SEQLEN, dtype=torch.int64)
        if "bbox" in takes:
            text["bbox"] = torch.zeros(2, SEQLEN, 4, dtype=torch.int64)
    decoder: dict[str, torch.Tensor] = {}
    if "decoder_input_ids" in takes:
        decoder["decoder_input_ids"] = torch.randint(SPECIAL, VOCABULARY, (2, 7), generator=generator)

    media = []
    if "pixel_values" in takes:
        part = getattr(model.config, "vision_config", model.config)
        channels = getattr(part, "num_channels", None) or getattr(part, "in_channels", None) or 3
        size = getattr(part, "image_size", None) or 32
        height, width = size if isinstance(size, list | tuple) else (size, size)
        media.append({"pixel_values": torch.randn(2, channels, height, width, generator=generator)})
        frames = getattr(part, "num_frames", None) or 4
        media.append({"pixel_values": torch.randn(2, frames, channels, height, width, generator=generator)})
    if "pixel_values_videos" in takes:
        media.append({"pixel_values_videos": torch.randn(2, 4, 3, 32, 32, generator=generator)})
    if "input_values" in takes:
        media.append({"input_values": torch.randn(2, 8000, generator=generator)})
        media.append({"input_values": torch.randn(2, 1, 4000, generator=generator)})
        media.append({"input_values": torch.randn(2, 1024, 128, generator=generator)})
    if "input_features" in takes:
        part = getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", model.config)
        names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
        bins = next((getattr(part, name) for name in names if getattr(part, name, None)), 80)
        frames = 2 * (getattr(part, "max_source_positions", None) or 32)
        for shape in ((2, bins, frames), (2, frames, bins), (2, 64, bins)):
            media.append({"input_features": torch.randn(shape, generator=generator)})
    if not decoder:
        candidates = [text] if text else []
        candidates += [{**text, **item} for item in media if text] + media
    else:
        candidates = [{**text, **decoder}] if text else []
        candidates += [{**item, **decoder} for item in media] + ([] if text else media)
    return candidates


def tiny_model(model_type: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Build a model of this type and inputs that it takes with "eager"."""
    import transformers

    name = class_name_of(model_type)
    if name is None:
        raise Unbuilt("part of other models, without a class of its own")
    config_class = transformers.CONFIG_MAPPING[model_type]
    reasons = []
    for widths in (True, False):
        try:
            model = build(getattr(transformers, name), tiny_config(config_class, widths))
        except Exception as error:
            reasons.append(first_line(error))
            continue
        for inputs in candidate_inputs(model):
            try:
                with torch.no_grad():
                    torch.manual_seed(0)
                    model(**inputs)
                return model, inputs
            except Exception as error:
                reasons.append(f"with {', '.join(inputs)}: {first_line(error)}")
    raise Unbuilt(reasons[0] if reasons else "its inputs are not among those tried")


def first_line(error: BaseException) -> str:
    """Say what went wrong in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
