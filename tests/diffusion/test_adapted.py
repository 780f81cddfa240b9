"""p_θ's own blocks in denoiser and critic: against p_θ and transformers' layers, and never
changed.
"""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dia_lightning.callbacks import Export, WeightEMA
from dia_lightning.data import ModelSamples
from dia_lightning.diffusion.adapted import (
    AdaptedBlock,
    AdaptedLinear,
    AdaptedTrunk,
    FrozenLinear,
    Shared,
)
from dia_lightning.diffusion.checkpoint import save_network
from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.meter import Meter
from dia_lightning.samplers import Chains, DenoiseAccept, Diffusion, GuidedSamplerModule
from dia_lightning.samplers.networks import load_critic, load_denoiser
from dia_lightning.training import CriticModule, DenoiserModule
from dia_lightning.types import Batch, Reward
from tests.oracles.in_parts import in_parts

SIZE: dict[str, int] = {"width": 16, "layers": 2, "heads": 4, "max_length": 12, "adapter_rank": 3}
MATRICES = ("q", "k", "v", "out", "gate", "up", "down")


class Long(Reward):
    name = "long"

    def __call__(self, texts: Any) -> Tensor:
        return torch.tensor([float(len(text)) for text in texts])


def embedding_of(lm: BaseLM, normalise: bool = True) -> TokenEmbedding:
    return TokenEmbedding(lm.embedding_table(), len(lm.tokenizer), normalise)


def denoiser(lm: BaseLM, normalise: bool = True, **size: int) -> DenoiserNetwork:
    """As training begins with it."""
    torch.manual_seed(0)
    network = DenoiserNetwork(
        embedding_of(lm, normalise),
        make_schedule("cosine"),
        NetworkSize(**{**SIZE, **size}),
        model=lm.model,
    )
    network.init_from_lm(lm.model, lm.bos_id)
    return network.eval()


