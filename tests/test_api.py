"""The three verbs, from names and from objects, and what importing the package needs."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    SAMPLE,
    speech,
    tiny_wav2vec2_config,
    tiny_whisper_config,
    wav2vec2_processor,
    whisper_generation_config,
    whisper_processor,
)
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    BertConfig,
    BertModel,
    Wav2Vec2ForCTC,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

import hf_residual_transformer as hrt
from hf_residual_transformer.api import EXTRAS, SHUFFLE_BUFFER, _shuffled, load_dense, require_extra, rows_of
from hf_residual_transformer.speech.datasets import load_speech_dataset, prepare_speech_dataset

OPTIONAL = ["datasets", "jiwer", "soundfile", "accelerate", "matplotlib", "scipy", "psutil", "peft"]
SHORT = {"num_windows": 4, "progress": False}


def rows(rate: int = 16_000, count: int = 6) -> list[dict]:
    """Noise with the text that it stands for."""
    return [
        {"audio": {"array": speech(0.6, seed).numpy(), "sampling_rate": rate}, "text": "a bed"}
        for seed in range(count)
    ]


def whisper(**kwargs) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(tiny_whisper_config(**kwargs)).eval()
    model.generation_config = whisper_generation_config()
    return model


@pytest.fixture(scope="module")
def compact() -> hrt.ResidualWhisperForConditionalGeneration:
    return hrt.compress(whisper(), rows(), 0.5, processor=whisper_processor(), **SHORT)


BARE = """
import sys
for name in sys.argv[2:]:
    sys.modules[name] = None
import torch
import hf_residual_transformer as hrt
from transformers import AutoModelForSpeechSeq2Seq
model = AutoModelForSpeechSeq2Seq.from_pretrained(sys.argv[1])
assert isinstance(model, hrt.ResidualWhisperForConditionalGeneration)
model(torch.zeros(1, 16, 100, dtype=model.dtype), decoder_input_ids=torch.tensor([[1]]))
print(hrt.size_report(model))
for verb in (hrt.compress, hrt.evaluate, hrt.distill):
    try:
        verb(model, [])
    except ImportError as error:
        print(error)
