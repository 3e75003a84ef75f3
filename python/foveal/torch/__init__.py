"""foveal on PyTorch tensors: the ops ``torch.ops.foveal.*``, on which :func:`foveal.attention` calls by itself."""

from foveal.torch import nn as nn
from foveal.torch.ops.call import _attention as _attention
from foveal.torch.ops.call import _attention_stats as _attention_stats
from foveal.torch.ops.sequences_call import _attention_kvcache as _attention_kvcache
from foveal.torch.ops.sequences_call import _attention_varlen as _attention_varlen
from foveal.torch.transformers import register_transformers

__all__ = ["register_transformers"]
