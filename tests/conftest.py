"""Tiny random models of both families, which every test file builds on; nothing here needs the network."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

import hrt_cli
from hf_residual_transformer import ResidualWav2Vec2Config, ResidualWhisperConfig

REPO = Path(hrt_cli.__file__).parents[1]  # or the folder of installed packages

torch.set_num_threads(1)
gc.freeze()  # What is imported by now is not searched for garbage again, which takes half a second each time.

SAMPLING_RATE = 16_000
SAMPLE = Path(__file__).resolve().parent.parent / "sample"
RESEARCH = SAMPLE.parent / "research"
# Six short clips, and two quick steps on a CPU, as options of a command or script.
CLIPS = ["--language", "en", "--max_seconds", "1.0", "--max_samples", "6"]
TRAINING = ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "3", "--logging_steps", "1"]
TRAINING += ["--learning_rate", "1e-3", "--save_strategy", "no", "--disable_tqdm", "true"]
WHISPER_BYTES = sorted(ByteLevel.alphabet())
WHISPER_SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
WHISPER_TIMESTAMPS = [f"<|{0.02 * i:.2f}|>" for i in range(51)]
WHISPER_VOCAB = {token: i for i, token in enumerate([*WHISPER_BYTES, *WHISPER_SPECIAL, *WHISPER_TIMESTAMPS])}
# A tiny wav2vec2 has 800 frames a second, and attention over them takes most of a test that hears whole recordings.
# With these it has 200.
COARSE_FRAMES = {"conv_kernel": (10, 8), "conv_stride": (10, 8)}
WAV2VEC2_VOCAB = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"])}


def tiny_whisper_config(**kwargs) -> WhisperConfig:
    """4 encoder layers of 32/64, windows of one second; a residual config if `residual_config` is given."""
    end = WHISPER_VOCAB["<|endoftext|>"]
    values = {
        "vocab_size": len(WHISPER_VOCAB),
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 4,
        "encoder_ffn_dim": 64,
        "encoder_attention_heads": 2,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_attention_heads": 2,
        "max_source_positions": 50,
        "max_target_positions": 40,
        "classifier_proj_size": 16,
        "decoder_start_token_id": WHISPER_VOCAB["<|startoftranscript|>"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "begin_suppress_tokens": [WHISPER_VOCAB["Ġ"], end],
        **kwargs,
    }
    return (ResidualWhisperConfig if "residual_config" in kwargs else WhisperConfig)(**values)


def tiny_wav2vec2_config(**kwargs) -> Wav2Vec2Config:
    """4 encoder layers of 32/64 over two convolutions; a residual config if `residual_config` is given.

    No dropout and no masking, so that what a test computes in training mode is deterministic.
    """
    values = {
        "vocab_size": len(WAV2VEC2_VOCAB),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "conv_dim": (16, 16),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 4),
        "num_feat_extract_layers": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "codevector_dim": 16,
        "proj_codevector_dim": 16,
        "num_codevectors_per_group": 8,
        "num_negatives": 4,
        "classifier_proj_size": 16,
        "tdnn_dim": (16, 16),
        "tdnn_kernel": (5, 3),
        "tdnn_dilation": (1, 2),
        "xvector_output_dim": 16,
        "pad_token_id": WAV2VEC2_VOCAB["<pad>"],
        "mask_time_prob": 0.0,
        "mask_time_length": 2,
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        **kwargs,
    }
    return (ResidualWav2Vec2Config if "residual_config" in kwargs else Wav2Vec2Config)(**values)


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every parameter, also those that start at zero or one, and returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


class Alone(nn.Module):
    """One residual layer with its bank registered beside it, as torch.export wants it."""

    def __init__(self, shared: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.shared, self.layer = shared, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def whisper_generation_config() -> GenerationConfig:
    """What multilingual Whisper checkpoints have: languages, tasks and timestamps."""
    end = WHISPER_VOCAB["<|endoftext|>"]
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id={token: WHISPER_VOCAB[token] for token in ("<|en|>", "<|de|>")},
        task_to_id={task: WHISPER_VOCAB[f"<|{task}|>"] for task in ("translate", "transcribe")},
        no_timestamps_token_id=WHISPER_VOCAB["<|notimestamps|>"],
        prev_sot_token_id=WHISPER_VOCAB["<|startofprev|>"],
        decoder_start_token_id=WHISPER_VOCAB["<|startoftranscript|>"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_initial_timestamp_index=25,
        alignment_heads=[[1, 0]],
        return_timestamps=False,
        max_new_tokens=12,
    )


def whisper_processor() -> WhisperProcessor:
    """Bytes as tokens, and Whisper's special ones."""
    tokenizer = WhisperTokenizer(vocab=dict(WHISPER_VOCAB), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": WHISPER_SPECIAL[1:]})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in WHISPER_TIMESTAMPS])
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer)


