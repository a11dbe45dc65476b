"""The contract that every family keeps: tiny models against dense ones with explicit matrices; saving and loading."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from conftest import (
    randomize_,
    speech,
    tiny_wav2vec2_config,
    tiny_whisper_config,
    whisper_generation_config,
    whisper_processor,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperForConditionalGeneration,
    WhisperModel,
)

import hf_residual_transformer as hrt
from hf_residual_transformer import (
    ResidualConfig,
    ResidualWav2Vec2ForCTC,
    ResidualWav2Vec2ForPreTraining,
    ResidualWav2Vec2Model,
    ResidualWhisperForAudioClassification,
    ResidualWhisperForConditionalGeneration,
    ResidualWhisperModel,
    size_report,
)
from hf_residual_transformer.layers import ResidualLinear, SharedLinear
from hf_residual_transformer.modeling import residual_linears
from hf_residual_transformer.reporting import format_bytes

FAMILIES = ["whisper", "wav2vec2"]
DEPTH = 4
SMALL = ResidualConfig(group_size=2, rank=4)
MODULES = {
    "whisper": {
        **{f"self_attn.{name}_proj": (32, 32) for name in ("q", "k", "v", "out")},
        "fc1": (64, 32),
        "fc2": (32, 64),
    },
    "wav2vec2": {
        **{f"attention.{name}_proj": (32, 32) for name in ("q", "k", "v", "out")},
        "feed_forward.intermediate_dense": (64, 32),
        "feed_forward.output_dense": (32, 64),
    },
}
REPO = str(Path(hrt.__file__).parents[1])


def build(family: str, residual: ResidualConfig = SMALL, **kwargs):
    """A residual model with a head and random components, the same each time, in eval mode."""
    torch.manual_seed(0)
    if family == "whisper":
        model = ResidualWhisperForConditionalGeneration(
            tiny_whisper_config(residual_config=residual, **kwargs)
        )
        model.generation_config = whisper_generation_config()
    else:
        model = ResidualWav2Vec2ForCTC(tiny_wav2vec2_config(residual_config=residual, **kwargs))
    return randomize_(model)


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    """A batch of two with labels."""
    if family == "whisper":
        extractor = whisper_processor().feature_extractor
        audio = [speech(seed=seed).numpy() for seed in (1, 2)]
        features = extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features
        return {"input_features": features, "labels": torch.tensor([[72, 73, 74], [80, 81, -100]])}
    audio = torch.stack([10 * speech(0.05, seed) for seed in (1, 2)])
    return {"input_values": audio, "labels": torch.tensor([[5, 6, 7], [8, 9, -100]])}


def in_float64(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In which gradients of equal functions agree on every machine, whatever order it adds in."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def encoder_of(model: nn.Module) -> nn.Module:
    return next(
        module for module in model.modules() if isinstance(getattr(module, "shared", None), nn.ModuleDict)
    )


def outputs_of(model: nn.Module, family: str, **kwargs):
    with torch.no_grad():
        return model(**inputs_of(family), **kwargs)


def assert_same_outputs(model: nn.Module, other: nn.Module, family: str, atol: float = 1e-5) -> None:
    mine, theirs = outputs_of(model, family), outputs_of(other, family)
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=atol, atol=atol)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=atol, atol=atol)


def dense_of(model: nn.Module, family: str, residual: ResidualConfig, group_size: int | None) -> nn.Module:
    """The dense model, its matrices written out here without any of the package's own arithmetic."""
    encoder = encoder_of(model)
    path = next(path for path, module in model.named_modules() if module is encoder)
    state = model.state_dict()
    weights = {key: value for key, value in state.items() if not key.startswith(f"{path}.shared.")}
    for layer_idx in range(DEPTH):
        for module, (out_features, in_features) in MODULES[family].items():
            own = f"{path}.layers.{layer_idx}.{module}"
            group_idx = layer_idx // (group_size or 1)
            if residual.cyclic:
                group_idx = layer_idx % math.ceil(DEPTH / group_size)
            shared = f"{path}.shared.{module.replace('.', '_')}.{group_idx}"
            weight = (
                state[f"{shared}.weight"].clone()
                if group_size
                else torch.zeros(out_features, in_features, dtype=model.dtype)
            )
            if residual.rank:
                weight += weights.pop(f"{own}.residual_B") @ weights.pop(f"{own}.residual_A")
            if f"{own}.diagonal" in weights:
                diagonal = weights.pop(f"{own}.diagonal")
                weight += torch.diag(diagonal) if out_features == in_features else _pad(diagonal, weight)
            weights[f"{own}.weight"] = weight
            if f"{shared}.bias" in state:
                weights[f"{own}.bias"] = state[f"{shared}.bias"]
    dense_class = WhisperForConditionalGeneration if family == "whisper" else Wav2Vec2ForCTC
    dense = dense_class(tiny_whisper_config() if family == "whisper" else tiny_wav2vec2_config())
    dense = dense.to(model.dtype)
    dense.load_state_dict({key: value.clone() for key, value in weights.items()})
    dense.tie_weights()
    return dense.eval()


