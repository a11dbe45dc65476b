"""A whole Whisper in its compact form: the layers of encoder and decoder, and the table of tokens."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import WHISPER_VOCAB, randomize_, tiny_whisper_config, whisper_generation_config
from safetensors.torch import load_file, save_file
from test_conversion import dense_whisper, whisper_inputs
from torch.nn import functional
from transformers import AutoModelForSpeechSeq2Seq, WhisperModel

import hf_residual_transformer as hrt
from hf_residual_transformer.compression import conversion
from hf_residual_transformer.compression.allocation import Curve, Lacking, choose
from hf_residual_transformer.compression.fitting import quantize_for
from hf_residual_transformer.compression.inputs import frozen_view, inputs_of, output_of
from hf_residual_transformer.compression.statistics import (
    EmbeddingStatistics,
    Group,
    LogitsObjective,
    StatesObjective,
    collect,
)
from hf_residual_transformer.families import WHISPER, LayerStack
from hf_residual_transformer.layers import QuantizedEmbedding, TiedOutput, unpacked_weights
from hf_residual_transformer.quantization import BLOCKS, LEVELS, SCALE_BITS, quantize

DECODER = WHISPER.stacks[1]
FORM = {
    "residual_config": hrt.ResidualConfig(group_size=2, rank=2),
    "decoder_residual_config": hrt.ResidualConfig(
        group_size={"fc1": 1, "fc2": 1, "encoder_attn.q_proj": None},
        rank=3,
        shared_bits={"fc1": 4},
        bits_pattern={"layers.1.fc2": 3},
    ),
    "embedding_bits": 5,
}
Whisper = hrt.ResidualWhisperForConditionalGeneration


def whole(seed=0):
    """A model in which all parts are compact and every component is random."""
    return randomize_(Whisper(tiny_whisper_config(**FORM)), seed)


def inputs(number=2, num_tokens=7):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (number, num_tokens), generator=generator)
    return {"input_features": whisper_inputs(number), "decoder_input_ids": ids}


def labelled(number=4, num_tokens=6):
    """Batches with transcripts of different lengths."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 256, (number, num_tokens), generator=generator)
    labels[0, 4:] = -100
    return [
        {"input_features": features[None], "labels": ids[None]}
        for features, ids in zip(whisper_inputs(number), labels)
    ]


