"""Tables in markdown, aligned so that they read well as plain text too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def markdown_table(rows: Sequence[Mapping[str, str]], left: Collection[str] = ()) -> str:
    """Return rows as a markdown table.

    Args:
        rows (`Sequence[Mapping[str, str]]`): cells by the title of their column; at least one row.
        left (`Collection[str]`): columns that are aligned to the left; numbers are better on the right.

    Raises:
        ModuleNotFoundError: pandas or tabulate is not installed.
    """
    try:
        import pandas
        import tabulate  # noqa: F401 - pandas asks for it late
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"tables need {error.name}: pip install 'vpt_peft[train]'.") from error
    frame = pandas.DataFrame([{name: text.replace("|", r"\|") for name, text in row.items()} for row in rows])
    align = ["left" if name in left else "right" for name in frame.columns]
    return frame.to_markdown(index=False, tablefmt="pipe", colalign=align, disable_numparse=True) + "\n"
