"""foveal on PyTorch tensors: the ops ``torch.ops.foveal.*``, on which :func:`foveal.attention` calls by itself."""

from foveal.torch._call import _attention as _attention
