"""The manifest of an index: the model and corpus that made it, and the format of its vectors."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from anchorembed.errors import InputError
from anchorembed.model.truncate_and_quantize import Ranges, VectorFormat, vector_format

MANIFEST = "manifest.json"
FORMAT = "anchorembed-index-1"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index was made from, and how it is stored; the defaults are for manifests of older indexes.

    ``model`` is the model's fingerprint, ``corpus`` the SHA-256 of the corpus file, or empty. ``dimension``,
    ``precision`` and ``ranges`` (of int8) are the format of the vectors; ``table`` is the table's name.
    """

    format: str
    model: str
    dimension: int
    documents: int
    corpus: str
    precision: str = "float32"
    ranges: Ranges = ()
    table: Annotated[str, Field(pattern="^documents(-[0-9a-f]{12})?$")] = "documents"  # it becomes part of a path

    @property
    def form(self) -> VectorFormat:
        """How vectors are stored."""
        return vector_format(self.dimension, self.dimension, self.precision, self.ranges or None)

    def fits(self, model: str, corpus: str, form: VectorFormat) -> bool:
        """Whether the index can be reused: made from this corpus, by this model, in this format without ranges."""
        return (self.model, self.corpus, replace(self.form, ranges=None)) == (model, corpus, form)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the index in ``folder``; None if the folder is missing or empty.

    Raises:
        InputError: if the folder holds something else, or its manifest is damaged.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: this is not an index (no {MANIFEST}). Give another folder; this one is left alone."
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path}: damaged, not JSON ({error}). Delete the folder {folder} and build it again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(
            f"{path}: not the manifest of an index ({FORMAT}). Give another folder; this one is left alone."
        )
    try:
        manifest = TypeAdapter(Manifest).validate_json(text, strict=True)
        is_valid = (manifest.form.ranges is not None) == (manifest.precision == "int8")
    except (InputError, ValueError, TypeError):
        is_valid = False
    if not is_valid:
        raise InputError(f"{path}: damaged, its keys or values are not an index's. Delete the folder {folder}.")
    return manifest


def identity_of(folder: Path) -> tuple[int, int]:
    """Inode and time stamp of the manifest file, which change when the index is replaced; zeros without one."""
    try:
        state = (folder / MANIFEST).stat()
    except OSError:
        return 0, 0
    return state.st_ino, state.st_mtime_ns
