"""The infiller: p_θ itself on the left, what each state may know, and training."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from dia_lightning.callbacks import Export
from dia_lightning.diffusion.checkpoint import save_network
from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.loss import draw_gaps
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers.networks import load_denoiser
from dia_lightning.sampling.infill import Infill
from dia_lightning.training import DenoiserModule
from tests.oracles.in_parts import in_parts

SIZE = {"width": 16, "layers": 1, "heads": 2, "max_length": 16, "trunk": "infiller"}
T = 10


def infiller(lm: BaseLM, normalise: bool = True, moved: bool = False) -> DenoiserNetwork:
    """As training begins with it, or with every parameter moved away from there."""
    torch.manual_seed(0)
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer), normalise)
    network = DenoiserNetwork(
        embedding, make_schedule("cosine"), NetworkSize(**SIZE), model=lm.model
    )
    network.init_from_lm(lm.model, lm.bos_id)
    if moved:
        with torch.no_grad():
            for parameter in network.trunk.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
    return network.eval().requires_grad_(False)


def texts(lm: BaseLM, n: int = 3, length: int = T) -> Tensor:
    """Without an end."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, lm.vocab_size, (n, length), generator=generator)


@pytest.fixture(params=["gpt2", "llama", "head with a bias"])
def base(request: pytest.FixtureRequest, lm: BaseLM, llama: BaseLM) -> BaseLM:
    if request.param == "head with a bias":
        model = deepcopy(llama.model)
        model.lm_head.bias = torch.nn.Parameter(torch.randn(llama.vocab_size))
        return BaseLM(model, llama.tokenizer)
    return lm if request.param == "gpt2" else llama


@pytest.mark.parametrize("normalise", [True, False])
def test_untrained_it_is_p_theta_given_the_left(base: BaseLM, normalise: bool) -> None:
    """Whatever is hidden on the right: with p_θ's text given, and found in clean rows."""
    network, tokens = infiller(base, normalise), texts(base)
    want = base.model(F.pad(tokens[:, :-1], (1, 0), value=base.bos_id)).logits
    z, t = network.embedding(tokens), torch.zeros(3, T)
    for level in (0.0, 0.5, 1.0):
        t[:, 4:] = level
        given = network.head(network.hidden(z, t, left=tokens)[0])
        torch.testing.assert_close(given, want, atol=1e-4, rtol=1e-4)
        found = network.head(network.hidden(z, t)[0])
        torch.testing.assert_close(found[:, :5], want[:, :5], atol=1e-4, rtol=1e-4)
    assert (found[:, 5:] - want[:, 5:]).abs().max() > 0.01  # of hidden tokens p_θ is not told


def test_a_state_knows_the_left_and_what_is_not_hidden_on_the_right(base: BaseLM) -> None:
    network, tokens = infiller(base, moved=True), texts(base, 1)
    hidden = torch.zeros(1, T, dtype=torch.bool)
    hidden[:, 4:7] = True

    def states(left: Tensor, right: Tensor) -> Tensor:
        z = torch.where(hidden[..., None], 0.0, network.embedding(right))
        return network.hidden(z, hidden.float(), left=left)[0][0]

    before = states(tokens, tokens)
    for i in range(T):
        other = tokens.clone()
        other[0, i] = (tokens[0, i] + 7) % base.vocab_size
        moved = [(states(*rows) - before).abs().amax(-1) > 1e-4 for rows in (
            (other, tokens), (tokens, other),
        )]  # fmt: skip
        assert moved[0].tolist() == [j > i for j in range(T)]  # on the left
        assert moved[1].tolist() == [j < i and not hidden[0, i] for j in range(T)]


def test_noise_on_the_right_is_read(base: BaseLM) -> None:
    network, tokens = infiller(base, moved=True), texts(base, 1)
    t = torch.zeros(1, T)
    t[:, 4:] = 0.5
    z = network.embedding(tokens)
    before, at = network.hidden(z, t, left=tokens)[0], torch.arange(T)
    z = z.clone()
    z[:, 6] += 1
    after = network.hidden(z, t, left=tokens)[0]
    assert ((after - before).abs().amax(-1)[0] > 1e-4).equal(at < 6)
    estimate = torch.zeros_like(z)
    estimate[:, 6] = 1
    again = network.hidden(z, t, estimate, left=tokens)[0]
    assert ((again - after).abs().amax(-1)[0] > 1e-4).equal(at < 6)


