"""MixtureOfAttention: what the balance loss is for."""

import pytest

torch = pytest.importorskip("torch")

from foveal.torch.nn import Mechanism, MixtureOfAttention  # noqa: E402


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_without_the_balance_loss_one_dies_and_with_it_none_does(gate):
    """The task is to give the token before; a mechanism that sees the token itself alone cannot help."""
    shares = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        module = MixtureOfAttention(16, 2, [Mechanism(window=(1, 0)), Mechanism(window=(0, 0))], gate=gate)
        optimizer = torch.optim.Adam(module.parameters(), 0.02)
        for _ in range(400):
            x = torch.randn(8, 10, 16)
            out, balance_loss = module(x)
            loss = (out[:, 1:] - x[:, :-1]).square().mean() + weight * balance_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        shares.append((module.usage() / module.usage().sum()).min().item())
    assert shares[0] < 0.1 < shares[1], shares  # dead: less than a tenth of the use
