"""What a sequence classifier says of a text, and the same as a differentiable function of a
distribution over tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning import progress
from dia_lightning.errors import UserError, require
from dia_lightning.lm.files import folder_of, load_whole, positions_of
from dia_lightning.lm.token_text import readable
from dia_lightning.rewards.base import RewardError
from dia_lightning.rewards.options import require_sign
from dia_lightning.types import Reward

# One tokenised text or pair, special tokens included.
Row = dict[str, list[int]]


class SequenceClassifier(Reward):
    """sign · log P(label | text), P(label | text) or the label's logit, by any sequence classifier
    of transformers.

    P is a softmax over the labels, or a sigmoid of the label's logit where the model's
    `problem_type` is `multi_label_classification`. A text longer than `max_length` is cut at its
    end; an empty one is read as the special tokens around it, or, where the tokenizer has none, as
    the end token. Texts of like length share a batch, and padding is masked, so that a text gets
    the same value alone and in any batch (to 1e-5).

    Runs on the GPU that torch uses (a rank's own under Lightning), else on the CPU, in float32.

    Args:
        model: Hub id or local folder in transformers' format; safetensors only, no remote code.
        label: Name of the label, as the model spells it, or its index.
        output: `log_prob` (nats), `prob` (in [0, 1]) or `logit` (not bounded).
        batch_size: Texts that the network reads at a time, 1 or more.
        max_length: Tokens read of a text, special tokens included; the model's window by default.
        sign: −1 = the label is bad, 1 = it is good.
        name: Label in outputs.

    Raises:
        UserError: if the model cannot be loaded or has no trained head for classes, or an argument
            does not fit it.
    """

    def __init__(
        self, model: str, label: int | str, output: str = "log_prob", batch_size: int = 32,
        max_length: int | None = None, sign: float = 1.0, name: str = "classifier",
    ) -> None:  # fmt: skip
        self.model, self.label, self.output, self.batch_size = model, label, output, batch_size
        self.max_length, self.sign, self.name = max_length, sign, name
        require_sign(sign)
        require(
            "output", output, output in ("log_prob", "prob", "logit"), "log_prob, prob or logit"
        )
        require("batch_size", batch_size, batch_size > 0, "1 or more")
        self._network, self._tokenizer = load_classifier(model)
        self._index = _find_label(self._network.config, label)
        self._sigmoid = self._network.config.problem_type == "multi_label_classification"
        only_logit = self._network.config.num_labels == 1 and not self._sigmoid
        require(
            "output",
            output,
            output == "logit" or not only_logit,
            f"logit, for {model} has one label: a score",
        )
        window, least = (
            window_of(self._network, self._tokenizer),
            self._tokenizer.num_special_tokens_to_add() + 1,
        )
        fits = max_length is None or least <= max_length <= window
        require("max_length", max_length, fits, f"{least} to {window}, the window of {model}")
        self._length = max_length or window

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = tokenize(self._network, self._tokenizer, list(texts), max_length=self._length)
        return self._value(logits_of(self._network, rows, self.batch_size))

    def check_tokenizer(self, tokenizer: Any) -> None:
        """`soft` is given distributions over the tokens of `tokenizer`; the classifier may know
        more, but no other ones.

        Raises:
            UserError: if a token has another number for the classifier, or another token ends a
                text.
        """
        own = self._tokenizer.get_vocab()
        same = all(own.get(token) == number for token, number in tokenizer.get_vocab().items())
        if not same or tokenizer.eos_token_id != self._tokenizer.eos_token_id:
            raise UserError(
                f"guidance: RewardGradient given, but the classifier {self.model} does not share"
                " the base model's tokenizer; allowed for it: CriticGuidance, Unguided"
            )

    def soft(self, probabilities: Tensor) -> Tensor:
        """The reward of texts given by a distribution over the base model's tokens at every
        position, differentiable.

        The network reads `probabilities @ its own embedding table`. The text ends before the first
        position whose likeliest token is the end token, as a decoded text does; what follows is
        masked. Where the text ends is thus no smooth function and has no gradient; how much of the
        end token is mixed in before has. The special tokens that the classifier's tokenizer puts
        around a text ([CLS] … [SEP]) are put around it here too, and a text too long for
        `max_length` is cut. On one-hot rows it is the reward of the text if the text's tokens are
        those that the tokenizer gives it.

        Args:
            probabilities: (B, T, V), rows that sum to 1; the base model's tokens have the same
                numbers for the classifier (`check_tokenizer`); columns beyond its table, which pad
                the base model's, are not read.

        Returns:
            (B,) on the device and in the dtype of the probabilities.

        Raises:
            RewardError: if none of the V tokens is an end token.
        """
        table, end = self._table(), self._tokenizer.eos_token_id
        if end is None or end >= probabilities.shape[2]:
            got = f"{probabilities.shape[2]} tokens, and {end} as the end token's number"
            raise RewardError(
                f"reward {self.name!r}: soft needs a tokenizer shared with the base model, with an"
                f" end token; got {got}"
            )
        given = probabilities.to(table.device, table.dtype)
        n = min(len(table), given.shape[2])
        lengths = ((given.argmax(-1) == end).cumsum(1) == 0).sum(1)
        embeds, mask = self._framed(given[..., :n] @ table[:n], lengths)
        return self.reward_from_embeddings(embeds, mask).to(probabilities)

    def reward_from_embeddings(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """The reward of what the network reads at the given embeddings, differentiable.

        Args:
            inputs_embeds: (B, T, H), special tokens included, T within the model's window.
            attention_mask: (B, T), 1 or True at what counts: the first positions of each row, at
                least one.

        Returns:
            (B,) on the embeddings' device, which must be the network's.
        """
        mask = attention_mask.long()
        head = getattr(self._network, "score", None)
        with torch.autocast(mask.device.type, enabled=False):
            if head is None:
                return self._value(
                    self._network(inputs_embeds=inputs_embeds, attention_mask=mask).logits
                )
            # transformers' causal classifiers look for the last token by its number, which is not
            # there to be seen.
            body = self._network.base_model(
                inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False
            )
            last = body.last_hidden_state[
                torch.arange(len(mask), device=mask.device), mask.sum(1) - 1
            ]
            return self._value(head(last))

    def _value(self, logits: Tensor) -> Tensor:
        """(B, labels) → (B,)."""
        if self.output == "logit":
            return self.sign * logits[:, self._index]
        log_p = F.logsigmoid(logits) if self._sigmoid else logits.log_softmax(1)
        return self.sign * (
            log_p[:, self._index] if self.output == "log_prob" else log_p[:, self._index].exp()
        )

    def _table(self) -> Tensor:
        self._network.to(_device())
        embedding = self._network.get_input_embeddings()
        weight: Tensor = embedding.weight
        scale = getattr(embedding, "embed_scale", None)  # Gemma's table is scaled on the way out
        return weight if scale is None else weight * scale

    def _framed(self, embeds: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, H) and mask (B, L): the first `lengths` embeddings of each row with the special
        tokens before and after.
        """
        before, after = self._frame()
        most = self._length - len(before) - len(after)
        # With nothing around it, an empty text is its end token.
        lengths = lengths.clamp(0 if before or after else 1, most)[:, None]
        b, t, a = len(before), embeds.shape[1], len(after)
        special = F.embedding(
            torch.tensor(before + after, device=embeds.device, dtype=torch.int64), self._table()
        )
        special = special[None].expand(len(embeds), -1, -1)
        parts = torch.cat([special[:, :b], embeds, special[:, b:]], 1)
        place = torch.arange(b + min(t, most) + a, device=embeds.device)[None]
        ended, inside = place >= b + lengths, place < b + lengths + a
        source = torch.where(ended, place - lengths + t, place).clamp_max(parts.shape[1] - 1)
        return parts.gather(1, source[..., None].expand(-1, -1, parts.shape[2])), inside

    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        row = self._tokenizer("a", return_special_tokens_mask=True)
        ids, special = row["input_ids"], row["special_tokens_mask"]
        first = special.index(0)
        last = len(special) - special[::-1].index(0)
        return ids[:first], ids[last:]


def load_classifier(model: str) -> tuple[Any, Any]:
    """A frozen sequence classifier and its tokenizer, on the CPU in float32.

    Raises:
        UserError: if it is missing, incomplete, not in safetensors, or a model without trained
            weights of a head for classes.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = folder_of(model, "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        network = load_whole(
            AutoModelForSequenceClassification, folder, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"model: {model} given, allowed: a trained sequence classifier; cannot load it"
            f" ({reason})"
        ) from error
    config = network.config.get_text_config()
    ids = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    config.pad_token_id = next(token for token in ids if token is not None)
    return network.eval().requires_grad_(False), tokenizer


def window_of(network: Any, tokenizer: Any) -> int:
    """The most tokens that the network reads at a time, special tokens included."""
    return min(positions_of(network), tokenizer.model_max_length)


def tokenize(
    network: Any,
    tokenizer: Any,
    texts: list[str],
    pairs: list[str] | None = None,
    max_length: int = 0,
) -> list[Row]:
    """A row for each text, or text and its pair; none empty."""
    if not texts:
        return []
    texts, pairs = [readable(text) for text in texts], pairs and [readable(text) for text in pairs]
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        texts, pairs, truncation=True, max_length=max_length
    )
    names = ["input_ids", "attention_mask"]
    # GPT-2 would add an embedding for segments that it was never trained with.
    if getattr(network.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    names = [
        name
        for name in names
        if name in encoded and name in inspect.signature(network.forward).parameters
    ]
    rows = [
        dict(zip(names, values, strict=True))
        for values in zip(*(encoded[name] for name in names), strict=True)
    ]
    end = tokenizer.eos_token_id
    alone = {
        "input_ids": [network.config.get_text_config().pad_token_id if end is None else end],
        "attention_mask": [1],
    }
    return [row if row["input_ids"] else alone for row in rows]


@torch.no_grad()
def logits_of(network: Any, rows: list[Row], batch_size: int) -> Tensor:
    """(N, labels) float32 on the CPU; rows of like length are read together."""
    device = _device()
    network.to(device)
    if not rows:
        return torch.zeros(0, network.config.num_labels)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    pad = {"input_ids": network.config.get_text_config().pad_token_id}
    found = []
    for start in progress.steps(range(0, len(rows), batch_size), "rewards"):
        some = [rows[i] for i in order[start : start + batch_size]]
        length = max(len(row["input_ids"]) for row in some)
        batch = {
            name: (
                torch.tensor(
                    [row[name] + [pad.get(name, 0)] * (length - len(row[name])) for row in some]
                ).to(device)
            )
            for name in some[0]
        }
        # In float32 whatever the trainer's precision, since equal texts get equal rewards.
        with torch.autocast(device.type, enabled=False):
            found.append(network(**batch).logits)
    logits = torch.cat(found).cpu()
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _find_label(config: Any, label: int | str) -> int:
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if isinstance(label, str) and names.count(label) == 1:
        return names.index(label)
    index = int(label) if isinstance(label, int) or label.isdecimal() else -1
    require(
        "label",
        label,
        0 <= index < len(names),
        f"{', '.join(names)}, or an index up to {len(names) - 1}",
    )
    return index