def wav2vec2_processor(folder) -> Wav2Vec2Processor:
    """Eight letters; `folder` is where the vocabulary's file is written."""
    path = folder / "vocab.json"
    path.write_text(json.dumps(WAV2VEC2_VOCAB))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=Wav2Vec2CTCTokenizer(str(path)))


def speech(seconds: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Noise that stands for a recording, (seconds * 16000,)."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(int(seconds * SAMPLING_RATE), generator=generator)


def logged(folder: Path, key: str) -> list[float]:
    """What a training run logged under `key`, by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def moved(before: Path, after: Path) -> set[str]:
    """The weights that differ between two folders of one model."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.fixture
def research(monkeypatch):
    """Imports a script of `research/` by its name."""
    monkeypatch.syspath_prepend(str(RESEARCH))
    return importlib.import_module


@pytest.fixture(scope="session")
def dense_whisper(tmp_path_factory) -> Path:
    """The folder of a dense Whisper with its processor."""
    folder = tmp_path_factory.mktemp("whisper")
    model = randomize_(WhisperForConditionalGeneration(tiny_whisper_config()))
    model.generation_config = whisper_generation_config()
    model.save_pretrained(folder)
    whisper_processor().save_pretrained(folder)
    (folder / "normalizer.json").write_text('{"colour": "color"}')
    return folder


@pytest.fixture(scope="session")
def dense_wav2vec2(tmp_path_factory) -> Path:
    """The folder of a dense wav2vec2 that hears all letters, with its processor."""
    folder = tmp_path_factory.mktemp("wav2vec2")
    vocabulary = {
        token: i
        for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2Processor(
        feature_extractor=Wav2Vec2FeatureExtractor(return_attention_mask=True),
        tokenizer=Wav2Vec2CTCTokenizer(str(folder / "vocab.json")),
    ).save_pretrained(folder)
    model = Wav2Vec2ForCTC(tiny_wav2vec2_config(vocab_size=len(vocabulary), layerdrop=0.1, **COARSE_FRAMES))
    randomize_(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compressed(dense_whisper, dense_wav2vec2, tmp_path_factory) -> dict[str, Path]:
    """Both, as `hrt compress` writes them, with the sample's recordings."""
    outputs = {}
    for family, folder in (("whisper", dense_whisper), ("wav2vec2", dense_wav2vec2)):
        outputs[family] = tmp_path_factory.mktemp("compressed") / family
        words = [
            "compress",
            folder,
            "--audio",
            SAMPLE,
            "--language",
            "en",
            "--max-seconds",
            1,
            "--max-samples",
            6,
        ]
        words += [
            "--rank",
            4,
            "--rank_pattern",
            '{"fc2|output_dense": 6}',
            "--iterations",
            2,
            "--device",
            "cpu",
        ]
        assert hrt_cli.main([*map(str, words), "--out", str(outputs[family])]) == 0
    return outputs


def add_adapter_or_skip(model, config) -> None:
    """Adds an adapter as transformers does, or skips the test where it refuses the version of PEFT that is there."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))


def fresh_process(words, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A finished Python process with these arguments, which runs in a folder and finds this package.

    The code of remote models goes into a new folder.
    """
    known = {"PYTHONPATH": str(REPO), "HF_MODULES_CACHE": str(folder / "modules")}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **known, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
