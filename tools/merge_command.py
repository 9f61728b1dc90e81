"""The command `python -m mala.lora merge`."""

from dataclasses import dataclass
from pathlib import Path

from mala.cli import REQUIRED, option, parse_command
from mala.storage.peft_adapter import merge_checkpoint


@dataclass
class Merge:
    """Merge an adapter into its base, and write a plain checkpoint."""

    model: str = option(REQUIRED, "the base checkpoint's folder")
    adapter: str = option(REQUIRED, "the adapter's folder")
    out: str = option(REQUIRED, "the checkpoint folder to write")

    def run(self) -> None:
        merge_checkpoint(Path(self.model), Path(self.adapter), Path(self.out))
        print(f"{self.out}: {self.adapter} merged into {self.model}")


COMMANDS = {"merge": Merge}


def main() -> None:
    parse_command("python -m mala.lora", COMMANDS).run()
