"""Randomly initialised classifiers of transformers' own classes, and transformers' answer for
one text at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WINDOW, END = 32, "<|endoftext|>"
CORPUS = [
    f"the {a} food is {b} near the {c}. We like it!"
    for a in ("good", "bad", "cheap") for b in ("great", "poor") for c in ("river", "pub")
]  # fmt: skip
FAMILIES = ["bert", "distilbert", "roberta", "gpt2", "llama"]


def make_tokenizer(framed: bool, n: int = 300) -> Any:
    """A byte-level BPE; `framed` puts [CLS] and [SEP] around texts and pairs, as BERT's does."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    names = [END, "[CLS]", "[SEP]", "[PAD]"]
    bpe.train_from_iterator(CORPUS, n, min_frequency=1, special_tokens=names, show_progress=False)
    own = bpe._tokenizer
    if framed:
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        own.post_processor = TemplateProcessing(
            "[CLS] $A [SEP]", pair, [("[CLS]", 1), ("[SEP]", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=own, eos_token=END, cls_token="[CLS]", sep_token="[SEP]",
            pad_token="[PAD]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token=END)


def make_classifier(
    folder: Path,
    family: str,
    labels: list[str] | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Path:
    """A folder in transformers' format with weights large enough to tell texts apart."""
    import transformers as hf

    labels = labels or ["bad", "good", "odd"]
    tokenizer = tokenizer or make_tokenizer(family not in ("gpt2", "llama"))
    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.3,
        **names,
        **options,
    }
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    torch.manual_seed(0)
    if family == "bert":
        config: Any = hf.BertConfig(
            **sizes, max_position_embeddings=WINDOW, pad_token_id=3, **common
        )
    elif family == "roberta":  # positions begin at pad_token_id + 1
        config = hf.RobertaConfig(
            **sizes, max_position_embeddings=WINDOW + 4, pad_token_id=3, type_vocab_size=1, **common
        )
    elif family == "distilbert":
        small = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        config = hf.DistilBertConfig(
            **small, max_position_embeddings=WINDOW, pad_token_id=3, **common
        )
    elif family == "llama":
        config = hf.LlamaConfig(
            **sizes, max_position_embeddings=WINDOW, pad_token_id=None, **common
        )
    else:
        config = hf.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=WINDOW, pad_token_id=None, **common
        )
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Oracle:
    """transformers' logits, one text or pair at a time, so that nothing is padded."""

    def __init__(self, folder: Path) -> None:
        import transformers as hf

        self.tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        self.model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def logits(self, text: str, pair: str | None = None, window: int = WINDOW) -> Tensor:
        row = self.tokenizer(text, pair, truncation=True, max_length=window)
        ids = row["input_ids"] or [self.tokenizer.eos_token_id]
        more = (
            {"token_type_ids": torch.tensor([row["token_type_ids"]])}
            if self.model.config.model_type == "bert"
            else {}
        )
        return self.model(input_ids=torch.tensor([ids]), **more).logits[0]