def test_a_saved_model_gives_the_same_tokens_and_logits_in_a_fresh_process(tmp_path):
    model, batch = whole(), inputs()
    with torch.no_grad():
        logits, tokens = model(**batch).logits, model.generate(batch["input_features"], max_new_tokens=5)
    model.save_pretrained(tmp_path)
    torch.save({"batch": batch}, tmp_path / "batch.pt")
    code = f"""
import torch, hf_residual_transformer
from transformers import AutoModelForSpeechSeq2Seq
batch = torch.load({str(tmp_path / "batch.pt")!r})["batch"]
model = AutoModelForSpeechSeq2Seq.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    found = model(**batch).logits, model.generate(batch["input_features"], max_new_tokens=5)
torch.save(found, {str(tmp_path / "found.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found[0], logits, rtol=0, atol=0)
    assert torch.equal(found[1], tokens)


def test_the_config_comes_back_and_says_what_each_part_is(tmp_path):
    config = tiny_whisper_config(**FORM)
    config.save_pretrained(tmp_path)
    again = hrt.ResidualWhisperConfig.from_pretrained(tmp_path)
    for name, value in FORM.items():
        assert getattr(again, name) == value
    assert again.residual_config_of("decoder") == FORM["decoder_residual_config"]
    assert not set(FORM) & set(again.to_dense_config().to_dict())
    old = tiny_whisper_config(residual_config=FORM["residual_config"])
    assert old.residual_config_of("decoder") is None and old.embedding_bits is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_bits": 1}, "`embedding_bits` must be from 2 to 8, or ranges of tokens, or None, got 1"),
        (
            {"embedding_bits": True},
            "`embedding_bits` must be from 2 to 8, or ranges of tokens, or None, got True",
        ),
        ({"embedding_bits": []}, r"`embedding_bits` must be .*, or ranges of tokens, or None, got \[\]"),
        (
            {"embedding_bits": [[9, 4], [9, 5]]},
            r"`embedding_bits` must have pairs .* greater than the last.*\[9, 5\]",
        ),
        (
            {"embedding_bits": [[9, 4], [19, 9]]},
            r"`embedding_bits` must have pairs .* from 2 to 8, got \[19, 9\]",
        ),
        ({"embedding_bits": [7]}, "`embedding_bits` must have pairs .*, got 7"),
        ({"decoder_residual_config": {"rank": -1}}, "`rank` must be"),
        ({"decoder_residual_config": {"bits_pattern": {"fc1": 9}}}, r"`bits_pattern\['fc1'\]` must be"),
        ({"decoder_residual_config": {"scale_bits": 12}}, "`scale_bits` must be one of 16, 8, got 12"),
        ({"decoder_residual_config": {"block_size": 48}}, "`block_size` must be one of 32, 64, 128, got 48"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_whisper_config(residual_config=FORM["residual_config"], **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"decoder_residual_config": {"target_modules": ["q_proj"]}},
            r"`target_modules` must name modules of a whisper decoder layer \(self_attn\.q_proj, .*got 'q_proj'",
        ),
        (
            {"decoder_residual_config": {"shared_bits": 4, "bits_pattern": {"layers.9.fc1": 4}}},
            r"`bits_pattern` must name modules of the decoder .*got 'layers\.9\.fc1'",
        ),
        (
            {"embedding_bits": 4, "tie_word_embeddings": False},
            "`embedding_bits` must be None for a model whose",
        ),
        (
            {"embedding_bits": 4, "d_model": 48},
            "`block_size` must divide the 48 inputs of the token embedding, which is to have few bits, got 32",
        ),
        (
            {"embedding_bits": [[9, 4], [300, 5]]},
            r"`embedding_bits` must end at \d+, the number of tokens, got \[\[9, 4\], \[300, 5\]\]",
        ),
    ],
)
def test_a_form_that_a_model_cannot_have_is_refused_when_it_is_built(fields, message):
    plain = hrt.ResidualConfig(group_size=1, rank=2)
    with pytest.raises(ValueError, match=message):
        Whisper(tiny_whisper_config(residual_config=plain, **fields))


def test_the_merged_model_and_a_copy_have_the_same_outputs():
    model, batch = whole(), inputs()
    with torch.no_grad():
        logits = model(**batch).logits
        other = copy.deepcopy(model)
        torch.testing.assert_close(other(**batch).logits, logits, rtol=0, atol=0)
        other.get_input_embeddings().weight_scale.mul_(2.0)
        assert not torch.allclose(other(**batch).logits, logits)
        torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0)
        merged = model.merge()
        torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-4)
        tokens = [m.generate(batch["input_features"], max_new_tokens=5) for m in (model, merged)]
        assert torch.equal(*tokens)
    assert type(merged) is Whisper.dense_class()
    assert merged.proj_out.weight is merged.model.decoder.embed_tokens.weight


def test_unpacked_weights_change_no_output_and_are_gone_afterwards():
    model, batch = whole(), inputs()
    with torch.no_grad():
        logits = model(**batch).logits
        with unpacked_weights(model):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)
            assert model.get_input_embeddings()._unpacked is not None
    assert model.get_input_embeddings()._unpacked is None
    model.generate(batch["input_features"], max_new_tokens=2)
    assert all(getattr(module, "_unpacked", None) is None for module in model.modules())


def test_there_is_one_table_for_look_up_and_for_logits(tmp_path):
    model = whole().half()
    table = model.get_input_embeddings()
    assert isinstance(table, QuantizedEmbedding) and isinstance(model.get_output_embeddings(), TiedOutput)
    assert not [key for key in model.state_dict() if key.startswith("proj_out")]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = {key: value for key, value in saved.items() if "embed_tokens" in key}
    vocabulary, hidden = model.config.vocab_size, model.config.d_model
    assert (
        sum(value.nbytes for value in own.values())
        == vocabulary * hidden * 5 // 8 + vocabulary * 2 + hidden * 2
    )
    report = hrt.size_report(model)
    assert report.model_bytes.unique == sum(value.nbytes for value in saved.values())
    assert report.parts["token embedding"].unique == sum(value.nbytes for value in own.values())
    assert list(report.parts) == ["encoder layers", "decoder layers", "token embedding"]
    dense = model.merge()
    names = {id(parameter): parameter for parameter in dense.parameters()}
    assert report.model_bytes.dense == sum(parameter.nbytes for parameter in names.values())
    assert report.model.dense == sum(parameter.numel() for parameter in names.values())


def test_the_table_has_scales_in_the_bits_of_the_decoder(tmp_path):
    decoder = dataclasses.replace(FORM["decoder_residual_config"], scale_bits=8)
    config = tiny_whisper_config(**FORM | {"decoder_residual_config": decoder}, d_model=64)
    model, batch = randomize_(Whisper(config)).half(), inputs()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = {key.rpartition(".")[2]: value for key, value in saved.items() if "embed_tokens" in key}
    vocabulary, hidden = config.vocab_size, config.d_model
    assert own["weight_levels"].shape == (vocabulary, hidden // 32)
    assert own["weight_levels"].dtype == torch.int8 and own["weight_scale"].shape == (vocabulary, 1)
    in_bytes = vocabulary * (hidden * 5 // 8 + hidden // 32 + 2) + hidden * 2
    report = hrt.size_report(model)
    assert report.parts["token embedding"].unique == in_bytes == sum(v.nbytes for v in own.values())
    assert report.model_bytes.unique == sum(value.nbytes for value in saved.values())
    again, model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=torch.float32), model.float()
    with torch.no_grad():
        logits = model(**batch).logits
        torch.testing.assert_close(again(**batch).logits, logits, rtol=0, atol=0)
        torch.testing.assert_close(model.merge()(**batch).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [{}, {"embedding_bits": [[40, 4], [len(WHISPER_VOCAB), 3]]}])
def test_a_table_adds_the_mean_of_its_vectors_to_vectors_and_logits(form):
    model, batch = randomize_(Whisper(tiny_whisper_config(**FORM | form))), inputs()
    parts = [part for _, part in model.get_input_embeddings().ranges]
    assert all(part.weight_mean.abs().sum() > 0 for part in parts)
    logits = model(**batch).logits
    logits.square().sum().backward()
    assert all(part.weight_mean.grad.abs().sum() > 0 for part in parts)
    with torch.no_grad():
        torch.testing.assert_close(model.merge()(**batch).logits, logits, rtol=1e-4, atol=1e-4)
        with unpacked_weights(model):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-4, atol=1e-4)
        for part in parts:
            part.weight_mean.zero_()
        assert (model(**batch).logits - logits).abs().max() > 1e-3


def test_a_table_of_an_older_format_has_no_mean_and_loads_but_a_new_one_must_have_it(tmp_path):
    model = Whisper(tiny_whisper_config(**FORM))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name,) = [key for key in tensors if key.endswith("weight_mean")]
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks '.*embed_tokens\.weight_mean'"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"residual_format": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert not loaded.get_input_embeddings().weight_mean.any()
    torch.testing.assert_close(loaded(**inputs()).logits, model(**inputs()).logits)


def test_the_mean_of_the_vectors_is_kept_apart_so_that_few_bits_lose_less():
    dense = dense_whisper()
    table = dense.get_input_embeddings().weight
    with torch.no_grad():
        table += 3 * table.std() * torch.randn(table.shape[1], generator=torch.Generator().manual_seed(3))
    model = Whisper.from_dense(dense, calibration=labelled(), budget=0.4, progress=False)
    parts = model.get_input_embeddings().ranges
    for start, part in parts:
        mean = table[start : start + part.num_embeddings].mean(0)
        torch.testing.assert_close(part.weight_mean, mean, rtol=1e-3, atol=1e-3)
    plain = Whisper.from_dense(
        dense,
        model.config.residual_config,
        calibration=labelled(),
        decoder_residual_config=model.config.decoder_residual_config,
        embedding_bits=model.config.embedding_bits,
        progress=False,
    )
    assert not any(part.weight_mean.any() for _, part in plain.get_input_embeddings().ranges)
    errors = [(m.get_input_embeddings().weight - table).square().sum() for m in (model, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_gradients_of_the_scales_come_from_both_uses_of_the_table(scale_bits):
    decoder = dataclasses.replace(FORM["decoder_residual_config"], scale_bits=scale_bits)
    config = tiny_whisper_config(**FORM | {"decoder_residual_config": decoder}, d_model=64)
    model, batch = randomize_(Whisper(config)), inputs()
    model(**batch).logits.square().sum().backward()
    table = model.get_input_embeddings()
    plain = copy.deepcopy(model.merge()).requires_grad_()
    plain(**batch).logits.square().sum().backward()
    gradient = plain.get_input_embeddings().weight.grad
    numbers = ((table.weight - table.weight_mean) / table.scale().repeat_interleave(32, 1)).detach()
    expected = (gradient * numbers).unflatten(1, (-1, 32)).sum(2)
    if scale_bits == 8:
        expected = (expected * table.weight_levels / LEVELS).sum(1, keepdim=True)
    torch.testing.assert_close(table.weight_scale.grad, expected, rtol=1e-3, atol=1e-2)
    assert table.weight_packed.grad is None


@pytest.mark.parametrize("size", [0.5, 0.4])
def test_a_size_is_that_of_the_whole_saved_file(size, tmp_path):
    model = Whisper.from_dense(dense_whisper(), calibration=labelled(), budget=size, progress=False)
    report = hrt.size_report(model)
    assert size - 0.02 < report.model_bytes.ratio <= size
    configs = model.config.residual_config, model.config.decoder_residual_config
    assert [config.scale_bits for config in configs] == [8, 8]
    model.half().save_pretrained(tmp_path)
    saved = sum(value.nbytes for value in load_file(tmp_path / "model.safetensors").values())
    assert saved == report.model_bytes.unique
    assert {error.stack for error in model.conversion_report.errors} == {"encoder", "decoder"}
    model.conversion_report.plot(tmp_path / "errors.png")
    assert "decoder" in str(model.conversion_report)


def divergence(model, dense, batches):
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            mask = batch["labels"] != -100
            found = [m(**inputs_of(m, batch)).logits[mask].log_softmax(-1) for m in (dense, model.float())]
            total += functional.kl_div(found[1], found[0], log_target=True, reduction="sum").item()
    return total


def test_the_model_is_nearer_to_dense_with_more_bytes_and_nearest_with_eight_bits():
    dense, batches = dense_whisper(), labelled(8)
    options = {"calibration": batches, "progress": False}
    errors = [
        divergence(Whisper.from_dense(dense, budget=size, **options), dense, batches)
        for size in (0.37, 0.45, 0.6)
    ]
    assert errors[0] > errors[1] > errors[2]
    eight = hrt.ResidualConfig(group_size=1, rank=0, diagonal="none", shared_bits=8)
    exact = Whisper.from_dense(dense, eight, decoder_residual_config=eight, embedding_bits=8, **options)
    assert divergence(exact, dense, batches) < 0.25 * errors[0]


def test_a_budget_beats_equal_bits_at_the_same_bytes():
    dense, batches = dense_whisper(), labelled(8)
    options = {"calibration": batches, "progress": False}
    four = hrt.ResidualConfig(group_size=1, rank=0, diagonal="none", shared_bits=4)
    equal = Whisper.from_dense(dense, four, decoder_residual_config=four, embedding_bits=4, **options)
    size = hrt.size_report(equal).model_bytes.ratio
    chosen = Whisper.from_dense(dense, budget=size, **options)
    assert divergence(chosen, dense, batches) < divergence(equal, dense, batches)


def test_statistics_of_few_decoder_layers_at_a_time_give_the_same_model(monkeypatch):
    """A decoder's later layers alone do not see all that the encoder's states do."""
    dense, batches = dense_whisper(), labelled()
    options = {"calibration": batches, "budget": 0.5, "progress": False}
    expected = Whisper.from_dense(dense, **options)
    seen = []
    collect = conversion.collect

    def counted(source, *args, **options):
        seen.append(source.stack.name)
        return collect(source, *args, **options)

    monkeypatch.setattr(conversion, "collect", counted)
    monkeypatch.setattr("hf_residual_transformer.compression.statistics.HELD_BYTES", 1)
    found = Whisper.from_dense(dense, **options)
    assert seen.count("decoder") > dense.config.decoder_layers > 1
    assert found.config.to_dict() == expected.config.to_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_only_the_numbers_of_bits_that_are_allowed_are_used():
    model = Whisper.from_dense(
        dense_whisper(), calibration=labelled(), budget=0.5, shared_bits=(4, 8), progress=False
    )
    bits = {module.bits for module in model.modules() if getattr(module, "bits", None)}
    assert bits <= {4, 8} and 4 in bits


def test_parts_may_be_chosen_and_the_rest_stays_dense():
    dense = dense_whisper()
    model = Whisper.from_dense(
        dense, calibration=labelled(), budget=0.7, parts=("encoder", "decoder"), progress=False
    )
    assert model.config.embedding_bits is None
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert model.proj_out.weight is model.get_input_embeddings().weight


def test_statistics_and_choices_do_not_depend_on_the_batch_size():
    """Weights may differ by steps of the rounding, since a sum in another order can tip one, and then the next."""
    dense, batches = dense_whisper(), labelled()
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    found, options = [], {"budget": 0.5, "progress": False}
    for given in (batches, [together]):
        view = frozen_view(dense)
        stacks = [LayerStack(stack, view) for stack in WHISPER.stacks]
        objective = LogitsObjective(stacks[1], stacks[0])
        groups = [Group(path, None, (1,), "decoder") for path in DECODER.modules]
        of_decoder = collect(stacks[1], view, groups, given, objective, progress=False)
        gradients = objective.memory_gradients
        groups = [Group(path, None, (1,)) for path in WHISPER.modules]
        of_encoder = collect(
            stacks[0], view, groups, given, StatesObjective(stacks[0], gradients), progress=False
        )
        model = Whisper.from_dense(dense, calibration=given, **options)
        found.append((of_decoder | of_encoder, torch.cat(gradients), model.config))
    torch.testing.assert_close(found[0][1], found[1][1])
    for key, entry in found[0][0].items():
        torch.testing.assert_close(entry.products, found[1][0][key].products, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(entry.gradients, found[1][0][key].gradients, rtol=1e-3, atol=1e-6)
    assert found[0][2].to_dict() == found[1][2].to_dict()


def test_keys_and_values_count_alike_over_however_many_windows_they_are_observed(monkeypatch):
    """They are observed over a few windows, and the decoder's other matrices over all."""
    found = []

    def watched(curves, left):
        found.append(
            {(c.group.module_path, c.group.layers, c.bits, c.group.size): c.errors[0] for c in curves}
        )
        return choose(curves, left)

    monkeypatch.setattr(conversion, "choose", watched)
    batches = 8 * labelled(1)
    for windows in (1, 8):
        monkeypatch.setattr(conversion, "ENCODER_WINDOWS", windows)
        Whisper.from_dense(dense_whisper(), calibration=batches, budget=0.5, rotation=1, progress=False)
    for path in ("encoder_attn.k_proj", "encoder_attn.v_proj"):
        few, all_windows = (
            sum(error for key, error in errors.items() if key[0] == path and key[2] == 4) for errors in found
        )
        assert 0.4 < few / all_windows < 2.5, path  # the sum over windows is 8 times as large


