"""Rows of data sets on the Hugging Face hub, by the package `datasets`, which also finds the splits of local folders.

Rows are streamed: few are in memory at once, and none are stored on disk. Code in a data set's repository is never run.
"""

import csv
import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow

from anchorembed.data.formats import QUOTE_COMMAS, TABLES, arrow_rows, checked_header, listed, split_of_pairs, suffix_of
from anchorembed.data.rows import SAVE_AS_UTF8, Chooser, Rows
from anchorembed.errors import InputError, first_line, nearest
from anchorembed.system.files import cache_folder, hash_texts, write_file

_log = logging.getLogger(__name__)
_SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(
    rf"hf://(?P<name>{_NAME}/{_NAME})(:(?P<config>[^@#:/]+))?(@(?P<split>[\w.-]+))?(#(?P<revision>[\w./-]+))?", re.ASCII
)
_COMMIT = re.compile("[0-9a-f]{40}")
_SPLIT_WORDS = re.compile(r"(?<![a-z])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?![a-z])")
_ROWS_AT_ONCE = 1024
_MESSAGE_CHARACTERS = 400  # of an error of datasets


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A split of a data set on the hub: ``hf://owner/name[:config][@split][#revision]``; empty parts are left open."""

    name: str
    config: str = ""
    split: str = ""
    revision: str = ""

    def __str__(self) -> str:
        parts = ((":", self.config), ("@", self.split), ("#", self.revision))
        return f"{_SCHEME}{self.name}" + "".join(mark + part for mark, part in parts if part)


def located(address: str | Path) -> HubDataset | Path:
    """A data set on the hub where an address begins with ``hf://``, and a path otherwise.

    Raises:
        InputError: if an address on the hub is not of the form of `HubDataset`.
    """
    if not isinstance(address, str) or not address.startswith(_SCHEME):
        return Path(address)
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f"{address}: not of the form hf://owner/name[:config][@split][#revision]. Write it so.")
    return HubDataset(**match.groupdict(""))


def pinned(dataset: HubDataset) -> HubDataset:
    """The data set at the commit of its revision: on the hub now, or if it cannot be reached, when last read.

    Raises:
        InputError: if there is no such data set or revision, or the hub was never reached.
    """
    return replace(dataset, revision=_commit(dataset.name, dataset.revision))


@cache  # a process reads one version of a data set
def _commit(name: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    from datasets import config  # noqa: PLC0415 - takes over a second, and only data sets on the hub need it
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError  # noqa: PLC0415

    remembered = cache_folder() / "hub" / hash_texts([name, "#", revision])[:32]
    try:
        commit = HfApi(endpoint=config.HF_ENDPOINT).dataset_info(name, revision=revision or None, timeout=100).sha
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{_SCHEME}{name}: the hub has no such data set, or it is private. Check the name, or log in: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{_SCHEME}{name}: the hub has no revision {revision!r} of it. Check it.") from error
    except Exception as error:  # of the network, in several libraries
        if not remembered.exists():
            raise InputError(
                f"{_SCHEME}{name}: the hub cannot be reached ({first_line(error)}), and this data set was never read. "
                "Read it once where the hub can be reached, or download it and give the folder."
            ) from error
        commit = remembered.read_text(encoding="utf-8")
        _log.warning("%s%s: the hub cannot be reached, so the version read last is taken: %s", _SCHEME, name, commit)
    write_file(remembered, str(commit))
    return str(commit)


def hub_rows(dataset: HubDataset, choose: Chooser) -> Rows:
    """Stream the rows of a split, which count from 1; by default of the split that `split_of_pairs` chooses.

    Raises:
        InputError: if there is no such data set, configuration or split, or a row cannot be read.
    """
    if Path(dataset.name).exists():
        raise InputError(f"{dataset}: {dataset.name} is a path here, too. Give the path, or run in another folder.")
    source = pinned(dataset)
    options = {"path": source.name, "name": source.config or None, "revision": source.revision}
    return _rows(str(dataset), choose, options, source.split)


def files_of_split(folder: Path) -> list[Path]:
    """The files to read of a folder of files of one format: those of the split that `split_of_pairs` chooses.

    `datasets` finds the splits by the files' names, as on the hub. The list is empty if no file is of a known format.

    Raises:
        InputError: if formats differ, or only some files are named by a split.
    """
    files = list(_visible_files(folder))
    suffixes = sorted({suffix_of(file) for file in files} & {*TABLES})
    if not suffixes:
        return []
    if len(suffixes) > 1:  # datasets would find one kind and ignore the others
        raise InputError(
            f"{folder}: it holds {' and '.join(suffixes)} files. Give a folder of one kind, or name each file."
        )
    _check_splits_named(folder, [file for file in files if suffix_of(file) == suffixes[0]])
    by_split = _builder(str(folder), {"path": str(folder)}).config.data_files
    return [Path(file) for file in by_split[split_of_pairs(str(folder), sorted(by_split))]]


def _check_splits_named(folder: Path, files: list[Path]) -> None:
    """Refuse a folder where some file names have a split and others none: datasets would ignore the others."""
    unnamed = [file.name for file in files if not _SPLIT_WORDS.search(str(file.relative_to(folder)).lower())]
    if unnamed and len(unnamed) < len(files):
        raise InputError(
            f"{folder}: the name of {unnamed[0]} has no split, other names there have one. Rename it, such as to "
            f"train-{unnamed[0]}, or name each file."
        )


def _visible_files(folder: Path) -> Iterator[Path]:
    """Files in a folder and its subfolders, except hidden ones."""
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts):
            yield file


