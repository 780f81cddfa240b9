"""The network against p_θ itself, the exact likelihood term, and the losses against plain
arithmetic.
"""

import pytest
import torch
import torch.nn.functional as F

from dia_lightning.diffusion.attention import attend
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.loss import LOSSES, draw_times, noise, summed
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM


def network(embedding: TokenEmbedding, **size: int | bool) -> DenoiserNetwork:
    torch.manual_seed(0)
    made = DenoiserNetwork(
        embedding,
        make_schedule("cosine"),
        NetworkSize(**{"width": 16, "layers": 2, "heads": 2, "max_length": 8, **size}),
    )
    return made.eval()


@pytest.mark.parametrize("normalise", [True, False])
def test_init_from_lm_is_p_theta_when_attention_is_causal(
    lm: BaseLM, monkeypatch: pytest.MonkeyPatch, normalise: bool
) -> None:
    """With clean input, a causal mask put back, and rows of one norm or raw, the hidden states
    are the base model's own.
    """
    from copy import deepcopy

    model = deepcopy(lm.model)
    table = model.transformer.wte.weight
    if normalise:
        table.copy_(table / table.norm(dim=1, keepdim=True) * 3)
    embedding = TokenEmbedding(table, normalise=normalise)
    net = network(embedding)
    net.init_from_lm(model, lm.bos_id)
    tokens = torch.randint(1, lm.vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))
    want = model(F.pad(tokens[:, :-1], (1, 0), value=lm.bos_id)).logits
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: sdpa(q, k, v, is_causal=True)
    )
    hidden, query = net.hidden(embedding(tokens), torch.zeros(3, 8))
    torch.testing.assert_close(net.head(hidden), want, atol=1e-4, rtol=1e-4)
    assert bool(
        (net.readout(hidden, query).argmax(-1) == tokens).all()
    )  # what is clean is read off


def test_init_from_lm_says_what_fits(lm: BaseLM, embedding: TokenEmbedding) -> None:
    with pytest.raises(UserError, match=r"init_from_lm.*\(16, 2\)"):
        network(embedding, heads=4).init_from_lm(lm.model, lm.bos_id)
    with pytest.raises(UserError, match="multiples of 2"):
        NetworkSize(width=18, heads=4)


@pytest.mark.parametrize("seen", [None, torch.ones(7, 7, dtype=torch.bool).tril()])
def test_attention_in_bf16_is_sdpa(seen: torch.Tensor | None) -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=seen is not None
    )
    torch.testing.assert_close(attend(q, k, v, seen).float(), want, atol=0.03, rtol=0.03)
    torch.testing.assert_close(attend(q.float(), k.float(), v.float(), seen), want)


def test_attention_looks_both_ways(embedding: TokenEmbedding) -> None:
    net = network(embedding)
    z, t = (
        torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)),
        torch.full((1, 8), 0.9),
    )
    other = z.clone()
    other[0, -1] += 1
    assert not torch.allclose(net(z, t)[0, 0], net(other, t)[0, 0])


@pytest.mark.parametrize("rotary", [False, True])
def test_positions_are_told_apart(embedding: TokenEmbedding, rotary: bool) -> None:
    net = network(embedding, rotary=rotary)
    z = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    t = torch.full((1, 8), 0.9)
    hidden, _ = net.hidden(z, t)
    swapped, _ = net.hidden(z[:, [0, 2, 1, 3, 4, 5, 6, 7]], t)
    assert not torch.allclose(hidden[0, 0], swapped[0, 0], atol=1e-6)


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("normalise", [True, False])
def test_likelihood_term_is_the_exact_posterior_under_a_flat_prior(
    lm: BaseLM, normalise: bool, tied_head: bool
) -> None:
    """With a head that says nothing, softmax(logits) is p(x | z) for a uniform token, at every σ
    ≥ 0.1; raw rows too.
    """
    embedding = TokenEmbedding(
        lm.embedding_table() * torch.linspace(0.5, 2, lm.vocab_size)[:, None], normalise=normalise
    )
    net = network(embedding)
    net = DenoiserNetwork(embedding, net.schedule, net.size, tied_head)
    torch.nn.init.zeros_(net.head.weight)
    t = torch.tensor([[0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]])
    z = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)) * 2
    alpha, sigma = net.schedule.alpha(t), net.schedule.sigma(t)
    distance = (z[:, :, None] - alpha[..., None, None] * embedding.weight).square().sum(-1)
    want = torch.softmax(-distance / (2 * sigma[..., None] ** 2), -1)
    torch.testing.assert_close(net(z, t).softmax(-1), want, atol=1e-5, rtol=1e-4)


