"""Rows of data sets on the Hugging Face hub, by the package `datasets`; and the files of local copies.

Rows are streamed: few are in memory at once, and none are stored on disk. Code in a data set's repository is never run.
"""

import csv
import inspect
import logging
import re
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
_SHARD = re.compile(r"data/(.+)-\d{5}-of-\d{5}.*\..*")
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
    location = str(dataset)
    if Path(dataset.name).exists():
        raise InputError(f"{location}: {dataset.name} is a path here, too. Give the path, or run in another folder.")
    source = pinned(dataset)
    builder = _builder(location, source.name, name=source.config or None, revision=source.revision)
    try:
        splits = builder.as_streaming_dataset()
    except Exception as error:  # of many kinds
        raise _cannot_be_opened(location, error) from error
    split = source.split or split_of_pairs(location, sorted(splits))
    if split not in splits:
        raise InputError(f"{location}: no split {split!r}.{nearest(split, splits)} {listed('Splits there', [*splits])}")

    def select(table: pyarrow.Table) -> pyarrow.Table:  # a data set that declares no columns may change them
        if builder.name == "csv" and "__index_level_0__" in table.column_names:  # pandas made it of surplus cells
            raise InputError(f"{location}: the rows have more cells than the header.{QUOTE_COMMAS}")
        return table.select(checked_header(location, table.column_names, choose))

    row = 0
    try:
        for row, value in arrow_rows(map(select, splits[split].with_format("arrow").iter(_ROWS_AT_ONCE))):
            yield row, value
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: the text is not valid UTF-8.{SAVE_AS_UTF8}") from error
    except Exception as error:  # of the network, the format and datasets' own, of many kinds
        raise InputError(f"{location}:{row + 1}: cannot be read ({_joined(error)}). Try again, or check it.") from error


def files_of_split(folder: Path) -> list[Path]:
    """The files to read of a folder of files of one format: those of the split that `split_of_pairs` chooses.

    Splits are those that a README.md configures, as on the hub, or else follow from the names of files and folders.
    Hidden files are left out. The list is empty if no file is of a known format.

    Raises:
        InputError: if formats differ, or only some files are named by a split.
    """
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if suffix_of(file) in TABLES)
    visible = [name for name in names if not any(part.startswith((".", "__")) for part in name.parts)]
    files = [name for name in visible if (folder / name).is_file()]
    suffixes = sorted(set(map(suffix_of, files)))
    if not files:
        return []
    if len(suffixes) > 1:
        raise InputError(
            f"{folder}: it holds {' and '.join(suffixes)} files. Give a folder of one kind, or name each file."
        )
    by_split = _configured_files(folder) or _named_files(folder, files)
    return by_split[split_of_pairs(str(folder), sorted(by_split))]


def _configured_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split, where a folder's README.md, or the file beside it, configures them."""
    cards = [card for card in (folder / "README.md", folder / ".huggingface.yaml") if card.is_file()]
    if not any(re.search(rb"^configs:", card.read_bytes(), re.MULTILINE) for card in cards):
        return {}
    by_split = _builder(str(folder), str(folder)).config.data_files
    return {str(split): list(map(Path, files)) for split, files in by_split.items()}


def _named_files(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split that words in their paths, relative to ``folder``, name; all are of train if none does.

    Shards in a folder ``data`` are also of the split before their numbers, as `datasets` writes them.
    """
    splits = [_split_named_in(file.as_posix()) for file in files]
    if not any(splits):
        shards = [_SHARD.fullmatch(file.as_posix()) for file in files]
        splits = [shard[1] for shard in shards if shard] if all(shards) else ["train"] * len(files)
    by_split: dict[str, list[Path]] = {}
    for file, split in zip(files, splits, strict=True):
        if not split:
            raise InputError(
                f"{folder}: the name of {file.name} has no split, other names there have one. Rename it, such as to "
                f"train-{file.name}, or name each file."
            )
        by_split.setdefault(split, []).append(folder / file)
    return by_split


def _split_named_in(name: str) -> str:
    """The split that a file's path names: train, unless it also names another; an empty string if it names none."""
    words = _SPLIT_WORDS.findall(name.lower())
    others = [word for word in words if word not in ("train", "training")]
    return others[-1] if others else "train" if words else ""


def _builder(location: str, path: str, **options: str | None) -> Any:  # noqa: ANN401 - of datasets, imported late
    """What opens a data set, told to read texts as the files hold them."""
    import datasets  # noqa: PLC0415 - takes over a second, and only data sets need it

    parameters = inspect.signature(datasets.load_dataset_builder).parameters
    no_code = {"trust_remote_code": False} if "trust_remote_code" in parameters else {}  # datasets 4 never runs any
    try:
        builder = datasets.load_dataset_builder(path, **options, **no_code)
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
    cure = "Check it."
    if "onfig" in fault and location.startswith(_SCHEME):
        cure = "A configuration is written after a colon: hf://owner/name:config."
    elif "onfig" in fault:
        cure = "Give the folder of one configuration, or name each file."
    return InputError(f"{location}: cannot be opened ({fault}). {cure}")


def _joined(error: Exception) -> str:
    """All lines of an error's message joined to one: they may list the names that exist."""
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS] or first_line(error)
