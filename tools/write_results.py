"""Write the output of evaluate.py: predictions.jsonl, then results.json, a printed table and a picture."""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from mala.benchmarks.results import summarise, with_macro
from mala.cli import UserError
from mala.storage.files import atomic_file, read_json, write_json
from tools import pictures
from tools.measurement import Measurement
from tools.tables import counted, print_results


def write_results(measurements: list[Measurement], out: Path, settings: Any, of_run: dict) -> None:
    """Write and print the results. of_run: more facts on the run for results.json, besides `settings`."""
    file = out / "results.json"
    file.unlink(missing_ok=True)  # an earlier run's: it must not remain with newer predictions
    seconds, by_language = 0.0, defaultdict(list)
    with atomic_file(out / "predictions.jsonl") as lines:
        for one in measurements:
            done = read_json(one.file)
            seconds += done["seconds"]
            by_language[one.language] += done["predictions"]
            lines.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in done["predictions"])
    languages = {language: summarise(predictions) for language, predictions in by_language.items()}
    is_nll, texts = settings.bench == "nll", sum(map(len, by_language.values()))
    if size := of_run.get("parallel_bytes"):
        for figures in languages.values():
            bits = figures["nll_per_document"] * figures["documents"] / math.log(2)
            figures["bits_per_parallel_byte"] = bits / size
    result = {
        "bench": settings.bench,
        **of_run,
        "split": settings.split,
        "limit": settings.limit,
        **with_macro(languages, settings.group_by),
        "seconds": seconds,
        "examples_per_second": texts / seconds,  # scoring only, over all processes and runs
    }
    write_json(file, result)
    print_results(result)
    models = " + ".join(filter(None, (result["model"], result["adapter"])))
    what = f"{texts:,} documents, NLL in nats" if is_nll else f"{texts:,} examples"
    print(f"{models}: {counted(languages, 'language')}, {what}, {seconds:.0f} s; {file}")
    if pictures.is_available():
        try:
            pictures.draw_results(result, out / "results.png")
        except UserError as error:  # not fatal: the results are written
            print(f"no picture: {error}", file=sys.stderr)
