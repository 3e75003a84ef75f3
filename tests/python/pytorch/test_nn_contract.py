"""What every module of foveal.torch.nn promises: it trains, compiles, exports, moves, copies, and holds no pairs."""

import copy
import gc

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from foveal.torch import nn  # noqa: E402

WIDTH, HEADS = 16, 2


def attention(**options):
    return lambda **made: nn.MultiHeadAttention(WIDTH, HEADS, batch_first=True, **options, **made)


def with_bias(kind, *size, **options):
    return lambda **made: attention(relative_bias=kind(HEADS, *size, **made), **options)(**made)


def mixture(gate):
    mechanisms = [nn.Mechanism(window=(1, 1)), nn.Mechanism(temperature=0.5), nn.Mechanism()]
    options = {"gate": gate, "rotary": nn.RotaryEmbedding(4)}
    return lambda **made: nn.MixtureOfAttention(WIDTH, HEADS, mechanisms, **options, **made)


def tasks(breadth):
    sizes = {"num_tasks": 2, "queries_per_task": 3, "breadth": breadth}
    return lambda **made: nn.MultiTaskAttention(WIDTH, HEADS, **sizes, **made)


MODULES = {
    "plain": attention(),
    "causal window": attention(causal=True, window=(3, None)),
    "grouped": attention(num_kv_heads=1, head_dim=12, bias=False),
    "rotary": attention(causal=True, rotary=nn.RotaryEmbedding(8)),
    "rotary partial interleaved": attention(rotary=nn.RotaryEmbedding(4, interleaved=True)),
    "alibi": attention(alibi=True, causal=True),
    "t5": with_bias(nn.T5RelativeBias, scale=1.0),
    "relative": with_bias(nn.LearnedRelativeBias, 3, causal=True, alibi=True),
    "sinks softcap": attention(sinks=True, softcap=2.0),
    "threshold": lambda **made: nn.ThresholdAttention(WIDTH, HEADS, batch_first=True, temperature=0.5, **made),
    "adaptive": lambda **made: nn.AdaptiveAttention(
        WIDTH, HEADS, batch_first=True, max_span=8, ramp=3.7, causal=True, **made
    ),
    "additive": lambda **made: nn.AdditiveAttention(WIDTH, HEADS, hidden_dim=5, causal=True, **made),
    "mixture": mixture("softmax"),
    "mixture sigmoid": mixture("sigmoid"),
    "tasks": tasks(None),
    "tasks learned": tasks("learned"),
    "tasks breadth": tasks([1.5, 4.0]),
}


def result(module, x):
    """Everything that a forward pass gives, as one differentiable tensor."""
    return torch.cat([part.flatten() for part in module(x) if part is not None])


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    made = MODULES[request.param]()
    with torch.no_grad():  # parameters that begin at 0 hide mistakes
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.fixture
def x():
    return torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(module, x, run=result):
    found = run(module, x)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype)
    return found, torch.autograd.grad((found * weights).sum(), tuple(module.parameters()))


def test_every_parameter_has_its_gradient(module, x):
    """Compare with differences in float64, along one direction for each parameter."""
    module, x = module.double(), x.double()
    if getattr(module, "breadth", None) is not None:
        pytest.skip("the temperature is a constant in the backward pass alone")
    _, found = gradients(module, x)
    for parameter, gradient in zip(module.parameters(), found, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                out = result(module, x)
                values.append((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).sum())
                parameter.sub_(direction, alpha=step)
        expected = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def test_trains(module, x):
    target = torch.randn(result(module, x).shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = (result(module, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


WITH_INDUCTOR = ("plain", "relative", "mixture", "tasks")  # it takes its time, the graphs are those of all


def test_compiles_whole(module, x, request):
    torch.compiler.reset()
    inductor = request.node.callspec.params["module"] in WITH_INDUCTOR
    compiled = torch.compile(result, fullgraph=True, backend="inductor" if inductor else "aot_eager")
    out, found = gradients(module, x)
    out_compiled, found_compiled = gradients(module, x, compiled)
    torch.testing.assert_close(out_compiled, out, rtol=1e-4, atol=1e-5)
    for x1, x2 in zip(found_compiled, found, strict=True):
        torch.testing.assert_close(x1, x2, rtol=1e-3, atol=1e-4)


def test_exports_with_any_batch(module, x):
    class Result(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x)[0]

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Result().eval(), (x,), dynamic_shapes={"x": {0: batch}})
    more = torch.randn(5, 9, WIDTH)
    torch.testing.assert_close(program.module()(more), module.eval()(more)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moves_to_another_dtype(module, x, dtype):
    expected = result(module, x)
    out = module.to(dtype)(x.to(dtype))
    assert out[0].dtype == dtype
    error = (result(module, x.to(dtype)).float() - expected).abs().max() / expected.abs().max()
    assert error < (0.06 if dtype == torch.bfloat16 else 1e-4)
    _, found = gradients(module, x.to(dtype))
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in found)


def test_autocast(module, x):
    expected = result(module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)[0]
        found = result(module, x)
    assert out.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() / expected.abs().max() < 0.06
    found.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_state_and_copies(module, x, request):
    expected = result(module, x)
    other = MODULES[request.node.callspec.params["module"]]()
    assert not torch.equal(result(other, x), expected)
    assert not any(other.load_state_dict(module.state_dict()))
    copied = copy.deepcopy(module)
    assert torch.equal(result(other, x), expected)
    assert torch.equal(result(copied, x), expected)
    with torch.no_grad():
        next(copied.parameters()).mul_(2)
    assert not torch.equal(result(copied, x), expected)
    assert torch.equal(result(module, x), expected)


def test_device_and_dtype_of_the_parameters(module, x, request):
    made = MODULES[request.node.callspec.params["module"]](device="meta", dtype=torch.float64)
    assert all(tensor.is_meta and tensor.dtype == torch.float64 for tensor in made.state_dict().values())
    made.to_empty(device="cpu").load_state_dict(module.state_dict())
    torch.testing.assert_close(result(made, x.double()), result(module.double(), x.double()), rtol=0, atol=0)


def test_gradients_of_each_sample(module, x):
    parameters = dict(module.named_parameters())

    def loss(parameters, sample):
        out = torch.func.functional_call(module, parameters, (sample[None],))
        return out[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(
            module(sample[None])[0].square().sum(), tuple(parameters.values()), allow_unused=True
        )
        for name, gradient in zip(parameters, expected, strict=True):
            gradient = torch.zeros_like(parameters[name]) if gradient is None else gradient
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


class Largest(TorchDispatchMode):
    """The number of elements in the largest memory that an operation gave."""

    found = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.found = max(self.found, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_no_array_of_pairs(module):
    tokens = 2500
    x = torch.randn(1, tokens, WIDTH)
    with Largest() as largest:
        gradients(module, x)
    assert 0 < largest.found < tokens * tokens / 2
    gc.collect()


def test_the_watch_sees_an_array_of_pairs():
    with Largest() as largest, torch.no_grad():
        attention()()(torch.randn(1, 300, WIDTH), need_weights=True)
    assert largest.found >= 300 * 300
