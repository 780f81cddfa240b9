"""Options of a training module given flat, as its parts."""

import inspect
from dataclasses import fields, replace
from typing import Any

from dia_lightning.diffusion.labels import RewardLabels
from dia_lightning.training import GAE, LeaveOneOut

PARTS = ("network", "noising", "optimizer", "updates", "estimator")


def in_parts(module: type, **options: Any) -> dict[str, Any]:
    """The keyword arguments of `module`: `lr=0.1` becomes `optimizer=AdamW(lr=0.1)`, and so on."""
    found: dict[str, Any] = {}
    if options.get("estimator") in ("ppo", "rloo"):
        gae = {k: options.pop(k) for k in ("gae_lambda", "value_coef") if k in options}
        ppo = options.pop("estimator") == "ppo"
        found["estimator"] = GAE(**gae) if ppo else LeaveOneOut()
    for name, parameter in inspect.signature(module).parameters.items():
        if name in PARTS:
            names = {f.name for f in fields(parameter.default)} & set(options)
            if names:
                given = {name: options.pop(name) for name in names}
                found[name] = replace(parameter.default, **given)
    if labels := {name: options.pop(name) for name in list(options) if name.startswith("label_")}:
        found["labels"] = RewardLabels(**{k.removeprefix("label_"): v for k, v in labels.items()})
    if "init_from_lm" in options:
        found["init_from"] = "base_lm" if options.pop("init_from_lm") else "random"
    return {**found, **options}
