"""JSON files as typed values, with errors that name the file and the field in one sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, InstanceOf, ValidationError

from offline_quantize.checkpoint.atomic_files import read_json
from precalib_kernels.errors import PrecalibError

RecordType = TypeVar("RecordType", bound="Record")
# Names of files may hold bytes that are no UTF-8, which pydantic's own `str` refuses.
FileName = InstanceOf[str]


class Record(BaseModel):
    """Base of typed JSON objects: immutable, strict about types, indifferent to unknown fields.

    ENTRIES: what an entry of a mapping is called in errors, by the name of the mapping's field.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)
    ENTRIES: ClassVar[Mapping[str, str]] = {}

    def to_json(self) -> dict[str, Any]:
        """The object as JSON values, fields in the order of their definition."""
        return self.model_dump(by_alias=True)


def read_record(
    path: Path, kind: type[RecordType], error: type[PrecalibError], remedy: str
) -> RecordType:
    """The object in a JSON file. Raises `error` that names the first field at fault."""
    try:
        return kind.model_validate(read_json(path, error, remedy))
    except ValidationError as cause:
        fault = cause.errors(include_url=False)[0]
        text = fault["msg"][:1].lower() + fault["msg"][1:300]
        first, *inner = (str(part)[:300] for part in fault["loc"])
        what = f"'{first}'"
        if inner and first in kind.ENTRIES:
            what = f"the entry of {kind.ENTRIES[first]} '{inner.pop(0)}'"
        where = f" ({'.'.join(inner)}: {text})" if inner else ""
        raise error(f"{path}: {what} is missing or damaged{where}; {remedy}") from cause
