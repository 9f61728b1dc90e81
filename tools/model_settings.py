"""The settings with which `evaluate.py` and `python -m mala.generate` find a model and run it."""

from dataclasses import dataclass
from pathlib import Path

from mala.cli import UserError, option
from mala.storage.files import read_json
from mala.storage.model_by_name import find_folder

DEMO_RUN = Path("out/demo")  # the default output of train.py
TINY_LLAMA = Path(__file__).resolve().parents[1] / "assets/tiny-llama"


@dataclass
class ModelSettings:
    """The settings of a command that runs a model."""

    model: str | None = option(None, "checkpoint folder, train.py's --out, or hub name; default: the demo's")
    adapter: str | None = option(None, "PEFT adapter, folder or hub name; its tokenizer is preferred")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16", "float16"))


def find_model(model: str | None, adapter: str | None) -> tuple[Path, Path | None]:
    """Return the folders of the base checkpoint and of the adapter, if there is one. The default is what
    `python train.py` wrote, else the bundled tiny LLaMA."""
    found = find_folder(adapter) if adapter else None
    if found and not model:
        return base_of(found), found
    has_run = any((DEMO_RUN / name).is_dir() for name in ("adapter", "model"))
    folder = find_folder(model) if model else DEMO_RUN if has_run else TINY_LLAMA
    if not found and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return base_of(folder), folder  # an adapter, given as the model
    trained, whole = folder / "adapter", folder / "model"  # train.py writes model/ with --train all
    if not trained.is_dir():
        return (whole if whole.is_dir() else folder), found
    base = folder / "base" if (folder / "base").is_dir() else base_of(trained)  # train.py's --out
    return base, found or trained


def base_of(adapter: Path) -> Path:
    """Return the base that an adapter names. Raises UserError if it is neither a folder nor on the hub."""
    file = adapter / "adapter_config.json"
    name = read_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: names no base_model_name_or_path; give the base with --model")
    base = find_folder(name)
    if not base.is_dir():
        raise UserError(f"{file}: names the base {name}, which does not exist; give it with --model")
    return base
