"""Labels of the denoiser: what they are, who loses them, and that a network without any is what
it was.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.labels import RewardLabels
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.rewards import SlotConsistency
from dia_lightning.samplers.networks import load_denoiser, load_labelled
from dia_lightning.training import DenoiserModule
from dia_lightning.types import Reward
from tests.diffusion.test_module import TINY, at, rows
from tests.oracles.in_parts import in_parts


class Number(Reward):
    """The number of characters."""

    name = "number"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(text)) for text in texts])


def module(lm_folder: Path, **options: Any) -> DenoiserModule:
    return DenoiserModule(
        str(lm_folder),
        **in_parts(
            DenoiserModule,
            **{**TINY, "label_reward": Number(), "label_edges": [11.0, 14.0], **options},
        ),
    )


def seen(embedding: TokenEmbedding) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, t = (
        torch.randn(4, 8, embedding.dim, generator=generator),
        torch.rand(4, 8, generator=generator),
    )
    return z, t, torch.randn(4, 8, embedding.dim, generator=generator)


def network(embedding: TokenEmbedding, n_labels: int) -> DenoiserNetwork:
    torch.manual_seed(0)
    size = NetworkSize(width=16, layers=2, heads=2, max_length=8)
    made = DenoiserNetwork(embedding, make_schedule("cosine"), size, n_labels=n_labels)
    for name, weight in made.named_parameters():
        if not name.startswith("labels"):
            torch.nn.init.normal_(
                weight, std=0.3, generator=torch.Generator().manual_seed(len(name))
            )
    return made.eval()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_labelled_network_begins_as_the_unlabelled_one(
    embedding: TokenEmbedding, autocast: bool
) -> None:
    """To the last bit, whatever the label; and the time is embedded as the whole of `time`
    would.
    """
    plain, labelled, (z, t, z0) = network(embedding, 0), network(embedding, 3), seen(embedding)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = plain(z, t, z0)
        for label in (None, torch.tensor([0, 1, 2, 3])):
            assert torch.equal(labelled(z, t, z0, label), want)
    assert "labels.weight" not in plain.state_dict()
    features = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        plain.trunk.time[1:](plain.trunk.time[0](features)), plain.trunk.time(features)
    )


def test_a_label_reaches_every_position_of_its_own_row_and_no_label_is_label_0(
    embedding: TokenEmbedding,
) -> None:
    net, (z, t, z0) = network(embedding, 3), seen(embedding)
    assert net.labels is not None
    torch.nn.init.normal_(net.labels.weight, std=1.0)
    with torch.no_grad():
        none, zero, some = (
            net(z, t, z0, x)
            for x in (None, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 0, 3]))
        )
    assert torch.equal(none, zero)
    assert torch.equal(some[[0, 2]], none[[0, 2]])
    assert bool(((some - none)[[1, 3]].abs().amax(-1) > 1e-3).all())


def test_labels_are_the_classes_between_the_edges() -> None:
    labeller = RewardLabels(Number(), [1.0, 3.0], 0.5)
    assert labeller(["", "a", "ab", "abc", "abcd", "a" * 99]).tolist() == [1, 1, 2, 2, 3, 3]
    assert labeller.settings() == {"n_labels": 3, "reward": "number", "edges": [1.0, 3.0]}


def test_a_share_loses_its_label_the_same_rows_however_they_are_cut(lm_folder: Path) -> None:
    """4,096 rows at 0.3: 7 standard errors are 0.05. Two processes and one; anew in every batch;
    none in validation.
    """
    model = at(module(lm_folder, label_drop=0.3), 0)
    assert model.labeller is not None
    batch = rows(4096)
    whole, full = model.labels(batch, 3), model.labels(batch)
    assert set(full.tolist()) == {1, 2, 3}
    assert torch.equal(full, model.labeller(model.lm.decode(batch["tokens"], batch["prompt_mask"])))
    dropped = whole == 0
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(whole[~dropped], full[~dropped])
    assert torch.equal(model.labels(batch, 3), whole)
    assert float(((model.labels(batch, 4) == 0) == dropped).float().mean()) == pytest.approx(
        0.58, abs=0.06
    )
    model._trainer.world_size = 2
    for rank in range(2):
        model._trainer.global_rank = rank
        part = model.labels({name: values[rank::2] for name, values in batch.items()}, 3)
        assert torch.equal(part, whole[rank::2])


def test_training_teaches_the_labels_of_its_rows_and_validation_sees_them_all(
    lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both passes of a self-conditioned step; the noise is what it is without labels."""
    model, given = module(lm_folder, label_drop=0.3), []
    torch.nn.init.normal_(model.network.trunk.time[2].weight, std=0.1)
    hidden = DenoiserNetwork.hidden

    def watch(self: DenoiserNetwork, *inputs: Any) -> tuple[Tensor, Tensor]:
        given.append(inputs)
        return hidden(self, *inputs)

    monkeypatch.setattr(DenoiserNetwork, "hidden", watch)
    for number in range(2):
        at(model, number).training_step(rows(), 0).backward()
    labels = [at(model, number).labels(rows(), number) for number in (0, 1, 1)]
    assert [inputs[3].tolist() for inputs in given] == [label.tolist() for label in labels]
    assert 0 in labels[0]
    assert torch.equal(
        given[0][0],
        at(DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY)), 0)
        .noised(rows(), 0)
        .z,
    )
    taught = model.network.labels.weight.grad.abs().sum(1) > 0
    assert taught.tolist() == [i in torch.cat(labels) for i in range(4)]
    given.clear()
    model.on_validation_epoch_start()
    model.validation_step(rows(), 0)
    assert all(torch.equal(inputs[3], model.labels(rows())) for inputs in given)


def test_it_goes_on_from_a_denoiser_without_labels_and_is_exported_with_them(
    lm_folder: Path, embedding: TokenEmbedding, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    unlabelled = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY))
    torch.nn.init.normal_(
        unlabelled.network.trunk.time[2].weight, std=0.1
    )  # zero as made: nothing would pass
    unlabelled.export(tmp_path / "plain")
    model = module(lm_folder, init_from=str(tmp_path / "plain"))
    plain = load_denoiser(str(tmp_path / "plain"), embedding)
    z, t, z0 = seen(embedding)
    assert torch.equal(model.network(z, t, z0, torch.tensor([1, 2, 3, 0])), plain(z, t, z0))
    torch.nn.init.normal_(model.network.labels.weight)
    model.export(tmp_path / "labelled")
    network, n_labels = load_labelled(str(tmp_path / "labelled"), embedding, "number")
    assert n_labels == 3
    label = torch.tensor([1, 2, 3, 0])
    assert torch.equal(network(z, t, z0, label), model.network(z, t, z0, label))
    assert not torch.equal(network(z, t, z0, label)[0], plain(z, t, z0)[0])
    again = module(lm_folder, init_from=str(tmp_path / "labelled"))
    assert torch.equal(again.network.labels.weight, model.network.labels.weight)
    with pytest.raises(UserError, match=r"init_from: .* does not fit"):
        module(lm_folder, init_from=str(tmp_path / "labelled"), label_edges=[11.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"label_edges": []}, r"edges: \[\] given"),
     ({"label_edges": [1.0, 1.0]}, r"edges: \[1.0, 1.0\] given"), ({"label_drop": 0.0},
      "drop: 0.0 given"),
     ({"label_drop": 1.0}, "drop: 1.0 given"),
     ({"label_reward": SlotConsistency()}, "reward: 'slots' given, .* compares with a record")],
)  # fmt: skip
def test_mistakes_are_named(lm_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        module(lm_folder, **options)
