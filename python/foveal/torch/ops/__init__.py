"""The ops ``torch.ops.foveal.*``: schemas, fakes, autograd, fallbacks, and the calls that lead to them."""
