"""A mistake in the options, said in one line: which option, what was given, what is allowed."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import pairwise

from dia_lightning.errors import UserError
from dia_lightning.settings.options import NEGATIVE
from dia_lightning.settings.short import in_full, outside

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN = re.compile(
    r"(?:Option|Subcommand '\w+' does not accept option|Group '\w+' does not accept option)"
    r" '([^']+)'"
)
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_NO_VALUE = re.compile(r"argument (\S+?)(?:/\S+)?: expected one argument")
_UNRECOGNISED = re.compile(r"unrecognized arguments: (\S+)")
_EXPECTED = re.compile(
    r"Expected an? (<class '.+?'>|typing\.\S.*?)(?:\. Got value: .*)?$", re.DOTALL
)
_DENIED = re.compile(r"Importing '([^']+)' is not allowed, denied by")
_NO_PATH = re.compile(r"Expected a dot import path string: (\S+)")
_NOT_IMPORTED = re.compile(r"No module named|has no attribute|not a valid import path")

# What options, samplers and classes of version 0.1.0 are called now.
_SAMPLER = dict.fromkeys(
    ("refine", "refine_steps", "rungs", "moves", "particles", "pool", "ess", "steps", "strength",
     "stagger", "corrector", "corrector_steps", "eta", "eta_decay", "reading", "gradient",
     "guidance_scale", "guidance_decay", "guidance_cap", "guidance_window", "temperature", "final",
     "n", "top_k", "top_p", "every", "resampling", "potential", "label", "scale", "reference",
     "method"),
    "now part of --model.sampler",
)  # fmt: skip
_OPTIMIZER = {
    name: f"now --model.optimizer.{name}" for name in ("lr", "weight_decay", "warmup_steps")
}
_NETWORK = {
    name: f"now --model.network.{name}"
    for name in (
        "width", "layers", "heads", "max_length", "rotary", "adapter_rank", "tied_head",
        "activation_checkpointing", "compile",
    )
} | {name: f"now --model.noising.{name}" for name in ("schedule", "normalise")}  # fmt: skip
_START = {"init_from_lm": "now --model.init_from base_lm or random"}
_READING = {name: f"now --data.reading.{name}" for name in ("fields", "split", "limit", "template")}
# Of each class where its options went.
_MOVED = {
    "GuidedSamplerModule": _SAMPLER,
    "DenoiseAccept": {"expert": "gone, drafts by p_θ are now the move Window"},
    "DenoiserModule": _OPTIMIZER | _NETWORK | _START | {
        f"label_{name}": f"now --model.labels RewardLabels --model.labels.{name}"
        for name in ("reward", "edges", "drop")
    },
    "CriticModule": _OPTIMIZER | _NETWORK | _START,
    "LMModule": _OPTIMIZER,
    "PromptData": _READING,
    "RolloutData": _READING,
    "HubText": {
        name: f"now --data.source.{name}" for name in ("dataset", "config", "split", "column")
    },
    "PPOModule": _OPTIMIZER | {
        name: f"now --model.updates.{name}"
        for name in ("epochs", "minibatches", "clip", "gradient_clip")
    } | {name: f"now --model.estimator.{name}" for name in ("gae_lambda", "value_coef")},
}  # fmt: skip
_RENAMED = {
    "annealed": "Annealed", "base_lm": "Chains",
    "source": "Chains with --model.sampler.start Source",
    "ancestral": "Diffusion with --model.sampler.solver Ancestral",
    "ddim": "Diffusion with --model.sampler.solver DDIM",
    "dpmpp_2m": "Diffusion with --model.sampler.solver DPMpp2M", "dia": "Diffusion",
    "ppo": "GAE", "rloo": "LeaveOneOut",
    "dia_literal": "Diffusion with --model.sampler.solver DiaLiteral",
    "dia_lightning.sampling.GuidedSamplerModule": "dia_lightning.GuidedSamplerModule",
    "dia_lightning.baselines.PPOModule": "dia_lightning.training.PPOModule",
    **{
        f"dia_lightning.baselines.{old}":
            f"dia_lightning.GuidedSamplerModule with the sampler {new}"
        for old, new in {
            "ZeroShotModule": "BaseModel",
            "BestOfNModule": "BestOfN",
            "SMCModule": "ParticleSteering",
            "TwistedSMCModule": "TwistedSMC",
            "GuidedDecodingModule": "GuidedDecoding",
            "ClassifierFreeModule": "Diffusion and the guidance ClassifierFree",
        }.items()
    },
    **{f"dia_lightning.metrics.{name}": f"dia_lightning.lab.judges.{name}"
       for name in ("Evaluation", "Hacking", "Judge")},
    "dia_lightning.lm_module.LMModule": "dia_lightning.training.LMModule",
    "dia_lightning.critic.CriticModule": "dia_lightning.training.CriticModule",
    "dia_lightning.diffusion.DenoiserModule": "dia_lightning.training.DenoiserModule",
}  # fmt: skip
_MIGRATION = "see docs/migration.md"

# Options may name classes and functions of these; those of other modules where the user allows it.
TRUSTED = ("dia_lightning", "lightning", "torch", "torchmetrics", "transformers")


def explain(
    message: str, error: BaseException | None, arguments: Sequence[str], options: Iterable[str]
) -> str:
    """One line for a parsing error of jsonargparse.

    Args:
        message: the whole message. error: its exception; the chain of causes leads from the option
            to what was wrong.
        arguments: the command line. options: the names it may use, for a hint at a spelling
            mistake.
    """
    texts = _chain(error) or [message]
    path, class_path = _locate(texts)
    leaf = texts[-1]
    if found := _DENIED.search(
        "\n".join(texts)
    ):  # anywhere: of a union's members the last one speaks
        if path[-1:] == ["init_args"]:
            path.pop()
        # Without a path it is the value of an option as --model.help.
        option = typed_option(path, arguments)[0] if path else texts[0].partition(":")[0]
        return _denied(option, found[1])
    if found := _UNRECOGNISED.search(leaf):
        name = found[1].partition("=")[0]
        if not name.startswith("-"):
            return f"{name}: an option was expected"
        typed = (argument.partition("=")[0] for argument in arguments)
        # Of --model.moves.size argparse says --moves.size.
        name = next((a for a in typed if a == name or a.endswith(f".{name.lstrip('-')}")), name)
        owner, _, old = _bare(name).partition(".")
        if owner in ("model", "data") and (now := _moved(old)):
            return f"{name}: {now}; {_MIGRATION}"
        return f"{name}: unknown option{_near(name, [*options, *outside(arguments)])}"
    if found := _NO_VALUE.search(leaf):
        return _without_value(found[1], arguments)
    if found := _UNKNOWN.search(leaf):
        option = typed_option([*path, *found[1].split(".")], arguments)[0]
        if now := _moved(found[1], class_path):
            return f"{option}: {now}; {_MIGRATION}"
        return f"{option}: unknown option{_near(found[1], _parameters(class_path), class_path)}"
    if found := _REQUIRED.search(leaf):
        return _required(path, found[1])
    return _value(texts, path, class_path, arguments)


def _value(texts: list[str], path: list[str], class_path: str, arguments: Sequence[str]) -> str:
    """What is wrong with the value of an option."""
    leaf = texts[-1]
    if path[-1:] == ["init_args"]:  # the class itself, none of its options
        path.pop()
    option, given = typed_option(path, arguments)
    for old in (
        class_path,
        given,
        *re.findall(r"(?:Got value|Given value|import path string): '?([\w.]+)", "\n".join(texts)),
    ):
        if old in _RENAMED:
            return f"{option}: {old} is {_RENAMED[old]} now; {_MIGRATION}"
    if wrong := _NO_PATH.search(leaf):  # `class_path` is the part around it
        known = getattr(import_module("dia_lightning.samplers"), "__all__", [])
        given = wrong[1].replace("None", "null")
        return (
            f"{option}: {given} given, allowed is the name or path of a class that fits"
            f" there{_near(given, known)}"
        )
    if _NOT_IMPORTED.search(leaf):
        reason = f"{_flat(leaf)}{_classes_beside(class_path)}"
        return f"{option}: {class_path or given} given, allowed is the path of a class ({reason})"
    if allowed := _allowed(texts):
        given = (
            given
            or (
                re.findall(r"(?:Got value|Given value): (.+)", "\n".join(texts))
                or ["a wrong value"]
            )[-1]
        )
        return f"{option}: {given} given, allowed: {allowed}"
    reason = re.sub(r"\. Got value: .*", "", _flat(leaf))
    return (
        f"{option}: {given + ' given, ' if given else ''}{reason[:1].lower()}{reason[1:]}"
        if path
        else reason
    )


def _moved(option: str, class_path: str = "") -> str | None:
    """Where an option of a module went, of `class_path` or of any."""
    module = class_path.rpartition(".")[2]
    tables = list(_MOVED.values()) if not module else [_MOVED.get(module, {})]
    return next(
        (table[name] for table in tables if (name := option.partition(".")[0]) in table), None
    )


def refuse_lost(arguments: Iterable[str]) -> None:
    """Raises a UserError for an option of a part that a later option replaces: it would be
    dropped without a word.
    """
    seen: list[str] = []
    for argument in arguments:
        option = argument.partition("=")[0]
        if lost := next((name for name in seen if name.startswith(f"{option}.")), ""):
            raise UserError(
                f"{lost}: given before {option}, which replaces the part; write {option} first"
            )
        seen += [option] if option.startswith("--") else []


def _denied(option: str, name: str) -> str:
    *most, last = TRUSTED
    module = name.rpartition(".")[0] or name
    return (
        f"{option}: {name} given, allowed without asking is what {', '.join(most)} and {last} hold;"
        f" if you trust its code, run it with --allow {module}"
    )


def _chain(error: BaseException | None) -> list[str]:
    """Messages from the outermost error to its root, repeated ones once."""
    texts: list[str] = []
    while error is not None:
        if (text := str(error).strip()) and text not in texts:
            texts.append(text)
        error = error.__cause__ or error.__context__
    return texts


def _locate(texts: list[str]) -> tuple[list[str], str]:
    """The option's path, as in `--a.b.init_args.c`, and the class whose options were being read."""
    path: list[str] = []
    class_path = ""
    for text in texts:
        if found := _KEY.match(text):
            path += found[1].split(".")
        elif found := _CLASS.match(text):
            path.append("init_args")
            class_path = found[1]
    return path, class_path


