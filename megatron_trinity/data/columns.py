"""The text column of Parquet and Arrow files, a few rows at a time, by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_trinity.data.formats import Kind
from megatron_trinity.data.listing import SourceFile
from megatron_trinity.data.opened import is_local, open_raw
from megatron_trinity.errors import TrinityError

_ROWS = 64


class UnreadableError(Exception):
    """A file is damaged; what was read before is as it was."""


def text_rows(file: SourceFile, key: str, skip: int, size: int) -> Iterator[list[str | None]]:
    """Texts of the column `key` in lists of about `size` bytes, behind the first `skip` rows.

    Raises:
        TrinityError: there is no such column, or it holds no text.
        UnreadableError: the file is damaged.
    """
    import pyarrow as pa

    assert file.format is not None
    read = _parquet if file.format.kind == Kind.PARQUET else _arrow
    pending: list[str | None] = []
    pending_size = 0
    try:
        for column in read(file, key, skip):
            for start in range(0, len(column), _ROWS):
                few = column.slice(start, _ROWS)
                pending += few.to_pylist()
                pending_size += few.nbytes
                if pending_size >= size:
                    yield pending
                    pending, pending_size = [], 0
        if pending:
            yield pending
    except (pa.ArrowException, OSError) as error:
        raise UnreadableError(" ".join(str(error).split())[:200]) from error


def _checked(file: SourceFile, schema: Any, key: str) -> None:
    import pyarrow.types as kinds

    if schema.get_field_index(key) < 0:
        raise TrinityError(
            f"{file.label} has no column {key!r}, but {', '.join(schema.names)[:200]}: "
            "give the one with the text as --json-key"
        )
    kind = schema.field(key).type
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
        raise TrinityError(f"column {key!r} of {file.label} is of {kind}, not of text")


def _parquet(file: SourceFile, key: str, skip: int) -> Iterator[Any]:
    import pyarrow.parquet as pq

    source = file.path if is_local(file) else open_raw(file)
    # A buffer in place of whole column chunks, which are as large as their writer pleased.
    with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table:
        _checked(file, table.schema_arrow, key)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            for batch in table.iter_batches(_ROWS, [group], [key], use_threads=False):
                yield batch.column(0).slice(skip)
                skip = max(0, skip - batch.num_rows)


def _arrow(file: SourceFile, key: str, skip: int) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(file.path) if is_local(file) else pa.PythonFile(open_raw(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source) as reader:
            _checked(file, reader.schema, key)
            batches = (
                (reader.get_batch(number) for number in range(reader.num_record_batches))
                if is_file
                else reader
            )
            for batch in batches:
                yield batch.column(reader.schema.get_field_index(key)).slice(skip)
                skip = max(0, skip - batch.num_rows)
