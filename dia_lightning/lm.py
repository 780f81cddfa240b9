"""p_θ: a frozen causal language model as a value that scores, samples and lends its embedding table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.optim import adamw_warmup_cosine
from dia_lightning.resources import UserError, find_path
from dia_lightning.types import fill_after_end, text_mask

_LOGITS_PER_CHUNK = 1 << 25  # 128 MiB of float32: no full B×T×V tensor for a 50k vocabulary
_HUB_TIMEOUT_S = 10


def _resolve(base_lm: str) -> str:
    """A local folder (as given or shipped), or a hub id whose files were fetched within the time limit."""
    folder = find_path(base_lm)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"--model.init_args.base_lm: {base_lm} holds no config.json, so it is no transformers folder")
        return str(folder)
    if base_lm.startswith((".", "/", "~")) or base_lm.count("/") > 1:
        raise UserError(f"--model.init_args.base_lm: no such folder: {base_lm}")
    return _fetch(base_lm)


def _fetch(repo_id: str) -> str:
    """Download the model's config, tokenizer and safetensors from the hub, or say within 30 s that it cannot be done."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_HUB_TIMEOUT_S))
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        # One question first, asked once: hf_hub_download tries six times, the last five with 60 s each.
        get_hf_file_metadata(hf_hub_url(repo_id, "config.json"), timeout=_HUB_TIMEOUT_S)
        return snapshot_download(repo_id, allow_patterns=patterns)
    except Exception as error:
        with suppress(Exception):  # fetched before, and no hub is needed
            return snapshot_download(repo_id, allow_patterns=patterns, local_files_only=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--model.init_args.base_lm: cannot fetch {repo_id!r} from the hub ({reason[:160]}); give a local folder, "
            "or use the shipped kit: --model.init_args.base_lm checkpoints/tiny/lm"
        ) from error