"""


def test_a_compact_model_runs_where_nothing_but_transformers_is_installed(compressed):
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(compressed["whisper"]), *OPTIONAL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('pip install "hf-residual-transformer[speech]"') == 2
    assert done.stdout.count('pip install "hf-residual-transformer[train]"') == 1


def test_missing_packages_are_named():
    require_extra("speech")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "jiwer", None)
        with pytest.raises(
            ImportError, match=r"^this needs jiwer: pip install \"hf-residual-tr.*\[speech\]\"$"
        ):
            require_extra("speech")


def test_the_packages_that_a_verb_asks_for_are_those_of_its_extra():
    project = tomllib.loads((SAMPLE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {extra: {re.match(r"[\w-]+", line)[0] for line in lines} for extra, lines in extras.items()}
    names["train"] = names["train"] - {"hf-residual-transformer"} | names["speech"]
    for extra, modules in EXTRAS.items():
        assert {{"yaml": "pyyaml"}.get(module, module) for module in modules} == names[extra]


class TestCompress:
    def test_a_model_with_its_processor_becomes_the_residual_class_of_its_own(self, compact):
        assert type(compact) is hrt.ResidualWhisperForConditionalGeneration
        assert hrt.size_report(compact).model_bytes.ratio <= 0.5
        assert compact.config.decoder_residual_config and compact.config.embedding_bits
        assert compact.processor.tokenizer
        assert not compact.training

    def test_it_is_what_from_dense_makes_of_the_same_windows(self, compact):
        from hf_residual_transformer.speech.windows import calibration_batches

        chosen = _shuffled(rows(), seed=0)
        batches = calibration_batches(chosen, whisper_processor(), num_windows=4, batch_size=1)
        expected = hrt.ResidualWhisperForConditionalGeneration.from_dense(
            whisper(), calibration=batches, budget=0.5, progress=False
        ).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in compact.state_dict().items())

    def test_several_sizes_give_what_each_gives_alone(self, compact):
        models = hrt.compress(whisper(), rows(), (0.7, 0.5), processor=whisper_processor(), **SHORT)
        assert [0.6 < hrt.size_report(model).model_bytes.ratio <= 0.7 for model in models] == [True, False]
        assert all(model.processor is not None and model.conversion_report.errors for model in models)
        assert models[1].config.to_dict() == compact.config.to_dict()
        expected = compact.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in models[1].state_dict().items())
        for sizes in ((0.5, 1.5), (), "0.5", (0.5, None)):
            with pytest.raises(ValueError, match="`budget` must be above 0, at most 1"):
                hrt.compress(whisper(), rows(), sizes, processor=whisper_processor(), **SHORT)
        with pytest.raises(ValueError, match="`budget` must have each size once"):
            hrt.compress(whisper(), rows(), (0.5, 0.5), processor=whisper_processor(), **SHORT)
        with pytest.raises(ValueError, match=r"`budget` must be at least 0\.\d+ with these settings"):
            hrt.compress(whisper(), rows(), (0.5, 0.01), processor=whisper_processor(), **SHORT)

    def test_a_model_in_half_precision_is_converted_in_float32_and_left_as_it_is(self):
        dense = whisper().half()
        before = {name: value.clone() for name, value in dense.state_dict().items()}
        model = hrt.compress(dense, rows(), processor=whisper_processor(), **SHORT)
        assert model.dtype == torch.float32
        assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
        assert dense.dtype == torch.float16
        expected = hrt.compress(dense.float(), rows(), processor=whisper_processor(), **SHORT).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())

    def test_with_low_memory_the_dense_model_stays_as_it_is_stored(self, tmp_path):
        dense = whisper().half()
        expected = hrt.compress(dense, rows(), processor=whisper_processor(), **SHORT).state_dict()
        dense.save_pretrained(tmp_path)
        whisper_processor().save_pretrained(tmp_path)
        loaded, _ = load_dense(tmp_path, low_memory=True)
        assert {value.dtype for value in loaded.parameters()} == {torch.float16}
        for given in (dense, tmp_path):
            model = hrt.compress(
                given, rows(), processor=whisper_processor(), low_memory=True, device="cpu", **SHORT
            )
            assert model.dtype == torch.float32
            assert {value.dtype for value in dense.parameters()} == {torch.float16}
            found = {name: value.half() for name, value in model.state_dict().items()}
            assert all(torch.equal(found[name], value.half()) for name, value in expected.items())

    def test_a_folder_is_loaded_by_its_config_and_audio_may_be_a_folder(self, dense_whisper, dense_wav2vec2):
        options = {"language": "en", "data_options": {"max_seconds": 1.0, "max_samples": 6}, **SHORT}
        config = hrt.ResidualConfig(rank=2)
        model = hrt.compress(str(dense_whisper), SAMPLE, residual_config=config, device="cpu", **options)
        assert type(model) is hrt.ResidualWhisperForConditionalGeneration
        assert model.config.residual_config == config
        model = hrt.compress(dense_wav2vec2, str(SAMPLE), bits=None, device="cpu", **options)
        assert type(model) is hrt.ResidualWav2Vec2ForCTC
        assert model.config.residual_config.shared_bits is None
        assert 0.5 < hrt.size_report(model).encoder.ratio <= 0.7

    def test_a_data_set_is_taken_as_it_is_loaded_or_with_its_audio_undecoded(self):
        loaded = load_speech_dataset(SAMPLE, text_column=None, language="en", max_seconds=1.0, max_samples=6)
        options = {"processor": whisper_processor(), "seed": 3, **SHORT}
        ours = hrt.compress(whisper(), loaded, **options)
        files = [str(SAMPLE / row["audio"]["path"]) for row in loaded]
        raw = datasets.Dataset.from_dict({"audio": files}).cast_column("audio", datasets.Audio())
        theirs = hrt.compress(whisper(), datasets.DatasetDict({"train": raw}), **options).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())

    def test_rows_of_another_rate_are_resampled(self):
        options = {"processor": whisper_processor(), **SHORT}
        slow = [{"audio": {**row["audio"], "sampling_rate": 8000}} for row in rows(count=2)]
        for row in slow:
            row["audio"]["array"] = row["audio"]["array"][::2]
        assert hrt.compress(whisper(), iter(slow), **options).conversion_report.mean_error < 1

    def test_the_class_of_a_model_decides_not_its_family_alone(self):
        dense = WhisperForAudioClassification(tiny_whisper_config())
        model = hrt.compress(dense, rows(), 0.6, processor=whisper_processor(), **SHORT)
        assert type(model) is hrt.ResidualWhisperForAudioClassification

    def test_a_model_for_whisper_cpp_is_written_as_q4_0(self, tmp_path):
        model = hrt.compress(whisper(), rows(), processor=whisper_processor(), whisper_cpp=True, **SHORT)
        assert model.config.residual_config == model.config.decoder_residual_config
        assert model.config.embedding_bits == model.config.residual_config.shared_bits == 4
        folder = hrt.export(model, tmp_path / "ggml", format="ggml")
        assert [path.name for path in folder.iterdir()] == ["ggml-model-q4_0.bin"]

    @pytest.mark.parametrize(
        ("name", "value"), [("size", 0.31), ("bits", 4), ("parts", ("encoder",)), ("rotation", 16)]
    )
    def test_the_form_of_whisper_cpp_leaves_nothing_to_choose(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must not be set with `whisper_cpp`"):
            hrt.compress(whisper(), rows(), processor=whisper_processor(), whisper_cpp=True, **{name: value})

    def test_whisper_cpp_runs_whisper_for_recognition_alone(self):
        dense = WhisperForAudioClassification(tiny_whisper_config())
        with pytest.raises(
            ValueError, match="`whisper_cpp` must be false for a WhisperForAudioClassification"
        ):
            hrt.compress(dense, rows(), processor=whisper_processor(), whisper_cpp=True, **SHORT)

    def test_a_generation_config_without_languages_gets_those_of_the_processor_that_is_given(self, compact):
        dense = whisper()
        for name in ("lang_to_id", "task_to_id"):
            delattr(dense.generation_config, name)
        model = hrt.compress(dense, rows(), 0.5, processor=whisper_processor(), **SHORT)
        wanted = whisper_generation_config()
        assert model.generation_config.lang_to_id == wanted.lang_to_id
        assert model.generation_config.task_to_id == wanted.task_to_id
        assert not hasattr(dense.generation_config, "lang_to_id")
        expected = compact.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())

    def test_recordings_in_which_the_model_hears_nothing_are_refused(self):
        deaf = whisper()
        with torch.no_grad():  # the end of the text is the likeliest token, whatever is said
            deaf.get_input_embeddings().weight[deaf.config.eos_token_id] = 1.0
            deaf.model.decoder.layer_norm.weight.zero_()
            deaf.model.decoder.layer_norm.bias.fill_(100.0)
        with pytest.raises(ValueError, match="the model hears no word in it; pass other recordings"):
            hrt.compress(deaf, rows(), 0.5, processor=whisper_processor(), **SHORT)

    def test_what_it_cannot_take_is_named(self, compact, compressed, tmp_path):
        processor = whisper_processor()
        with pytest.raises(ValueError, match=r"`processor` must be the model's where a model is given"):
            hrt.compress(whisper(), rows())
        with pytest.raises(ValueError, match=r"dense model, got ResidualWhisper.*merge"):
            hrt.compress(compact, rows(), processor=processor)
        bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
        with pytest.raises(ValueError, match=r"dense model of whisper, .* got BertModel, a bert"):
            hrt.compress(bert, rows(), processor=processor)
        bert.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"dense model of whisper, .* got .*, a bert"):
            hrt.compress(str(tmp_path), rows())
        with pytest.raises(ValueError, match="a residual_whisper"):
            hrt.compress(compressed["whisper"], rows())
        with pytest.raises(ValueError, match="`bits` must not be set beside `residual_config`"):
            config = hrt.ResidualConfig()
            hrt.compress(whisper(), rows(), processor=processor, residual_config=config, bits=None)
        for name, value in (("block_size", 64), ("rotation", 32), ("parts", ("encoder",))):
            with pytest.raises(ValueError, match=rf"`{name}` must be .*{value}"):
                hrt.compress(
                    whisper(), rows(), processor=processor, residual_config=config, **{name: value}, **SHORT
                )
            with pytest.raises(ValueError, match=rf"`{name}` must be .*{value}"):
                hrt.compress(whisper(), None, processor=processor, start="svd", **{name: value}, **SHORT)
        for name in ("block_size", "rotation"):
            with pytest.raises(ValueError, match=rf"`{name}` must be one of .*, got 0"):
                hrt.compress(whisper(), rows(), processor=processor, **{name: 0}, **SHORT)
        for audio in ({"audio": []}, 3):
            with pytest.raises(ValueError, match="`audio` must be a folder"):
                hrt.compress(whisper(), audio, processor=processor)
        with pytest.raises(ValueError, match="each row must be a dict"):
            hrt.compress(whisper(), ["clip.wav"], processor=processor)
        with pytest.raises(ValueError, match="`split` must be one of test, got 'train'"):
            data = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"audio": ["a.wav"]})})
            hrt.compress(whisper(), data, processor=processor)

    @pytest.mark.parametrize("online", [True, False])
    def test_an_id_of_an_adapter_is_told_to_be_merged_first(self, online, tmp_path, monkeypatch):
        """Of the Hub, only the transfer of files is replaced; the errors are those of transformers itself."""
        snapshot = tmp_path / "models--someone--adapter" / "snapshots" / ("0" * 40)
        (snapshot.parent.parent / "refs").mkdir(parents=True)
        (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
        snapshot.mkdir(parents=True)
        (snapshot / "adapter_config.json").write_text("{}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        response, asked = SimpleNamespace(headers={}, request=None, status_code=404), []

        def download(name, file, **kwargs):
            asked.append(file)
            if name == "someone/nothing":
                raise RepositoryNotFoundError("404", response=response)
            if not (snapshot / file).is_file():
                raise RemoteEntryNotFoundError("404", response=response)
            return str(snapshot / file)

        if online:
            monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
            monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
        with pytest.raises(
            ValueError, match=r"got 'someone/adapter', an adapter: merge the adapter first"
        ) as info:
            hrt.compress("someone/adapter", rows())
        assert isinstance(info.value.__cause__, ValueError if online else OSError)
        assert asked == (["config.json", "adapter_config.json"] if online else [])
        with pytest.raises(OSError, match="not a valid model identifier" if online else "couldn't connect"):
            hrt.compress("someone/nothing", rows())

    def test_the_processor_is_saved_with_the_model(self, compact, tmp_path):
        compact.save_pretrained(tmp_path)
        assert AutoProcessor.from_pretrained(tmp_path).feature_extractor.chunk_length == 1
        assert isinstance(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path), type(compact))


FORMS = {
    "list": list,
    "iterator": iter,
    "data set": datasets.Dataset.from_list,
    "stream": lambda clips: datasets.Dataset.from_list(clips).to_iterable_dataset(),
    "loaded": lambda clips: prepare_speech_dataset(
        datasets.Dataset.from_list(clips), text_column="sentence", language_column="locale"
    ),
    "loaded stream": lambda clips: prepare_speech_dataset(
        datasets.Dataset.from_list(clips).to_iterable_dataset(),
        text_column="sentence",
        language_column="locale",
    ),
}


class TestRows:
    """What the verbs make of recordings that are no path."""

    clips = tuple(
        {
            "audio": {"array": speech(seconds, number).numpy(), "sampling_rate": 16_000},
            "sentence": str(number),
            "locale": locale,
        }
        for number, (seconds, locale) in enumerate(((0.1, "de"), (0.4, "en"), (0.2, "en"), (0.1, "en")))
    )

    def read(self, audio, **settings):
        return rows_of(audio, whisper_processor(), "train", **settings)

    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_has_the_options_of_a_path(self, form):
        loaded = "loaded" in form
        columns = {} if loaded else {"language_column": "locale"}
        found = self.read(
            FORMS[form](self.clips),
            language="en",
            text_column="text" if loaded else "sentence",
            options={"max_seconds": 0.3, "max_samples": 1, **columns},
        )
        (row,) = found
        assert (row["text"], row["language"]) == ("2", "en")
        np.testing.assert_array_equal(row["audio"]["array"], self.clips[2]["audio"]["array"])

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("options", [{"streaming": True}, {"revision": "main"}, {"config_name": "de"}])
    def test_how_to_load_is_no_option_of_what_is_loaded(self, form, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must not be set for recordings that"):
            self.read(FORMS[form](self.clips), text_column=None, options=options)

    def test_a_loaded_data_set_finds_its_files_again(self):
        loaded = load_speech_dataset(SAMPLE, "test", text_column=None)
        row = self.read(loaded, language="en", text_column=None, options={"max_samples": 1})[0]
        assert row["language"] == "en" and len(row["audio"]["array"])
        plain = datasets.Dataset.from_list([{"audio": self.clips[0]["audio"]}])
        named = prepare_speech_dataset(plain, text_column=None, language="de")
        assert self.read(named, text_column=None)[0]["language"] == "de"
        with pytest.raises(ValueError, match=r"`language` must be 'de', with which .* loaded, got 'en'"):
            self.read(named, text_column=None, language="en")

    def test_a_row_without_a_language_gets_that_which_is_asked_for(self):
        for audio in (rows(count=2), iter(rows(count=2))):
            assert [row["language"] for row in self.read(audio, language="de")] == ["de", "de"]

    @pytest.mark.parametrize("form", ["list", "iterator"])
    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"language": "fr"}, r"`language` must be one of those in the data \(de, en\), got 'fr'"),
            ({"text_column": "words"}, "`text_column` must be one of audio, sentence, locale, got 'words'"),
            ({"options": {"max_seconds": 0.01}}, "no clip is left"),
            ({"options": {"max_samples": 0}}, "`max_samples` must be at least 1"),
        ],
    )
    def test_an_option_that_fits_no_row_is_named(self, form, settings, problem):
        options = {"language_column": "locale", **settings.get("options", {})}
        with pytest.raises(ValueError, match=problem):
            list(self.read(FORMS[form](self.clips), **{"text_column": None, **settings, "options": options}))

    def test_a_transform_of_ones_own_gives_rows_as_they_are_to_be(self):
        clips = [{**clip, "language": clip["locale"]} for clip in self.clips]
        own = datasets.Dataset.from_list(clips).with_transform(lambda batch: batch)
        assert self.read(own) is own
        assert [row["sentence"] for row in self.read(own, language="de")] == ["0"]
        with pytest.raises(ValueError, match="`language` must be one of those in the data, got 'fr'"):
            self.read(own, language="fr")
        for settings in ({"text_column": "sentence"}, {"options": {"max_seconds": 1.0}}):
            with pytest.raises(
                ValueError, match="must not be set for a data set with a transform of its own"
            ):
                self.read(own, **settings)
        for_training = own.with_transform(lambda batch: {"input_features": batch["audio"]})
        with pytest.raises(
            ValueError, match="'audio' each, but its own transform gives input_features; take"
        ):
            self.read(for_training)

    def test_lists_are_shuffled_as_data_sets_are(self):
        numbers = list(range(9))
        expected = datasets.Dataset.from_dict({"n": numbers}).shuffle(seed=3)["n"]
        assert _shuffled(numbers, 3) == list(expected) != numbers

    def test_what_comes_one_by_one_is_shuffled_in_parts(self):
        first = list(itertools.islice(_shuffled(iter(itertools.count()), 3), 5))
        assert first != sorted(first) and max(first) <= SHUFFLE_BUFFER + 4
        assert sorted(_shuffled(iter(range(500)), 3)) == list(range(500))


class TestDistill:
    def test_where_only_the_encoder_is_compact_it_learns_in_place_and_the_model_comes_back(self):
        teacher = whisper()
        options = {"processor": whisper_processor(), "parts": ("encoder",), **SHORT}
        student = hrt.compress(teacher, rows(), 0.4, **options)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        assert hrt.distill(student, rows(), teacher, steps=2, learning_rate=1e-3, use_cpu=True) is student
        changed = {
            name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
        }
        assert changed
        assert all(name.startswith("model.encoder.") for name in changed)
        assert not student.training
        assert all(parameter.requires_grad for parameter in student.model.decoder.parameters())

    def test_names_are_loaded_and_ctc_models_run_without_noise(self, compressed, dense_wav2vec2):
        names = str(compressed["wav2vec2"]), SAMPLE, str(dense_wav2vec2)
        data = {"language": "en", "data_options": {"max_seconds": 1.0, "max_samples": 4}}
        student = hrt.distill(*names, steps=1, use_cpu=True, per_device_train_batch_size=2, **data)
        assert type(student) is hrt.ResidualWav2Vec2ForCTC
        assert student.config.layerdrop == 0
        assert student.processor.tokenizer

    def test_it_needs_a_teacher(self, compact):
        with pytest.raises(ValueError, match="`teacher` must be the dense model"):
            hrt.distill(compact, rows())

    def test_a_dense_student_is_refused(self, dense_whisper):
        dense = str(dense_whisper)
        with pytest.raises(ValueError, match=r"`student` must be a compact model .* got a WhisperFor"):
            hrt.distill(dense, rows(), dense, processor=whisper_processor())

    @pytest.mark.parametrize("steps", [0, -1])
    def test_it_needs_steps_and_a_folder_for_checkpoints(self, steps, compact, dense_whisper):
        with pytest.raises(ValueError, match=f"`steps` must be at least 1, got {steps}"):
            hrt.distill(compact, rows(), str(dense_whisper), steps=steps)
        with pytest.raises(
            ValueError, match=r"`output_dir` must be given beside `save_strategy`.*got 'steps'"
        ):
            hrt.distill(compact, rows(), str(dense_whisper), save_strategy="steps")

    @pytest.mark.parametrize("name", ["student", "teacher"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_models_in_16_bits_are_refused_by_name(self, name, dtype, compressed, dense_whisper):
        models = {"student": str(compressed["whisper"]), "teacher": str(dense_whisper)}
        models[name] = AutoModelForSpeechSeq2Seq.from_pretrained(models[name], dtype=dtype)
        wrong = str(dtype).removeprefix("torch.")
        problem = rf"`{name}` must be in float32 to be distilled, got {wrong}; pass {name}\.float\(\)"
        with pytest.raises(ValueError, match=problem):
            hrt.distill(
                models["student"], rows(), models["teacher"], processor=whisper_processor(), use_cpu=True
            )

    def test_checkpoints_are_saved_on_request(self, compressed, dense_wav2vec2, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path), "use_cpu": True}
        hrt.distill(str(compressed["wav2vec2"]), rows(), str(dense_wav2vec2), steps=1, **options)
        assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


class TestEvaluate:
    def test_a_compact_model_has_its_processor(self, compact):
        result = hrt.evaluate(compact, rows(count=2), language="en", progress=False)
        assert (result.rates.clips, result.rates.words) == (2, 4)

    def test_a_model_of_its_own_and_one_by_name_agree(self, tmp_path):
        torch.manual_seed(0)
        model, processor = Wav2Vec2ForCTC(tiny_wav2vec2_config()).eval(), wav2vec2_processor(tmp_path)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        result = hrt.evaluate(model, rows(count=3), processor=processor, progress=False)
        named = hrt.evaluate(str(tmp_path), rows(count=3), device="cpu", progress=False)
        assert result.predictions == named.predictions
        with pytest.raises(ValueError, match="`processor` must be the model's"):
            hrt.evaluate(model, rows())