def test_without_labels_the_dense_model_transcribes_the_recordings(monkeypatch):
    dense, batches = dense_whisper(), labelled()
    options = {"budget": 0.5, "progress": False}
    unlabelled = [{"input_features": batch["input_features"]} for batch in batches]
    heard = []

    def transcribe(model, features, states):
        heard.append(len(features))
        torch.testing.assert_close(states, model.get_encoder()(features).last_hidden_state)
        return torch.cat([batch["labels"] for batch in batches])

    monkeypatch.setattr("hf_residual_transformer.compression.inputs.transcribe", transcribe)
    found = Whisper.from_dense(dense, calibration=unlabelled, **options)
    assert heard == [4]
    given = Whisper.from_dense(dense, calibration=batches, **options)
    assert heard == [4]  # what is given is not transcribed again
    for name, value in found.state_dict().items():
        assert torch.equal(value, given.state_dict()[name]), name


def test_statistics_of_few_layers_at_a_time_give_the_same_choices_for_the_whole_model(monkeypatch):
    dense, options = dense_whisper(), {"calibration": labelled(), "budget": 0.5, "progress": False}
    at_once = Whisper.from_dense(dense, **options)
    monkeypatch.setattr("hf_residual_transformer.compression.statistics.HELD_BYTES", 1)
    by_layer = Whisper.from_dense(dense, **options)
    assert by_layer.config.to_dict() == at_once.config.to_dict()
    # Weights may differ by steps of the rounding, which the last digit of a sum can tip.
    errors = [model.conversion_report.mean_error for model in (by_layer, at_once)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_silence_and_models_that_cannot_transcribe_are_refused():
    batches = labelled()
    for batch in batches:
        batch["labels"] = torch.full_like(batch["labels"], dense_whisper().config.eos_token_id)
    with pytest.raises(ValueError, match=r"`calibration` must have speech .* hears no word in it"):
        Whisper.from_dense(dense_whisper(), calibration=batches, budget=0.5, progress=False)
    base = WhisperModel(tiny_whisper_config()).eval()
    options = {"calibration": whisper_inputs(), "budget": 0.5, "progress": False}
    with pytest.raises(ValueError, match="`calibration` must have `labels`"):
        hrt.ResidualWhisperModel.from_dense(base, **options)
    model = hrt.ResidualWhisperModel.from_dense(base, parts=("encoder",), **options)
    assert hrt.size_report(model).encoder_bytes.ratio <= 0.5


@pytest.mark.parametrize("parts", [("decoder",), ("encoder", "head"), ()])
def test_parts_that_cannot_be_are_refused(parts):
    with pytest.raises(ValueError, match="`parts` must be of encoder, decoder, embed_tokens"):
        Whisper.from_dense(dense_whisper(), calibration=labelled(), parts=parts, progress=False)


@pytest.mark.parametrize("embedding_bits", [5, [[9, 4], [len(WHISPER_VOCAB), 3]]])
def test_a_decoder_offloaded_to_disk_gives_the_same_logits(embedding_bits, tmp_path):
    model = randomize_(Whisper(tiny_whisper_config(**{**FORM, "embedding_bits": embedding_bits})))
    model.generation_config = whisper_generation_config()
    model.save_pretrained(tmp_path / "model")
    places = {"model.encoder": "cpu", "model.decoder": "disk", "proj_out": "disk"}
    loaded = Whisper.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert all(parameter.is_meta for parameter in loaded.model.decoder.embed_tokens.parameters())
    with pytest.raises(
        ValueError, match=r"`merge` must be of a .* whose weights are all loaded, got '.*' offloaded"
    ):
        loaded.merge()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs()).logits, model(**inputs()).logits)
    options = {"language": "en", "max_new_tokens": 8, "min_new_tokens": 8}
    found, wanted = (each.generate(whisper_inputs(2), **options) for each in (loaded, model.eval()))
    assert torch.equal(found, wanted)


