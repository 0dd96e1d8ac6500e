"""Upload an exported folder to the model hub, private unless asked otherwise."""

import re
import shlex
from pathlib import Path

from huggingface_hub import HfApi

from anchorembed.errors import InputError, first_line
from anchorembed.model.load import HUB_ID, quiet


def check_repository(repository: str) -> None:
    """Raise InputError if a repository is not of the form OWNER/NAME."""
    if not re.fullmatch(HUB_ID, repository, re.ASCII):
        raise InputError(f"--push {repository!r}: not of the form OWNER/NAME, of letters, digits, - _ and dots.")


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported folder as one commit to OWNER/NAME on the hub; returns the address of the model's page.

    A repository is created if there is none, private unless ``public``; an existing one keeps its visibility.

    Raises:
        InputError: if the hub does not answer, or refuses; the local folder stays.
    """
    check_repository(repository)
    api = HfApi()
    try:
        with quiet():
            page = api.create_repo(repository, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by AnchorEmbed")
    except Exception as error:  # the hub's client raises errors of its HTTP library, which differs by version
        repeat = shlex.join(["hf", "upload", repository, str(folder), *([] if public else ["--private"])])
        raise InputError(
            f"--push {repository}: {first_line(error)} {folder} is written. Log in by `hf auth login` or set HF_TOKEN "
            f"to a token that may write, then: {repeat}"
        ) from error
    return str(page)
