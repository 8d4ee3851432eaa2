"""Rows of parquet files (extra `data`), some at a time: memory depends on the longest rows, not on the file."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from classiclm.data.opening import COMPRESSED, check_file, read_bytes
from classiclm.errors import BAD_INPUT, Error
from classiclm.extras import need
from classiclm.files import writing

_ROWS, _BYTES = 256, 4 << 20  # at once


def read_rows(path: Path, columns: Sequence[str], check: Callable[[Sequence[str]], None]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row; `check` is first called with the names of those there are.

    Bytes of a text that are not UTF-8 come as lone surrogates. Raises Error (exit 3) for a damaged file.
    """
    check_file(path)
    pyarrow, parquet = need("pyarrow", "data"), need("pyarrow.parquet", "data")
    try:
        with _seekable(path) as place, parquet.ParquetFile(place, buffer_size=1 << 20, pre_buffer=False) as file:
            check(file.schema_arrow.names)
            for batch in _batches(file, columns):
                numbers = [batch.schema.names.index(column) for column in columns]
                yield from zip(*(_values(batch.column(i), pyarrow) for i in numbers), strict=True)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        why = f"is no readable parquet file ({' '.join(str(e).split())[:200]})"
        raise Error(path, why, "replace it by a whole file", BAD_INPUT) from e


@contextmanager
def _seekable(path: Path) -> Iterator[Any]:
    """The file; of a compressed one a temporary copy, since parquet is not read from its beginning on."""
    if path.suffix.lower() not in COMPRESSED:
        yield path
        return
    with tempfile.TemporaryFile() as file:
        with writing(Path(tempfile.gettempdir())):
            for piece in read_bytes(path):
                file.write(piece)
            file.seek(0)
        yield file


def _batches(file: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Some rows at a time, the fewer the longer they are."""
    for i in range(file.num_row_groups):
        group = file.metadata.row_group(i)
        n = _BYTES * group.num_rows // max(group.total_byte_size, 1)
        yield from file.iter_batches(max(1, min(n, _ROWS)), row_groups=[i], columns=list(columns), use_threads=False)


def _values(column: Any, pyarrow: Any) -> list[Any]:
    """A column's values; text by way of its bytes, for Arrow does not check that they are UTF-8."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(is_text(column.type) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
        return list(column.to_pylist())
    raw = column.cast(pyarrow.large_binary()).to_pylist()
    return [value if value is None else value.decode(errors="surrogateescape") for value in raw]
