"""Print what MaLA-500 changed, from the published results of LLaMA 2 7B and of MaLA-500's versions 1 and 2.

    python benchmarks/published.py ../shared/data/reference

The files are tables with a header. A row has a language and one figure for each of the three models. The
first row has the means.
"""

import argparse
import csv
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder
for name, better in (("nll_glot500", -1), ("nll_pbc", -1), ("sib200", 1), ("taxi1500", 1)):
    with open(folder / f"{name}.tsv", encoding="utf-8", newline="") as file:
        _, mean, *rows = csv.reader(file, delimiter="\t")
    languages = {row[0]: [float(cell) for cell in row[1:]] for row in rows}
    won = [sum((figures[i] - figures[0]) * better > 0 for figures in languages.values()) for i in (1, 2)]
    print(
        f"{name}: {len(languages)} languages, mean {', '.join(mean[1:])}; better than LLaMA 2: "
        f"v1 {won[0]}, v2 {won[1]}; English {languages['eng_Latn']}"
    )
