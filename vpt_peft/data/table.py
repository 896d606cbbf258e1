"""Images listed in a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from .images import IMAGE_SUFFIXES, DataError


_SPLIT = "split"


def read_table(path: Path) -> datasets.DatasetDict:
    """Read a CSV file with one row per image: a column of image files, and others.

    Paths are relative to the folder of the file. A column "split" divides the rows, otherwise all are "train".

    Raises:
        DataError: it is not such a file, or an image is missing.
    """
    import pandas

    name = f"dataset_name={str(path)!r}"
    try:
        # With the mark that spreadsheets write at the start of UTF-8
        with path.open(encoding="utf-8-sig") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            # A class may be called "None" or "NA"; whole numbers stay whole beside a missing one
            table = pandas.read_csv(
                file, sep=separator, keep_default_na=False, na_values=[""], dtype_backend="numpy_nullable"
            )
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"{name} is empty; it needs a line of column names, and one line for each image.") from error
    except ValueError as error:
        raise DataError(f"{name} cannot be read as CSV in UTF-8 ({' '.join(str(error).split())}).") from error
    columns = ", ".join(map(str, table.columns))
    if table.empty:
        raise DataError(f"{name} has column names ({columns}), but no rows.")
    column = max(table.columns, key=lambda each: _count_images(table[each]))
    if not _count_images(table[column]):
        raise DataError(
            f"{name}: no column holds image files ({', '.join(IMAGE_SUFFIXES)}); there is {columns}. The first line "
            "must name the columns, separated by commas, semicolons or tabs."
        )
    files = [path.parent / str(value) for value in table[column]]
    missing = [row for row, file in enumerate(files) if not file.is_file()]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {len(files)} images in column {column!r} are not there, the first in line "
            f"{missing[0] + 2}: {str(files[missing[0]])!r}. Paths are relative to the folder of the CSV file."
        )
    table[column] = list(map(str, files))
    if _SPLIT in table and table[_SPLIT].isna().any():
        raise DataError(f"{name}: column {_SPLIT!r} is empty in some rows; name the split of each, as in train, test.")
    parts = dict(list(table.groupby(_SPLIT, sort=False))) if _SPLIT in table else {"train": table}
    return datasets.DatasetDict(
        {
            str(split): datasets.Dataset.from_pandas(part, preserve_index=False).cast_column(column, datasets.Image())
            for split, part in parts.items()
        }
    )


def _count_images(values: Any) -> int:
    return sum(str(value).lower().endswith(IMAGE_SUFFIXES) for value in values)