def test_a_label_is_read_at_every_position(base: BaseLM) -> None:
    unlabelled, tokens = infiller(base, moved=True), texts(base, 1)
    network = DenoiserNetwork(
        unlabelled.embedding, unlabelled.schedule, unlabelled.size, n_labels=2, model=base.model
    )
    network.load_state_dict(unlabelled.state_dict(), strict=False)
    z, t, label = network.embedding(tokens), torch.full((1, T), 0.5), torch.tensor([2])
    plain = unlabelled.hidden(z, t, left=tokens)[0]
    torch.testing.assert_close(network.hidden(z, t, None, label, tokens)[0], plain)
    with torch.no_grad():
        network.labels.weight[2] = torch.linspace(-1, 1, 16)
    moved = network.hidden(z, t, None, label, tokens)[0] - plain
    assert bool((moved.abs().amax(-1) > 1e-4).all())
    torch.testing.assert_close(network.hidden(z, t, None, label - 1, tokens)[0], plain)


def test_blocks_run_again_in_the_backward_pass_make_the_same_gradients(base: BaseLM) -> None:
    network, tokens = infiller(base, moved=True).requires_grad_(True), texts(base)
    z, t = network.embedding(tokens), torch.full((3, T), 0.5)
    found = []
    for again in (False, True):
        network.trunk.checkpointed = again
        network.zero_grad()
        network.hidden(z, t, left=tokens)[0].square().mean().backward()
        gradients = {k: v.grad.clone() for k, v in network.trunk.named_parameters()}
        found.append(gradients)
    assert not [
        k for k, v in found[0].items() if not bool(v.abs().max() > 0) and k != "z0_in.weight"
    ]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("window", [(2, 4), (4, 6), (5, 6)])
def test_a_row_says_the_same_however_long_it_is(base: BaseLM, window: tuple[int, int]) -> None:
    """Filled up with end tokens, where its own end is known."""
    network, tokens = infiller(base, moved=True), texts(base)
    first, end = window
    tokens[:, 6:] = base.end_id
    found = []
    for length in (7, 8, T):
        row, t = tokens[:, :length], torch.zeros(3, length)
        t[:, first:end] = 1.0
        z = torch.where((t > 0)[..., None], 0.0, network.embedding(row))
        found.append(network.hidden(z, t, left=row)[0][:, :7])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


def test_gaps_are_up_to_sixteen_long_and_apart() -> None:
    schedule = make_schedule("cosine")
    times = draw_gaps(2000, 41, schedule, torch.Generator().manual_seed(0))
    lengths, levels = [], []
    for row in times:
        runs = "".join("x" if t > 0 else " " for t in row.tolist()).split(" ")
        lengths += [len(run) for run in runs[:-1] if run]  # the last may be cut
        levels += [row.max()] if row.max() > 0 else []
        assert len(row[row > 0].unique()) <= 1
    assert set(lengths) == set(range(1, 17))
    assert abs(lengths.count(1) / len(lengths) - 0.245) < 0.03  # log 2 / log 17
    share = sum(float(level) == 1 for level in levels) / len(levels)
    assert abs(share - 0.6) < 0.04
    assert abs(len(levels) / 2000 - 2 / 3) < 0.04


def module_of(folder: Path, **options: Any) -> DenoiserModule:
    return DenoiserModule(**in_parts(DenoiserModule, base_lm=str(folder), **{**SIZE, **options}))


class Repeated(L.LightningDataModule):
    """Texts a b a b of two random tokens: what comes first is known from the right alone."""

    max_length = 5

    def __init__(self, end_id: int) -> None:
        super().__init__()
        pairs = torch.randint(1, 20, (2048, 2), generator=torch.Generator().manual_seed(0))
        ends = torch.full((2048, 1), end_id)
        self.tokens = torch.cat([pairs, pairs, ends], 1)

    def train_dataloader(self) -> DataLoader[Any]:
        rows = [
            {"tokens": row, "prompt_mask": torch.zeros(5, dtype=torch.bool)} for row in self.tokens
        ]
        return DataLoader(rows, batch_size=64)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