def trained(network: Any) -> Any:
    """With every parameter moved away from where it began."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.requires_grad_(False)


def noised(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, 16, generator=generator), torch.rand(3, 8, generator=generator)


# The computation


def test_untrained_it_is_p_theta_given_the_left(llama: BaseLM) -> None:
    """On clean raw input the head reads p_θ's own logits off the states, and what is clean is
    read off.
    """
    network = denoiser(llama, normalise=False)
    tokens = torch.randint(1, llama.vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))
    want = llama.model(F.pad(tokens[:, :-1], (1, 0), value=llama.bos_id)).logits
    hidden, query = network.hidden(network.embedding(tokens), torch.zeros(3, 8))
    torch.testing.assert_close(network.head(hidden), want, atol=1e-4, rtol=1e-4)
    assert bool((network.readout(hidden, query).argmax(-1) == tokens).all())


def attention_to_the_right(
    block: AdaptedBlock, layer: Any, h: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """Position by position, head by head, with the layer's own matrices."""
    out = torch.zeros(*h.shape[:2], 16)
    own = layer.self_attn
    q, k, v = (
        (h @ part.weight.T).unflatten(-1, (-1, 4)).transpose(1, 2)
        for part in (own.q_proj, own.k_proj, own.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rope)
    for head in range(4):
        of = head * k.shape[1] // 4
        for i in range(h.shape[1]):
            attention = (q[:, head, i : i + 1] @ k[:, of, i:].mT / 2).softmax(-1)
            out[:, i, 4 * head : 4 * head + 4] = (attention @ v[:, of, i:])[:, 0]
    return out @ block.right.down.weight.T @ block.right.up.weight.T


def test_a_block_is_transformers_layer_with_a_view_to_the_right(llama: BaseLM) -> None:
    """Around transformers' own causal attention and MLP."""
    layer = llama.model.model.layers[1]
    block, generator = AdaptedBlock(layer, 3), torch.Generator().manual_seed(0)
    for new in block.right.parameters():
        torch.nn.init.normal_(new, generator=generator)
    block.requires_grad_(False)
    x = torch.randn(2, 6, 16, generator=generator)
    rope = llama.model.model.rotary_emb(x, torch.arange(6)[None])
    h = layer.input_layernorm(x)
    attended, _ = layer.self_attn(hidden_states=h, position_embeddings=rope, attention_mask=None)
    want = x + attended + attention_to_the_right(block, layer, h, rope)
    want = want + layer.mlp(layer.post_attention_layernorm(want))
    torch.testing.assert_close(block(x, rope), want, atol=1e-3, rtol=1e-3)


def test_adapters_are_a_sum_of_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    source, x = torch.nn.Linear(7, 5, bias=False), torch.randn(2, 4, 7, generator=generator)
    linear, weight = AdaptedLinear(source, 2), source.weight
    assert torch.equal(linear(x), F.linear(x, weight))  # until it has learned
    torch.nn.init.normal_(linear.low.up.weight, generator=generator)
    torch.testing.assert_close(
        linear(x), F.linear(x, weight + linear.low.up.weight @ linear.low.down.weight)
    )


def test_adapters_are_p_theta_with_other_matrices(llama: BaseLM) -> None:
    """Every adapter at its place: the same network without adapters over a p_θ into which they
    were merged.
    """
    network, merged = trained(denoiser(llama)), deepcopy(llama.model)
    with torch.no_grad():
        for block, layer in zip(network.trunk.blocks, merged.model.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            sources = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            for name, source in zip(
                MATRICES, (*sources, mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True
            ):
                source.weight += (
                    block.linear[name].low.up.weight @ block.linear[name].low.down.weight
                )
    other = DenoiserNetwork(network.embedding, network.schedule, NetworkSize(**SIZE), model=merged)
    state = network.state_dict()
    other.load_state_dict(
        {name: torch.zeros_like(w) if ".low.up.weight" in name else w for name, w in state.items()}
    )
    torch.testing.assert_close(network(*noised()), other(*noised()), atol=1e-4, rtol=1e-4)


def test_trained_it_looks_both_ways_and_knows_places(llama: BaseLM) -> None:
    """Untrained, what stands on the right says nothing."""
    (z, t), first = noised(), slice(0, 1)
    t = torch.full_like(t, 0.9)
    other, swapped = z.clone(), z[:, [0, 2, 1, 3, 4, 5, 6, 7]]
    other[:, -1] += 1
    for network, looks in ((denoiser(llama), False), (trained(denoiser(llama)), True)):
        for changed in (other, swapped):
            same = torch.allclose(
                network.hidden(z, t)[0][:, first],
                network.hidden(changed, t)[0][:, first],
                atol=1e-4,
            )
            assert same is not looks
        # The last state knows of all but its own token.
        assert not torch.allclose(
            network.hidden(z, t)[0][:, -1], network.hidden(swapped, t)[0][:, -1], atol=1e-3
        )


def test_what_is_absent_is_an_average_token(llama: BaseLM) -> None:
    """The blocks read (1 − α) of the tokens' mean, as long as a token, where noise has taken α
    away.
    """
    network, table = denoiser(llama), llama.embedding_table()
    (z, _), seen = noised(), []
    network.trunk.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for t in (0.0, 1.0):
        network(z, torch.full(z.shape[:2], t))
    mean = table.mean(0)
    absent = mean * (table.norm(dim=1).mean() / mean.norm())
    torch.testing.assert_close(seen[0][:, 1:], z * network.embedding.unit)
    torch.testing.assert_close(seen[1][:, 1:], absent.expand(3, 8, 16), atol=1e-2, rtol=0)
    assert torch.equal(seen[0][:, 0], table[llama.bos_id].expand(3, 16))


@pytest.mark.parametrize("normalise", [True, False])
def test_what_z_says_of_its_own_token_is_exact_in_bfloat16_too(
    llama: BaseLM, normalise: bool
) -> None:
    """The log-likelihood of z_i is added in float32: of raw rows it is the difference of two
    large numbers.
    """
    low = BaseLM(deepcopy(llama.model).bfloat16(), llama.tokenizer)
    network = denoiser(low, normalise)
    z, t = noised()
    t = t.clamp_min(0.1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden, query = network.hidden(z, t)
        assert hidden.dtype == torch.float32  # what all blocks add up
        got, prior = network.readout(hidden, query), network.head(hidden)
    assert (got.dtype, prior.dtype) == (torch.float32, torch.bfloat16)
    alpha, sigma = network.schedule.alpha(t), network.schedule.sigma(t)
    distance = (z[:, :, None] - alpha[..., None, None] * network.embedding.weight).square().sum(-1)
    likelihood = -distance / (2 * sigma[..., None] ** 2)
    torch.testing.assert_close(
        got.log_softmax(-1), (prior.float() + likelihood).log_softmax(-1), atol=2e-3, rtol=1e-4
    )


def test_in_bfloat16_it_is_nearly_what_it_is_in_float32(llama: BaseLM) -> None:
    low = BaseLM(deepcopy(llama.model).bfloat16(), llama.tokenizer)
    high = trained(denoiser(llama))
    network = trained(denoiser(low))
    assert network.trunk.blocks[0].linear["q"].weight.dtype == torch.bfloat16
    network.load_state_dict(high.state_dict())
    off = network.hidden(*noised())[0] - high.hidden(*noised())[0]
    assert 0 < off.norm() < 0.03 * high.hidden(*noised())[0].norm()


# What is stored


def test_no_weight_of_p_theta_is_stored_and_all_are_shared(llama: BaseLM) -> None:
    network, base = denoiser(llama), {weight.data_ptr() for weight in llama.model.parameters()}
    kept = {
        re.sub(r"\d+", "N", name)
        for name in network.state_dict()
        if name.startswith("trunk.blocks")
    }
    low_rank = {*(f"linear.{name}.low" for name in MATRICES), "right"}
    assert kept == {
        f"trunk.blocks.N.{name}.{part}.weight" for name in low_rank for part in ("down", "up")
    }
    around = {name for name in network.state_dict() if not name.startswith("trunk.blocks")}
    inputs = {"trunk.unit", "trunk.z0_in", "trunk.start", "trunk.absent"}
    assert around == {*inputs, "trunk.norm.weight", "schedule.knots"}
    assert not base & {weight.data_ptr() for weight in network.state_dict().values()}
    frozen = {
        part.weight.data_ptr() for part in network.modules() if isinstance(part, FrozenLinear)
    }
    assert len(frozen) == 2 * 7 + 1
    assert frozen <= base


def test_moved_and_copied_there_is_one_p_theta(llama_folder: Path, tmp_path: Path) -> None:
    """In training and in sampling, and in the copy that an average of the weights is."""
    adapted = module_of("denoiser", llama_folder), module_of("critic", llama_folder)
    for module in adapted:
        save_network(module.network, module.settings(), tmp_path / module.network.network_name)
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        module.trainer.datamodule = ModelSamples(str(llama_folder), max_length=12)
    denoiser, critic = str(tmp_path / "denoiser"), str(tmp_path / "critic")
    sampler = GuidedSamplerModule(Long(), Diffusion(), str(llama_folder), denoiser, critic)
    for module in (*adapted, sampler):
        copy = deepcopy(module)
        module.to("meta").setup("predict" if module is sampler else "validate")
        layers, own = (
            module.lm.model.model.layers,
            {id(weight) for weight in module.lm.model.parameters()},
        )
        for part in (module, copy):
            blocks = [block for block in part.modules() if isinstance(block, AdaptedBlock)]
            assert len(blocks) == (4 if module is sampler else 2)
            assert {id(block.linear["up"].weight) for block in blocks} == {
                id(layer.mlp.up_proj.weight) for layer in layers
            }
            read = [layer.weight for layer in part.modules() if isinstance(layer, FrozenLinear)]
            assert {id(weight) for weight in read} <= own
            assert all(weight.is_meta for weight in read)
            # Of its own a block has the adapters: 8 of rank 3 and 32.
            held = sum(x.numel() for x in (*blocks[0].parameters(), *blocks[0].buffers()))
            assert held == 3 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24)) + 32 * (16 + 16)


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
def test_another_model_with_the_same_embeddings_is_refused(
    llama: BaseLM, llama_folder: Path, tmp_path: Path, kind: str
) -> None:
    """With the same embeddings, and changed in one matrix; a checkpoint from before blocks were
    told apart is read.
    """
    module = module_of(kind, llama_folder)
    save_network(module.network, module.settings(), tmp_path)
    low = BaseLM(deepcopy(llama.model).bfloat16().float(), llama.tokenizer)
    tuned = BaseLM(deepcopy(llama.model), llama.tokenizer)
    with torch.no_grad():
        tuned.model.model.layers[1].mlp.down_proj.weight += (
            0.1 * torch.randn(16, 1) @ torch.randn(1, 24)
        )
    embedding = embedding_of(llama)
    load: Any = load_denoiser if kind == "denoiser" else load_critic
    load(str(tmp_path), embedding, lm=low)
    with pytest.raises(
        UserError,
        match=(rf"^{kind}: .* adapts the blocks of another base model with the same"),
    ):
        load(str(tmp_path), embedding, lm=tuned)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert len(settings.pop("blocks")) == 16
    (tmp_path / "config.json").write_text(json.dumps(settings))
    load(str(tmp_path), embedding, lm=tuned)


def test_a_change_in_any_column_of_a_large_matrix_is_seen() -> None:
    trunk = AdaptedTrunk.__new__(AdaptedTrunk)
    torch.nn.Module.__init__(trunk)
    block, source = torch.nn.Module(), torch.nn.Linear(576, 1536, bias=False)
    block.shared, trunk.blocks = Shared(source), torch.nn.ModuleList([block])
    found = [trunk.fingerprint()]
    for column in range(0, 576, 7):
        with torch.no_grad():
            source.weight[:, column] += 1
        found.append(trunk.fingerprint())
    assert len(set(found)) == len(found) == 84


def test_what_was_saved_is_loaded_with_the_base_model(
    llama: BaseLM, llama_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"base_lm": str(llama_folder), **SIZE}
    for module in (
        DenoiserModule(**in_parts(DenoiserModule, **options)),
        CriticModule(Long(), **in_parts(CriticModule, **options)),
    ):
        save_network(
            trained(module.network), module.settings(), tmp_path / module.network.network_name
        )
    embedding, path = embedding_of(llama), str(tmp_path / "denoiser")
    z, t = noised()
    network = load_denoiser(path, embedding, llama)
    want = DenoiserModule(**in_parts(DenoiserModule, **options, init_from=path)).network
    torch.testing.assert_close(network(z, t), want(z, t))
    assert not torch.allclose(
        network(z, t),
        DenoiserModule(**in_parts(DenoiserModule, **options)).network(z, t),
        atol=1e-2,
    )
    assert (
        network.trunk.blocks[0].linear["q"].weight.data_ptr()
        == llama.model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    )
    critic, settings = load_critic(str(tmp_path / "critic"), embedding, "long", llama)
    assert settings["size"]["adapter_rank"] == 3
    torch.testing.assert_close(critic(z, t), module.network(z, t))
    assert (tmp_path / "denoiser/model.safetensors").stat().st_size < 40_000
    for load, kind in ((load_denoiser, "denoiser"), (load_critic, "critic")):
        with pytest.raises(
            UserError, match=r"^adapter_rank: 3 given, allowed: with the base model"
        ):
            load(str(tmp_path / kind), embedding)  # type: ignore[operator]


# Training


class Watch(L.Callback):
    """Losses by number of batch; which parameters had a gradient at every step, and one that is
    not zero at some step.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.without: list[str] = []
        self.reached: set[str] = set()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.requires_grad and weight.grad is None:
                self.without.append(name)
            elif weight.grad is not None and weight.grad.abs().sum() > 0:
                self.reached.add(name)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses[trainer.fit_loop.total_batch_idx] = float(outputs["loss"])


def fit(
    module: L.LightningModule, folder: Path, steps: int, ckpt: Path | None = None, **trainer: Any
) -> Watch:
    watch, base = Watch(), module.base_lm_name
    data = ModelSamples(
        base,
        n_texts=24,
        n_val=8,
        max_length=12,
        batch_size=8,
        shard_size=8,
        cache=str(folder.parent / "samples"),
    )
    saving = ModelCheckpoint(folder / "ckpt", "{step}", every_n_train_steps=2, save_top_k=-1)
    made = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
        callbacks=[watch, WeightEMA(), Export(str(folder / "export")), saving], **trainer,
    )  # fmt: skip
    made.fit(module, data, ckpt_path=ckpt)
    return watch


def module_of(kind: str, folder: Path) -> Any:
    options: dict[str, Any] = {"base_lm": str(folder), **SIZE, "warmup_steps": 1, "lr": 0.01}
    return (
        DenoiserModule(**in_parts(DenoiserModule, **options, time_warp=2))
        if kind == "denoiser"
        else CriticModule(Long(), **in_parts(CriticModule, **options))
    )


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
@pytest.mark.parametrize("low", [False, True])
def test_training_moves_all_that_is_trained_and_nothing_of_p_theta(
    llama: BaseLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, low: bool
) -> None:
    """Every trained weight has a gradient at every step, which several processes need; a stopped
    run goes on.

    In float32, and with a p_θ in bfloat16 and training in mixed precision.
    """
    folder, precision = tmp_path / "lm", "bf16-mixed" if low else "32-true"
    monkeypatch.setattr("dia_lightning.lm.base_lm._is_bf16_fast", lambda: True)
    deepcopy(llama.model).to(torch.bfloat16 if low else torch.float32).save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    module = module_of(kind, folder)
    assert module.lm.model.dtype == (torch.bfloat16 if low else torch.float32)
    before = {name: weight.clone() for name, weight in module.lm.model.state_dict().items()}
    start = {name: weight.clone() for name, weight in module.network.named_parameters()}
    whole = fit(module, tmp_path / "whole", 6, precision=precision)
    assert whole.without == []
    want = {
        f"network.{name}"
        for name, weight in module.network.named_parameters()
        if weight.requires_grad
    }
    assert whole.reached == want
    assert {name for name in want if re.search(r"linear\.\w+\.low\.(down|up)", name)}
    moved = {
        f"network.{name}"
        for name, weight in module.network.named_parameters()
        if not torch.equal(weight, start[name])
    }
    assert moved == want
    assert all(
        torch.equal(weight, before[name]) for name, weight in module.lm.model.state_dict().items()
    )
    for block, layer in zip(module.network.trunk.blocks, module.lm.model.model.layers, strict=True):
        assert block.linear["down"].weight.data_ptr() == layer.mlp.down_proj.weight.data_ptr()
    rest = fit(
        module_of(kind, folder),
        tmp_path / "rest",
        6,
        tmp_path / "whole/ckpt/step=4.ckpt",
        precision=precision,
    )
    assert rest.losses == pytest.approx({k: v for k, v in whole.losses.items() if k >= 4}, abs=1e-6)
    assert sorted(rest.losses) == [4, 5]


def test_blocks_that_run_again_give_the_same_gradients(llama: BaseLM) -> None:
    network, gradients = trained(denoiser(llama)).requires_grad_(), []
    for again in (False, True):
        network.trunk.checkpointed = again
        gradients.append(
            torch.autograd.grad(
                network(*noised()).square().mean(), list(network.trunk.blocks.parameters())
            )
        )
    torch.testing.assert_close(*gradients)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0])


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
def test_compiled_blocks_give_the_same_gradients(llama_folder: Path, kind: str) -> None:
    """Traced, with autograd of the trace, but without a compiler; p_θ's weights are no part of
    the trace.
    """
    torch._dynamo.reset()
    network, found = trained(module_of(kind, llama_folder).network).requires_grad_(), []
    for compiled in (False, True):
        if compiled:
            for block in network.trunk.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        found.append(
            torch.autograd.grad(
                network(*noised()).square().mean(), list(network.trunk.blocks.parameters())
            )
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_both_guide_a_sampler(llama_folder: Path, tmp_path: Path) -> None:
    for kind in ("denoiser", "critic"):
        fit(module_of(kind, llama_folder), tmp_path / kind, 2)
    module = GuidedSamplerModule(
        Long(), Chains(Diffusion(steps=3), [DenoiseAccept()], rounds=2), str(llama_folder),
        str(tmp_path / "denoiser/export"), str(tmp_path / "critic/export"), lam=0.1,
        compare_base=False,
    )  # fmt: skip
    tokens = torch.full((4, 12), module.lm.end_id)
    (drawn,) = module.predict_step(
        Batch(0, list(range(4)), [""] * 4, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    )
    assert drawn.costs["denoiser"].flops > 0
    assert drawn.costs["critic"].flops > 0
    assert drawn.tokens.shape == (4, 12)


# What is counted


def one_more_token(network: Any, gradient: bool) -> tuple[float, float]:
    """FLOPs that one more token costs, by the meter, and by torch's count of products with
    matrices.

    The start position, one for any length, is left out of the meter's count.
    """
    found = []
    for n_tokens in (9, 8):
        meter = Meter()
        meter.watch(network.network_name, network.multiplied())
        z, t = torch.randn(1, n_tokens, 16, requires_grad=gradient), torch.full((1, n_tokens), 0.5)
        with torch.set_grad_enabled(gradient), FlopCounterMode(display=False) as counter:
            out = network(z, t)
            if gradient:
                out.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        # A view of states is multiplied with `bmm`; attention's own products have another name.
        counted = sum(
            n for op, n in counts.items() if str(op) in ("aten.addmm", "aten.mm", "aten.bmm")
        )
        found.append((meter.read()[network.network_name].flops, counted))
    return found[0][0] - found[1][0], found[0][1] - found[1][1]


def test_frozen_matrices_and_adapters_are_counted(llama: BaseLM) -> None:
    network = denoiser(llama)
    metered, counted = one_more_token(network, gradient=False)
    assert metered == counted > 0
    frozen = sum(
        weight.numel() for name, weight in llama.model.named_parameters() if "proj" in name
    )
    trained_ones = sum(
        w.numel() for name, w in network.named_parameters() if re.search(r"(up|down)\.weight", name)
    )
    (_, trunk), (_, head) = network.multiplied()
    assert trunk == frozen + trained_ones
    assert head == 2 * llama.vocab_size * 16


def test_a_frozen_critics_gradient_costs_as_much_again(llama: BaseLM) -> None:
    torch.manual_seed(0)
    critic = CriticNetwork(
        16, make_schedule("cosine"), NetworkSize(**SIZE), llama.model
    ).requires_grad_(False)
    metered, counted = one_more_token(critic, gradient=True)
    assert metered == counted


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_rank": -1}, r"adapter_rank: -1 given, allowed: 0 \(none\) or more$"),
        (
            {"width": 32},
            r"adapter_rank: \d given, allowed: with width and heads of base_lm \(16, 4\) and up to",
        ),
        (
            {"heads": 2},
            r"adapter_rank: \d given, allowed: with width and heads of base_lm \(16, 4\) and up to",
        ),
        (
            {"layers": 3},
            r"adapter_rank: \d given, allowed: with width and heads of base_lm \(16, 4\) and up to",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    llama_folder: Path, options: dict[str, int], message: str
) -> None:
    for make in (
        lambda **given: DenoiserModule(**in_parts(DenoiserModule, **given)),
        lambda **given: CriticModule(Long(), **in_parts(CriticModule, **given)),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            make(base_lm=str(llama_folder), **{**SIZE, **options})


def test_parts_that_do_not_fit_are_named(
    llama: BaseLM, llama_folder: Path, lm_folder: Path
) -> None:
    for make in (
        lambda **given: DenoiserModule(**in_parts(DenoiserModule, **given)),
        lambda **given: CriticModule(Long(), **in_parts(CriticModule, **given)),
    ):
        with pytest.raises(
            UserError,
            match=r"adapter_rank: . given, allowed: 0; base_lm is a GPT2LMHeadModel",
        ):
            make(base_lm=str(lm_folder), **SIZE)
    for init_from_lm in (True, False):
        with pytest.raises(
            UserError,
            match=r"^tied_head: true given, allowed: false; with adapter_rank .*$",
        ):
            DenoiserModule(
                str(llama_folder),
                **in_parts(DenoiserModule, **SIZE, tied_head=True, init_from_lm=init_from_lm),
            )
    for change in ({"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}):
        model = deepcopy(llama.model)
        model.config.update(change)
        with pytest.raises(
            UserError, match=r"adapter_rank: 3 given, allowed: 0; base_lm has biases or an"
        ):
            denoiser(BaseLM(model, llama.tokenizer))