def _pad(diagonal: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    matrix = torch.zeros_like(like)
    matrix[: len(diagonal), : len(diagonal)] = torch.diag(diagonal)
    return matrix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("group_size", "rank", "diagonal", "share_biases", "cyclic"),
    [
        (1, 4, "square", False, False),
        (2, 4, "square", False, False),
        (3, 4, "all", True, False),
        (DEPTH, 4, "none", False, False),
        (DEPTH, 0, "square", True, False),
        (DEPTH, 0, "none", True, False),
        (2, 32, "all", False, False),
        (3, 1, "none", True, False),
        (100, 4, "all", False, False),
        (2, 4, "square", False, True),
        (3, 4, "all", True, True),
        (DEPTH, 4, "none", False, True),
    ],
)
def test_outputs_and_gradients_equal_those_of_the_explicit_dense_model(
    family, group_size, rank, diagonal, share_biases, cyclic
):
    residual = ResidualConfig(group_size, rank, diagonal=diagonal, share_biases=share_biases, cyclic=cyclic)
    model = build(family, residual).double()
    dense = dense_of(model, family, residual, group_size)
    mine, expected = (twin(**in_float64(inputs_of(family))) for twin in (model, dense))
    torch.testing.assert_close(mine.logits, expected.logits)
    mine.loss.backward()
    expected.loss.backward()

    encoder = encoder_of(model)
    dense_layers = (dense.model.encoder if family == "whisper" else dense.wav2vec2.encoder).layers

    close = torch.testing.assert_close

    for module in MODULES[family]:
        bank = encoder.shared[module.replace(".", "_")]
        assert len(bank) == math.ceil(DEPTH / group_size)
        for group_idx, shared in enumerate(bank):
            members = range(group_idx * group_size, min((group_idx + 1) * group_size, DEPTH))
            if cyclic:
                members = range(group_idx, DEPTH, len(bank))
            twins = [dense_layers[i].get_submodule(module) for i in members]
            close(shared.weight.grad, sum(twin.weight.grad for twin in twins))
            if share_biases and twins[0].bias is not None:
                close(shared.bias.grad, sum(twin.bias.grad for twin in twins))
            else:
                assert shared.bias is None
            for i, twin in zip(members, twins, strict=True):
                layer = encoder.layers[i].get_submodule(module)
                if rank:
                    close(layer.residual_A.grad, layer.residual_B.detach().T @ twin.weight.grad)
                    close(layer.residual_B.grad, twin.weight.grad @ layer.residual_A.detach().T)
                else:
                    assert layer.residual_A is None and layer.residual_B is None
                if layer.diagonal is not None:
                    close(layer.diagonal.grad, twin.weight.grad.diagonal())
                if layer.own_bias is not None:
                    close(layer.own_bias.grad, twin.bias.grad)
    for mine, theirs in ((encoder.layers[i], dense_layers[i]) for i in range(DEPTH)):
        close(mine.final_layer_norm.weight.grad, theirs.final_layer_norm.weight.grad)
    if family == "whisper":
        close(model.model.encoder.conv1.weight.grad, dense.model.encoder.conv1.weight.grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rank", "diagonal", "share_biases"), [(4, "all", False), (1, "none", True), (32, "square", False)]
)
def test_low_rank_without_sharing_equals_the_explicit_dense_model(
    family, rank, diagonal, share_biases, tmp_path
):
    residual = ResidualConfig(None, rank, diagonal=diagonal, share_biases=share_biases)
    model = build(family, residual).double()
    dense = dense_of(model, family, residual, None)
    mine, expected = (twin(**in_float64(inputs_of(family))) for twin in (model, dense))
    torch.testing.assert_close(mine.logits, expected.logits)
    mine.loss.backward()
    expected.loss.backward()
    for path, linear in residual_linears(model):
        twin = dense.get_submodule(path)
        grads = {"residual_A": linear.residual_B.detach().T @ twin.weight.grad}
        grads["residual_B"] = twin.weight.grad @ linear.residual_A.detach().T
        grads["diagonal"] = twin.weight.grad.diagonal()
        if twin.bias is not None:
            grads["bias"] = twin.bias.grad
        for name, parameter in linear.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name])
        assert (linear.bias is None) == (twin.bias is None)
    assert not any("shared" in key for key in model.state_dict())
    assert size_report(model).components["shared"].unique == 0
    model.float()
    assert_same_outputs(model, model.merge(), family)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, type(model).from_pretrained(tmp_path), family, atol=0)


