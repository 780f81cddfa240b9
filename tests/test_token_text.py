"""Prompt + text is the whole text, to the character, for three kinds of tokenizers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.data.text import train_tokenizer
from dia_lightning.errors import UserError
from dia_lightning.lm.token_text import TokenText

CORPUS = [
    "The baker mends an old net before dawn.",
    "My uncle waters the roses.",
    "été, naïve – “quoted”",
    "a  b\tc\nd",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece() -> Any:
    """As Llama 2 and Mistral have it: a space before the first word, which the decoder takes
    away again.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unigram() -> Any:
    """As T5 and XLNet have it: Metaspace in front of the first piece, characters beyond the
    table unknown.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def text_of(tokenizer: Any) -> TokenText:
    found = TokenText()
    found.tokenizer, found.name, found.end_id = tokenizer, "test", tokenizer.eos_token_id
    found.vocab_size = max(tokenizer.get_vocab().values()) + 1
    return found


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: train_tokenizer(CORPUS, 300),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
}
TEXTS = {kind: text_of(make()) for kind, make in KINDS.items()}
UNICODE = st.text(max_size=12) | st.text("The baker ▁\n\t.é界", max_size=12)


def row_of(
    text: TokenText, prompt: Sequence[int], ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row (1, T) in canonical form and its prompt mask."""
    row = [*prompt, *(i for i in ids if i != text.end_id), text.end_id]
    return torch.tensor([row]), torch.arange(len(row))[None] < len(prompt)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(KINDS)), UNICODE, st.lists(st.integers(0, 1 << 16), max_size=8))
@example("sentencepiece", "The baker", [])
@example("bytes", "a ", [])
def test_what_follows_a_prompt_is_the_whole_less_the_prompt(
    kind: str, prompt: str, numbers: list[int]
) -> None:
    """Of any prompt and any tokens after it: the parts make the whole, and `canonical` is what
    it says.
    """
    text = TEXTS[kind]
    [given] = text.token_ids([prompt])
    given = [i for i in given if i != text.end_id]
    tokens, mask = row_of(text, given, [i % text.vocab_size for i in numbers])
    [found] = text.decode(tokens, mask)
    [whole] = text.decode(tokens, mask, with_prompt=True)
    [before] = text.decode(tokens[:, : len(given)], torch.zeros(1, len(given), dtype=torch.bool))
    assert before + found == whole or not whole.startswith(before)
    [canonical] = text.is_canonical(tokens, mask, [prompt + found]).tolist()
    kept = tokens[0, :-1].tolist()
    assert canonical == (text.token_ids([prompt + found])[0][: len(kept)] == kept)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(KINDS)), UNICODE, UNICODE)
@example("sentencepiece", "The baker", " mends")
@example("sentencepiece", "My un", "cle waters")
@example("unigram", "The", " baker")
@example("bytes", "The baker", " mends")
def test_a_text_that_goes_on_comes_back(kind: str, prompt: str, more: str) -> None:
    """Encoded as pieces of one text and read again, prompt and text are as they were, where the
    tokenizer can say them.
    """
    text = TEXTS[kind]
    given, later = text.token_ids([prompt])[0], text.continued_ids([more])[0]
    if text._read([text.token_ids([prompt + more])[0]]) != [prompt + more] or not prompt:
        return  # unknown characters, or more space than the tokenizer keeps
    if text.end_id in (*given, *later) or text._read([given]) != [prompt]:
        return
    tokens, mask = row_of(text, given, later)
    assert text.decode(tokens, mask) == [more]
    assert text.decode(tokens, mask, with_prompt=True) == [prompt + more]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_around_blanks_get_no_space_of_their_own(kind: str) -> None:
    """The prefix space belongs to the first piece alone: with the words filled in, the text is
    what a person wrote.
    """
    text: Any = TEXTS[kind]
    filled = text.continued_ids([" baker"])[0]
    for prompt, want in [
        (f"The [blank:{len(filled)}] mends an old net.", "The baker mends an old net."),
        (f"The[blank:{len(filled)}], naïve", "The baker, naïve"),
        (f"[blank:{len(filled)}] waters\nd", None),
    ]:
        tokens, mask = prompt_rows(text, [prompt], 64)
        tokens[~mask] = torch.tensor(filled)
        [found] = text.decode(tokens, mask, with_prompt=True)
        assert found == want or (want is None and found.lstrip() == "baker waters\nd")


def test_lines_before_a_blank_stay(lm: Any) -> None:
    tokens, mask = prompt_rows(lm, ["the good\n[blank:2] is"], 12)
    tokens[~mask] = 7
    [found] = lm.decode(tokens, mask, with_prompt=True)
    assert found.startswith("the good\n")
    assert found.endswith(" is")


def test_a_space_at_the_end_of_a_prompt_makes_other_tokens() -> None:
    """The classic: "The " and "baker" are not the tokens of "The baker", and the record says so."""
    text = TEXTS["bytes"]
    [the], [baker] = text.token_ids(["The "]), text.token_ids(["baker"])
    tokens, mask = row_of(text, the, baker)
    [found] = text.decode(tokens, mask)
    assert found == "baker"
    assert text.is_canonical(tokens, mask, ["The " + found]).tolist() == [False]
    [baker] = text.token_ids([" baker"])
    [start] = text.token_ids(["The"])
    tokens, mask = row_of(text, start, baker)
    assert text.is_canonical(tokens, mask, ["The" + text.decode(tokens, mask)[0]]).tolist() == [
        True
    ]


def test_tokens_beyond_the_table_are_named() -> None:
    text = text_of(train_tokenizer(CORPUS, 300))
    text.vocab_size = max(text.token_ids(["The baker"])[0])
    token = text.tokenizer.convert_ids_to_tokens(text.vocab_size)
    with pytest.raises(
        UserError, match=rf"'The baker' has the token '{token}', which test has no embedding for"
    ):
        text.encode(["a", "The baker"], 8)
