"""`adapter_config.json` of PEFT: which settings are understood, and which values of them are a LoRA."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.files import read_json

SAVEABLE = ("embed_tokens", "lm_head")  # what may train, and be saved, whole
ENDS_WITH = r"(.*\.)?({})$"  # as PEFT compares a pattern: with a full name, or with its end after a dot
BLOCK = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # as PEFT finds a layer's block
# Settings that do not change what an adapter computes (biases that it trains are extra tensors, and PEFT
# transposes no nn.Linear). Others that LoRAConfig lacks are ACCEPTED so, or OFF.
HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    megatron_core runtime_config loftq_config eva_config corda_config lora_ga_config qalora_group_size
    ensure_weight_tying bias fan_in_fan_out""".split()
ACCEPTED = {
    "peft_type": ("LORA",),
    # Other ways to start A and B also change the base's weights, which the adapter then goes with.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
}
OFF = (None, False, [], "")  # but {} is a variant with its defaults
KINDS = dict(target_modules=(list, str), modules_to_save=(list,), rank_pattern=(dict,), alpha_pattern=(dict,))
KINDS |= dict(exclude_modules=(list, str), layers_to_transform=(list, int), layers_pattern=(list, str))
KINDS |= dict(trainable_token_indices=(list, dict))


def read_adapter_config(directory: Path, config_class: type) -> Any:
    """The LoRAConfig of an adapter's folder. Raises UserError for a setting that is not implemented."""
    path = directory / "adapter_config.json"
    values = read_json(path)
    known = {field.name for field in fields(config_class)}
    for key, value in values.items():
        if key not in known.union(HARMLESS) and value not in ACCEPTED.get(key, OFF):
            expected = " or ".join(map(repr, ACCEPTED[key])) if key in ACCEPTED else "it to be off"
            raise UserError(f"{path}: {key} is {value!r}, which is not implemented; expected {expected}")
    for key in ("r", "lora_alpha", "target_modules"):
        if values.get(key) is None:
            raise UserError(f"{path}: there is no {key!r}; expected the settings of a LoRA adapter")
    given = {"lora_dropout": 0.0, "modules_to_save": []}
    given |= {key: value for key, value in values.items() if key in known and value is not None}
    for key, kinds in KINDS.items():
        if key in given and not isinstance(given[key], kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{path}: {key} is {given[key]!r}, expected a {expected}")
    for key in ("layers_to_transform", "layers_pattern"):  # PEFT takes one of them without a list, too
        if not isinstance(given.get(key, []), list):
            given[key] = [given[key]] if given[key] != "" else []
    if rows := given.pop("trainable_token_indices", None):
        rows = {"embed_tokens": rows} if isinstance(rows, list) else rows
        given["trainable_token_indices"] = {name.removeprefix("model."): ids for name, ids in rows.items()}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    given["modules_to_save"] = tuple(str(name).removeprefix("model.") for name in given["modules_to_save"])
    try:
        return config_class(**given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_lora_config(config: Any) -> None:
    """Raise UserError for a LoRAConfig with a value that makes no sense."""
    for r in (config.r, *config.rank_pattern.values()):
        if type(r) is not int or not 1 <= r <= 2**16:
            raise UserError(f"the LoRA rank r is {r!r}, expected a whole number from 1 to 65,536")
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if type(alpha) not in (int, float) or not -1e30 < alpha < 1e30:
            raise UserError(f"lora_alpha is {alpha!r}, expected a number")
    if type(config.lora_dropout) not in (int, float) or not 0 <= config.lora_dropout < 1:
        raise UserError(f"lora_dropout is {config.lora_dropout!r}, expected a number from 0 to below 1")
    if type(config.use_rslora) is not bool:
        raise UserError(f"use_rslora is {config.use_rslora!r}, expected true or false")
    targets, saved = config.target_modules, config.modules_to_save
    if others := sorted(set(saved) - set(SAVEABLE)):
        raise UserError(f"modules_to_save names {others[0]!r}, expected some of {', '.join(SAVEABLE)}")
    rows = config.trainable_token_indices
    for name, ids in rows.items():
        if name not in SAVEABLE or name in saved:
            expected = f"expected {' or '.join(SAVEABLE)}, and none of modules_to_save"
            raise UserError(f"trainable_token_indices names {name!r}, {expected}")
        is_list = isinstance(ids, list) and all(type(id) is int and id >= 0 for id in ids)
        if not is_list or not ids or len(set(ids)) < len(ids):
            raise UserError(f"trainable_token_indices of {name}: expected numbers of rows, each once")
    if not targets and not saved and not rows:
        raise UserError("target_modules and modules_to_save are both empty: nothing would train")
    blocks, parts = config.layers_to_transform, config.layers_pattern
    if not all(type(number) is int and number >= 0 for number in blocks or ()):
        raise UserError(f"layers_to_transform is {blocks!r}, expected numbers of layers, from 0 on")
    if (blocks is not None and isinstance(targets, str)) or (parts and blocks is None):
        found = f"layers_to_transform is {blocks!r}, layers_pattern {parts!r}, target_modules {targets!r}"
        raise UserError(f"{found}; expected numbers of layers, with target_modules by name, or neither")
    patterns = [ENDS_WITH.format(pattern) for pattern in (*config.rank_pattern, *config.alpha_pattern)]
    patterns += [BLOCK.format(part) for part in parts or ()]
    for pattern in [*patterns, *(names for names in (targets, config.exclude_modules) if type(names) is str)]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from None