class BaseLM:
    """A frozen causal language model p_θ with its tokenizer.

    Token rows are in the canonical form of `Tokens`: no start token (it is added here), end token after the text.

    Attributes:
        bos_id: token put before every row. end_id: token that ends a text.
        vocab_size: number of rows V of the embedding table.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"--model.init_args.base_lm: the tokenizer of {name!r} has no end token")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.end_id: int = tokenizer.eos_token_id
        self.bos_id: int = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.end_id
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.max_length: int = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20) - 1
        self._head_is_linear = self._check_head()

    @classmethod
    def load(cls, base_lm: str, dtype: torch.dtype = torch.float32) -> BaseLM:
        """Load from a hub id (`gpt2`) or a local folder in transformers' format; safetensors only, no remote code.

        Raises:
            UserError: if the folder is missing or incomplete, or the hub cannot be reached within 30 s.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = _resolve(base_lm)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype, trust_remote_code=False
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"--model.init_args.base_lm: cannot load {base_lm} ({reason})") from error
        return cls(model, tokenizer, base_lm)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> BaseLM:
        self.model.to(device)
        return self

    def embedding_table(self) -> Tensor:
        """(V, d) float32: p_θ's input embeddings, one row a token."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.detach().float()

    def encode(self, texts: Sequence[str], length: int, end: bool = True) -> Tensor:
        """(B, length) int64: each text's first `length` tokens, then end tokens."""
        ids = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
        rows = torch.full((len(ids), length), self.end_id, dtype=torch.int64)
        for row, token_ids in zip(rows, ids, strict=True):
            row[: len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)
        return rows

    def decode(self, tokens: Tensor, prompt_mask: Tensor, with_prompt: bool = False) -> list[str]:
        """The text of each row without the end token, and without its prompt unless asked for."""
        keep = text_mask(tokens, prompt_mask, self.end_id)
        keep = (keep if with_prompt else keep & ~prompt_mask).cpu()
        rows = [row[mask].tolist() for row, mask in zip(tokens.cpu(), keep, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def log_prob(self, tokens: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """Log p_θ(x | c) in nats, (B,) float64: the text and its end token, given the prompt.

        Rows without an end token are scored as the beginning of a text.
        """
        return self.token_log_probs(tokens, prompt_mask).double().sum(1)

    def token_log_probs(self, tokens: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """(B, T) float32 nats: log p_θ(x_i | x_<i, c) at text positions, 0 at the prompt and after the end."""
        if prompt_mask is None:
            prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
        return self._scored(tokens, prompt_mask)[0]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        prompt_mask: Tensor,
        generator: torch.Generator,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        """Draw the positions outside the prompt from p_θ: (B, T) int64 in canonical form.

        Prompts of different lengths share a batch: each row is forced to its prompt and free afterwards. Categorical
        draws are made in float64. The loop ends early once every row has ended (looked at every 8 tokens only, so that
        a GPU is not made to wait).
        """
        out = tokens.clone()
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        inputs = torch.full_like(tokens[:, :1], self.bos_id)
        cache = None
        for i in range(tokens.shape[1]):
            result = self.model(inputs, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            drawn = draw_categorical(_next_log_probs(result.logits[:, -1], temperature, top_k, top_p), generator)
            drawn = torch.where(ended, self.end_id, drawn)
            out[:, i] = torch.where(prompt_mask[:, i], tokens[:, i], drawn)
            ended |= (out[:, i] == self.end_id) & ~prompt_mask[:, i]
            inputs = out[:, i : i + 1]
            if i % 8 == 7 and bool(ended.all()):
                out[:, i + 1 :] = self.end_id
                break
        return fill_after_end(out, prompt_mask, self.end_id)

    def log_prob_and_hidden(self, tokens: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob` (B,), and from the same pass (B, T, H): the states that predict the text's tokens, for `log_probs_at`."""
        log_p, hidden = self._scored(tokens, prompt_mask)
        return log_p.double().sum(1), F.pad(hidden, (0, 0, 0, tokens.shape[1] - hidden.shape[1]))

    @torch.no_grad()
    def log_probs_at(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Log p_θ(v | x_<i, c) of every token v at the positions i in `index` (B, K): (B, K, V) float32."""
        return self._logits(hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))).log_softmax(-1)

    def _scored(self, tokens: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        keep = text_mask(tokens, prompt_mask, self.end_id)
        log_p, hidden = self._next_token_log_probs(tokens, int(keep.sum(1).max()))
        return torch.where(keep & ~prompt_mask, log_p, 0.0), hidden

    @torch.no_grad()
    def _next_token_log_probs(self, tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(B, T), 0 from `length` on, and the states (B, length, H) that they are read from."""
        inputs = F.pad(tokens[:, : max(length - 1, 0)], (1, 0), value=self.bos_id)
        hidden = torch.cat([self._hidden(x) for x in inputs.split(rows_at_once(inputs))])
        rows = max(1, min(rows_at_once(inputs), _LOGITS_PER_CHUNK // (length * self.vocab_size)))
        chunks = zip(hidden.split(rows), tokens[:, :length].split(rows), strict=True)
        log_p = torch.cat([_gather_log_softmax(self._logits(h), x) for h, x in chunks])
        return F.pad(log_p, (0, tokens.shape[1] - length)), hidden

    def _hidden(self, inputs: Tensor) -> Tensor:
        """(B, T, H) last hidden states, or the logits of a model whose head is not linear."""
        return self.model.base_model(inputs).last_hidden_state if self._head_is_linear else self.model(inputs).logits

    def _logits(self, hidden: Tensor) -> Tensor:
        return (self.model.get_output_embeddings()(hidden) if self._head_is_linear else hidden).float()

    @torch.no_grad()
    def _check_head(self) -> bool:
        """Whether logits are the output embedding of the last hidden state (no soft-capping or scaling on top)."""
        probe = torch.arange(4, device=self.device)[None] % self.vocab_size
        head, body = self.model.get_output_embeddings(), getattr(self.model, "base_model", None)
        if head is None or body is None or body is self.model:
            return False
        return torch.allclose(head(body(probe).last_hidden_state), self.model(probe).logits, atol=1e-3, rtol=1e-3)


def rows_at_once(rows: Tensor) -> int:
    """How many of `rows` (B, T, …) a network should take at a time: all of them on a GPU, about 2,000 positions on a CPU.

    There, page faults of larger temporaries take up to half of the time.
    """
    return max(1, len(rows) if rows.device.type != "cpu" else 2048 // rows.shape[1])


def _gather_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def draw_categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from softmax(logits) per row, (…, V) → (…) int64, by inversion in float64.

    `torch.multinomial` gives the same law at twenty times the cost on a CPU; float32 sums would lower the temperature.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    u = torch.rand(logits.shape[:-1], generator=generator, device=logits.device, dtype=torch.float64)
    # Scaled by the last value, which is 1 but for rounding, so that no draw falls beyond the vocabulary.
    drawn = torch.searchsorted(cumulative, (u[..., None] * cumulative[..., -1:]), right=True)[..., 0]
    return drawn.clamp_max(logits.shape[-1] - 1)


def _next_log_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B, V) unnormalised log-probabilities of the next token; p_θ itself at temperature 1, top_k 0, top_p 1."""
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        beyond = ordered.softmax(1).cumsum(1) - ordered.softmax(1) >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


class LMModule(L.LightningModule):
    """Trains a small GPT-2-architecture base model from scratch, the p_θ of the shipped kit.

    Args:
        vocab_size: rows of the embedding table; must equal the tokenizer's size.
        width: embedding width d; narrow, because the diffusion runs in this space.
        layers, heads: transformer blocks and attention heads in each.
        positions: longest text in tokens, start token included.
        dropout: applied to embeddings, attention and residual branches.
        lr, weight_decay, warmup_steps: AdamW with warm-up and cosine decay to the end of training.
    """

    def __init__(
        self,
        vocab_size: int = 2000,
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        positions: int = 96,
        dropout: float = 0.1,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 200,
    ) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        config = GPT2Config(
            vocab_size=vocab_size, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def setup(self, stage: str) -> None:
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if len(tokenizer) != self.model.config.vocab_size:
            raise UserError(
                f"--model.init_args.vocab_size: {self.model.config.vocab_size}, but the tokenizer has {len(tokenizer)}"
            )
        self.end_id: int = tokenizer.eos_token_id
        self.model.config.bos_token_id = self.model.config.eos_token_id = self.end_id

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood in nats of text and end tokens, and their number."""
        end_id = self.end_id
        tokens, keep = batch["tokens"], text_mask(batch["tokens"], batch["prompt_mask"], end_id)
        logits = self.model(F.pad(tokens[:, :-1], (1, 0), value=end_id)).logits
        targets = torch.where(keep, tokens, -100)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum"), keep.sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total, count = self.loss(batch)
        self.log("train/loss", total / count, prog_bar=True)
        return total / count

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        total, count = self.loss(batch)
        self.log("val/loss", total / count, batch_size=int(count), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        return adamw_warmup_cosine(self.named_parameters(), self.lr, self.weight_decay, self.warmup_steps, total)

    def export(self, folder: Path) -> None:
        """Write the model and its tokenizer in transformers' format (safetensors), loadable as `base_lm`."""
        self.model.save_pretrained(folder)
        self.trainer.datamodule.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
