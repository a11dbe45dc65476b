"""Broken configs, weights, shard indexes and training checkpoints from a generator with a seed: each gives a clear
error or the outputs of the whole one.

By default about a hundred cases run. `make fuzz` runs thousands, and writes their counts into the file that
HRT_FUZZ_CHECKPOINT_RESULTS names. HRT_FUZZ_SEED chooses other cases.
"""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_, tiny_wav2vec2_config, tiny_whisper_config
from fuzz_counts import MANY, SEED, Counts, changed, write_results
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import hf_residual_transformer as hrt
from hf_residual_transformer.training.checkpoints import fault_of

SECONDS = 20  # after which a case counts as one that hangs
WRONG_TYPES: list[Any] = [None, "x", -1, 0, 2.5, True, [], {}, [1, "a"], {"a": 1}, 10**9, 1e400, "\ud800"]
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
          torch.bool, torch.float8_e4m3fn, torch.complex64]  # fmt: skip
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)
FLOATS = (torch.float16, torch.bfloat16, torch.float64)
ELSEWHERE = ("none.safetensors", "../whole/none.safetensors", "/dev/zero", "config.json", "", ".")
FAMILIES: dict[str, Any] = {
    "whisper": hrt.ResidualWhisperForConditionalGeneration,
    "wav2vec2": hrt.ResidualWav2Vec2ForCTC,
}


def tiny(family: str) -> Any:
    torch.manual_seed(SEED)
    residual = hrt.ResidualConfig(
        group_size=2,
        rank=2,
        shared_bits=4,
        rank_pattern={"layers.0.fc1|fc2": 3} if family == "whisper" else {},
    )
    if family == "whisper":
        config: Any = tiny_whisper_config(
            residual_config=residual, decoder_residual_config=hrt.ResidualConfig(group_size=1, rank=1, shared_bits=3),
            embedding_bits=4, encoder_layers=2, decoder_layers=1,
        )  # fmt: skip
    else:
        config = tiny_wav2vec2_config(residual_config=residual, num_hidden_layers=2)
    return randomize_(FAMILIES[family](config))


