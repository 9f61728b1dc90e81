"""Read and check PEFT's `adapter_config.json`. A setting that is not implemented is refused."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.files import read_json

SAVEABLE = ("embed_tokens", "lm_head")  # modules that may train, and be saved, whole
ENDS_WITH = r"(.*\.)?({})$"  # as in PEFT: a pattern matches a full name, or its end after a dot
BLOCK = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # as in PEFT: the number of the block that a layer is in
# Settings that do not change the result. A trained bias is refused later, as an extra tensor; fan_in_fan_out
# is ignored for nn.Linear. Any other setting that LoRAConfig lacks must have a value in ACCEPTED or OFF.
HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    megatron_core runtime_config loftq_config eva_config corda_config lora_ga_config qalora_group_size
    ensure_weight_tying bias fan_in_fan_out""".split()
ACCEPTED = {
    "peft_type": ("LORA",),
    # Other initialisations also change the base's weights, and such an adapter fits only the changed base.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
}
OFF = (None, False, [], "")  # not {}: it turns a variant of LoRA on, with default settings
KINDS = dict(target_modules=(list, str), modules_to_save=(list,), rank_pattern=(dict,), alpha_pattern=(dict,))
KINDS |= dict(exclude_modules=(list, str), layers_to_transform=(list, int), layers_pattern=(list, str))
KINDS |= dict(trainable_token_indices=(list, dict))


def read_adapter_config(directory: Path, config_class: type) -> Any:
    """Read the LoRAConfig of an adapter folder. Raises UserError for a setting that is not implemented."""
    path = directory / "adapter_config.json"
    values = read_json(path)
    known = {field.name for field in fields(config_class)}
    for key, value in values.items():
        if key not in known.union(HARMLESS) and value not in ACCEPTED.get(key, OFF):
            expected = " or ".join(map(repr, ACCEPTED[key])) if key in ACCEPTED else "it to be turned off"
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
    for key in ("layers_to_transform", "layers_pattern"):  # PEFT also allows a single value
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
    """Raise UserError if a LoRAConfig has an invalid value."""
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
        raise UserError(f"modules_to_save names {others[0]!r}, expected {' or '.join(SAVEABLE)}")
    rows = config.trainable_token_indices
    for name, ids in rows.items():
        if name not in SAVEABLE or name in saved:
            expected = f"expected {' or '.join(SAVEABLE)}, not already in modules_to_save"
            raise UserError(f"trainable_token_indices names {name!r}, {expected}")
        is_list = isinstance(ids, list) and all(type(id) is int and id >= 0 for id in ids)
        if not is_list or not ids or len(set(ids)) < len(ids):
            raise UserError(f"trainable_token_indices of {name}: expected a list of distinct row numbers")
    if not targets and not saved and not rows:
        raise UserError("target_modules and modules_to_save are both empty, so nothing would train")
    blocks, parts = config.layers_to_transform, config.layers_pattern
    if not all(type(number) is int and number >= 0 for number in blocks or ()):
        raise UserError(f"layers_to_transform is {blocks!r}, expected layer numbers from 0 on")
    if (blocks is not None and isinstance(targets, str)) or (parts and blocks is None):
        found = f"layers_to_transform is {blocks!r}, layers_pattern {parts!r}, target_modules {targets!r}"
        raise UserError(f"{found}; expected layer numbers and a list of target_modules, or no layer settings")
    patterns = [ENDS_WITH.format(pattern) for pattern in (*config.rank_pattern, *config.alpha_pattern)]
    patterns += [BLOCK.format(part) for part in parts or ()]
    for pattern in [*patterns, *(names for names in (targets, config.exclude_modules) if type(names) is str)]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{pattern!r} is not a valid regular expression: {error}") from None
