"""One level, three roles: an optimizer, a layer, and another level's learning rule."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import nestopt
from nestopt.core import scan
from nestopt.levels import momentum, titans
from nestopt.parts import Mlp

Array = npt.NDArray[np.float64]
BETA = 0.9


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of a regression from images to the sine of their row sums, by backpropagation."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 1, 6, 6, generator=generator, dtype=torch.float64)
    target = images.sum(dim=(1, 3)).sin()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(images) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 6)
    ).double()


def linear_attention_by_hand(q: Tensor, k: Tensor, v: Tensor, decay: float) -> Tensor:
    """M ← decay · M + v kᵀ, y = M q, token by token; q, k, v `[B, T, H, D]`."""
    y = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            memory = torch.zeros(v.shape[3], k.shape[3], dtype=torch.float64)
            for t in range(q.shape[1]):
                memory = decay * memory + v[b, t, h][:, None] * k[b, t, h][None, :]
                y[b, t, h] = memory @ q[b, t, h]
    return y


def titans_by_hand(q: Array, k: Array, v: Array, eta: Array, alpha: Array, w1: Array, w2: Array, beta: float) -> Array:
    """One sequence and head of Titans (Behrouz et al. 2025), the gradients derived by hand.

    With z = W2 k, a = silu(z) and the error e = k + W1 a - v of the loss ½‖e‖²: ∂W1 = e aᵀ and
    ∂W2 = ((W1ᵀ e) ⊙ silu'(z)) kᵀ. Then S ← β S + η ∂W, W ← α W - S, and the read is q + W1 silu(W2 q).
    """
    s1, s2, ys = np.zeros_like(w1), np.zeros_like(w2), []
    for t in range(len(q)):
        z = w2 @ k[t]
        sigma = 1 / (1 + np.exp(-z))
        error = k[t] + w1 @ (z * sigma) - v[t]
        grad1 = np.outer(error, z * sigma)
        grad2 = np.outer((w1.T @ error) * sigma * (1 + z * (1 - sigma)), k[t])
        s1, s2 = beta * s1 + eta[t] * grad1, beta * s2 + eta[t] * grad2
        w1, w2 = alpha[t] * w1 - s1, alpha[t] * w2 - s2
        z = w2 @ q[t]
        ys.append(q[t] + w1 @ (z / (1 + np.exp(-z))))
    return np.stack(ys)


def test_one_momentum_is_an_optimizer_a_layer_and_a_rule() -> None:
    level = momentum(BETA)
    exact = {"rtol": 0, "atol": 1e-12}

    # as an optimizer: torch.optim.SGD
    ours, theirs = network(), network()
    losses = train(ours, nestopt.optimizer(ours, level, lr=0.05), steps=25)
    torch.testing.assert_close(
        losses, train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=BETA), steps=25), **exact
    )
    assert losses[-1] < 0.5 * losses[0]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **exact)

    # as a layer: linear attention with decay, by its fast form, by the reference machine, and as a module
    q, k, v = (torch.randn(2, 70, 3, width, dtype=torch.float64) for width in (4, 4, 5))
    wanted = linear_attention_by_hand(q, k, v, BETA)
    torch.testing.assert_close(nestopt.ops.run(level, q, k, v)[0], wanted, **exact)
    torch.testing.assert_close(scan(level, q, k, v)[0], wanted, **exact)
    layer = nestopt.layer(level, dim=12, heads=3, conv=0, out_norm=False).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = ((x @ part.weight.detach().T).reshape(2, 9, 3, 4) for part in (layer.query, layer.key, layer.value))
    wanted = linear_attention_by_hand(q, k, v, BETA).reshape(2, 9, 12) @ layer.out.weight.detach().T
    torch.testing.assert_close(layer(x)[0].detach(), wanted, **exact)

    # as the rule of another level: the momentum S inside Titans
    memory = titans(memory=Mlp(), rule=level, chunk=1, normalized=False, forget="all")  # the letter of the equation
    q, k, v = (torch.randn(2, 8, 3, 5, dtype=torch.float64) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    eta, alpha = 0.2 * torch.rand(2, 8, 3, dtype=torch.float64), 1 - 0.2 * torch.rand(2, 8, 3, dtype=torch.float64)
    starts = [memory.learned_start(5, 5) for _ in range(3)]
    learned = {name: torch.stack([start[name] for start in starts]).double() for name in ("W1", "W2")}
    y, state = nestopt.ops.run(memory, q, k, v, gates={"lr": eta, "retention.keep": alpha}, learned=learned)
    for b in range(2):
        for h in range(3):
            rows = (x[b, :, h].numpy() for x in (q, k, v, eta, alpha))
            by_hand = titans_by_hand(*rows, learned["W1"][h].numpy(), learned["W2"][h].numpy(), BETA)
            np.testing.assert_allclose(y[b, :, h].numpy(), by_hand, rtol=0, atol=1e-12)
    assert set(state["level"]["rule"]["W1"]) == {"momentum"}

    # three roles, one object, unchanged
    assert memory.rule is level
    assert level == momentum(BETA)