def test_rows_of_one_norm_are_read_out_as_ever(embedding: TokenEmbedding) -> None:
    """Bit for bit: checkpoints from before raw rows were known keep their texts."""
    net, (z, t) = network(embedding), (torch.randn(1, 8, 16), torch.linspace(0.1, 1, 8)[None])
    hidden, query = net.hidden(z, t)
    alpha, sigma = net.schedule.alpha(t), net.schedule.sigma(t)
    assert torch.equal(query, (alpha / sigma.square().clamp_min(1e-2))[..., None] * z)
    assert torch.equal(
        net.readout(hidden, query), net.head(hidden).float() + (query @ embedding.weight.T).float()
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_loss_in_chunks_is_the_plain_one_with_its_gradients(
    embedding: TokenEmbedding,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    autocast: bool,
    tied_head: bool,
    normalise: bool,
) -> None:
    embedding = TokenEmbedding(
        embedding.weight * torch.linspace(0.5, 2, embedding.vocab_size)[:, None],
        normalise=normalise,
    )
    net = network(embedding)
    net = DenoiserNetwork(embedding, net.schedule, net.size, tied_head)
    generator = torch.Generator().manual_seed(0)
    hidden, query = (
        torch.randn(37, width, generator=generator)
        for width in (net.size.width, 16 if normalise else 17)
    )
    targets, t = (
        torch.randint(0, embedding.vocab_size, (37,), generator=generator),
        torch.rand(37, generator=generator),
    )
    leaf = hidden.requires_grad_()
    wanted = [leaf, *net.head.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = LOSSES[name](net, leaf, query, targets, t)
        want = torch.autograd.grad(0.5 * plain.sum(), wanted)
        monkeypatch.setattr(
            "dia_lightning.diffusion.loss._LOGITS_PER_CHUNK", 5 * embedding.vocab_size
        )
        total, values = summed(LOSSES[name], net, leaf, query, targets, t)
        with torch.no_grad():
            assert torch.equal(values, summed(LOSSES[name], net, leaf, query, targets, t)[1])
    assert not values.requires_grad
    torch.testing.assert_close(values, plain.detach())
    torch.testing.assert_close(total, plain.sum(), rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(torch.autograd.grad(0.5 * total, wanted), want, strict=True):
        # bfloat16 has 8 bits, and each chunk's share is rounded to them.
        error = (gradient - expected).abs().max() / expected.abs().max()
        assert error < (0.02 if autocast else 1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_cross_entropy_is_minus_the_targets_log_probability(
    embedding: TokenEmbedding, normalise: bool
) -> None:
    embedding = TokenEmbedding(
        embedding.weight * torch.linspace(0.5, 2, embedding.vocab_size)[:, None],
        normalise=normalise,
    )
    net = network(embedding)
    hidden, query = torch.randn(37, net.size.width), torch.randn(37, 16 if normalise else 17)
    targets = torch.randint(0, embedding.vocab_size, (37,))
    want = -(net.readout(hidden, query).log_softmax(-1)[torch.arange(37), targets])
    torch.testing.assert_close(LOSSES["ce"](net, hidden, query, targets, torch.ones(37)), want)


@pytest.mark.parametrize("normalise", [True, False])
def test_losses_by_hand(embedding: TokenEmbedding, normalise: bool) -> None:
    """eps and x0 from their definitions: ‖ε − ε_ψ‖² and ‖z_0 − ẑ_0‖², means over coordinates."""
    embedding = TokenEmbedding(
        embedding.weight * torch.linspace(0.5, 2, embedding.vocab_size)[:, None],
        normalise=normalise,
    )
    net = network(embedding)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, embedding.vocab_size, (2, 8), generator=generator)
    t, eps = torch.full((2, 8), 0.6), torch.randn(2, 8, 16, generator=generator)
    noised = noise(
        tokens,
        t,
        torch.zeros(2, 8, dtype=torch.bool),
        torch.arange(2),
        embedding,
        net.schedule,
        eps,
    )
    hidden, query = net.hidden(noised.z, noised.t)
    z0 = embedding.expected(net.readout(hidden, query))
    alpha, sigma = net.schedule.alpha(t)[..., None], net.schedule.sigma(t)[..., None]
    eps_net = (noised.z - alpha * z0) / sigma
    flat = (hidden.flatten(0, 1), query.flatten(0, 1), tokens.flatten(), t.flatten())
    torch.testing.assert_close(
        LOSSES["eps"](net, *flat), (eps - eps_net).square().mean(-1).flatten(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        LOSSES["x0"](net, *flat), (embedding(tokens) - z0).square().mean(-1).flatten()
    )


def test_noise_leaves_clean_what_is_clean(embedding: TokenEmbedding) -> None:
    tokens = torch.randint(
        0, embedding.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0)
    )
    t = torch.full((2, 8), 0.7)
    t[:, 0] = 0
    ends = torch.zeros(2, 8, dtype=torch.bool)
    ends[:, -2:] = True
    noised = noise(
        tokens,
        t,
        ends,
        torch.tensor([4, 7]),
        embedding,
        make_schedule("cosine"),
        torch.ones(2, 8, 16),
    )
    assert noised.noised.tolist() == [[False] + [True] * 5 + [False] * 2, [False] + [True] * 7]
    assert torch.equal(noised.z[~noised.noised], embedding(tokens)[~noised.noised])
    schedule = make_schedule("cosine")
    want = schedule.alpha(t[0, 1]) * embedding(tokens)[0, 1] + schedule.sigma(t[0, 1])
    torch.testing.assert_close(noised.z[0, 1], want)


def test_training_times_cover_every_use() -> None:
    """Rows with one time, with a clean prefix, with clean positions anywhere, with times rising
    to the right.
    """
    times = draw_times(4000, 12, make_schedule("cosine"), torch.Generator().manual_seed(0))
    assert times.shape == (4000, 12)
    assert bool(((times >= 0) & (times <= 1)).all())
    one = (times == times[:, :1]).all(1).float().mean()
    moving = times > 0
    rising = ((times.diff(dim=1) >= 0).all(1) & ~(times == times[:, :1]).all(1)).float().mean()
    holes = ((moving.float().diff(dim=1) < 0).any(1)).float().mean()
    inside = moving[:, 1:-1].any(1) & ~moving[:, 0] & ~moving[:, -1]
    one_run = (moving.float().diff(dim=1) > 0).sum(1) == 1
    hidden_span = (inside & one_run & (torch.where(moving, times, 1.0) == 1).all(1)).float().mean()
    # Shares 0.15 at one time; 0.35 staggered and 0.1 with a clean prefix; 0.1 scattered and 0.3
    # spans, of which some touch an end of the row; bounds leave 7 standard errors of 4,000 rows
    # (0.05).
    assert 0.1 < one < 0.3
    assert 0.35 < rising < 0.7
    assert 0.15 < holes < 0.45
    assert 0.03 < hidden_span < 0.15


def test_rows_of_mixed_lengths_come_out_alone_as_in_a_batch(embedding: TokenEmbedding) -> None:
    """Texts of 2 to 8 tokens after prompts of 0 to 4, each alone at its own place in the row, to
    1e-5.
    """
    net, generator = network(embedding), torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (6, 8), generator=generator)
    lengths, prompts = torch.tensor([2, 3, 8, 5, 4, 7]), torch.tensor([0, 1, 4, 2, 3, 0])
    place = torch.arange(8)
    tokens = torch.where(place < lengths[:, None], tokens, 0)
    t = torch.where(place < prompts[:, None], 0.0, torch.rand(6, 8, generator=generator))
    z = embedding(tokens) + t[..., None] * torch.randn(6, 8, 16, generator=generator)
    singles = torch.cat([net(z[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(net(z, t), singles, atol=1e-5, rtol=1e-5)
