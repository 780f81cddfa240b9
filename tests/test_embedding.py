"""G is the inverse of E, but for rows that cannot be told apart."""

import pytest
import torch

from dia_lightning.diffusion.embedding import TokenEmbedding


def table() -> torch.Tensor:
    weight = (
        torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0.1, 9, 50)[:, None]
    )
    weight[7] = weight[3]  # an exact copy
    weight[9] = 2 * weight[4]  # the same direction
    weight[20] = 0
    return weight


def test_decoding_inverts_the_embedding() -> None:
    embedding = TokenEmbedding(table(), n_tokens=48)
    ids = torch.arange(50)[embedding.decodable]
    assert torch.equal(embedding.decode(embedding(ids[None]))[0], ids)
    torch.testing.assert_close(embedding.weight[ids].norm(dim=1), torch.full((len(ids),), 8**0.5))


def test_copies_empty_rows_and_padding_are_not_decoded() -> None:
    embedding = TokenEmbedding(table(), n_tokens=48)
    assert [i for i in range(50) if not embedding.decodable[i]] == [7, 9, 20, 48, 49]
    assert embedding.decode(embedding(torch.tensor([[7, 9]]))).tolist() == [[3, 4]]


def test_raw_rows_would_not_invert() -> None:
    """Why rows are scaled: with raw rows the longest win."""
    raw = table()
    assert ((raw @ raw.T).argmax(1) == torch.arange(50)).float().mean() < 0.7


def test_raw_rows_keep_their_norms_and_long_ones_win() -> None:
    """One factor for the table, root mean square norm √d over the tokenizer's rows; G as the
    original proposal has it.
    """
    raw = table()
    embedding = TokenEmbedding(raw, n_tokens=48, normalise=False)
    assert float(embedding.weight[:48].square().sum(1).mean()) == pytest.approx(8, rel=1e-5)
    torch.testing.assert_close(embedding.unit * embedding.weight, raw)
    # Twice a row is another row now; copies, empty rows and padding are out as ever.
    assert [i for i in range(50) if not embedding.decodable[i]] == [7, 20, 48, 49]
    ids = torch.arange(50)[embedding.decodable]
    want = [max(ids.tolist(), key=lambda v: float(raw[v] @ raw[i])) for i in ids]
    assert embedding.decode(embedding(ids[None]))[0].tolist() == want
    assert want != ids.tolist()
    assert embedding.half_square is not None
    torch.testing.assert_close(
        embedding.half_square, torch.tensor([float(row @ row) / 2 for row in embedding.weight])
    )


def test_expected_is_the_mean_under_the_softmax() -> None:
    embedding = TokenEmbedding(table())
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    want = sum(
        logits[:, v].exp()[:, None] * embedding.weight[v] for v in range(50)
    ) / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(embedding.expected(logits), want)


def test_fingerprint_tells_tables_apart() -> None:
    other = table()
    other[0, 0] += 0.1
    assert TokenEmbedding(table()).fingerprint() == TokenEmbedding(table().bfloat16()).fingerprint()
    assert TokenEmbedding(other).fingerprint() != TokenEmbedding(table()).fingerprint()
