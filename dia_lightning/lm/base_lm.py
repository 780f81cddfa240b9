"""p_θ: a frozen causal language model as a value that scores, samples and lends its embedding
table.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dia_lightning.errors import UserError
from dia_lightning.lm import contract
from dia_lightning.lm.decoding import Decoding
from dia_lightning.lm.files import folder_of, load_whole, positions_of
from dia_lightning.lm.row_cache import RowCache, TokenTerms, rows_at_once
from dia_lightning.lm.token_text import TokenText
from dia_lightning.meter import weights_of
from dia_lightning.numerics import draw_categorical
from dia_lightning.progress import steps
from dia_lightning.types import leading, text_mask

_LOG = logging.getLogger(__name__)
# No full B×T×V tensor for a 50k vocabulary.
_LOGITS_AT_ONCE = defaultdict(lambda: 1 << 25, cpu=1 << 22)
# Rows times weights from which a step's time grows with them, and rows of like prompts are better
# written by themselves.
_BUSY = defaultdict(lambda: 1e12, cpu=4e9)


class BaseLM(TokenText):
    """A frozen causal language model p_θ with its tokenizer.

    Token rows are in canonical form: no start token (it is added here); the text ends at the first
    end token that is not part of the prompt, and every later position holds the end token too, so
    that a row says by itself how long it is.

    A text ends with any of several tokens, where the model has them (`end_ids`). p_θ is then the
    law of texts whose end is
    written as `end_id`, whichever it was: its probability is the sum of theirs, and the others do
        not occur in a text.

    Attributes:
        bos_id: token put before every row. end_id: token that ends a text. end_ids: all tokens that
            do, `end_id` first.
        vocab_size: number of rows V of the embedding table.
        has_body: whether logits are the output embedding of `model.base_model`'s last hidden state.
        has_cache: whether the model can be written from a key–value cache; else it reads a row
            again for each token. has_slots: whether rows of different lengths can be written on
            together (see `row_cache`).

    Raises:
        UserError: if the model breaks what `contract` asks of it, or the tokenizer has no end or
            does not fit.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "") -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"base_lm: the tokenizer of {name!r} has no end token")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.end_id: int = tokenizer.eos_token_id
        self.bos_id: int = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.end_id
        )
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        contract.check_table(tokenizer, self.vocab_size, name)
        self.end_ids = [self.end_id]
        self.add_ends(_ends_of(getattr(model, "generation_config", None)))
        self.max_length = positions_of(model) - 1
        self._head: dict[str, Tensor] = {}  # in float32, of a model that is not
        self.has_body = self._check_head()
        contract.check_reading(self)
        self.has_cache = contract.writes_as_it_reads(self)
        if not self.has_cache:
            _LOG.warning(
                "%s: %s writes without a key-value cache, reading each text again for every token",
                name,
                type(model).__name__,
            )
        self.has_slots = False
        self.has_slots = contract.reads_in_slots(self)
        self._n_weights = sum(weights for _, weights in self.multiplied())

    def add_ends(self, tokens: Iterable[int]) -> None:
        """Let a text end with these tokens too; those that the table does not have are passed
        over.
        """
        self.end_ids = list(
            dict.fromkeys([*self.end_ids, *(i for i in tokens if 0 <= i < self.vocab_size)])
        )

    @classmethod
    def load(cls, base_lm: str) -> BaseLM:
        """Load from a hub id (`gpt2`), a folder in transformers' format, a `.gguf` file, or the
        package of `smollm2`.

        Safetensors only, no remote code; a GGUF file is unpacked once (see `lm_files`). Weights
        that are stored in bfloat16 stay so where that is fast, else they become float32.

        Raises:
            UserError: if the folder is missing or incomplete, or the hub cannot be reached within
                30 s.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = folder_of(base_lm)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            dtype = (
                torch.bfloat16
                if config.dtype == torch.bfloat16 and _is_bf16_fast()
                else torch.float32
            )
            model = load_whole(AutoModelForCausalLM, folder, use_safetensors=True, dtype=dtype)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"base_lm: cannot load {base_lm} ({reason})") from error
        return cls(model, tokenizer, base_lm)

    def multiplied(self) -> list[tuple[nn.Module, int]]:
        """What a `cost.Meter` watches: the body, and the head where it is asked by itself."""
        body, head = (
            getattr(self.model, "base_model", self.model),
            self.model.get_output_embeddings(),
        )
        heads = [] if head is None or body is self.model else [(head, weights_of(head))]
        return [(body, weights_of(body)), *heads]

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

    def log_prob(self, tokens: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """Log p_θ(x | c) in nats, (B,) float64: the text and its end token, given the prompt.

        Rows without an end token are scored as the beginning of a text.
        """
        return self.token_log_probs(tokens, prompt_mask).double().sum(1)

    def token_log_probs(self, tokens: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """(B, T) float32 nats: log p_θ(x_i | x_<i, c) at text positions, 0 at the prompt and
        after the end.
        """
        if prompt_mask is None:
            prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
        return self._scored(tokens, prompt_mask)

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

        Prompts of different lengths share a batch: each row is forced to its prompt and free
        afterwards. Categorical draws are made in float64. Every 8 tokens (so that a GPU is not made
        to wait oftener) finished rows are dropped. Where there are rows enough, those with prompts
        of like length are written together, and read theirs in one pass. Blanks are filled from
        what stands on their left alone, without an end token: this is not p_θ given both sides.
        """
        text = torch.empty_like(tokens)
        for rows in self._alike(prompt_mask):
            text[rows] = self._written(
                tokens[rows], prompt_mask[rows], generator, temperature, top_k, top_p
            )
        return text

    def _alike(self, prompt_mask: Tensor) -> Sequence[Tensor]:
        """Numbers of rows, the shortest prompts first, in as many parts as keep the device busy,
        at most 8.
        """
        n, lengths = len(prompt_mask), leading(prompt_mask).sum(1)
        parts = min(8, int(n * self._n_weights / _BUSY[self.device.type]))
        if parts < 2 or not self.has_body or int(lengths.max() - lengths.min()) < parts:
            return [torch.arange(n, device=lengths.device)]
        return lengths.argsort(stable=True).tensor_split(parts)

    def _written(
        self,
        tokens: Tensor,
        prompt_mask: Tensor,
        generator: torch.Generator,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> Tensor:
        writing = Decoding(self, tokens, prompt_mask)
        given = writing.read_prompts()
        # Every place has its random numbers, also where none are needed: how prompts are read
        # decides no text.
        torch.rand(
            given * len(tokens), generator=generator, device=tokens.device, dtype=torch.float64
        )
        for i in steps(range(given, tokens.shape[1]), "tokens"):
            logits = writing.next_logits()
            writing.write(
                draw_categorical(_next_log_probs(logits, temperature, top_k, top_p), generator)
            )
            if i % 8 == 7 and not writing.drop_ended():
                break
        return writing.text()

    @torch.no_grad()
    def read(self, tokens: Tensor, prompt_mask: Tensor, entropy: bool = False) -> TokenTerms:
        """What p_θ says of each token of (B, T) rows, with the states behind it where they fit
        into memory, so that texts can be written on from any place.
        """
        keep = text_mask(tokens, prompt_mask, self.end_id)
        cache = RowCache(self, *tokens.shape)
        inputs = F.pad(tokens[:, :-1], (1, 0), value=self.bos_id)
        states = cache.read(inputs, torch.zeros_like(tokens[:, 0]), tokens.shape[1])
        terms = self.token_terms(states, tokens, keep, entropy)
        log_p = torch.where(leading(prompt_mask), 0.0, terms.log_p)
        return replace(terms, log_p=log_p, cache=cache if cache.fits else None)

    def token_terms(
        self, states: Tensor, tokens: Tensor, keep: Tensor, entropy: bool = False
    ) -> TokenTerms:
        """`TokenTerms` of `tokens` (N, q), which `states` (N, q, H) predict, where `keep` is
        True.
        """
        n = max(1, _LOGITS_AT_ONCE[tokens.device.type] // self.vocab_size)
        parts = zip(states[keep].split(n), tokens[keep].split(n), strict=True)
        found = [told(self.logits(h), x, self.end_id, entropy) for h, x in parts]
        zeros = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        columns = [torch.cat(values) for values in zip(*found, strict=True)]
        columns = columns or [zeros[keep]] * (2 + entropy)
        terms = [zeros.masked_scatter(keep, values) for values in columns]
        return TokenTerms(terms[0], terms[1], terms[2] if entropy else None)

    @torch.no_grad()
    def _scored(self, tokens: Tensor, prompt_mask: Tensor) -> Tensor:
        """`token_log_probs`, in chunks of rows of like length."""
        keep = text_mask(tokens, prompt_mask, self.end_id)
        lengths, order = keep.sum(1).sort()
        out = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        rows = rows_at_once(tokens)
        longest_in = torch.stack([chunk[-1] for chunk in lengths.split(rows)]).tolist()
        for chunk, longest in zip(order.split(rows), longest_in, strict=True):
            x, kept = tokens[chunk, :longest], keep[chunk, :longest]
            hidden = self.states(F.pad(x[:, :-1], (1, 0), value=self.bos_id))
            n = max(1, _LOGITS_AT_ONCE[tokens.device.type] // self.vocab_size)
            parts = zip(hidden[kept].split(n), x[kept].split(n), strict=True)
            log_p = torch.cat(
                [-F.cross_entropy(self.logits(h), y, reduction="none") for h, y in parts]
            )
            out[chunk, :longest] = torch.zeros_like(out[chunk, :longest]).masked_scatter(
                kept, log_p
            )
        return torch.where(leading(prompt_mask), 0.0, out)

    def states(self, inputs: Tensor) -> Tensor:
        """(B, T, H) last hidden states after `inputs` (B, T), or the logits of a model whose head
        is not linear.
        """
        if self.has_body:
            return self.model.base_model(inputs, use_cache=False).last_hidden_state
        return self.model(inputs, use_cache=False).logits

    def next_logits(self, inputs: Tensor) -> Tensor:
        """(B, V) logits of the token after (B, T) `inputs`, start token included, by a full
        pass.
        """
        return self.logits(self.states(inputs)[:, -1])

    @torch.no_grad()
    def probe_logits(self, inputs: Tensor) -> Tensor:
        """(B, T, V) in the model's precision: what it says after each of `inputs`, ends not
        joined.
        """
        return self.logits_as_read(self.states(inputs))

    def logits_as_read(self, states: Tensor) -> Tensor:
        """(…, V) in the model's precision, ends not joined."""
        return self._every_logit(states).to(self.model.dtype)

    def with_one_end(self, logits: Tensor) -> Tensor:
        """(…, V) `logits` with the probability of every end token at `end_id`."""
        if len(self.end_ids) == 1:
            return logits
        ends = torch.tensor(self.end_ids, device=logits.device)
        out = logits.index_fill(-1, ends, -torch.inf)
        # Not in bfloat16, in which small shares are lost.
        end = logits[..., ends].float().logsumexp(-1).to(logits.dtype)
        return out.index_copy(-1, ends[:1], end[..., None])

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, V) float32 logits of the next token, from `states` (…, H)."""
        return self.with_one_end(self._every_logit(hidden))

    def _every_logit(self, hidden: Tensor) -> Tensor:
        if not self.has_body:
            return hidden.float()
        head = self.model.get_output_embeddings()
        if head.weight.dtype == torch.float32:
            return head(hidden)  # type: ignore[no-any-return]
        # Rounded to bfloat16, logits of 20 are a tenth off, and what is accepted hangs on them.
        # One that is trained is another after each step.
        if (
            not self._head
            or self._head["weight"].device != hidden.device
            or head.weight.requires_grad
        ):
            self._head = {name: weight.float() for name, weight in head.named_parameters()}
        # A call of the module itself, so that it is counted (see `cost.Meter`).
        return functional_call(head, self._head, hidden.float())

    @torch.no_grad()
    def _check_head(self) -> bool:
        """See `has_body`; soft-capping or scaling on top makes it false."""
        probe = torch.arange(4, device=self.device)[None] % self.vocab_size
        head, body = self.model.get_output_embeddings(), getattr(self.model, "base_model", None)
        if head is None or body is None or body is self.model:
            return False
        try:
            found = head(body(probe, use_cache=False).last_hidden_state)
            logits = self.model(probe, use_cache=False).logits
        except Exception:  # a body that wants more than tokens
            return False
        # The same products, so nearly the same numbers: small logits hide a soft cap.
        return found.shape == logits.shape and contract.same(found, logits, 0.01)


def _ends_of(generation_config: Any) -> list[int]:
    """All tokens that end a text, says the folder's generation_config.json."""
    ends = getattr(generation_config, "eos_token_id", None)
    return [ends] if isinstance(ends, int) else list(ends or ())


def _is_bf16_fast() -> bool:
    """Whether a GPU is there, or a CPU with instructions for it: others take longer than in
    float32.
    """
    return torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()


def told(logits: Tensor, tokens: Tensor, end_id: int, entropy: bool) -> list[Tensor]:
    """Of `logits` (N, V) the log-probability of `tokens` (N,), that of any token but the end, and
    with `entropy` that, (N,) each.
    """
    log_p = logits.float().log_softmax(-1)
    goes_on = torch.log1p(-log_p[:, end_id].double().exp()).clamp_min(-1e30).float()
    found = [log_p.gather(1, tokens[:, None])[:, 0], goes_on]
    # 0 · −inf is 0 here.
    return [*found, -(log_p.exp() * log_p.clamp_min(-1e30)).sum(1)] if entropy else found


def _next_log_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B, V) unnormalised log-probabilities of the next token; p_θ itself at temperature 1,
    top_k 0, top_p 1.
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        beyond = ordered.softmax(1).cumsum(1) - ordered.softmax(1) >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits
