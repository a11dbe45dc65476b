"""What a checkpoint says of itself: its format, what its layers share, and that only this package can open it."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_whisper_config
from test_contract import build
from test_family_contract import NAMES, residual
from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, PreTrainedConfig, WhisperModel

from hf_residual_transformer import (
    ResidualConfig,
    ResidualWhisperForConditionalGeneration,
    ResidualWhisperModel,
    classes,
)
from hf_residual_transformer.configuration import FORMAT, GUARD, GUARD_FIELDS, HEAD_GUARD_FIELDS
from hf_residual_transformer.families import FAMILIES


@pytest.fixture(scope="module", params=["whisper", "wav2vec2"])
def saved(request, tmp_path_factory):
    """A family and the folder of a model whose layers share in threes, the last one alone."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, ResidualConfig(group_size=3, rank=2)).save_pretrained(folder)
    return request.param, folder


def edited(folder, tmp_path, *dropped, **values):
    """A copy of the folder with other values in its config.json, and without those that are dropped."""
    config = json.loads((folder / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in dropped})
    )
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    return tmp_path


def test_a_group_size_with_as_many_groups_is_refused(saved, tmp_path):
    family, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["residual_format"] == FORMAT
    assert set(map(tuple, config["residual_sharing"]["encoder"].values())) == {(3, 1)}
    other = edited(folder, tmp_path, residual_config={"group_size": 2, "rank": 2})
    message = r"share '\w+' of the encoder in groups of \[3, 1\] layers, but the config says \[2, 2\]"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(other)
    with pytest.raises(ValueError, match=message):
        type(build(family)).from_pretrained(folder, config=AutoConfig.from_pretrained(other))


def test_layers_that_share_cyclically_are_refused_as_adjacent_ones(tmp_path):
    residual = ResidualConfig(group_size=2, rank=2, cyclic=True)
    folder = tmp_path / "saved"
    build("whisper", residual).save_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    assert model.config.residual_config == residual
    layers = model.encoder.layers
    assert layers[0].fc1.shared is layers[2].fc1.shared is not layers[1].fc1.shared
    other = edited(folder, tmp_path, residual_config=residual.to_dict() | {"cyclic": False})
    with pytest.raises(
        ValueError, match=r"groups of \[\[0, 2\], \[1, 3\]\] layers, but the config says \[2, 2\]"
    ):
        AutoModel.from_pretrained(other)


def test_a_file_that_says_nothing_still_loads(saved, tmp_path):
    said = ("residual_format", "residual_sharing", "residual_rotations")
    old = edited(saved[1], tmp_path, *said, init_std=0.02, initializer_range=0.02)
    assert AutoModel.from_pretrained(old).config.residual_config.group_size == 3


@pytest.mark.parametrize("value", [5, "64", {"64": 1}, [[64]]])
def test_a_record_of_rotations_that_is_no_list_is_refused(saved, tmp_path, value):
    with pytest.raises(ValueError, match="`residual_rotations` must be a list"):
        AutoModel.from_pretrained(edited(saved[1], tmp_path, residual_rotations=value))


@pytest.mark.parametrize("value", [5, [1], {"encoder": 3}])
def test_a_record_of_sharing_that_is_no_dict_is_refused(saved, tmp_path, value):
    with pytest.raises(ValueError, match="`residual_sharing` must be a dict"):
        AutoModel.from_pretrained(edited(saved[1], tmp_path, residual_sharing=value))


