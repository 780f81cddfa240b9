"""The sentiment classifier of the ablation `gradient`: it shares the tokenizer of `tiny/lm`, so a
gradient can pass through it.

    python checkpoints/ablations/classifier.py FOLDER

GPT-2's architecture with a head for two classes, begun from the first layers of `tiny/lm` and
trained on that model's own samples (kept in runs/samples, as for the critics) to tell whether
VADER's compound score is above 0.5. Writes FOLDER in transformers' format, bfloat16. Prints the
accuracy on held-out samples.
"""

import sys

import torch
from transformers import GPT2ForSequenceClassification

from dia_lightning.data import ModelSamples
from dia_lightning.data.base import TokenRows
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import VaderSentiment

LAYERS, STEPS, BATCH, ABOVE = 2, 800, 64, 0.5


def build(lm: BaseLM) -> GPT2ForSequenceClassification:
    """The untrained classifier; its lowest layers are the base model's."""
    config = type(lm.model.config).from_dict(lm.model.config.to_dict())
    config.n_layer, config.pad_token_id = LAYERS, lm.end_id
    config.id2label, config.label2id = {0: "other", 1: "positive"}, {"other": 0, "positive": 1}
    model = GPT2ForSequenceClassification(config)
    model.transformer.load_state_dict(lm.model.transformer.state_dict(), strict=False)
    return model


def labelled(
    lm: BaseLM, rows: TokenRows, reward: VaderSentiment
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as the tokenizer makes them of the decoded texts, and whether each is positive."""
    batch = rows[list(range(len(rows)))]
    texts = lm.decode(batch["tokens"], batch["prompt_mask"])
    return lm.encode(texts, batch["tokens"].shape[1]), (reward(texts) > ABOVE).long()


def main(folder: str) -> None:
    """Train and write the classifier."""
    torch.manual_seed(0)
    data = ModelSamples("checkpoints/tiny/lm", n_texts=20_000)
    data.prepare_data()
    data.setup("fit")
    lm, reward = data.lm, VaderSentiment()
    (tokens, labels), (held_out, truth) = (
        labelled(lm, data.train_rows, reward),
        labelled(lm, data.val_rows, reward),
    )
    model = build(lm).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
    for step in range(STEPS):
        some = torch.randint(len(tokens), (BATCH,))
        loss = model(tokens[some], labels=labels[some]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval().bfloat16().float()
    with torch.no_grad():
        accuracy = (model(held_out).logits.argmax(1) == truth).double().mean()
    print(
        f"held out: accuracy {accuracy:.3f}, {truth.double().mean():.3f} of {len(truth)} positive"
    )
    model.bfloat16().save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
