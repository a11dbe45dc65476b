"""`ResidualConfig`: what is refused, and what survives JSON. No weights are computed here."""

from __future__ import annotations

import copy
import json
import pickle
import time
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from conftest import tiny_wav2vec2_config, tiny_whisper_config
from transformers import AutoConfig, WhisperConfig

from hf_residual_transformer import (
    ResidualConfig,
    ResidualWav2Vec2Model,
    ResidualWhisperConfig,
    ResidualWhisperModel,
    size_report,
)

FULL = ResidualConfig(
    group_size={"fc1": 3, "q_proj": 2},
    rank=4,
    rank_pattern={r"layers\.0\.fc1": 8, "fc1": 2},
    diagonal="all",
    share_biases=True,
    target_modules=("fc1", "q_proj"),
)

INVALID = [
    ("group_size", 0, "at least 1"),
    ("group_size", -2, "at least 1"),
    ("group_size", 2.0, "integer"),
    ("group_size", True, "integer"),
    ("group_size", "2", "integer"),
    ("group_size", [2], "integer"),
    ("group_size", {}, "by module name"),
    ("group_size", {"fc1": 0}, "at least 1"),
    ("group_size", {"fc1": "2"}, "integer"),
    ("rank", -1, "at least 0"),
    ("rank", 1.5, "integer"),
    ("rank", False, "integer"),
    ("rank", None, "integer"),
    ("rank_pattern", [("fc1", 2)], "dict of integers"),
    ("rank_pattern", None, "dict of integers"),
    ("rank_pattern", {"fc1": -1}, "at least 0"),
    ("rank_pattern", {"fc1": "2"}, "integer"),
    ("rank_pattern", {"fc(": 2}, "module names or the ends of module paths"),
    ("rank_pattern", {"((fc1)+)+x": 2}, "module names or the ends of module paths"),
    ("bits_pattern", {"(a|a)*b": 2}, "module names or the ends of module paths"),
    ("rank_pattern", {"": 2}, "module names or the ends of module paths"),
    ("diagonal", "rectangular", "none, square, all"),
    ("diagonal", True, "none, square, all"),
    ("diagonal", None, "none, square, all"),
    ("share_biases", "yes", "true or false"),
    ("share_biases", 1, "true or false"),
    ("cyclic", "yes", "true or false"),
    ("target_modules", "fc1", "list of module names"),
    ("target_modules", [], "list of module names"),
    ("target_modules", 3, "list of module names"),
    ("target_modules", [["fc1"]], "list of module names"),
    ("target_modules", [None], "list of module names"),
]


def last_value(value):
    """The part of an invalid value that the error has to show."""
    return next(iter(value.values())) if isinstance(value, dict) and value else value


@pytest.mark.parametrize(("field", "value", "must_be"), INVALID)
def test_an_invalid_field_is_named_with_what_it_must_be_and_what_it_was(field, value, must_be):
    with pytest.raises(ValueError) as raised:
        ResidualConfig(**{field: value})
    message = str(raised.value)
    shown = repr(next(iter(value)) if must_be.endswith("module paths") else last_value(value))
    assert f"`{field}" in message and must_be in message and shown in message


@pytest.mark.parametrize(("field", "value", "must_be"), INVALID)
def test_an_invalid_field_in_config_json_is_refused_on_load(field, value, must_be, tmp_path):
    tiny_whisper_config(residual_config=ResidualConfig(rank=4)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["residual_config"][field] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"`{field}"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [tiny_whisper_config, tiny_wav2vec2_config])
@pytest.mark.parametrize(
    ("residual", "message"),
    [
        ({"rank": 33}, r"`rank` must be at most 32 for layers.0.*\(32, 32\), got 33"),
        (
            {"rank_pattern": {r"layers\.2\..*q_proj": 40}, "rank": 2},
            "`rank_pattern` must be at most 32 .*got 40",
        ),
        ({"group_size": {"lm_head": 2}}, "`group_size` must name modules of a w.* encoder layer .*'lm_head'"),
        ({"target_modules": ["q_proj", "gate"]}, "`target_modules` must name modules of a w.*'gate'"),
        ({"rank_pattern": {"layers.9.fc1": 2}}, "`rank_pattern` must name modules .*'layers.9.fc1'"),
        ({"rank_pattern": {"q_proj": 4, r"layers\.0\..*q_proj": 8}}, "no earlier key names, got 'layers"),
        ({"rank_pattern": {"proj": 4}}, "`rank_pattern` must name modules .*'proj'"),
    ],
)
def test_a_value_that_does_not_fit_the_encoder_is_refused_when_the_model_is_built(config, residual, message):
    model_class = ResidualWhisperModel if config is tiny_whisper_config else ResidualWav2Vec2Model
    with pytest.raises(ValueError, match=message):
        model_class(config(residual_config=residual))


def test_unknown_fields_and_other_types_are_refused():
    with pytest.raises(ValueError, match=r"only the fields group_size, rank.*got 'ranks'"):
        ResidualConfig.from_dict({"ranks": 3})
    with pytest.raises(ValueError, match="`residual_config` must be a ResidualConfig or a dict, got 5"):
        tiny_whisper_config(residual_config=5)
    with pytest.raises(ValueError, match="`rank`"):
        tiny_whisper_config(residual_config={"rank": -1})
    with pytest.raises(
        ValueError, match=r"`target_modules` must .*what `group_size` names \(fc1\), got \['fc2'\]"
    ):
        ResidualConfig(group_size={"fc1": 2}, target_modules=["fc2"])


