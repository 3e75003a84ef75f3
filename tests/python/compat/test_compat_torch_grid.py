"""What torch's scaled_dot_product_attention survives, foveal.compat.torch's survives: both are asked the same things.

A cell of the grid is a way to run (eager, compiled, exported), shapes, and options, called at two sizes of
every symbolic axis. Where torch's own function survives, foveal's must give its results, with gradients where the way
has any.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from foveal.compat.torch import scaled_dot_product_attention

# Axes by name, so that a cell can be asked at several sizes: b batch, h heads, g heads of keys, s queries, l keys.
SIZES = [{"b": 3, "h": 4, "g": 2, "s": 8, "l": 9}, {"b": 5, "h": 4, "g": 2, "s": 12, "l": 12}]
SHAPES = {
    "2 axes": ("se", "le", "le"),
    "3 axes": ("hse", "hle", "hle"),
    "4 axes": ("bhse", "bhle", "bhle"),
    "5 axes": ("2bhse", "2bhle", "2bhle"),
    "all the same": ("bhse", "same", "same"),
    "keys are values": ("bhse", "bhle", "same"),
    "one head of keys": ("bhse", "b1le", "b1le"),
    "one head of values": ("bhse", "bhle", "b1le"),
    "one head of queries": ("b1se", "bhle", "bhle"),
    "a batch of one": ("bhse", "1hle", "1hle"),
    "fewer axes": ("bhse", "hle", "le"),
    "fewer axes of queries": ("se", "bhle", "bhle"),
    "grouped": ("bhse", "bgle", "bgle"),
    "grouped keys alone": ("bhse", "bgle", "bhle"),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "mask": {"attn_mask": "sl"},
    "mask of keys": {"attn_mask": "1l"},
    "mask of batch": {"attn_mask": "b1sl"},
    "bias": {"attn_mask": "hsl", "floating": True},
    "dropout": {"dropout_p": 0.5},
}


def tensors_of(shapes, sizes):
    def extent(axis):
        return int(axis) if axis.isdigit() else {"e": 16}.get(axis) or sizes[axis]

    generator = torch.Generator().manual_seed(sum(sizes.values()))
    tensors = []
    for shape in shapes:
        tensor = tensors[-1] if shape == "same" else torch.randn([*map(extent, shape)], generator=generator)
        tensors.append(tensor)
    return tensors


class Call(torch.nn.Module):
    """A call of one of the functions on its tensors, the mask among them."""

    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, query, key, value, attn_mask):
        return self.function(query, key, value, attn_mask=attn_mask, **self.options)


def run_eager(call, calls):
    return [with_gradients(call, inputs) for inputs in calls]


def run_compiled(dynamic):
    def run(call, calls):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        return [with_gradients(compiled, inputs) for inputs in calls]

    return run


def run_exported(strict):
    def run(call, calls):
        sizes = SIZES[0]
        dims = {sizes[axis]: torch.export.Dim(axis, min=2, max=99) for axis in "bsl"}
        dynamic = tuple(
            x if x is None else {n: dims[extent] for n, extent in enumerate(x.shape) if extent in dims}
            for x in calls[0]
        )
        program = torch.export.export(call, calls[0], dynamic_shapes=dynamic, strict=strict)
        return [[program.module()(*inputs)] for inputs in calls]

    return run


WAYS = {
    "eager": run_eager,
    "compiled": run_compiled(None),
    "compiled for all sizes": run_compiled(True),
    "exported": run_exported(False),
    "exported by Dynamo": run_exported(True),
}


def with_gradients(call, inputs):
    """Give the output and the gradients of what the call was given; a tensor that was given twice stays one."""
    leaves = {x: x.clone().requires_grad_() for x in inputs if x is not None and x.is_floating_point()}
    out = call(*(leaves.get(x, x) for x in inputs))
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(leaves.values()))]


CELLS = [(shape, option) for shape in SHAPES for option in ("plain", "causal")]
CELLS += [(shape, option) for shape in ("4 axes", "a batch of one", "grouped") for option in list(OPTIONS)[2:]]


def survives(way, options, calls):
    """Tell whether torch's own function does what foveal's has just failed to do."""
    try:
        WAYS[way](Call(torch_sdpa, options), calls)
    except Exception:
        return False
    return True


@pytest.mark.parametrize(("shape", "option"), CELLS)
@pytest.mark.parametrize("way", WAYS)
def test_survives_what_torchs_own_survives(way, shape, option):
    shapes, options = SHAPES[shape], dict(OPTIONS[option])
    mask, floating = options.pop("attn_mask", None), options.pop("floating", False)
    calls = []
    for sizes in SIZES:
        *inputs, scores = tensors_of([*shapes, mask or "s"], sizes)
        if shape == "all the same" and mask is not None:
            sizes = {**sizes, "l": sizes["s"]}
            scores = tensors_of([mask], sizes)[0]
        calls.append((*inputs, None if mask is None else scores if floating else scores > -1))
    options |= {"enable_gqa": True} if "g" in "".join(shapes) else {}
    try:
        found = WAYS[way](Call(scaled_dot_product_attention, options), calls)
    except Exception:
        if shape == "4 axes" or survives(way, options, calls):
            raise
        pytest.skip("torch's own does not survive either")
    expected = [with_gradients(Call(torch_sdpa, options), inputs) for inputs in calls]
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=len(one) > 1):  # an exported program gives the output alone
            assert x.shape == y.shape
            if option == "dropout":
                assert x.isfinite().all()
            else:
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