def test_hooks_of_the_input_embedding_do_not_see_logits():
    model = whole().eval()
    model.enable_input_require_grads()
    with torch.no_grad():
        assert not model(**inputs()).logits.requires_grad


@pytest.mark.parametrize(
    "zeroed",
    [
        ("encoder.layers.1.fc1.weight", "encoder.layers.1.fc1.bias"),
        ("decoder.layers.1.encoder_attn.v_proj.weight",),
        ("encoder.layers.1.final_layer_norm.weight", "encoder.layers.1.final_layer_norm.bias"),
        ("decoder.layers.0.fc2.weight", "encoder.layers.0.self_attn.out_proj.weight"),
    ],
)
@pytest.mark.parametrize("form", [{"budget": 0.8}, {"residual_config": hrt.ResidualConfig(rank=4)}])
def test_pruned_matrices_and_inputs_that_are_zero_are_converted(zeroed, form):
    dense = dense_whisper()
    with torch.no_grad():
        for name in zeroed:
            dense.model.get_parameter(name).zero_()
        model = Whisper.from_dense(dense, calibration=labelled(), progress=False, **form)
        assert 0 <= model.conversion_report.mean_error < 1
        wanted, found = (each(**inputs()).logits for each in (dense, model.half().float()))
    assert (found - wanted).norm() < (0.05 if "budget" in form else 0.5) * wanted.norm()


def test_what_reads_nothing_is_rounded_as_if_all_inputs_were_alike():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing, alike = (
        quantize_for(weight, scale * torch.eye(64, dtype=torch.float64), 3).weight() - weight
        for scale in (0.0, 1.0)
    )
    assert nothing.norm() < 1.1 * alike.norm()


@pytest.mark.parametrize(
    "form",
    [
        {"parts": ("encoder", "embed_tokens"), "budget": 0.8},
        {"residual_config": hrt.ResidualConfig(group_size=1, rank=2, shared_bits=8), "embedding_bits": 8},
    ],
    ids=["chosen", "given"],
)
def test_the_token_table_is_near_to_the_dense_one_where_the_decoder_stays_dense(form):
    dense = dense_whisper()
    model = Whisper.from_dense(dense, calibration=labelled(), progress=False, **form)
    assert model.config.decoder_residual_config is None
    ids = torch.arange(dense.config.vocab_size)
    with torch.no_grad():
        wanted, found = (each.get_input_embeddings()(ids) for each in (dense, model))
        assert (found - wanted).norm() < 0.02 * wanted.norm()
        states = torch.randn(4, dense.config.d_model, generator=torch.Generator().manual_seed(0))
        logits = [each.get_output_embeddings()(states) for each in (dense, model)]
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()


def perturbed(linear, noise, absorbed):
    with torch.no_grad():
        linear.weight += noise
        if absorbed is not None and linear.bias is not None:
            linear.bias -= absorbed


def test_the_error_estimate_is_what_small_changes_do_to_the_distributions():
    dense, batches = dense_whisper(), labelled(64)
    view = frozen_view(dense)
    stacks = [LayerStack(stack, view) for stack in WHISPER.stacks]
    table = EmbeddingStatistics(*view.get_input_embeddings().weight.shape, torch.device("cpu"))
    objective = LogitsObjective(stacks[1], stacks[0], table)
    groups = [Group(path, None, (layer,), "decoder") for path in DECODER.modules for layer in range(2)]
    of_decoder = collect(stacks[1], view, groups, batches, objective, progress=False)
    assert len(objective.memory_gradients) == len(batches)
    changed = copy.deepcopy(dense)
    for key in ((0, "fc1"), (1, "encoder_attn.out_proj"), (1, "fc2"), (0, "self_attn.out_proj")):
        entry, linear = of_decoder[key], changed.model.decoder.layers[key[0]].get_submodule(key[1])
        noise = 1e-2 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1))
        perturbed(linear, noise, noise @ entry.mean.float())
        moved = 2 * divergence_of(changed, dense, batches)
        perturbed(linear, -noise, -noise @ entry.mean.float())
        error = noise.double() @ entry.covariance() @ noise.double().T
        estimate = torch.trace(entry.gradients @ error).item() / entry.weight.item()
        assert estimate == pytest.approx(moved, rel=0.7), key
    # The table is tied, so that a change reaches look-up and logits.
    noise = 1e-2 * torch.randn(dense.proj_out.weight.shape, generator=torch.Generator().manual_seed(1))
    perturbed(changed.proj_out, noise, None)
    moved = 2 * divergence_of(changed, dense, batches)
    assert table.errors(noise.double()).sum().item() == pytest.approx(moved, rel=0.7)


