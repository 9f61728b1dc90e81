"""How MaLA-500 draws shots: the labelled examples that a model is shown before a question."""

from typing import Any

import numpy as np

from mala.cli import UserError


def draw_shots(rng: np.random.Generator, train: list, row: Any, shots: int) -> list[int]:
    """The train rows to show before `row`: of successive draws the first `shots` that are not the row itself.
    Trap: the published loop sees that it has enough only when it is handed one index more, so that it has
    mostly begun another draw by then. That draw moves `rng` on, and with it the shots of all later rows."""
    if shots and all(other == row for other in train):
        raise UserError(f"row {row.id}: every train row is this very row; add others, or take --shots 0")
    chosen: list[int] = []
    while shots:
        for index in rng.choice(len(train), size=shots, replace=False, shuffle=True).tolist():
            if len(chosen) == shots:
                return chosen
            if train[index] != row:
                chosen.append(index)
    return chosen
