"""One kind of error for everything a user can mend: it names the value, the limit and the cure."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

LESS_MEMORY = "Lower the stage's tokens_per_micro_batch, data.query_tokens or data.document_tokens."
_OF_FILES = {errno.EACCES, errno.EBUSY, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EIO, errno.EISDIR}
_OF_FILES |= {errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM}
_OF_FILES |= {errno.EROFS, errno.ESTALE}


class InputError(Exception):
    """A fault in the user's input; the command line prints its message without a traceback and exits with code 2.

    The message gives the location, the fault and the cure:
    ``pairs.jsonl:17: "positive" is empty. Remove the line, or drop and count such lines by ...``
    """


class OutOfMemory(InputError):
    """Memory ran out in a training step; the steps before it are kept, and the same command continues after them."""


def memory_ended(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    has_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return has_type or "DefaultCPUAllocator" in str(error)


def of_files(error: OSError) -> bool:
    """Whether an error is of the disk or the file system, and not of a network or of a library that gives no number."""
    return error.errno in _OF_FILES or str(error).endswith(" written")  # numpy: 9 requested and 5 written


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def refuse_utf16(path: object, start: bytes) -> None:
    """Refuse a file whose first bytes are those of UTF-16 or UTF-32 text, with or without a byte order mark.

    Raises:
        InputError: with the command that converts it.
    """
    zeros = "".join("x" if byte else "0" for byte in start[:4])
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros in ("x0x0", "0x0x", "00xx", "x000", "000x"):
        is_32 = start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or zeros.count("0") == 3
        name = "UTF-32" if is_32 else "UTF-16"
        raise InputError(f"{path}: the text is {name}, not UTF-8. Convert it: iconv -f {name} -t UTF-8 OLD > NEW")


def decoded(path: object, content: bytes) -> str:
    """The text of a UTF-8 file with these bytes, without a byte order mark.

    Raises:
        InputError: if it is UTF-16 or UTF-32, or no UTF-8.
    """
    refuse_utf16(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: the line is not valid UTF-8. Save the file as UTF-8.") from error


def extra(name: str) -> AbstractContextManager[None]:
    """Turn a missing package of an extra in pyproject.toml, or of extras separated by commas, into an InputError.

    Raises:
        InputError: with the command to type, if a package that the block imports is not installed.
    """
    return installed_by(f"'anchorembed[{name}]'")


@contextmanager
def installed_by(needed: str) -> Iterator[None]:
    """Do as `extra` does, for the packages that ``pip install NEEDED`` installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "anchorembed"):  # a wrong import in this package, which no installation cures
            raise
        raise InputError(f"{package}: this package is not installed. To install it: pip install {needed}") from error