def test_roles_that_share_and_roles_that_do_not_live_in_one_model():
    residual = ResidualConfig(group_size={"q_proj": 3, "fc1": None}, rank=3, diagonal="all")
    model = build("whisper", residual)
    assert set(encoder_of(model).shared) == {"self_attn_q_proj"}
    assert_same_outputs(model, model.merge(), "whisper")
    with pytest.raises(
        ValueError, match=r"`rank` must be at least 1 where nothing is shared for .*fc1.* got 0"
    ):
        build("whisper", ResidualConfig(group_size={"q_proj": 3, "fc1": None}, rank=0))


@pytest.mark.parametrize("diagonal", ["none", "square", "all"])
def test_diagonals_are_on_the_matrices_that_the_config_says(diagonal):
    encoder = encoder_of(build("whisper", ResidualConfig(2, 4, diagonal=diagonal)))
    sizes = {
        module: None if (d := encoder.layers[0].get_submodule(module).diagonal) is None else len(d)
        for module in MODULES["whisper"]
    }
    square = 32 if diagonal != "none" else None
    expected = dict.fromkeys(MODULES["whisper"], square)
    expected["fc1"] = expected["fc2"] = 32 if diagonal == "all" else None
    assert sizes == expected


def test_a_dict_of_group_sizes_shares_only_what_it_names():
    residual = ResidualConfig(group_size={"fc1": 4, "fc2": 3}, rank=2)
    model = build("whisper", residual)
    encoder = encoder_of(model)
    assert {role: len(bank) for role, bank in encoder.shared.items()} == {"fc1": 1, "fc2": 2}
    assert type(encoder.layers[0].self_attn.q_proj) is nn.Linear
    assert encoder.layers[2].fc2.shared is encoder.layers[0].fc2.shared is not encoder.layers[3].fc2.shared
    assert_same_outputs(model, model.merge(), "whisper")
    count = size_report(model).components
    assert count["shared"].unique == 3 * 32 * 64 and count["shared"].dense == 8 * 32 * 64
    assert count["other"].unique == count["other"].dense == 16 * 32 * 32


def test_target_modules_leave_the_others_dense_and_ranks_follow_their_pattern():
    residual = ResidualConfig(
        group_size=2,
        rank=2,
        rank_pattern={r"layers\.0\..*q_proj": 0, "q_proj": 5},
        target_modules=("q_proj", "intermediate_dense"),
    )
    model = build("wav2vec2", residual)
    ranks = {path.removeprefix("wav2vec2.encoder."): m.rank for path, m in residual_linears(model)}
    assert ranks == {
        "layers.0.attention.q_proj": 0,
        **{f"layers.{i}.attention.q_proj": 5 for i in (1, 2, 3)},
        **{f"layers.{i}.feed_forward.intermediate_dense": 2 for i in range(4)},
    }
    assert type(encoder_of(model).layers[0].attention.v_proj) is nn.Linear
    assert_same_outputs(model, model.merge(), "wav2vec2")


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_shows_in_identity_count_and_effect(family):
    model = build(family, ResidualConfig(group_size=3, rank=2, diagonal="square"))
    encoder = encoder_of(model)
    for module, (out_features, in_features) in MODULES[family].items():
        linears = [layer.get_submodule(module) for layer in encoder.layers]
        bank = encoder.shared[module.replace(".", "_")]
        assert [linear.shared is bank[0] for linear in linears] == [True, True, True, False]
        assert linears[3].shared is bank[1]
        assert linears[0].residual_B is not linears[1].residual_B
        before = [linear.weight.detach() for linear in linears]
        with torch.no_grad():
            bank[0].weight.add_(1.0)
        after = [linear.weight.detach() for linear in linears]
        moved = [float((b - a).mean()) for a, b in zip(before, after, strict=True)]
        assert moved == pytest.approx([1, 1, 1, 0], abs=1e-5)
        assert sum(p.numel() for p in bank.parameters()) == 2 * out_features * in_features
    biases = 3 if family == "whisper" else 4  # Whisper's keys have none
    matrices = 4 * 32 * 32 + 2 * 32 * 64
    per_layer = 4 * 2 * (32 + 32) + 2 * 2 * (32 + 64) + 4 * 32 + (biases * 32 + 64 + 32) + 2 * 2 * 32
    report = size_report(model)
    assert report.encoder.unique == 2 * matrices + 4 * per_layer
    assert report.encoder.dense == 4 * (matrices + biases * 32 + 64 + 32 + 2 * 2 * 32)
    dense = model.merge()
    assert report.model.unique == sum(p.numel() for p in model.parameters())
    assert report.model.dense == sum(p.numel() for p in dense.parameters())


