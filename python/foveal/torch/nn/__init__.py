"""Attention mechanisms as PyTorch modules, on the kernels of :func:`foveal.attention`: docs/modules.md."""

from foveal.torch.nn.additive import AdditiveAttention
from foveal.torch.nn.cache import KeyValueCache
from foveal.torch.nn.learned import AdaptiveAttention, ThresholdAttention
from foveal.torch.nn.mixture import Mechanism, MixtureOfAttention, MixtureOutput
from foveal.torch.nn.multi_head import MultiHeadAttention
from foveal.torch.nn.multi_task import MultiTaskAttention, MultiTaskOutput
from foveal.torch.nn.relative_bias import LearnedRelativeBias, T5RelativeBias, alibi_slopes
from foveal.torch.nn.rotary import Llama3Scaling, RotaryEmbedding, YarnScaling

__all__ = [
    "AdaptiveAttention",
    "AdditiveAttention",
    "KeyValueCache",
    "LearnedRelativeBias",
    "Llama3Scaling",
    "Mechanism",
    "MixtureOfAttention",
    "MixtureOutput",
    "MultiHeadAttention",
    "MultiTaskAttention",
    "MultiTaskOutput",
    "RotaryEmbedding",
    "T5RelativeBias",
    "ThresholdAttention",
    "YarnScaling",
    "alibi_slopes",
]