def divergence_of(model, dense, batches):
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return divergence(model, dense, [together])


def test_the_decoder_says_which_frames_of_the_encoder_matter():
    dense, batches = frozen_view(dense_whisper()), labelled(2)
    stacks = [LayerStack(stack, dense) for stack in WHISPER.stacks]
    gradients = [torch.zeros(1, 50, 32) for _ in batches]
    for gradient in gradients:
        gradient[:, :10] = 1.0
    groups = [Group("fc2", None, (3,))]
    found = collect(stacks[0], dense, groups, batches, StatesObjective(stacks[0], gradients), progress=False)
    for weights in found[3, "fc2"].frame_weights:
        assert (weights[:10] > 0).all() and not weights[10:].any()  # the last layer mixes no frames
    final = output_of(dense, stacks[0].owner, batches[0])[0]
    assert final.shape == (1, 50, 32)


def random_curves(seed):
    """Three groups at two places, each with few choices."""
    chance = random.Random(seed)
    curves = []
    for path, size, layers in (("a", 1, (0,)), ("a", 1, (1,)), ("b", None, (0,))):
        for bits in (2, 3) if size else (None,):
            errors = np.array(sorted((chance.random() for _ in range(9)), reverse=True))
            curves.append(Curve(Group(path, size, layers), bits, errors, 3, 10.0 * (bits or 0)))
    return curves


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_near_the_best_of_all(seed):
    curves = random_curves(seed)
    options: dict = {}
    for curve in curves:
        options.setdefault(curve.group, []).extend((curve, rank) for rank in curve.ranks())
    left = 85.0
    every = [
        (sum(curve.errors[rank] for curve, rank in picked), sum(c.fixed + c.cost * r for c, r in picked))
        for picked in itertools.product(*options.values())
    ]
    best = min(error for error, size in every if size <= left)
    chosen = choose(curves, left)
    by_key = {(curve.group, curve.bits): curve for curve in curves}
    picked = [(by_key[choice.group, choice.bits], choice.rank) for choice in chosen]
    assert len(picked) == 3
    assert sum(curve.fixed + curve.cost * rank for curve, rank in picked) <= left
    worst = max(error for error, size in every if size <= left)
    found = sum(curve.errors[rank] for curve, rank in picked)
    assert found <= best + 0.35 * (worst - best)