def test_the_report_prints_counts_and_refuses_models_without_residual_layers():
    report = size_report(build("whisper"))
    assert json.loads(json.dumps(report.to_dict()))["encoder"]["ratio"] == report.encoder.ratio
    assert sum(count.unique for count in report.components.values()) == report.encoder.unique
    assert f"{report.encoder.unique:,}" in str(report) and f"{report.encoder.ratio:.1%}" in str(report)
    assert list(report.to_dict()) == ["model_bytes", "encoder_bytes", "parts", "model", "encoder"]
    for name in ("model_bytes", "encoder_bytes"):
        assert report.to_dict()[name] == getattr(report, name).to_dict()
    with pytest.raises(ValueError, match="`model` must have residual layers, got WhisperModel"):
        size_report(WhisperModel(tiny_whisper_config()))


def test_the_report_leads_with_the_bytes_of_the_whole_model():
    report = size_report(build("whisper"))
    header, whole, layers, _, parameters, *_ = str(report).splitlines()
    assert header.split() == ["bytes", "when", "saved", "compressed", "dense", "ratio"]
    assert whole.startswith("whole model") and whole.endswith(f"{report.model_bytes.ratio:.1%}")
    assert f"{report.model_bytes.unique / 1e3:,.1f} kB" in whole
    assert f"{report.encoder_bytes.dense / 1e3:,.1f} kB" in layers
    assert parameters.split() == ["parameters", "compressed", "dense", "ratio"]
    assert [format_bytes(number) for number in (999_949, 1e6, 105_260_000)] == [
        "999.9 kB",
        "1.0 MB",
        "105.3 MB",
    ]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reported_bytes_of_the_model_are_those_of_the_saved_tensors(family, bits, tmp_path):
    model = build(family, ResidualConfig(group_size=2, rank=3, shared_bits=bits))
    report = size_report(model)
    model.half().save_pretrained(tmp_path / "residual")
    model.merge().save_pretrained(tmp_path / "dense")
    assert report.model_bytes.unique == tensor_bytes(tmp_path / "residual" / "model.safetensors")
    assert report.model_bytes.dense == tensor_bytes(tmp_path / "dense" / "model.safetensors")


def tensor_bytes(path):
    return sum(tensor.nbytes for tensor in load_file(path).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_dict_has_the_dense_keys_with_components_and_one_bank(family):
    model = build(family, ResidualConfig(group_size=3, rank=2))
    encoder = "model.encoder" if family == "whisper" else "wav2vec2.encoder"
    expected = set(model.merge().state_dict())
    for module, (out_features, in_features) in MODULES[family].items():
        expected |= {f"{encoder}.shared.{module.replace('.', '_')}.{group}.weight" for group in (0, 1)}
        for i in range(DEPTH):
            path = f"{encoder}.layers.{i}.{module}"
            expected.remove(f"{path}.weight")
            expected |= {f"{path}.residual_A", f"{path}.residual_B"}
            if out_features == in_features:
                expected.add(f"{path}.diagonal")
    assert set(model.state_dict()) == expected


def bytes_of_tensors(path: Path) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in load_file(path).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_keeps_one_changed_u_on_disk_and_in_memory(family, tmp_path):
    model = build(family, ResidualConfig(group_size=3, rank=2, diagonal="all", share_biases=True))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SharedLinear):
                module.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    unique = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert bytes_of_tensors(file) == unique
    assert unique < file.stat().st_size < unique + 200 * len(load_file(file))
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert sum(p.numel() for p in loaded.parameters()) * 4 == unique
    layers = encoder_of(loaded).layers
    module = next(iter(MODULES[family]))
    assert layers[0].get_submodule(module).shared is layers[2].get_submodule(module).shared
    assert_same_outputs(model, loaded, family, atol=0)


