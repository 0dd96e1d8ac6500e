"""Exports have our vectors in vLLM's server, and a wrong setting there is named.

`make test-vllm` runs this in the environment of AnchorEmbed; $VLLM is the Python of one with vLLM for CPUs.
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anchorembed.export.run import export
from anchorembed.export.verify import Report, verify
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from tiny import SIZES, save_tiny

_SECONDS = 300  # to start
HEADS = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}  # as vLLM has kernels for


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Serve an export by vLLM on loopback, and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [os.environ["VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--runner", "pooling", "--dtype", "float32", "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    log = folder.parent / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - loopback
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text(encoding="utf-8")[-5000:]
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-5000:]
            time.sleep(0.5)
        else:
            return


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Export a tiny model of an architecture, serve it with vLLM's options, and verify it."""
    for name, value in HEADS.items():
        monkeypatch.setitem(SIZES, name, value)

    def run(name: str, *options: str) -> Report:
        base = Embedder.load(
            save_tiny(tmp_path / "base", name), precision="float32", lengths=Lengths(160, 160), instruction="find code"
        )
        base.save(tmp_path / "model")
        export(tmp_path / "model", tmp_path / "out")
        with serving(tmp_path / "out", *options) as url:
            return verify(tmp_path / "model", url)

    return run


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_export_has_our_vectors(served: Callable[..., Report], name: str) -> None:
    report = served(name)
    assert {cause.what for cause in report.causes} == {"refuses over-long text"}
    assert min(probe.cosine for probe in report.probes if not probe.refused) > 0.9999
    assert len([probe for probe in report.probes if not probe.refused]) >= 16
    assert "Queries were sent with" in report.note


def test_another_pooling_is_named(served: Callable[..., Report]) -> None:
    report = served("llama", "--pooler-config", '{"seq_pooling_type": "MEAN"}')
    assert "mean pooling instead of last-token pooling" in {cause.what for cause in report.causes}