def test_setting_a_field_later_is_validated_too():
    config = tiny_whisper_config(residual_config={"rank": 4})
    with pytest.raises(ValueError, match="`rank`"):
        config.residual_config = {"rank": -4}
    config.residual_config = {"rank": 8}
    assert config.residual_config == ResidualConfig(rank=8)
    with pytest.raises(FrozenInstanceError):
        config.residual_config.rank = -1
    assert replace(config.residual_config, rank=2).rank == 2
    with pytest.raises(ValueError, match="`rank`"):
        replace(config.residual_config, rank=-2)


def test_a_dict_that_its_owner_changes_later_does_not_change_the_config():
    pattern, sizes = {"fc1": 2}, {"fc1": 2}
    config = ResidualConfig(group_size=sizes, rank_pattern=pattern)
    pattern["fc1"] = sizes["fc1"] = -1
    assert config.rank_pattern == config.group_size == {"fc1": 2}


def test_every_field_survives_json_pickle_and_deepcopy(tmp_path):
    config = tiny_wav2vec2_config(residual_config=FULL)
    config.save_pretrained(tmp_path)
    for other in (
        AutoConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        type(config)(**config.to_dict()),
    ):
        assert type(other) is type(config)
        assert other.residual_config == FULL
        assert other.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_the_saved_name_is_the_residual_one_and_the_instance_has_the_dense_one(tmp_path):
    for config, name in (
        (tiny_whisper_config(residual_config=FULL), "whisper"),
        (tiny_wav2vec2_config(residual_config=FULL), "wav2vec2"),
    ):
        config.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == f"residual_{name}"
        for instance in (config, AutoConfig.from_pretrained(tmp_path / name), copy.deepcopy(config)):
            assert instance.model_type == name
            assert type(instance).model_type == instance.to_dict()["model_type"] == f"residual_{name}"


def test_dense_and_residual_configs_convert_into_each_other():
    dense = tiny_whisper_config(dropout=0.25, attn_implementation="eager", id2label={0: "a", 1: "b", 2: "c"})
    residual = ResidualWhisperConfig.from_dense_config(dense, FULL)
    assert residual.residual_config == FULL
    assert (residual.dropout, residual.num_labels, residual._attn_implementation) == (0.25, 3, "eager")
    back = residual.to_dense_config()
    assert type(back) is WhisperConfig
    assert (back.to_dict(), back._attn_implementation) == (dense.to_dict(), "eager")


def test_the_first_key_that_matches_a_path_gives_its_rank():
    config = ResidualConfig(rank=7, rank_pattern={r"layers\.0\.fc1": 8, "fc1": 2, r".*\.1\.self_attn\..*": 3})
    paths = ["layers.0.fc1", "layers.10.fc1", "layers.1.self_attn.q_proj", "layers.11.self_attn.q_proj"]
    assert [config.rank_of(path) for path in paths] == [8, 2, 3, 7]


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
@pytest.mark.parametrize(
    ("group_size", "rank", "published"), [(3, 2, 34.0), (3, 16, 38.1), (6, 16, 21.5), (9, 16, 15.9)]
)
def test_the_papers_preset_has_the_papers_sizes(family, group_size, rank, published):
    residual = ResidualConfig.paper(group_size, rank)
    with torch.device("meta"):
        if family == "whisper":
            heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
            config = tiny_whisper_config(
                residual_config=residual, encoder_layers=18, d_model=512, encoder_ffn_dim=2048, **heads
            )
            model = ResidualWhisperModel(config)
        else:
            config = tiny_wav2vec2_config(
                residual_config=residual, num_hidden_layers=18, hidden_size=512, intermediate_size=2048
            )
            model = ResidualWav2Vec2Model(config)
    encoder = size_report(model).encoder
    assert round(encoder.dense / 1e6, 1) == 56.7
    assert round(100 * encoder.ratio, 1) == published


def test_a_key_that_would_take_a_regular_expression_for_ever_is_refused_at_once_and_keys_are_matched_in_linear_time():
    start = time.perf_counter()
    for key in ("(a*)*b", "((layers|layers).*)+x", "(.+)+fc1", r"(\w+\s?)*$"):
        with pytest.raises(ValueError, match="`rank_pattern` keys must be module names"):
            ResidualConfig(rank_pattern={key: 2})
    many_stars = ResidualConfig(rank=3, rank_pattern={"*a" * 500 + "b": 2})
    assert many_stars.rank_of("layers.0." + "a" * 2000) == 3
    assert time.perf_counter() - start < 5


def test_keys_as_0_1_0_wrote_them_are_read_and_saved_as_paths():
    config = ResidualConfig(rank_pattern={r"layers\.0\.fc1": 6, r"layers\.[1-3]\..*proj": 2, "fc1|fc2": 1})
    assert list(config.to_dict()["rank_pattern"]) == ["layers.0.fc1", "layers.[1-3].*proj", "fc1|fc2"]
    assert [config.rank_of(f"layers.{path}") for path in ("0.fc1", "2.self_attn.k_proj", "10.fc1")] == [
        6,
        2,
        1,
    ]
    with pytest.raises(ValueError, match=r"`rank_pattern` keys must differ, got 'layers\.0\.fc1' twice"):
        ResidualConfig(rank_pattern={r"layers\.0\.fc1": 6, "layers.0.fc1": 2})


def test_a_config_of_another_family_is_refused_by_name():
    with pytest.raises(
        ValueError, match="`config` must be a ResidualWhisperConfig, got ResidualWav2Vec2Config"
    ):
        ResidualWhisperModel(tiny_wav2vec2_config(residual_config=ResidualConfig(rank=2)))
