"""Read, write and check the `config.json` of a LLaMA, in the spelling of transformers 4 or 5."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.files import read_json

# Keys that change the mathematics, with the only value of each that is implemented here.
COMPUTED = {"model_type": "llama", "hidden_act": "silu", "attention_dropout": 0, "quantization_config": None}
ROPE_SETTINGS = {
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}


def read_config(path: Path, config_class: type) -> Any:
    """Read a LlamaConfig from a `config.json`. Raises UserError if that model is not implemented here."""
    values = read_json(path)
    try:
        return config_class(**fields_of(values, config_class))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def fields_of(values: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Return the fields of a LlamaConfig, given the content of a `config.json`. Raises UserError as above."""
    for key, expected in COMPUTED.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{key} is {values[key]!r}, expected {expected!r}: no other is implemented")
    fields = dataclasses.fields(config_class)
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f"there is no {field.name!r}; expected the config.json of a LLaMA")
    kept = {field.name: values[field.name] for field in fields if field.name in values}
    # transformers 5 puts both rotary settings in one dict. Early transformers 4 wrote "type" for "rope_type".
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"the rotary settings are {rope!r}, expected a JSON object")
    kept["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    numbers = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    kept["rope_scaling"] = None if rope_type == "default" else {"rope_type": rope_type, **numbers}
    return kept


def to_config_json(config: Any) -> dict[str, Any]:
    """Return the content of a `config.json` in the spelling of transformers 4, which 5 reads too."""
    constant = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    return {**constant, **dataclasses.asdict(config)}


def check_config(config: Any) -> None:
    """Raise UserError if a LlamaConfig is not a valid LLaMA."""
    checked = [(field.name, field.type, getattr(config, field.name)) for field in dataclasses.fields(config)]
    if config.rope_scaling is not None:
        rope_type = config.rope_scaling.get("rope_type")
        if rope_type not in list(ROPE_SETTINGS):
            raise UserError(f"rope_type is {rope_type!r}, expected default, linear or llama3")
        for key in ROPE_SETTINGS[rope_type]:
            checked.append((f"{key} of the {rope_type} rotary scaling", float, config.rope_scaling.get(key)))
    for name, kind, value in checked:
        is_size = kind is int or name in ("num_key_value_heads", "head_dim") and value is not None
        if is_size and (type(value) is not int or value < 1):
            raise UserError(f"{name} is {value!r}, expected a positive whole number")
        if kind is float and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise UserError(f"{name} is {value!r}, expected a positive number")
        if kind is bool and type(value) is not bool:
            raise UserError(f"{name} is {value!r}, expected true or false")
    D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if config.head_dim is None and D % H:
        raise UserError(f"hidden_size {D} is not a multiple of num_attention_heads {H}; give a head_dim")
    if (head_dim := config.head_dim or D // H) % 2:
        raise UserError(f"head_dim is {head_dim}, expected an even number: rotary positions rotate pairs")
    if K is not None and H % K:
        raise UserError(f"num_attention_heads {H} is not a multiple of num_key_value_heads {K}")