@pytest.mark.parametrize("kind", ["lm_folder", "llama_folder"])
def test_it_learns_what_only_the_right_side_knows(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """What is written then is read again, and has nothing of p_θ in it."""
    folder = request.getfixturevalue(kind)
    module = module_of(folder, lr=1e-2, warmup_steps=10, time_warp=20, max_length=5)
    lm, begin = module.lm, {k: v.clone() for k, v in module.lm.model.state_dict().items()}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=400, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[Export(str(tmp_path / "denoiser"))], max_epochs=-1, limit_val_batches=2,
    )  # fmt: skip
    data = Repeated(lm.end_id)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val/loss_filled"]) < math.log(19)
    assert all(torch.equal(v, begin[k]) for k, v in lm.model.state_dict().items())
    network = load_denoiser(str(tmp_path / "denoiser"), module.embedding, lm)
    infill, first = Infill(lm, network), torch.zeros(256, dtype=torch.int64)
    log_q = infill.log_prob(data.tokens[:256], first, 1, data.tokens[:256, None, :1])
    assert float(-log_q.mean()) < 0.5 * math.log(19)
    tokens = texts(lm, 2, 5)
    z, t = module.embedding(tokens), torch.full((2, 5), 0.5)
    torch.testing.assert_close(network(z, t), module.network.eval()(z, t))
    base = {weight.data_ptr() for weight in lm.model.parameters()}
    held = network.state_dict()
    assert not base & {weight.data_ptr() for weight in held.values()}
    assert not [name for name in held if name.startswith(("trunk.lm", "trunk.embedding", "head"))]


def test_another_model_with_the_same_embeddings_is_refused(
    lm: BaseLM, lm_folder: Path, tmp_path: Path
) -> None:
    module = module_of(lm_folder)
    save_network(module.network, module.settings(), tmp_path)
    tuned = BaseLM(deepcopy(lm.model), lm.tokenizer)
    load_denoiser(str(tmp_path), module.embedding, tuned)
    with torch.no_grad():
        tuned.model.transformer.h[1].mlp.c_fc.weight += 0.1 * torch.randn(16, 64)
    with pytest.raises(UserError, match=r"^denoiser: .* reads the left with another base model"):
        load_denoiser(str(tmp_path), module.embedding, tuned)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["size"]["trunk"] == "infiller"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trunk": "unknown"}, "trunk: 'unknown' given, allowed: bidirectional, infiller"),
        ({"adapter_rank": 2}, "adapter_rank: 2 given, allowed: 0 with trunk: infiller"),
        ({"rotary": True}, "rotary: True given, allowed: False with trunk: infiller"),
        ({"tied_head": True}, "tied_head: true given, allowed: false; with trunk: infiller"),
        ({"loss": "eps"}, "loss: 'eps' given, allowed: ce, with trunk: infiller"),
        ({"init_from": "random"}, "init_from: random given, allowed: base_lm or a denoiser"),
    ],
)
def test_options_that_an_infiller_does_not_have_are_refused(
    lm_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        module_of(lm_folder, **options)


def test_it_is_a_denoiser_with_a_base_model(embedding: TokenEmbedding) -> None:
    schedule, size = make_schedule("cosine"), NetworkSize(**SIZE)
    with pytest.raises(UserError, match=r"trunk: 'infiller' given, .*for a critic"):
        CriticNetwork(embedding.dim, schedule, size)
    with pytest.raises(UserError, match="trunk: infiller given, allowed: with the base model"):
        DenoiserNetwork(embedding, schedule, size)
    headless = type("Headless", (), {"get_output_embeddings": lambda self: None})()
    with pytest.raises(UserError, match="allowed: bidirectional; base_lm is a Headless"):
        DenoiserNetwork(embedding, schedule, size, model=headless)