def _bare(name: str) -> str:
    """An option's name without what may be left out of it."""
    return name.lstrip("-").rstrip("+").replace(".init_args", "")


def typed_option(path: list[str], arguments: Sequence[str]) -> tuple[str, str]:
    """The option as it stands on the command line, with its value, or its full name if it is in
    a file.
    """
    full = "--" + ".".join(path)
    if typed := _typed(full, arguments):
        return typed
    for n in reversed(range(1, len(path))):
        above = _typed("--" + ".".join(path[:n]), arguments)
        if above and above[1].startswith(("[", "{")):  # what was typed holds it
            return f"{above[0]}: {'.'.join(path[n:]).replace('init_args.', '')}", ""
    files = [b for a, b in pairwise(arguments) if a == "--config"]
    return f"{full} (in {', '.join(files)})" if files else full, ""


def is_typed(option: str, arguments: Sequence[str], word: str = "") -> bool:
    """Whether the command line gives `option` or a part of it, with `word` somewhere in it."""
    return any(
        f"{_bare(given.partition('=')[0])}.".startswith(f"{_bare(option)}.") and word in given
        for given in _joined(arguments)
    )


def _joined(arguments: Sequence[str]) -> list[str]:
    """Options with their values in one word each."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return [a if "=" in a else f"{a}={b}" for a, b in pairs if a.startswith("--")]


def _typed(full: str, arguments: Sequence[str]) -> tuple[str, str] | None:
    for i in reversed(range(len(arguments))):
        name, equals, value = arguments[i].partition("=")
        if name.startswith("--") and _bare(name) in (_bare(full), _bare(full) + ".class_path"):
            return name, value if equals else "".join(arguments[i + 1 : i + 2])
    return None


def _without_value(option: str, arguments: Sequence[str]) -> str:
    """Of the argument that `option` stands for and that no value follows; argparse names the
    head of a dotted option only.
    """
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        no_value = (
            following.startswith("-") and following != "-" and NEGATIVE.match(following) is None
        )
        if (
            (argument == option or argument.startswith(f"{option}."))
            and no_value
            and "=" not in argument
        ):
            meant = not re.match(r"--($|[a-z_]+(\.|=|$))|-[ch]$", following)
            mend = f"; if {following} is its value, write {argument}={following}" if meant else ""
            return f"{argument}: no value given{mend}"
    return f"{option}: no value given"


def _required(path: list[str], names: str) -> str:
    if path:
        return f"--{'.'.join(path)}.{names}: required, not given"
    command = names.partition(".")[0]
    wanted = " and ".join(f"--{name.removeprefix(command + '.')}" for name in names.split(", "))
    return (
        f"{wanted}: required by {command}, not given; name a file with --config, for example"
        " configs/ddpm_tiny.yaml"
    )


def _near(name: str, known: Iterable[str], owner: str = "") -> str:
    known = sorted(set(known))
    if near := difflib.get_close_matches(name, known, 1, 0.6):
        return f"; did you mean {in_full(near[0])}"
    return (
        f"; allowed for {owner} are {', '.join(known)}"
        if owner and known
        else " (see `lightning COMMAND --help-all`)"
    )


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _classes_beside(class_path: str) -> str:
    """What the module that was named does hold."""
    try:
        names = getattr(import_module(class_path.rpartition(".")[0]), "__all__", [])
    except (ImportError, ValueError):
        names = []
    return f"; it has {', '.join(names)}" if names else ""


def _allowed(texts: list[str]) -> str:
    """The types that would have been accepted, as a person writes them."""
    unions = [
        found[1]
        for text in texts
        if (found := re.match(r"Does not validate.*?Subtypes: \[(.*?)\]\n", text, re.DOTALL))
    ]
    expected = _EXPECTED.search(texts[-1])
    if not expected:
        return ""
    # The innermost union whose first branch is what the root error complains of.
    allowed = unions[-1] if unions and unions[-1].startswith(expected[1]) else expected[1]
    allowed = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", allowed)
    return re.sub(r"typing\.Literal\[(.*?)\]", r"\1", allowed).replace("NoneType", "null")


def _flat(text: str) -> str:
    lines = (line.strip().removeprefix("- ") for line in text.splitlines())
    return " ".join(line for line in lines if line)[:300]
