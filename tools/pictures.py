"""Pictures of a training run, of benchmark results and of fertility. They need matplotlib."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mala.cli import UserError
from mala.storage.corpus import script_of
from mala.storage.files import atomic_path
from tools.fertility import by_unit

MAX_NAMES = 120  # languages named on the x axis; with more, the names would be unreadable


def is_available() -> bool:
    """Return whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:  # not installed, or broken
        return False
    return True


@contextlib.contextmanager
def picture(path: Path, panels: int = 1, **options: Any) -> Iterator[Any]:
    """Yield the axes of a new figure (one, or a row of `panels`). Save the figure when the block ends."""
    if not is_available():
        raise UserError(f"{path}: pictures need matplotlib; install it with `pip install matplotlib`")
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, without a window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, **options)
    try:
        yield axes
        figure.tight_layout()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")
    except (ValueError, RuntimeError) as error:  # a format that matplotlib cannot write
        raise UserError(f"{path}: {error}") from None
    finally:
        plt.close(figure)


def name_languages(axis: Any, languages: list[str], order: str) -> None:
    """Name the languages on the x axis. If they are too many, give only their number and `order`."""
    names = languages if len(languages) <= MAX_NAMES else []
    axis.set_xlim(-1, len(languages))
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_xlabel("" if names == languages else f"{len(languages)} languages, {order}")
    axis.grid(axis="y", alpha=0.3)


def width_of(languages: list[str]) -> float:
    """Return the width of a picture in inches. It grows with the number of names, up to a limit."""
    return min(max(4.0, 1.5 + len(languages) * 0.15), 16)


def log_scale(axis: Any) -> None:
    """Make the y axis logarithmic, with ticks at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def draw_run(out: Path, before: dict[str, dict], after: dict[str, dict]) -> None:
    """Draw loss.png, the loss during training, and nll.png, the NLL of every language before and after it."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    with picture(out / "loss.png", figsize=(7, 4)) as axis:
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1.5)
        axis.set_xlabel("step")
        axis.set_ylabel("training loss, nats per token")
        axis.grid(alpha=0.3)
        measured = [line for line in lines if "nll_per_document" in line]
        if measured:
            right = axis.twinx()
            steps, nll = [line["step"] for line in measured], [line["nll_per_document"] for line in measured]
            right.plot(steps, nll, "o--", color="tab:orange")
            right.set_ylabel("held-out NLL, nats per document", color="tab:orange")

    before, after = before["languages"], after["languages"]
    languages = sorted(before, key=lambda language: after[language]["nll_per_document"])
    with picture(out / "nll.png", figsize=(width_of(languages), 4.5)) as axis:
        for x, language in enumerate(languages):
            ends = [scores[language]["nll_per_document"] for scores in (before, after)]
            color = "tab:green" if ends[1] < ends[0] else "tab:red"
            axis.plot([x, x], ends, color=color, linewidth=1, alpha=0.6)
            axis.plot(x, ends[0], "o", color="black", markerfacecolor="white", markersize=4)
            axis.plot(x, ends[1], "o", color=color, markersize=4)
        log_scale(axis)
        axis.set_ylabel("held-out NLL, nats per document")
        axis.set_title("before (hollow) and after; red: worse", fontsize=10)
        name_languages(axis, languages, "by NLL after")


def draw_results(result: dict[str, Any], path: Path) -> None:
    """Draw the figures of a benchmark with 95 % intervals, best first; accuracies come with baselines."""
    languages, of_nll = result["languages"], result["bench"] == "nll"
    key = "nll_per_document" if of_nll else "accuracy"
    names = sorted(languages, key=lambda language: languages[language][key], reverse=not of_nll)
    with picture(path, figsize=(width_of(names), 4.5)) as axis:
        for x, name in enumerate(names):
            ci95 = languages[name]["ci95"]
            if ci95:
                axis.plot([x, x], ci95, color="tab:blue", linewidth=1.5, alpha=0.5)
        figures = [languages[name][key] for name in names]
        axis.plot(figures, "o", color="tab:blue", markersize=4, label=result["bench"])
        if not of_nll:
            steps = {"drawstyle": "steps-mid", "linewidth": 1, "marker": "_", "markersize": 4}
            majority = [languages[name]["majority"] for name in names]
            axis.plot(majority, color="tab:red", label="majority class", **steps)
            uniform = [languages[name]["uniform"] for name in names]
            axis.plot(uniform, ":", color="black", label="uniform guess", **steps)
            axis.set_ylim(0, 1)
            axis.legend(fontsize=8)
        axis.set_ylabel("NLL, nats per document" if of_nll else f"accuracy, {result['shots']} shots")
        model = _short(result["adapter"] or result["model"])
        mean = f"{result['macro'][key]:.{1 if of_nll else 3}f}"
        axis.set_title(f"{model}: {len(names)} languages, mean {mean}; bars: 95 %", fontsize=10)
        name_languages(axis, names, "best first")


def _short(path: str) -> str:
    """Return the name that readers know a model by: out/mine/adapter -> mine, the hub's cache -> org/name."""
    if of_hub := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", path):
        return "/".join(of_hub.groups())
    parts = [part for part in Path(path).parts if part not in ("base", "adapter")]
    return parts[-1] if parts else path


def draw_fertility(report: dict[str, Any], path: Path) -> None:
    """Draw fertility before and after extension: languages sorted, coloured by script, a panel per unit."""
    sides = report["languages"]
    panels = list(by_unit(sides).items())
    widths = [max(1.6, min(len(chosen) * 0.13, 10)) for _, chosen in panels]
    figsize = (sum(widths) + 1.5, 4.5)
    with picture(path, len(panels), figsize=figsize, width_ratios=widths, squeeze=False) as axes:
        import matplotlib.pyplot as plt

        by_size = Counter(map(script_of, sides)).most_common()
        palette = list(plt.get_cmap("tab10").colors)
        del palette[7]  # grey marks all other scripts
        colors = dict(zip([script for script, _ in by_size], palette))
        for axis, (unit, chosen) in zip(axes[0], panels):
            chosen.sort(key=lambda language: sides[language]["base"]["fertility"])
            for x, language in enumerate(chosen):
                before, after = (sides[language][side]["fertility"] for side in ("base", "new"))
                color = colors.get(script_of(language), "tab:gray")
                axis.plot([x, x], [before, after], color=color, linewidth=1, alpha=0.5)
                axis.plot(x, before, "o", color=color, markerfacecolor="white", markersize=4)
                axis.plot(x, after, "o", color=color, markersize=4)
            log_scale(axis)
            axis.set_ylabel(f"tokens per {unit}")
            name_languages(axis, chosen, "by fertility before")

        legend = [{"color": color, "label": script} for script, color in colors.items()]
        if len(by_size) > len(colors):
            legend.append({"color": "tab:gray", "label": "other"})
        legend.append({"color": "black", "markerfacecolor": "white", "label": "before"})
        legend.append({"color": "black", "label": "after"})
        marks = [plt.Line2D([], [], linestyle="", marker="o", **entry) for entry in legend]
        axes[0][0].legend(handles=marks, fontsize=7, ncol=2, loc="upper left")
        pieces = report["pieces"]
        title = f"Fertility before and after: {pieces['base']:,} pieces and {pieces['new']:,}"
        axes[0][0].figure.suptitle(title, fontsize=10)