def test_a_choice_that_cannot_be_paid_says_how_much_is_lacking():
    with pytest.raises(Lacking) as raised:
        choose(random_curves(0), 30.0)
    assert raised.value.parameters == pytest.approx(2 * 20 + 3 - 30)


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("bits", [2, 4])
def test_sweeps_bring_outputs_nearer_than_rounding_column_by_column(bits, block_size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 128, generator=generator).double()
    directions = torch.linalg.qr(torch.randn(128, 128, generator=generator).double())[0]
    covariance = directions * torch.logspace(0, -2, 128).double() @ directions.T

    def error(sweeps):
        difference = quantize(weight, covariance, bits, block_size, sweeps).weight() - weight
        return ((difference @ covariance) * difference).sum().item()

    errors = [error(sweeps) for sweeps in range(4)]
    assert errors[0] > errors[1] >= errors[2] >= errors[3]
    assert errors[3] < 0.9 * errors[0]
    assert quantize(weight, covariance, bits, block_size).scale.shape == (24, 128 // block_size)


def test_a_compact_model_opens_through_the_auto_class_in_half_precision(tmp_path):
    model = Whisper.from_dense(dense_whisper(), calibration=labelled(), budget=0.5, progress=False)
    model.half().save_pretrained(tmp_path)
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype="float32")
    batch = inputs()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.float()(**batch).logits)


def test_without_labels_a_training_moves_scales_of_the_decoder_and_no_integer(tmp_path):
    from hf_residual_transformer.training.recipe import short_distillation

    dense = dense_whisper()
    model = Whisper.from_dense(dense, calibration=labelled(), budget=0.5, progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = labelled(8)

    def collator(batch):
        return {key: torch.cat([row[key] for row in batch]) for key in batch[0]}

    short_distillation(
        model,
        dense,
        rows,
        tmp_path,
        collator=collator,
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        report_to="none",
        remove_unused_columns=False,
    )
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    for part in ("decoder.shared", "embed_tokens.weight_scale"):
        assert any(part in key for key in moved), part
    assert not [key for key in moved if "encoder." in key and "decoder." not in key]
    assert not [key for key in moved if key.endswith(("weight_packed", "weight_levels"))]
