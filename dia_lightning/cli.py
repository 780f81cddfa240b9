"""The `lightning` command (second name: `dia`): its help, its arguments and how it ends.

Nothing heavy is imported here: help and most mistakes are answered at once; `parser.run` does the
    work.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dia_lightning import __version__
from dia_lightning.errors import INTERRUPTS, UserError, no_memory, root_user_error
from dia_lightning.files import read_yaml, require_path
from dia_lightning.lab.kit.files import settings_file
from dia_lightning.settings.options import module_name
from dia_lightning.terminal import visible

_DEFAULT_PREDICT = "configs/dia_tiny.yaml"
_CONFIG_OPTIONS = ("--config", "-c")
_ALLOW = "--allow"
_HELP_OPTIONS = {"-h", "--help"}

COMMANDS = {
    "fit": "train a base model, a denoiser or a critic",
    "validate": "measure a module in training on held-out data",
    "test": "evaluate a sampler on prompts",
    "predict": "sample texts; with no option, aligned texts from the shipped kit",
}

# Commands that run no trainer, and have options of their own.
TOOLS = {
    "kit": "put networks, settings and a model card into one folder to share",
    "preference": "let people judge pairs of texts: export them blinded, import the choices",
    "study": "run a grid of runs from one file, and report it; goes on where it was stopped",
}

HELP = f"""usage: lightning COMMAND [--config FILE] [--OPTION VALUE ...]

Sample text from p_theta(x) exp(lambda r(x)): a frozen language model, steered by a reward.

commands:
{chr(10).join(f"  {name:12}{text}" for name, text in {**COMMANDS, **TOOLS}.items())}

A run is one YAML file and what you change in it:
  lightning predict
  lightning predict --lam 8 --prompts my_prompts.txt --n 8 --out runs/mine
  lightning predict --reward my_rewards.py:Cheer
  lightning fit --config configs/ddpm_tiny.yaml --trainer.max_steps 100
  lightning kit export --config configs/dia_tiny.yaml --out my_kit
  dia study configs/ablations/lam.yaml --out runs/ablations
  dia preference export runs/a/predictions.jsonl runs/b/predictions.jsonl --out runs/people

`lightning COMMAND --help` says more. `--version` prints the version; `--debug` shows the
traceback of an error.
`--allow MODULE` lets options name classes of a module of yours: nothing else of yours is imported.
`dia` and `python -m dia_lightning` are the same program.
"""

_SAMPLER_OPTIONS = """
  --lam X                       lambda: 0 = the base model itself, larger = more reward
  --reward CLASS                VaderSentiment, LocalToxicity, ...; or a class or function of
                                yours: my_rewards.py:NAME; its options: --reward.words "[a, b]"
  --prompts FILE                .txt (one a line), or with a field "prompt": .jsonl, .json (a list),
                                .csv, .tsv, .parquet or hub:NAME; none = from nothing
  --n N                         texts for each prompt
  --out DIR                     folder of all that the run writes
  --sampler CLASS               Annealed, Chains, Diffusion, ParticleSteering, ParticleGibbs,
                                TwistedSMC, GuidedDecoding, BestOfN, BaseModel or Source, or
                                my_sampler.py:NAME; its options: --sampler.particles 8
  --base_lm NAME                base model: folder, .gguf file, hub id, or smollm2
  --seed N                      of all randomness
  --model.denoiser PATH         denoiser of the base model: folder or .ckpt
  --model.critic PATH           critic, trained on the reward: folder or .ckpt
  --data.reading.template TEXT  makes the prompt of a record's fields: "{source} TL;DR:"
  --data.batch_size N           texts sampled together
  --data.max_length N           tokens, prompt and end included"""

_TRAINING_OPTIONS = """
  --out DIR                     folder of all that the run writes
  --base_lm NAME                base model: folder, .gguf file, hub id, or smollm2
  --n N                         how many samples of the base model to train on
  --seed N                      of all randomness but that of the samples
  --model.optimizer.lr X        learning rate
  --data.batch_size N           rows a step and process
  --data.max_length N           longest row in tokens
  --trainer.max_steps N         how long
  --trainer.devices N           how many processes
  --ckpt_path FILE              weights (in `fit` the state of the run too) to go on from"""

_SHORTS = """`--lam` is short for `--model.lam`, and that for `--model.init_args.lam`.
`--prompts` and `--n` are `--data.prompts` and `--data.n_texts`; the others are of `--model`."""
_TRAINING_SHORTS = """`--base_lm` is short for `--model.base_lm`, `--n` for `--data.n_texts`,
`--seed` for `--seed_everything`, and for a critic `--reward` for `--model.reward`."""

_COMMAND_HELP = """usage: lightning {command} [--config FILE] [--OPTION VALUE ...]

{title}.

options most used ({classes}):{options}
  --config FILE                 settings: a file, a kit's folder or hub:USER/REPO; {default}.
                                May be given several times, the later one wins.
  --allow MODULE                lets options name classes of a module of yours;
                                may be given several times

{shorts}
What the command line says wins over the file.
  lightning {command} --print_config            every setting, as a YAML file
  lightning {command} --model.help CLASS        every option of a class, for example
                                       {example}
  lightning {command} --help-all                every option of the trainer
