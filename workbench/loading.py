"""Loading a causal language model, with every refusal in words: path, weights, architecture, code, dtype, device.

Weights come from safetensors only and remote code runs only where it is asked for by name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_model(
    name: str | Path,
    *,
    revision: str | None,
    dtype: str | torch.dtype,
    device: str,
    remote: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode with frozen weights, and its tokenizer.

    Raises FileNotFoundError for a folder that does not exist, ValueError for everything else that can't work.
    """
    if options.get("ignore_mismatched_sizes"):
        raise ValueError(
            "load: got ignore_mismatched_sizes=True, which fills weights of another size with random numbers. "
            "Leave it out: Subject.load reads pruned models as narrow as they are."
        )
    source = _find(name)
    config = _config(source, revision, options.get("trust_remote_code", False))
    where = _device(device)
    kind = _dtype(dtype, config, where)
    trusted = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    tokenizer = _tokenizer(source, revision, trusted)
    if remote:  # structure only: the weights stay with the remote service
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=kind, **trusted).eval(), tokenizer
    try:
        with _bar_only_if_long(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=kind,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            model, report = loaded
    except (OSError, SafetensorError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError(
                f"load: {name} has weights of other sizes than its config tells. If its layers were pruned to "
                "different widths, read it with load_pruned(folder)."
            ) from error
        raise ValueError(f"load: {name} can't be read as safetensors: {_first_line(error)}") from error
    absent = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
    if absent:  # transformers would fill them with random numbers and only warn
        raise ValueError(
            f"load: {name} lacks weights that its config asks for, such as {absent[0]} ({len(absent)} in all)."
        )
    if "device_map" not in options and "quantization_config" not in options:
        model = model.to(where)
    return model.eval().requires_grad_(False), tokenizer


def load_parts(
    folder: Path, *, dtype: str | torch.dtype, device: str
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, torch.dtype, torch.device]:
    """What a model in a folder is built from, besides its weights: config, tokenizer, dtype and device."""
    source = _find(folder)
    config = _config(source, None, False)
    where = _device(device)
    return config, _tokenizer(source, None, {}), _dtype(dtype, config, where), where


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits over names, shapes, dtypes and values of all parameters.

    Values enter through their exact bytes: all of a small tensor, about 4,096 elements of a large one, spread
    evenly.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        if len(flat) > 65_536:
            flat = flat[:: len(flat) // 4096]
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if flat.device.type != "meta":
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_state(model: nn.Module) -> tuple[str, int]:
    """What tells weights apart within a process: their fingerprint and, for a single number in a large matrix, which it
    may pass over, how often they were changed in place (tensors of inference mode don't count)."""
    versions = sum(parameter._version for parameter in model.parameters() if not parameter.is_inference())
    return model_fingerprint(model), versions


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture and number of layers with narrow random weights, to find its places without its weights."""
    config = type(model.config)(**model.config.to_dict())
    text = config.get_text_config()
    groups = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    text.num_attention_heads, text.hidden_size = 2 * groups, 16 * groups
    for name, value in {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "ffn_dim": 24}.items():
        if vars(text).get(name) is not None:
            setattr(text, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@contextmanager
def _bar_only_if_long(source: str) -> Iterator[None]:
    """Keep transformers' progress bar off where a local folder loads in a moment."""
    folder = Path(source)
    short = folder.is_dir() and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 200e6
    if not short or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _find(name: str | Path) -> str:
    text = str(Path(str(name)).expanduser()) if str(name).startswith("~") else str(name)
    looks_local = isinstance(name, Path) or text.startswith((".", os.sep)) or text.count("/") > 1
    if not text.strip():
        raise ValueError("load: got an empty name, expected a model's folder, or its name on the hub.")
    folder = Path(text)
    if folder.is_file():
        raise ValueError(f"load: {name} is a file, expected the folder that holds config.json and the weights.")
    if not folder.is_dir():
        if looks_local:
            raise FileNotFoundError(f"load: there is no folder {name}. Check the path, or give a name on the hub.")
        return text
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" not in names:
        raise ValueError(f"load: {name} has no config.json, expected a Hugging Face model folder.")
    if not any(file.endswith(".safetensors") for file in names):
        other = [file for file in names if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
        found = f"only {', '.join(other[:3])}" if other else "no weights"
        raise ValueError(
            f"load: {name} has {found}, expected *.safetensors. Convert with save_pretrained; pickles are not read."
        )
    return text


def _config(source: str, revision: str | None, trust: bool) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"load: {source} brings code of its own, which is off. Read it, then pass trust_remote_code=True."
            ) from error
        raise ValueError(f"load: no model {source!r} could be read: {_first_line(error)}") from error
    if getattr(config, "auto_map", None) and not trust:
        raise ValueError(
            f"load: {source} brings code of its own, which is off. Read it, then pass trust_remote_code=True."
        )
    names = config.architectures or []
    if config.is_encoder_decoder or any(name.endswith(("ForMaskedLM", "EncoderModel")) for name in names):
        what = "an encoder-decoder" if config.is_encoder_decoder else "an encoder"
        raise ValueError(f"load: {source} is {what} ({', '.join(names)}), expected a decoder: a causal language model.")
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust:
        raise ValueError(f"load: {source} is a {config.model_type} model, expected a causal language model.")
    return config


def _tokenizer(source: str, revision: str | None, trusted: dict[str, bool]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, **trusted)
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {source} has no tokenizer that can be read: {_first_line(error)}") from error


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = "cpu" + ", cuda" * torch.cuda.is_available()
        raise ValueError(
            f"load: device {device!r} can't be used here, expected auto, {have}: {_first_line(error)}"
        ) from error
    return found


def _dtype(dtype: str | torch.dtype, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"load: got dtype {dtype!r}, expected auto or one of {', '.join(DTYPES)}.")
    kind = getattr(torch, name)
    try:
        one = torch.ones(2, 2, dtype=kind, device=device)
        (one @ one).sum().item()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"load: device {device} can't compute in {name}. Choose another of {', '.join(DTYPES)}."
        ) from error
    return kind


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
