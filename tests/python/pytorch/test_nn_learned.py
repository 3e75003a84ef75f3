"""ThresholdAttention, AdaptiveAttention and AdditiveAttention against their formulas."""

import pytest

torch = pytest.importorskip("torch")

from foveal.torch import nn  # noqa: E402

E, H, D = 16, 2, 8


def heads(x):
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def joined(module, weights, v):
    return module.out_proj((weights @ v).transpose(1, 2).flatten(2))


def shaken(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("batch_first", [True, False])
def test_threshold(batch_first):
    module = shaken(nn.ThresholdAttention(E, H, batch_first=batch_first, temperature=0.5))
    x = torch.randn(3, 9, E, dtype=torch.float64)
    q, k, v = (heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    s = q @ k.mT / D**0.5
    tau, temperature = module.threshold(x).transpose(1, 2), module.log_temperature.exp()
    w = torch.exp(s) * torch.sigmoid((s - tau[..., None]) / temperature[:, None, None])
    expected = joined(module, w / w.sum(-1, keepdim=True), v)
    found, _ = module(x if batch_first else x.transpose(0, 1))
    torch.testing.assert_close(found if batch_first else found.transpose(0, 1), expected)


def test_threshold_begins_open():
    module = nn.ThresholdAttention(E, H)
    assert (module.threshold.bias == -2).all()
    assert (module.threshold.weight == 0).all()
    assert (module.log_temperature == 0).all()


def test_adaptive():
    module = shaken(nn.AdaptiveAttention(E, H, batch_first=True, max_span=20, ramp=3.0, causal=True))
    x = torch.randn(2, 30, E, dtype=torch.float64)
    q, k, v = (heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    s = q @ k.mT / D**0.5 / module.log_temperature.exp()[:, None, None]
    distance = torch.arange(30)[:, None] - torch.arange(30)
    z = module.span.clamp(0, 1)[:, None, None] * 20
    soft = ((3 + z - distance) / 3).clamp(0, 1) * (distance >= 0)
    w = torch.exp(s) * soft
    torch.testing.assert_close(module(x)[0], joined(module, w / w.sum(-1, keepdim=True), v))
    torch.testing.assert_close(module.span_loss(), module.span.clamp(0, 1).mean())


def test_a_span_loss_shortens_spans():
    torch.manual_seed(0)
    module = nn.AdaptiveAttention(E, H, batch_first=True, max_span=20, init_span=1.0)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (1e-3 * module(torch.randn(2, 30, E))[0].square().mean() + module.span_loss()).backward()
        optimizer.step()
    assert module.span_loss() < 0.2


def test_additive_of_an_encoder_and_a_decoder():
    module = shaken(nn.AdditiveAttention(E, H, hidden_dim=5, kdim=12, vdim=10))
    state, keys, values = (torch.randn(3, n, f, dtype=torch.float64) for n, f in ((4, E), (20, 12), (20, 10)))
    padding = torch.arange(20) >= torch.tensor([20, 7, 13])[:, None]
    hidden = torch.tanh(heads(module.q_proj(state))[:, :, :, None] + heads(module.k_proj(keys))[:, :, None])
    s = (hidden * module.u[:, None, None]).sum(-1).masked_fill(padding[:, None, None], -torch.inf)
    weights = torch.softmax(s, -1)
    expected = joined(module, weights, heads(module.v_proj(values)))
    torch.testing.assert_close(module(state, keys, values, key_padding_mask=padding)[0], expected)
    with torch.no_grad():
        _, found = module(state, keys, values, key_padding_mask=padding, need_weights=True)
    torch.testing.assert_close(found, weights)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: nn.ThresholdAttention(E, H, temperature=0.0),
            "ThresholdAttention: temperature is 0.0, expected above 0",
        ),
        (
            lambda: nn.ThresholdAttention(E, H, relative_bias=nn.T5RelativeBias(H)),
            "ThresholdAttention: relative_bias is given, expected None",
        ),
        (lambda: nn.AdaptiveAttention(E, H, ramp=0.0), "AdaptiveAttention: ramp is 0.0, expected above 0"),
        (lambda: nn.AdaptiveAttention(E, H, max_span=-1), "AdaptiveAttention: max_span is -1, expected above 0"),
        (lambda: nn.AdaptiveAttention(E, H, init_span=2), "AdaptiveAttention: init_span is 2, expected 0 to 1"),
        (lambda: nn.AdditiveAttention(E, 3), "AdditiveAttention: embed_dim is 16, expected a multiple of num_heads 3"),
        (lambda: nn.AdditiveAttention(E, hidden_dim=0), "AdditiveAttention: hidden_dim is 0, expected 1 or more"),
        (lambda: nn.AdditiveAttention(E)(torch.zeros(2, E)), r"AdditiveAttention: query has shape \(2, 16\)"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ValueError, match="^" + text):
        make()


def test_caches_are_refused():
    module = nn.ThresholdAttention(E, H, batch_first=True)
    with pytest.raises(NotImplementedError, match=r"^ThresholdAttention: cache is given"):
        module(torch.randn(1, 2, E), cache=module.new_cache(1, 4))