"""


def command_help(command: str) -> str:
    """What `lightning COMMAND --help` prints."""
    samples = command in ("test", "predict")
    default = f"for example configs/{'dia' if samples else 'ddpm'}_tiny.yaml"
    return _COMMAND_HELP.format(
        command=command,
        title=COMMANDS[command].capitalize(),
        classes="GuidedSamplerModule, PromptData" if samples else "DenoiserModule, ModelSamples",
        default=f"by default {_DEFAULT_PREDICT}" if command == "predict" else default,
        shorts=_SHORTS if samples else _TRAINING_SHORTS,
        options=_SAMPLER_OPTIONS if samples else _TRAINING_OPTIONS,
        example=f"dia_lightning.{'GuidedSamplerModule' if samples else 'training.DenoiserModule'}",
    )


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Find config files also among the shipped ones, and give `predict` its default when no file is
    named.

    They come before the options, wherever they were named, since the command line wins over the
    file.

    Raises:
        UserError: for an unknown command, and for a config file that exists nowhere or is none.
    """
    command = next((a for a in arguments if a in COMMANDS), "")
    if not command:
        given = f"{arguments[0]!r} given" if arguments else "none given"
        raise UserError(
            f"COMMAND: {given}, allowed are {', '.join({**COMMANDS, **TOOLS})} (see `lightning"
            " --help`)"
        )
    out: list[str] = []
    files: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, _, value = argument.partition("=")
        if option in _CONFIG_OPTIONS:
            value = value or next(rest, "")
            if not value or value.startswith("-"):
                raise UserError(
                    "--config: no file given, for example --config configs/dia_tiny.yaml"
                )
            path = settings_file(value, "--config")
            if "allow" in read_yaml(path, "--config"):
                raise UserError(
                    f"--config: {path} sets allow; what may be imported is said on the command line"
                    " alone"
                )
            files += ["--config", str(path)]
        else:
            out.append(argument)
    if command == "predict" and not files and not _HELP_OPTIONS & set(out):
        files = ["--config", str(require_path(_DEFAULT_PREDICT, "--config"))]
    place = out.index(command) + 1
    return [*out[:place], *files, *out[place:]]


def split_allow(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--allow MODULE` or `--allow=MODULE`, and the modules; UserError
    where one is missing or none.
    """
    rest, modules = [], []
    given = iter(arguments)
    for argument in given:
        option, equals, value = argument.partition("=")
        if option == _ALLOW:
            modules.append(module_name(value if equals else next(given, "")))
        else:
            rest.append(argument)
    return rest, modules


def _help_text(arguments: list[str]) -> str | None:
    """What to print instead of running anything."""
    if arguments[:1] in (["-h"], ["--help"], ["help"]):
        return HELP
    if arguments[:1] == ["--version"]:
        return f"dia-lightning {__version__}\n"
    if arguments and arguments[0] in COMMANDS and _HELP_OPTIONS & set(arguments):
        return command_help(arguments[0])
    return None


def _end(message: str, code: int) -> NoReturn:
    print(visible(" ".join(message.split())), file=sys.stderr)
    sys.exit(code)


def _end_interrupted(command: str) -> NoReturn:
    code = INTERRUPTS.exit_code
    if command in ("preference", "kit"):
        _end("interrupted", code)
    if command == "study":
        _end("interrupted; finished cells are kept, the same command goes on from there", code)
    hint = "finished batches are kept, the same command goes on from there"
    _end(
        "interrupted;"
        f" {'go on from its last checkpoint with --ckpt_path' if command == 'fit' else hint}",
        code,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is imported stays: looking through it for garbage takes a fifth of the imports' time,
    and as long at the end.
    """
    if "lightning" in sys.modules:  # called by a program, whose garbage is its own
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)


def main() -> None:
    """Entry point of the scripts: exit code 2 and one line for a user's mistake, 1 for a bug, 130
    for Ctrl-C, 143 for SIGTERM.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    text = _help_text(arguments)
    if text is not None:
        print(text, end="")
        sys.exit(0)
    # Before huggingface_hub and transformers are imported.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        INTERRUPTS.watch()
        if arguments[:1] == ["preference"]:
            from dia_lightning.lab.preference.command import run_preference

            return run_preference(arguments[1:])
        if arguments[:1] == ["study"]:
            from dia_lightning.lab.study.command import run_study

            return run_study(arguments[1:])
        if arguments[:1] == ["kit"]:
            from dia_lightning.lab.kit.command import run_kit

            return run_kit(arguments[1:])
        rest, modules = split_allow(arguments)
        prepared = prepare_arguments(["--help" if a == "--help-all" else a for a in rest])
        with _no_collection():
            from dia_lightning.settings.own_code import load_files
            from dia_lightning.settings.parser import run
        prepared, own = load_files(prepared)
        run(prepared, allow=[*modules, *own])
    except KeyboardInterrupt:
        _end_interrupted(arguments[0])
    except SystemExit as end:
        # The Trainer turns Ctrl-C into exit code 1.
        if isinstance(end.__context__, KeyboardInterrupt):
            _end_interrupted(arguments[0])
        raise
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            print(visible(traceback.format_exc()), file=sys.stderr, end="")
        user_error = root_user_error(error)
        if user_error is not None:
            _end(f"error: {user_error}", 2)
        if no_memory(error):
            _end(
                "error: not enough memory; lower what is done at once: --data.batch_size,"
                " --model.sampler.particles",
                2,
            )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _end(
            f"internal error: {type(error).__name__}: {reason} (run again with --debug for the"
            " traceback)",
            1,
        )