FRESH = """
import socket, sys, torch
def refuse(*args, **kwargs):
    raise OSError("the network is not to be used")
socket.socket.connect = refuse
import hf_residual_transformer
assert not {"peft", "datasets", "hf_residual_transformer.conversion"} & set(sys.modules), "imported too much"
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq
folder = sys.argv[1]
for family, auto in (("whisper", AutoModelForSpeechSeq2Seq), ("wav2vec2", AutoModelForCTC)):
    model = auto.from_pretrained(f"{folder}/{family}")
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/{family}.pt")).logits, f"{folder}/{family}.logits")
"""

PLAIN = """
import sys, torch
sys.modules["hf_residual_transformer"] = None
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq
folder = sys.argv[1]
for family, auto in (("whisper", AutoModelForSpeechSeq2Seq), ("wav2vec2", AutoModelForCTC)):
    model = auto.from_pretrained(f"{folder}/{family}")
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/{family}.pt")).logits, f"{folder}/{family}.logits")
"""


@pytest.mark.parametrize(("script", "merged"), [(FRESH, False), (PLAIN, True)], ids=["residual", "merged"])
def test_a_fresh_process_loads_the_model_and_a_process_without_the_package_the_merged_one(
    script, merged, tmp_path
):
    expected = {}
    for family in FAMILIES:
        model = build(family, ResidualConfig(group_size=3, rank=2, diagonal="all"))
        (model.merge() if merged else model).save_pretrained(tmp_path / family)
        inputs = inputs_of(family)
        torch.save(inputs, tmp_path / f"{family}.pt")
        expected[family] = outputs_of(model, family).logits
    environment = {**os.environ, "PYTHONPATH": "" if merged else REPO, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        logits = torch.load(tmp_path / f"{family}.logits")
        torch.testing.assert_close(logits, expected[family], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_a_dense_copy_with_equal_outputs(family):
    model = build(family, ResidualConfig(group_size=3, rank=5, diagonal="all", share_biases=True))
    before = copy.deepcopy(model.state_dict())
    dense = model.merge()
    assert type(dense) is (WhisperForConditionalGeneration if family == "whisper" else Wav2Vec2ForCTC)
    assert not any(isinstance(module, (ResidualLinear, SharedLinear)) for module in dense.modules())
    assert "residual_config" not in dense.config.to_dict() and dense.config.model_type == family
    assert_same_outputs(model, dense, family)
    assert {k: p.requires_grad for k, p in dense.named_parameters()} == {
        k: p.requires_grad for k, p in type(dense)(dense.config).named_parameters()
    }
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if family == "whisper":
        assert dense.proj_out.weight is dense.model.decoder.embed_tokens.weight
        assert dense.generation_config is not model.generation_config
        assert dense.generation_config.lang_to_id == model.generation_config.lang_to_id


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_sharded_saving_and_device_maps_round_trip(family, tmp_path):
    model = build(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    split = (
        {"": "cpu"}
        if family == "wav2vec2"
        else {"model.encoder": "cpu", "model.decoder": "cpu", "proj_out": "cpu"}
    )
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": split}):
        loaded = type(model).from_pretrained(tmp_path, dtype="auto", **options)
        assert {p.dtype for p in encoder_of(loaded).parameters()} == {torch.bfloat16}
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    full = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs_of(family).items()}
    with torch.no_grad():
        logits = model(**inputs).logits
        merged = model.merge()
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=0, atol=0)
        torch.testing.assert_close(logits.float(), full(**inputs_of(family)).logits, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_map_keeps_the_layers_of_a_group_with_their_u(family):
    model = build(family)
    encoder = encoder_of(model)
    size = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    path = next(path for path, module in model.named_modules() if module is encoder)
    for memory in (size // 2, 4 * size):
        places = infer_auto_device_map(
            model, {0: memory, "cpu": 10**9}, no_split_module_classes=list(model._no_split_modules)
        )
        assert {key for key in places if key.startswith(f"{path}.")} == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_offloaded_to_disk_gives_the_same_outputs(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "model")
    encoder = "model.encoder" if family == "whisper" else "wav2vec2.encoder"
    places = {
        name: "disk" if name == encoder else "cpu"
        for name in ([encoder, "model.decoder", "proj_out"] if family == "whisper" else [encoder, "lm_head"])
    }
    if family == "wav2vec2":
        places |= {f"wav2vec2.{name}": "cpu" for name in ("feature_extractor", "feature_projection")}
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert encoder_of(loaded).shared["fc1" if family == "whisper" else "attention_q_proj"][0].weight.is_meta
    assert_same_outputs(model, loaded, family)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("family", "clone"),
    # torch does not pickle wav2vec2's weight norm, in the dense class either
    [("whisper", copy.deepcopy), ("whisper", through_pickle), ("wav2vec2", copy.deepcopy)],
)
def test_copies_share_among_themselves_and_not_with_the_original(family, clone):
    model = build(family)
    other = clone(model)
    assert_same_outputs(model, other, family, atol=0)
    encoder = encoder_of(other)
    for path, linear in residual_linears(other):
        assert linear.shared in list(encoder.modules()), path
    with torch.no_grad():
        for parameter in encoder.shared.parameters():
            parameter.mul_(2)
    assert not torch.allclose(outputs_of(model, family).logits, outputs_of(other, family).logits, atol=1e-3)
    assert_same_outputs(model, clone(model), family, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hidden_states_and_attentions_are_the_merged_models(family, implementation):
    model = build(family, attn_implementation=implementation)
    merged = model.merge()
    assert merged.config._attn_implementation == model.config._attn_implementation == implementation
    prefix = "encoder_" if family == "whisper" else ""
    outputs = [
        outputs_of(m, family, output_hidden_states=True, output_attentions=implementation == "eager")
        for m in (model, merged)
    ]
    mine, theirs = (output[f"{prefix}hidden_states"] for output in outputs)
    assert len(mine) == len(theirs) == DEPTH + 1
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    if implementation == "eager":
        mine, theirs = (output[f"{prefix}attentions"] for output in outputs)
        assert len(mine) == DEPTH
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree(family):
    model = build(family, attn_implementation="eager")
    eager = outputs_of(model, family).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(outputs_of(model, family).logits, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model = build(family).train()
    model(**inputs_of(family)).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**inputs_of(family)).loss.backward()
    assert encoder_of(model).layers[0].gradient_checkpointing
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(".shared." in name for name in grads)
    torch.testing.assert_close(grads, plain, rtol=1e-5, atol=1e-6)


def test_whispers_encoder_compiles_as_one_graph():
    torch._dynamo.reset()
    residual = ResidualConfig(group_size=2, rank=2, diagonal="all")
    encoder = build("whisper", residual, encoder_layers=2).model.encoder
    features = inputs_of("whisper")["input_features"]
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    expected = encoder(features).last_hidden_state
    expected.pow(2).sum().backward()
    grads = [p.grad.clone() for p in encoder.shared.parameters()]
    encoder.zero_grad()
    actual = compiled(features).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.pow(2).sum().backward()
    torch.testing.assert_close([p.grad for p in encoder.shared.parameters()], grads, rtol=1e-3, atol=1e-3)


def test_a_padded_batch_gives_what_each_recording_gives_alone():
    model = build("wav2vec2", feat_extract_norm="layer")
    short, long = 10 * speech(0.05, seed=1), 10 * speech(0.1, seed=2)
    values = torch.zeros(2, len(long))
    values[0, : len(short)], values[1] = short, long
    mask = torch.zeros(2, len(long), dtype=torch.long)
    mask[0, : len(short)], mask[1] = 1, 1
    with torch.no_grad():
        batch = model(values, attention_mask=mask).logits
        for row, audio in enumerate((short, long)):
            alone = model(audio[None], attention_mask=torch.ones(1, len(audio), dtype=torch.long)).logits
            torch.testing.assert_close(batch[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stable", [False, True])
def test_both_of_wav2vec2s_encoders_are_covered(stable):
    model = build("wav2vec2", do_stable_layer_norm=stable)
    assert_same_outputs(model, model.merge(), "wav2vec2")


GENERATION = {
    "language": {"language": "de", "task": "translate"},
    "timestamps": {"language": "en", "return_timestamps": True},
    "prompt": {
        "prompt_ids": torch.tensor([263, 72, 73, 74]),
        "language": "en",
        "return_dict_in_generate": True,
    },
    "beams": {"num_beams": 2, "language": "en"},
    "detect": {},
    "tokens": {"return_token_timestamps": True, "language": "en"},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_gives_the_merged_models_tokens(options):
    model = build("whisper")
    features = {"input_features": inputs_of("whisper")["input_features"]}
    mine, theirs = (m.generate(**features, **options) for m in (model, model.merge()))
    if isinstance(mine, dict):
        if "token_timestamps" in mine:
            torch.testing.assert_close(mine["token_timestamps"], theirs["token_timestamps"])
        mine, theirs = mine["sequences"], theirs["sequences"]
    assert torch.equal(mine, theirs)
    assert mine.shape[1] > 4
    if "prompt_ids" in options:
        # where generation does not know that it has a Whisper, it puts a start token before the prompt
        assert mine[0, :5].tolist() == [*options["prompt_ids"].tolist(), model.config.decoder_start_token_id]


def test_long_form_generation_gives_the_merged_models_tokens():
    model = build("whisper")
    processor = whisper_processor()
    batch = processor(
        [speech(2.5).numpy()],
        sampling_rate=16_000,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    options = {"return_timestamps": True, "language": "en", "condition_on_prev_tokens": True}
    mine, theirs = (m.generate(**batch, **options) for m in (model, model.merge()))
    assert torch.equal(mine, theirs)


def test_scratch_positions_are_sinusoids_and_feature_projections_are_the_dense_classs():
    residual = ResidualWhisperModel(tiny_whisper_config(residual_config=SMALL))
    dense = WhisperModel(tiny_whisper_config())
    assert torch.equal(residual.encoder.embed_positions.weight, dense.encoder.embed_positions.weight)
    assert not residual.encoder.embed_positions.weight.requires_grad
    model = ResidualWav2Vec2Model(tiny_wav2vec2_config(residual_config=SMALL))
    assert_is_uniform(model.feature_projection.projection.weight, 16**-0.5)


def assert_is_uniform(weight: torch.Tensor, bound: float) -> None:
    """The dense class's start; the trap's is normal, with a tenth of the spread."""
    assert 0.9 * bound < weight.abs().max() <= bound
    assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_scratch_layers_of_a_group_start_as_their_u_with_the_dense_classs_spread(family):
    torch.manual_seed(0)
    config = tiny_whisper_config if family == "whisper" else tiny_wav2vec2_config
    model_class = ResidualWhisperForConditionalGeneration if family == "whisper" else ResidualWav2Vec2ForCTC
    model = model_class(config(residual_config=ResidualConfig(group_size=2, rank=4, diagonal="all"))).eval()
    for path, linear in residual_linears(model):
        assert torch.equal(linear.weight, linear.shared.weight), path
        assert float(linear.shared.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert 0 < linear.residual_A.std() < linear.in_features**-0.5
        assert linear.bias is None or not linear.bias.any()
    outputs = model(**inputs_of(family))
    assert torch.isfinite(outputs.logits).all()
    outputs.loss.backward()
    for path, linear in residual_linears(model):
        assert (
            linear.residual_B.grad.any() and linear.diagonal.grad.any() and linear.shared.weight.grad.any()
        ), path
    assert torch.isfinite(
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    ).all()


def test_scratch_layers_without_sharing_start_at_the_scale_of_lecuns_initialisation():
    torch.manual_seed(0)
    model = ResidualWav2Vec2Model(
        tiny_wav2vec2_config(residual_config=ResidualConfig(None, 16, diagonal="all"))
    )
    for path, linear in residual_linears(model):
        std = float(linear.weight.detach().std())
        assert std == pytest.approx(linear.in_features**-0.5, rel=0.25), path
        assert not linear.diagonal.any()


def test_initialising_again_leaves_a_trained_model_alone():
    model = build("whisper")
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_loading_into_another_head_keeps_the_encoder_and_starts_the_head(tmp_path):
    build("whisper").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    model, info = ResidualWhisperForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {
        f"{m}.{p}" for m in ("projector", "classifier") for p in ("weight", "bias")
    }
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(value, saved[f"model.encoder.{key}"]), key
    assert 0 < model.classifier.weight.std() < 0.1 and not model.classifier.bias.any()
    base = ResidualWhisperModel.from_pretrained(tmp_path)
    assert torch.equal(base.encoder.shared["fc1"][0].weight, saved["model.encoder.shared.fc1.0.weight"])
    base.save_pretrained(tmp_path / "base")
    again = ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert torch.equal(
        again.model.encoder.shared["fc1"][1].weight, saved["model.encoder.shared.fc1.1.weight"]
    )


@pytest.mark.parametrize("head", [ResidualWav2Vec2Model, ResidualWav2Vec2ForPreTraining])
def test_a_dense_wav2vec2_checkpoint_is_refused_with_the_way_out(head, tmp_path):
    Wav2Vec2Model(tiny_wav2vec2_config()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"does not fit {head.__name__}: it lacks .*{head.__name__}.from_dense"
    ):
        head.from_pretrained(tmp_path)


def test_a_dense_config_is_refused():
    with pytest.raises(ValueError, match="must be a ResidualWhisperConfig, got WhisperConfig"):
        ResidualWhisperModel(tiny_whisper_config())


def test_a_dense_whisper_checkpoint_is_refused_with_the_way_out(tmp_path):
    WhisperForConditionalGeneration(tiny_whisper_config()).save_pretrained(tmp_path)
    for head in (ResidualWhisperModel, ResidualWhisperForConditionalGeneration):
        with pytest.raises(ValueError, match=r"lacks .*from_dense"):
            head.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .*from_dense"):
        ResidualWhisperForConditionalGeneration.from_pretrained(
            tmp_path, config=tiny_whisper_config(residual_config=SMALL), ignore_mismatched_sizes=True
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("saved", "claimed", "message"),
    [
        ({}, {"group_size": 1}, r"lacks .*shared.*\.2\.weight"),
        ({}, {"group_size": 4}, r"has no use for its .*shared.*\.1\.weight"),
        ({}, {"rank": 8}, "shapes that its config.json"),
        ({}, {"rank": 0}, "has no use for its .*residual_A"),
        ({"rank": 0}, {"rank": 4}, "lacks .*residual_A"),
        ({}, {"diagonal": "all"}, "lacks .*diagonal"),
        ({}, {"diagonal": "none"}, "has no use for its .*diagonal"),
        ({}, {"share_biases": True}, "lacks .*shared.*bias"),
        ({"share_biases": True}, {}, "lacks .*layers.*bias"),
        ({}, {"target_modules": ["q_proj"]}, "lacks .*layers.*weight"),
    ],
)
def test_a_checkpoint_whose_bank_does_not_fit_its_config_is_refused(
    family, saved, claimed, message, tmp_path
):
    base = {"group_size": 2, "rank": 4}
    model = build(family, ResidualConfig(**(base | saved)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["residual_config"] = base | claimed
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"does not fit Residual.*{message}.*residual_config"):
        type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit Residual"):
        type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_depth_is_refused(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    depth = "encoder_layers" if family == "whisper" else "num_hidden_layers"
    for layers, message in ((5, "lacks"), (3, "has no use for")):
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path, **{depth: layers})


def test_a_truncated_or_foreign_checkpoint_is_an_error(tmp_path):
    model = build("whisper")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) - 5, len(content) // 2, 100, 0):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"{tmp_path.name}' cannot be read, it may be truncated"):
            ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path)
    save_file({"something.else": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks"):
        ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path)
    build("wav2vec2").save_pretrained(tmp_path / "wav2vec2")
    with pytest.raises(ValueError, match="`model_type` must be 'residual_whisper', got 'residual_wav2vec2'"):
        ResidualWhisperForConditionalGeneration.from_pretrained(tmp_path / "wav2vec2")


@pytest.mark.parametrize("family", FAMILIES)
def test_loras_on_residual_layers_are_refused_and_do_not_reach_the_bank(family):
    model = build(family)
    with pytest.raises(ValueError, match="ResidualLinear"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def test_loras_on_the_decoder_train_and_merge():
    model = build("whisper")
    before = copy.deepcopy(model.state_dict())
    config = LoraConfig(r=2, target_modules=r".*decoder.*\.q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable and all("decoder" in name and "lora_" in name for name in trainable)
    expected = adapted(**inputs_of("whisper")).logits
    adapted(**inputs_of("whisper")).loss.backward()
    merged = adapted.merge_and_unload()
    assert type(merged) is ResidualWhisperForConditionalGeneration
    torch.testing.assert_close(merged(**inputs_of("whisper")).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in merged.state_dict().items() if ".encoder." in k)
    assert_same_outputs(merged, merged.merge(), "whisper")


def test_a_lora_on_the_bank_reaches_every_layer_of_its_group():
    model = build("whisper", ResidualConfig(group_size=2, rank=2, diagonal="none"))
    expected = copy.deepcopy(model)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*shared\.fc1\.0", init_lora_weights=False)
    )
    bank = encoder_of(adapted).shared["fc1"][0]
    with torch.no_grad():
        encoder_of(expected).shared["fc1"][0].weight.add_(bank.get_delta_weight("default"))
    torch.testing.assert_close(
        adapted(**inputs_of("whisper")).logits, expected(**inputs_of("whisper")).logits, rtol=1e-4, atol=1e-4
    )
    assert_same_outputs(adapted.merge_and_unload(), expected, "whisper", atol=1e-4)


def test_a_few_steps_move_every_component_and_nothing_frozen():
    model = build("wav2vec2").train()
    model.freeze_feature_encoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**inputs_of("wav2vec2")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        frozen = "feature_extractor" in name or name.endswith("masked_spec_embed")
        assert torch.equal(parameter, before[name]) == frozen, name