@torch.inference_mode()
def outputs_of(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    model = model.float().eval()
    if model.config.is_encoder_decoder:
        features = torch.randn(1, 16, 100, generator=generator)
        return model(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits
    return model(input_values=torch.randn(1, 4000, generator=generator)).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Folder and outputs of a whole checkpoint of each family, in one file and in shards."""
    found = {}
    for family, model_class in FAMILIES.items():
        model = tiny(family)
        for name, size in ((family, "1GB"), (f"{family} shards", "20KB")):
            folder = tmp_path_factory.mktemp("whole") / "whole"
            model.save_pretrained(folder, max_shard_size=size)
            found[name] = (folder, outputs_of(model_class.from_pretrained(folder)))
    return found


@contextmanager
def limited() -> Iterator[None]:
    """A case that takes too long ends in an error."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# What may come of a case: an error, equal outputs, finite outputs (where nothing tells a changed weight from a trained
# one), or whatever the config says (where somebody could have written it).
ERROR, EQUAL, CLOSE, FINITE, ANY = "error", "equal", "close", "finite", "any"
Change = tuple[str, str]  # what was done, and what may come of it beside a clear error


def change_config(random: random.Random, folder: Path) -> Change:
    path = folder / "config.json"
    content = path.read_bytes()
    kind = random.choice(("bytes", "retype", "retype", "retype", "remove", "add", "value"))
    if kind == "bytes":
        name, broken = changed(random, content)
        path.write_bytes(broken)
        return f"config.json, {name}", _of_json(content, broken)
    values = json.loads(content)
    places = list(_places(values))
    parent, key = random.choice(places)
    old = parent[key]
    if kind == "remove":
        del parent[key]
        found = (f"without {key}", ANY)
    elif kind == "add":
        parent[key if isinstance(parent, list) else "colour"] = random.choice(WRONG_TYPES)
        found = ("a field more", ANY if isinstance(parent, list) else EQUAL)
    elif kind == "value" and type(old) in (int, float):
        parent[key] = random.choice((old + 1, old * 2, old // 2, -old, 10**9))
        found = (f"{key} = {parent[key]!r}", ANY)
    else:
        parent[key] = random.choice([value for value in WRONG_TYPES if type(value) is not type(old)])
        found = (f"{key} = {parent[key]!r}", EQUAL)
    path.write_text(json.dumps(values))
    return f"config.json, {found[0]}", found[1]


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], (dict, list)):
            yield from _places(values[key])


def _of_json(content: bytes, broken: bytes) -> str:
    try:
        return EQUAL if json.loads(content) == json.loads(broken) else ANY
    except ValueError:
        return ERROR


def change_weights(random: random.Random, folder: Path) -> Change:
    path = random.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    kind = random.choice(("header", "payload", "cut", "missing", "extra", "dtype", "dtype", "shape", "value"))
    if kind == "cut":
        path.write_bytes(content[: random.randrange(len(content))])
        return "cut", ERROR
    if kind in ("header", "payload"):
        position = random.randrange(size) if kind == "header" else random.randrange(size, len(content))
        path.write_bytes(
            content[:position]
            + bytes([content[position] ^ 1 << random.randrange(8)])
            + content[position + 1 :]
        )
        return f"a bit in the {kind}", FINITE
    tensors = load_file(path)
    key = random.choice(sorted(tensors))
    expected = ERROR
    if kind == "missing":
        del tensors[key]
    elif kind == "extra":
        name = random.choice(("colour", f"{key}.colour", key.replace("layers.0", "layers.9"), key + "_scale"))
        expected = EQUAL
        tensors[name] = tensors[key].clone()
    elif kind == "dtype":
        dtype = random.choice([dtype for dtype in DTYPES if dtype != tensors[key].dtype])
        floats = dtype in FLOATS and tensors[key].is_floating_point()
        expected = (EQUAL if dtype == torch.float64 else CLOSE) if floats else ERROR
        tensors[key] = tensors[key].to(dtype)
    elif kind == "shape":
        value = tensors[key]
        others = [value[:-1], value.flatten()[None], value[..., None], torch.cat([value, value])]
        tensors[key] = random.choice(others).contiguous()
        expected = EQUAL if tensors[key].shape == value.shape else ERROR
    elif tensors[key].is_floating_point():
        tensors[key].view(-1)[random.randrange(tensors[key].numel())] = random.choice(
            (torch.nan, torch.inf, -torch.inf)
        )
    else:
        kind, expected = "none", EQUAL
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{kind} of {key}", expected


def change_index(random: random.Random, folder: Path) -> Change:
    path = folder / "model.safetensors.index.json"
    content = path.read_bytes()
    index = json.loads(content)
    files = sorted(set(index["weight_map"].values()))
    key = random.choice(sorted(index["weight_map"]))
    kind = random.choice(("bytes", "no file", "swap", "elsewhere", "without", "extra", "retype", "map"))
    expected = EQUAL
    if kind == "bytes":
        name, broken = changed(random, content)
        path.write_bytes(broken)
        return f"index, {name}", EQUAL
    if kind == "no file":
        (folder / random.choice(files)).unlink()
        expected = ERROR
    elif kind == "swap":
        index["weight_map"][key] = random.choice(files)
    elif kind == "elsewhere":
        index["weight_map"][key] = random.choice(ELSEWHERE)
        expected = ERROR
    elif kind == "without":
        del index["weight_map"][key]
    elif kind == "extra":
        index["weight_map"]["colour"] = random.choice(files)
    elif kind == "retype":
        index["weight_map"][key] = random.choice(WRONG_TYPES)
        expected = ERROR
    else:
        index[random.choice(sorted(index))] = random.choice(WRONG_TYPES)
    path.write_text(json.dumps(index))
    return f"index, {kind} {key}", expected


def fuzz_model(number: int, counts: dict[str, Counts], folder: Path, whole: dict[str, Any]) -> None:
    random_ = random.Random(f"checkpoint {SEED} {number}")
    name = random_.choice(sorted(whole))
    changes: list[Callable[..., Change]] = [change_config, change_weights]
    change = random_.choice([*changes, change_index, change_index] if name.endswith("shards") else changes)
    source, expected = whole[name]
    broken = folder / "broken"
    shutil.copytree(source, broken)
    what, may = change(random_, broken)
    found = counts.setdefault(f"{change.__name__.removeprefix('change_')}", Counts())
    case = f"checkpoint {number}, {name}, {what}"
    start = time.process_time()
    try:
        with limited():
            outputs = outputs_of(FAMILIES[name.partition(" ")[0]].from_pretrained(broken))
    except Exception as error:
        clear = isinstance(error, (ValueError, OSError)) and not isinstance(error, TimeoutError)
        clear = clear and any(name in str(error) for name in ("broken", "`", "of the checkpoint"))
        outcome = "clear error" if clear else f"{type(error).__name__}: {str(error)[:300]}"
        found.note(outcome, case, time.process_time() - start, fault=not clear)
        return
    finally:
        shutil.rmtree(broken)
    seconds = time.process_time() - start
    equal = outputs.shape == expected.shape and torch.allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    close = outputs.shape == expected.shape and (outputs - expected).norm() <= 0.1 * expected.norm()
    if equal:
        found.note("equal output", case, seconds, fault=may == ERROR)
    elif may == CLOSE and close:
        found.note("rounded output", case, seconds)
    elif may == ANY and outputs.isfinite().all():
        found.note("another right config", case, seconds)
    elif may == FINITE and outputs.isfinite().all():
        found.note("another weight", case, seconds)
    else:
        found.note(f"silently other outputs ({may})", case, seconds, fault=True)


@functools.cache
def training_files() -> dict[str, bytes]:
    """The files of a Trainer's checkpoint, by name, as small ones."""
    weight = torch.nn.Parameter(torch.arange(6.0))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()

    def saved(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    return {
        "optimizer.pt": saved(optimizer.state_dict()),
        "scheduler.pt": saved({"last_epoch": 7, "base_lrs": [0.1]}),
        "rng_state.pth": saved({"cpu": torch.get_rng_state()}),
        "trainer_state.json": json.dumps({"global_step": 7, "log_history": [{"loss": 1.5}]}).encode(),
        "run.json": json.dumps({"student": "abc", "options": {"seed": 1}}).encode(),
    }


def same(name: str, one: bytes, other: bytes) -> bool:
    if name.endswith(".json"):
        return json.loads(one) == json.loads(other)
    try:
        loaded = [torch.load(io.BytesIO(content), weights_only=True) for content in (one, other)]
    except Exception:  # torch has no class of its own for what it cannot read
        return False
    return repr(loaded[0]) == repr(loaded[1])


def fuzz_training(number: int, counts: dict[str, Counts], folder: Path, whole: dict[str, Any]) -> None:
    random_ = random.Random(f"training {SEED} {number}")
    files = training_files()
    name = random_.choice(sorted(files))
    checkpoint = folder / "checkpoint-7"
    shutil.copytree(whole["wav2vec2"][0], checkpoint)
    kind, broken = changed(random_, files[name])
    for other, content in files.items():
        (checkpoint / other).write_bytes(broken if other == name else content)
    found = counts.setdefault("training checkpoint", Counts())
    case = f"training {number}, {name}, {kind}"
    start = time.process_time()
    try:
        with limited():
            problem = fault_of(checkpoint)
    except Exception as error:
        found.note(f"{type(error).__name__}: {error}", case, time.process_time() - start, fault=True)
        return
    finally:
        shutil.rmtree(checkpoint)
    seconds = time.process_time() - start
    if problem is not None:
        found.note("clear error", case, seconds)
    elif same(name, files[name], broken):
        found.note("equal output", case, seconds)
    elif name.endswith(".json"):
        found.note("another right file", case, seconds)
    else:
        found.note("silently another checkpoint", case, seconds, fault=True)


def run(fuzz: Callable[..., None], number: int, folder: Path, whole: dict[str, Any]) -> dict[str, Counts]:
    counts: dict[str, Counts] = {}
    for case in range(number):
        fuzz(case, counts, folder, whole)
    return counts


@pytest.fixture(autouse=True)
def quiet():
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.set_verbosity(before)
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize(("fuzz", "number"), [(fuzz_model, 80), (fuzz_training, 30)])
def test_a_broken_checkpoint_gives_a_clear_error_or_the_outputs_of_the_whole_one(
    tmp_path, whole, fuzz, number
):
    counts = run(fuzz, number, tmp_path, whole)
    assert [fault for found in counts.values() for fault in found.faults] == []
    assert sum(found.outcomes["clear error"] for found in counts.values()) > number // 3


@pytest.mark.fuzz
def test_thousands_of_broken_checkpoints_give_a_clear_error_or_the_outputs_of_the_whole_one(tmp_path, whole):
    counts = {**run(fuzz_model, MANY, tmp_path, whole), **run(fuzz_training, MANY // 2, tmp_path, whole)}
    write_results("HRT_FUZZ_CHECKPOINT_RESULTS", counts)