def _rows(location: str, choose: Chooser, options: dict[str, Any], split: str) -> Rows:
    builder = _builder(location, options)
    splits = _splits(location, builder)
    if split and split not in splits:
        raise InputError(f"{location}: no split {split!r}.{nearest(split, splits)} {listed('Splits there', [*splits])}")
    tables = splits[split or split_of_pairs(location, sorted(splits))].with_format("arrow").iter(_ROWS_AT_ONCE)

    def select(table: pyarrow.Table) -> pyarrow.Table:  # a data set that declares no columns may change them
        if builder.name == "csv" and "__index_level_0__" in table.column_names:  # pandas made it of surplus cells
            raise InputError(f"{location}: the rows have more cells than the header.{QUOTE_COMMAS}")
        return table.select(checked_header(location, table.column_names, choose))

    row = 0
    try:
        for row, value in arrow_rows(map(select, tables)):
            yield row, value
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: the text is not valid UTF-8.{SAVE_AS_UTF8}") from error
    except Exception as error:  # of the network, the format and datasets' own, of many kinds
        raise InputError(f"{location}:{row + 1}: cannot be read ({_joined(error)}). Try again, or check it.") from error


def _splits(location: str, builder: Any) -> dict[str, Any]:  # noqa: ANN401 - of datasets, which is imported late
    """The splits of a data set by name, opened but not read."""
    try:
        return {**builder.as_streaming_dataset()}
    except Exception as error:  # of many kinds
        raise _cannot_be_opened(location, error) from error


def _builder(location: str, options: dict[str, Any]) -> Any:  # noqa: ANN401 - of datasets, which is imported late
    """What opens a data set, told to read texts as the files hold them."""
    import datasets  # noqa: PLC0415 - takes over a second, and only data sets need it

    parameters = inspect.signature(datasets.load_dataset_builder).parameters
    no_code = {"trust_remote_code": False} if "trust_remote_code" in parameters else {}  # datasets 4 never runs any
    try:
        builder = datasets.load_dataset_builder(**options, **no_code)
    except Exception as error:  # of many kinds
        raise _cannot_be_opened(location, error) from error
    config = builder.config
    if hasattr(config, "keep_default_na"):  # else pandas takes texts such as "null" and "NA" for no text
        config.keep_default_na, config.na_values = False, [""]
        if any(suffix_of(Path(file)) == ".tsv" for files in config.data_files.values() for file in files):
            config.quoting = csv.QUOTE_NONE  # as in `formats.csv_rows`
    if hasattr(config, "on_mixed_types"):  # else one number among texts makes JSON of all texts of its column
        config.on_mixed_types = None
    return builder


def _cannot_be_opened(location: str, error: Exception) -> InputError:
    fault = _joined(error).partition(" Example of usage")[0]
    cure = "A configuration is written after a colon: hf://owner/name:config." if "onfig" in fault else "Check it."
    return InputError(f"{location}: cannot be opened ({fault}). {cure}")


def _joined(error: Exception) -> str:
    """All lines of an error's message joined to one: they may list the names that exist."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS] or first_line(error)
