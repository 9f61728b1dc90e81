"""The command `python -m mala.lora merge`."""

from dataclasses import dataclass
from pathlib import Path

from mala.cli import REQUIRED, UserError, option, parse_command
from mala.storage.peft_adapter import merge_checkpoint
from tools.model_settings import find_model


@dataclass
class Merge:
    """Merge an adapter into its base, and write a plain checkpoint."""

    model: str = option(REQUIRED, "train.py's --out, or a base checkpoint's folder")
    adapter: str | None = option(None, "the adapter's folder; default: that of the run")
    out: str = option(REQUIRED, "the checkpoint folder to write")

    def run(self) -> None:
        base, adapter = find_model(self.model, self.adapter)
        if not adapter:
            raise UserError(f"{self.model}: has no adapter; give its folder with --adapter")
        merge_checkpoint(base, adapter, Path(self.out))
        print(f"{self.out}: {adapter} merged into {base}")


COMMANDS = {"merge": Merge}


def main() -> None:
    parse_command("python -m mala.lora", COMMANDS).run()
