import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Run


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(
        str(folder), size_guidance={"tensors": 0, "histograms": 0, "scalars": 0}
    )
    found.Reload()
    return found


def test_a_run_says_what_its_files_say(lightning: Run) -> None:
    size = [
        "--data.n_texts=6",
        "--data.batch_size=4",
        "--data.max_length=12",
        "--trainer.callbacks.folder=out",
    ]
    start = ["predict", "--config", "configs/dia_tiny.yaml", *size]
    assert lightning(*start, "--trainer.limit_predict_batches=1")[0] == 0
    assert not Path("out/tensorboard").exists()  # figures come with the last batch
    assert lightning(*start)[0] == 0
    metrics = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    files = {
        metrics["method"]: ("predictions", metrics),
        "zero_shot": ("base_predictions", metrics["base"]),
    }
    assert {path.name for path in Path("out/tensorboard").iterdir()} == set(files)
    for method, (name, figures) in files.items():
        lines = [
            json.loads(line)
            for line in Path(f"out/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        events = read(Path("out/tensorboard") / method)
        for tag in ("reward", "log_p_per_token"):
            assert [
                (event.step, event.histogram_value.num)
                for event in events.Histograms(f"texts/{tag}")
            ] == [(0, 4), (1, 2)]
        first = events.Histograms("texts/reward")[0].histogram_value
        assert first.sum == pytest.approx(sum(line["reward"] for line in lines[:4]), rel=1e-5)
        (mean,) = events.Scalars("run/reward")
        assert mean.value == pytest.approx(figures["reward"], rel=1e-5)
        shown = [
            event.tensor_proto.string_val[0].decode()
            for event in events.Tensors("texts/samples/text_summary")
        ]
        assert all(line["text"].strip() in shown[i // 4] for i, line in enumerate(lines))
    events = read(Path("out/tensorboard") / metrics["method"])
    rates = [event.value for event in events.Scalars("sampler/accept_rate")]
    assert (4 * rates[0] + 2 * rates[1]) / 6 == pytest.approx(metrics["accept_rate"], abs=1e-5)
