"""Train several methods (or settings) on the same data with the same seeds, and test them all."""

from __future__ import annotations

from .grid import Grid
from .runs import Setting, claim_folder, parse_cell, run_setting, write_results


COMPARE_RESULTS = "compare_results.json"


def compare(grid: Grid) -> list[Setting]:
    """Run every setting of the grid with every seed and return them in the order given.

    Ended runs are kept in their folders, so the same call goes on with a comparison that broke off.
    `compare_results.json` is written after each setting.

    Raises:
        ValueError: a setting is wrong in itself; nothing was run.
    """
    cells = grid.cells()
    for cell in cells:
        parse_cell(grid, cell, grid.seeds[0])
    path = claim_folder(grid, COMPARE_RESULTS)
    rows: list[Setting] = []
    write_results(path, rows)
    for cell in cells:
        rows.append(run_setting(grid, cell, with_test=True))
        write_results(path, rows)
    return rows