def test_a_rotation_that_is_not_that_of_the_matrices_is_refused(tmp_path):
    form = ResidualConfig(group_size=1, rank=0, diagonal="none", shared_bits=4, rotation=32)
    ResidualWhisperForConditionalGeneration(tiny_whisper_config(residual_config=form)).save_pretrained(
        tmp_path
    )
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).config.residual_config.rotation == 32
    config = json.loads((tmp_path / "config.json").read_text())
    config["residual_config"]["rotation"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"rotations of \[32\], but the config says \[16\]"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("found", [FORMAT + 1, 0, "2"])
def test_a_newer_format_is_refused_with_what_to_do(saved, tmp_path, found):
    with pytest.raises(ValueError, match=r"`residual_format` must be from 1 to \d, got .*update the package"):
        AutoModel.from_pretrained(edited(saved[1], tmp_path, residual_format=found))


def test_a_newer_format_is_refused_before_what_it_says_is_read(saved, tmp_path):
    newer = {"residual_format": FORMAT + 1, "residual_config": {"group_size": 3, "colour": "blue"}}
    with pytest.raises(ValueError, match=r"`residual_format` must be from 1 to \d, got .*update the package"):
        AutoModel.from_pretrained(edited(saved[1], tmp_path, **newer))


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_classes_of_every_family_refuse_a_compact_checkpoint_and_say_what_opens_it(name, tmp_path):
    residual(name).save_pretrained(tmp_path)
    for cls in classes.model_classes_of(FAMILIES[name]).values():
        with pytest.raises(Exception, match="this checkpoint is compact: import hf_residual_transformer"):
            cls.dense_class().from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    notes = [key for key, value in config.items() if isinstance(value, str) and value.endswith(GUARD)]
    assert (len(notes) == 1 and notes[0] in GUARD_FIELDS) or set(notes) == {*HEAD_GUARD_FIELDS}
    (guarded, *_) = [key for key in notes if config[key] != f"null{GUARD}"]
    PreTrainedConfig.from_json_file(tmp_path / "config.json")  # as the Trainer reads it when it resumes
    loaded = AutoConfig.from_pretrained(tmp_path)
    number = getattr(loaded, guarded)
    assert json.dumps(number) == json.dumps(getattr(residual(name).config, guarded))
    # In a dense config, which exports and merged models have, it is a number again.
    loaded.to_dense_config().save_pretrained(tmp_path / "dense")
    assert GUARD not in (tmp_path / "dense" / "config.json").read_text()
    # Files of versions that wrote no such text load as before.
    (tmp_path / "config.json").write_text(json.dumps({**config, guarded: number}))
    assert type(type(residual(name)).from_pretrained(tmp_path).config) is type(loaded)
    # So do files that say it in the size of the vocabulary, as those of some families did.
    if "vocab_size" in config:
        size = f"{config['vocab_size']}{GUARD}"
        (tmp_path / "config.json").write_text(json.dumps({**config, guarded: number, "vocab_size": size}))
        assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.to_dict()


@pytest.mark.parametrize("saved_as", ["parakeet_ctc", "parakeet_rnnt", "parakeet_tdt"])
@pytest.mark.parametrize("read_as", ["parakeet_ctc", "parakeet_rnnt", "parakeet_tdt"])
def test_the_plain_classes_of_other_heads_refuse_a_compact_checkpoint_too(saved_as, read_as, tmp_path):
    residual(saved_as).save_pretrained(tmp_path)
    dense = classes.config_class_of(FAMILIES[read_as]).dense_class()
    with pytest.raises(Exception, match="this checkpoint is compact: import hf_residual_transformer"):
        dense.from_pretrained(tmp_path)
    loaded, saved = AutoConfig.from_pretrained(tmp_path).to_dict(), residual(saved_as).config.to_dict()
    assert {name for name in loaded if loaded[name] != saved.get(name)} <= {"_name_or_path", "dtype"}
    assert loaded.keys() == saved.keys()


def test_what_the_file_says_of_itself_reaches_no_dense_model(tmp_path):
    build("whisper").save_pretrained(tmp_path / "compact")
    loaded = ResidualWhisperModel.from_pretrained(tmp_path / "compact")
    assert loaded.config.init_std == 0.02
    dense = loaded.merge()
    assert not {name for name in vars(dense.config) if name.startswith("residual")}
    dense.save_pretrained(tmp_path / "dense")
    assert type(AutoModel.from_pretrained(tmp_path / "dense")) is WhisperModel
