"""Error rates by hand, what is asked of the models, what is saved, and the command line around it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    SAMPLING_RATE,
    randomize_,
    tiny_wav2vec2_config,
    tiny_whisper_config,
    wav2vec2_processor,
    whisper_generation_config,
    whisper_processor,
)
from tiny_families import MELS, dense_model
from torch import nn
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertProcessor, Wav2Vec2ForCTC

from hf_residual_transformer import ResidualConfig, ResidualWhisperForConditionalGeneration
from hf_residual_transformer.folders import prepare_output_dir
from hf_residual_transformer.provenance import portable, provenance
from hf_residual_transformer.speech.metrics import EvaluationStopped, error_rates, evaluate_asr
from hf_residual_transformer.training.arguments import DataArguments, parse_args
from hf_residual_transformer.training.scratch_parakeet import (
    ParakeetSizes,
    new_parakeet,
    new_parakeet_processor,
)

RATE = 16_000


def row(text: str | None, path: str | None = "clip.wav", seconds: float = 0.2, **columns) -> dict:
    array = np.sin(np.arange(int(seconds * RATE)) / 7).astype(np.float32)
    columns.update({} if text is None else {"text": text})
    return {"audio": {"array": array, "sampling_rate": RATE, "path": path}, **columns}


class Scripted(nn.Module):
    """A CTC model that hears what it is told to; `model_inputs` are those of its last call."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(is_encoder_decoder=False, model_type="wav2vec2")

    def __init__(self, processor, texts: list[str]) -> None:
        super().__init__()
        self.tokenizer, self.texts = processor.tokenizer, list(texts)

    def can_generate(self) -> bool:
        return False

    def _get_feat_extract_output_lengths(self, num_samples):
        return num_samples

    def forward(self, **inputs):
        self.model_inputs = inputs
        blank = self.tokenizer.pad_token_id
        heard = [self.tokenizer(self.texts.pop(0)).input_ids for _ in inputs["input_values"]]
        frames = [[token for pair in ids for token in (pair, pair, blank)] for ids in heard]
        padded = [ids + [blank] * (max(map(len, frames)) - len(ids)) for ids in frames]
        return SimpleNamespace(
            logits=nn.functional.one_hot(torch.tensor(padded), len(self.tokenizer)).float()
        )


class TestErrorRates:
    def test_errors_are_summed_over_clips_and_divided_by_what_was_said(self):
        rates = error_rates(["the cat sat", "a dog"], ["the cat sat down", "dog"])
        assert rates.wer == 2 / 5  # one word inserted, one deleted, of 3 + 2
        assert rates.cer == 7 / 16  # " down" inserted, "a " deleted, of 11 + 5
        assert (rates.clips, rates.words, rates.characters, rates.empty_references) == (2, 5, 16, 0)

    def test_a_substituted_word_counts_once_and_its_letters_each(self):
        rates = error_rates(["one two three four"], ["one tow three four"])
        assert (rates.wer, rates.cer) == (1 / 4, 2 / 18)

    def test_what_is_heard_where_nothing_was_said_counts_as_inserted(self):
        rates = error_rates(["", "one two"], ["uh oh no", "one two"])
        assert rates.wer == 3 / 2
        assert rates.empty_references == 1

    def test_silence_that_is_heard_as_silence_is_no_error(self):
        assert error_rates(["", "one"], ["", "one"]).wer == 0

    def test_nothing_but_empty_references_has_no_rate(self):
        with pytest.raises(ValueError, match="the 2 references hold no word after normalisation"):
            error_rates(["", " "], ["a", ""])


class TestCTC:
    def test_clips_are_compared_one_by_one_and_together(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        model = Scripted(processor, ["a bad cab", "a bed", "feed"])
        rows = [row("A bad cab.", "1.wav"), row("A bad bed", None), row("feed", "3.wav")]
        result = evaluate_asr(model, processor, rows, batch_size=2, language="en", progress=False)
        assert result.wer == 1 / 7
        assert result.cer == 4 / (9 + 9 + 4)
        assert [p.id for p in result.predictions] == ["1.wav", "1", "3.wav"]
        assert [p.prediction for p in result.predictions] == ["a bad cab", "a bed", "feed"]
        assert [p.word_errors for p in result.predictions] == [0, 1, 0]
        assert result.predictions[0].reference == "A bad cab."
        assert result.predictions[0].normalized_reference == "a bad cab"
        assert result.audio_seconds == pytest.approx(0.6)
        assert set(model.model_inputs) == {"input_values", "attention_mask"}

    def test_each_language_has_its_normaliser_and_its_rates(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        rows = [row("Uh, a bad cab", language="en"), row("Uh, bed", language="de")]
        result = evaluate_asr(Scripted(processor, ["a bad cab", "bed"]), processor, rows, progress=False)
        assert result.normalizers == {"en": "EnglishTextNormalizer", "de": "BasicTextNormalizer"}
        assert result.predictions[0].normalized_reference == "a bad cab"  # the English one drops fillers
        assert result.predictions[1].normalized_reference == "uh bed"
        assert (result.by_language["en"].wer, result.by_language["de"].wer, result.wer) == (0, 1 / 2, 1 / 5)

    @pytest.mark.parametrize("language", ["en", "English", "eng", "en_us", "en-GB", "English (US)"])
    def test_english_is_normalised_as_such_however_it_is_spelt(self, language, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        rows = [row("Uh, a bad cab", language=language)]
        result = evaluate_asr(Scripted(processor, ["a bad cab"]), processor, rows, progress=False)
        assert (result.wer, result.normalizers) == (0, {language: "EnglishTextNormalizer"})

    def test_the_result_does_not_depend_on_the_batch_size(self, tmp_path):
        torch.manual_seed(0)
        processor = wav2vec2_processor(tmp_path)
        model = randomize_(Wav2Vec2ForCTC(tiny_wav2vec2_config()))
        rows = [row("a bad cab", seconds=seconds) for seconds in (0.1, 0.25, 0.4)]
        one, three = (evaluate_asr(model, processor, rows, batch_size=n, progress=False) for n in (1, 3))
        assert [p.prediction for p in one.predictions] == [p.prediction for p in three.predictions]
        assert (one.wer, one.cer) == (three.wer, three.cer)

    def test_nor_does_it_where_the_model_reads_a_spectrogram(self, tmp_path):
        extractor = SeamlessM4TFeatureExtractor(feature_size=MELS // 2, num_mel_bins=MELS // 2)
        processor = Wav2Vec2BertProcessor(extractor, wav2vec2_processor(tmp_path).tokenizer)
        model = dense_model("wav2vec2-bert")
        rows = [row("a bad cab", seconds=seconds) for seconds in (0.1, 0.25, 0.8)]
        one, three = (evaluate_asr(model, processor, rows, batch_size=n, progress=False) for n in (1, 3))
        assert [p.prediction for p in one.predictions] == [p.prediction for p in three.predictions]
        assert all(p.prediction for p in one.predictions)
        short = row("a", "short.wav", seconds=559 / SAMPLING_RATE)
        with pytest.raises(ValueError, match=r"short\.wav must have at least 560 samples.*, got 559"):
            evaluate_asr(model, processor, [row("a"), short], progress=False)
        evaluate_asr(model, processor, [row("a", seconds=560 / SAMPLING_RATE)], progress=False)

    def test_the_model_is_left_in_the_mode_it_was_in(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        for training in (True, False):
            model = Scripted(processor, ["a"]).train(training)
            evaluate_asr(model, processor, [row("a")], progress=False)
            assert model.training is training

    @pytest.mark.parametrize(
        ("rows", "problem"),
        [
            ([], "has no rows"),
            ([row(None)], "must have texts to compare with"),
            ([row("?!")], "hold no word after normalisation"),
        ],
    )
    def test_data_that_give_no_rate_are_refused(self, tmp_path, rows, problem):
        processor = wav2vec2_processor(tmp_path)
        model = Scripted(processor, ["a"]).train()
        with pytest.raises(ValueError, match=problem):
            evaluate_asr(model, processor, rows, progress=False)
        assert model.training

    def test_a_row_that_cannot_be_used_is_found_before_the_first_is_transcribed(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        model = Scripted(processor, ["a"] * 9)
        model._get_feat_extract_output_lengths = lambda num_samples: num_samples // 400
        for bad, problem in (
            (
                row("a", "short.wav", seconds=0.02),
                r"short\.wav must be longer than the model's receptive field, got 320",
            ),
            (row(None, "mute.wav"), r"must have texts to compare with, got none for mute\.wav"),
            (row(5, "five.wav"), r"text of five\.wav must be a string, got 5"),
        ):
            with pytest.raises(ValueError, match=problem):
                evaluate_asr(model, processor, [row("a"), bad], batch_size=1, progress=False)
            assert len(model.texts) == 9
            with pytest.raises(ValueError, match=problem):
                evaluate_asr(model, processor, iter([bad]), batch_size=1, progress=False)

    def test_a_model_that_reads_a_prompt_is_refused(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        model = Scripted(processor, ["a"])
        model.config = SimpleNamespace(model_type="canary")
        with pytest.raises(ValueError, match="`model` must be one that needs no prompt, got a canary"):
            evaluate_asr(model, processor, [row("a")], progress=False)

    def test_what_was_transcribed_of_a_stream_before_a_bad_row_is_kept(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        model = Scripted(processor, ["a", "bad"]).train()

        def unreadable():
            yield from (row("a"), row("abe"))
            raise OSError("the disk is gone")

        for rows, problem in (
            (iter([row("a"), row("abe"), row(None, "mute.wav")]), r"got none for mute\.wav"),
            (unreadable(), "the disk is gone"),
        ):
            model.texts = ["a", "bad"]
            with pytest.raises(EvaluationStopped, match=f"{problem}.*; 2 clips were transcribed") as stopped:
                evaluate_asr(model, processor, rows, batch_size=1, progress=False)
            assert (stopped.value.result.wer, stopped.value.result.rates.clips) == (0.5, 2)
            assert re.search(problem, stopped.value.result.stopped_by) and model.training
            path = stopped.value.result.save(tmp_path / "out")
            assert path.name == "partial-evaluation.json" and json.loads(path.read_text())["wer"] == 0.5
            assert len((tmp_path / "out" / "partial-predictions.jsonl").read_text().splitlines()) == 2
            assert not (tmp_path / "out" / "evaluation.json").exists()

    def test_a_ctc_model_does_not_translate(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        with pytest.raises(ValueError, match="`task` must be 'transcribe' for a model that only transcribes"):
            evaluate_asr(Scripted(processor, ["a"]), processor, [row("a")], task="translate", progress=False)
        with pytest.raises(ValueError, match="`task` must be one of transcribe, translate, got 'write'"):
            evaluate_asr(Scripted(processor, ["a"]), processor, [row("a")], task="write", progress=False)

    def test_vowel_signs_are_kept_on_request_and_their_loss_is_said(self, tmp_path, caplog):
        processor = wav2vec2_processor(tmp_path)
        for text, split, kept, marks in (
            ("हिन्दी भाषा।", 5, "हिन्दी भाषा", 5),
            ("ที่นี่", 2, "ที่นี่", 4),
            ("cafe\u0301 Étienne!", 2, "café étienne", 0),
        ):
            caplog.clear()
            rows = [row(text, language="xx")]
            plain = evaluate_asr(Scripted(processor, ["a"]), processor, rows, progress=False)
            assert (plain.rates.words, plain.removed_marks) == (split, marks)
            assert ("--keep-marks" in caplog.text) == (marks > 0)
            assert plain.to_dict()["removed_marks"] == marks
            result = evaluate_asr(
                Scripted(processor, ["a"]), processor, rows, keep_marks=True, progress=False
            )
            assert result.predictions[0].normalized_reference == kept
            assert (result.rates.characters, result.removed_marks) == (len(kept), 0)
            assert result.normalizers == {"xx": "MarkKeepingNormalizer"}


class TestParakeet:
    def made(self, head):
        names = ("encoder_layers", "d_model", "attention_heads", "subsampling", "decoder_dim", "num_mel_bins")
        sizes = ParakeetSizes(**dict(zip(names, (1, 16, 2, 4, 16, MELS), strict=True)), encoder_ffn_dim=32)
        processor = new_parakeet_processor(["a bad cab", "bed"], 20, head, sizes)
        torch.manual_seed(0)
        model = randomize_(new_parakeet(sizes, head, processor.tokenizer), seed=2)
        if head == "tdt":
            model.joint.head.bias.data[-1] += (
                100.0  # moves on at each token, which random weights need not do
            )
        return model, processor

    @pytest.mark.parametrize("head", ["ctc", "rnnt", "tdt"])
    def test_the_result_does_not_depend_on_the_batch_size(self, head):
        model, processor = self.made(head)
        rows = [row("a bad cab", seconds=seconds) for seconds in (0.1, 0.15, 0.3)]
        limit = {} if head == "ctc" else {"max_new_tokens": 100}
        one, three = (
            evaluate_asr(model, processor, rows, batch_size=n, progress=False, **limit) for n in (1, 3)
        )
        assert [p.prediction for p in one.predictions] == [p.prediction for p in three.predictions]
        assert any(p.prediction for p in one.predictions)

    def test_its_language_is_that_of_the_data_and_not_english(self):
        model, processor = self.made("ctc")
        for options, expected in (({}, "None"), ({"language": "de"}, "de")):
            result = evaluate_asr(model, processor, [row("a bad cab")], progress=False, **options)
            assert result.normalizers == {expected: "BasicTextNormalizer"}


class TestWhisper:
    @pytest.fixture
    def model(self, monkeypatch):
        """A tiny residual Whisper that notes what `generate` was asked for."""
        torch.manual_seed(0)
        config = tiny_whisper_config(residual_config=ResidualConfig(group_size=2, rank=4))
        model = randomize_(ResidualWhisperForConditionalGeneration(config))
        model.generation_config = whisper_generation_config()
        generate, asked = model.generate, []
        monkeypatch.setattr(model, "generate", lambda **options: asked.append(options) or generate(**options))
        model.asked = asked
        return model

    def test_it_is_told_each_clips_language_and_the_task(self, model):
        rows = [row("a", language="en"), row("b", language="de"), row("c", language="de")]
        result = evaluate_asr(
            model, whisper_processor(), rows, batch_size=2, max_new_tokens=4, progress=False
        )
        assert [options["language"] for options in model.asked] == [["en", "de"], ["de"]]
        assert {(options["task"], options["max_new_tokens"]) for options in model.asked} == {
            ("transcribe", 4)
        }
        assert model.asked[0]["input_features"].shape == (2, 16, 100)
        assert len(result.predictions) == 3
        assert not any("<|" in p.prediction for p in result.predictions)

    def test_one_language_may_be_set_for_all_clips(self, model):
        rows = [row("a", language="de"), row("b", language="de")]
        result = evaluate_asr(model, whisper_processor(), rows, language="en", progress=False)
        assert model.asked[0]["language"] == ["en", "en"]
        assert "max_new_tokens" not in model.asked[0]
        assert list(result.by_language) == ["en"]

    def test_without_a_language_it_has_to_detect_it(self, model):
        result = evaluate_asr(model, whisper_processor(), [row("a")], progress=False)
        assert model.asked[0]["language"] is None
        assert result.normalizers == {"None": "BasicTextNormalizer"}

    def test_a_clip_without_a_language_does_not_take_that_of_others_away(self, model):
        rows = [row("a", language="de"), row("b"), row("c", language="en", seconds=0.5)]
        options = {"max_new_tokens": 4, "progress": False}
        one, three = (evaluate_asr(model, whisper_processor(), rows, batch_size=n, **options) for n in (1, 3))
        assert [asked["language"] for asked in model.asked] == [["de"], None, ["en"], ["de", "en"], None]
        assert one.predictions == three.predictions

    def test_translations_are_compared_as_english(self, model):
        rows = [row("a", language="de")]
        result = evaluate_asr(model, whisper_processor(), rows, task="translate", progress=False)
        assert model.asked[0]["task"] == "translate"
        assert result.normalizers == {"de": "EnglishTextNormalizer"}

    def test_a_language_that_it_does_not_know_is_named_before_work_is_done(self, model):
        processor = whisper_processor()
        rows = [row("a", "first.wav", language="en"), row("a", "last.wav", language="en-US")]
        with pytest.raises(ValueError, match=r"the language of last\.wav must be one that .* got 'en-US'"):
            evaluate_asr(model, processor, rows, batch_size=1, progress=False)
        assert model.asked == []
        for known in ("en", "English", "<|en|>"):
            evaluate_asr(model, processor, rows, batch_size=1, language=known, progress=False)

    def test_a_lost_table_of_spellings_is_said(self, model, caplog):
        processor = whisper_processor()
        rows = [row("a", language="en")]
        result = evaluate_asr(model, processor, rows, progress=False)
        assert not result.has_spellings and "copy normalizer.json" in caplog.text
        caplog.clear()
        processor.tokenizer.english_spelling_normalizer = {"colour": "color"}
        result = evaluate_asr(model, processor, rows, progress=False)
        assert (
            result.has_spellings
            and result.to_dict()["has_spellings"]
            and "normalizer.json" not in caplog.text
        )

    def test_an_english_only_model_is_told_neither(self, model):
        model.generation_config.is_multilingual = False
        result = evaluate_asr(model, whisper_processor(), [row("a")], max_new_tokens=3, progress=False)
        assert set(model.asked[0]) == {"input_features", "max_new_tokens"}
        assert result.normalizers == {"en": "EnglishTextNormalizer"}

    def test_an_english_only_model_is_not_asked_for_another_language_or_task(self, model):
        model.generation_config.is_multilingual = False
        for options, problem in (
            ({"language": "de"}, "must be English for an English-only Whisper, got 'de'"),
            ({"task": "translate"}, "`task` must be 'transcribe'"),
        ):
            with pytest.raises(ValueError, match=problem):
                evaluate_asr(model, whisper_processor(), [row("a")], progress=False, **options)
        with pytest.raises(ValueError, match=r"the language of clip\.wav must be English .* got 'de'"):
            evaluate_asr(model, whisper_processor(), [row("a", language="de")], progress=False)
        assert model.asked == []

    def test_a_clip_longer_than_the_window_is_named_before_work_is_done(self, model):
        rows = [row("a"), row("b", "long.wav", seconds=1.5)]
        with pytest.raises(
            ValueError, match=r"long\.wav must be of at most 1 seconds, got 1\.50.*max_seconds"
        ):
            evaluate_asr(model, whisper_processor(), rows, batch_size=1, progress=False)
        assert model.asked == []

    @pytest.mark.parametrize(
        "missing", [("lang_to_id",), ("task_to_id",), ("lang_to_id", "task_to_id", "is_multilingual")]
    )
    def test_an_older_model_takes_the_numbers_of_languages_and_tasks_from_the_tokenizer(self, model, missing):
        expected = whisper_generation_config()
        model.config.vocab_size = 51_865  # by which a config without `is_multilingual` is told
        for name in missing:
            delattr(model.generation_config, name)
        rows = [row("a", language="de"), row("b", language="de")]
        evaluate_asr(model, whisper_processor(), rows, max_new_tokens=4, progress=False)
        assert model.asked[0]["language"] == ["de", "de"]
        assert model.generation_config.task_to_id == expected.task_to_id
        assert model.generation_config.lang_to_id == expected.lang_to_id

    def test_inputs_are_cast_to_the_models_dtype(self, model):
        evaluate_asr(
            model.to(torch.bfloat16), whisper_processor(), [row("a")], max_new_tokens=3, progress=False
        )
        assert model.asked[0]["input_features"].dtype == torch.bfloat16


class TestTracing:
    def test_a_saved_result_tells_where_its_figures_come_from(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            sys, "argv", [str(tmp_path / "evaluate.py"), "--model", str(tmp_path / "my model")]
        )
        processor = wav2vec2_processor(tmp_path)
        rows = [row("a bad cab", str(tmp_path / "1.wav")), row("é", "2.wav")]
        result = evaluate_asr(Scripted(processor, ["a bed", "e"]), processor, rows, progress=False)
        path = result.save(tmp_path / "new" / "folder", model="m", data={"split": "test"}, seed=3)
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert (saved["wer"], saved["clips"], saved["words"]) == (3 / 4, 2, 4)
        assert (saved["model"], saved["data"], saved["seed"]) == ("m", {"split": "test"}, 3)
        assert saved["command"] == "evaluate.py --model 'my model'"
        assert saved["versions"]["torch"] == metadata.version("torch")  # may lack the local part, as in +cpu
        assert {"python", "transformers", "hf_residual_transformer", "jiwer"} <= set(saved["versions"])
        assert saved["hardware"]["cores"] >= 1 and saved["hardware"]["cpu"]
        lines = (path.parent / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["1.wav", "2.wav"]
        assert json.loads(lines[1])["reference"] == "é"
        assert str(tmp_path) not in path.read_text() + "".join(lines)

    def test_paths_are_saved_without_this_machines_folders(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for word, expected in (
            (f"{tmp_path}/outputs/a", "outputs/a"),
            (f"--model={tmp_path}/outputs/a", "--model=outputs/a"),
            ("/home/someone/models/a", "a"),
            ("openai/whisper-base", "openai/whisper-base"),
            ("--batch_size=8", "--batch_size=8"),
            ("--overwrite", "--overwrite"),
            ("ours:/home/someone/models/a", "ours:a"),
            ("onnxruntime:/home/someone/a@_int8", "onnxruntime:a@_int8"),
            ("--systems=ours:/home/someone/a", "--systems=ours:a"),
            ("https://host.org/name", "https://host.org/name"),
            ("--url=https://host.org/name", "--url=https://host.org/name"),
            (f"{tmp_path}", tmp_path.name),
            ("", ""),
        ):
            assert portable(word) == expected

    def test_provenance_is_plain_json(self):
        found = provenance()
        assert json.loads(json.dumps(found)) == found


@dataclass
class Options:
    """Options of every kind."""

    name: str = field(metadata={"help": "A name."})
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    layers: list[int] = field(default_factory=list, metadata={"help": "Some layers."})
    fast: bool = field(default=True, metadata={"help": "Whether to be fast."})
    limit: int | None = field(default=None, metadata={"help": "A limit."})


class TestCommandLine:
    @pytest.fixture
    def common(self):
        return SimpleNamespace(parse_args=parse_args, prepare_output_dir=prepare_output_dir)

    def test_options_come_from_the_command_line(self, common):
        words = ["--name", "a", "--layers", "1", "2", "--fast", "false", "--limit", "3"]
        assert common.parse_args(Options, args=words) == (Options("a", 0.5, [1, 2], False, 3),)

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("o.json", '{"name": "a", "rate": 1e-4, "layers": [1, 2], "fast": false, "limit": null}'),
            ("o.yaml", "name: a\nrate: 1e-4\nlayers: [1, 2]\nfast: false\nlimit:\n"),
        ],
    )
    def test_a_file_holds_options_and_words_after_it_win(self, common, tmp_path, file, content):
        path = tmp_path / file
        path.write_text(content)
        assert common.parse_args(Options, args=[str(path)]) == (Options("a", 1e-4, [1, 2], False),)
        assert common.parse_args(Options, args=[str(path), "--limit", "2"])[0].limit == 2

    @pytest.mark.parametrize(
        ("words", "problem"),
        [
            (["--name", "a", "--layer", "1"], "there is no option --layer"),
            (["a", "b"], "a file of options ends in .json"),
            (["missing.json"], "No such file"),
            ([], "the following arguments are required: --name"),
            (["--name", "a", "--rate", "high"], "invalid float value: 'high'"),
        ],
    )
    def test_what_is_no_option_is_told(self, common, capsys, words, problem):
        with pytest.raises(SystemExit):
            common.parse_args(Options, args=words)
        assert problem in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["[1]", "{", "unknown: 1"])
    def test_a_file_of_something_else_is_refused(self, common, tmp_path, content):
        path = tmp_path / "o.yaml"
        path.write_text(content)
        with pytest.raises(SystemExit):
            common.parse_args(Options, args=[str(path)])

    def test_an_output_folder_with_files_is_kept(self, common, tmp_path):
        folder = tmp_path / "new" / "output"
        assert common.prepare_output_dir(folder, overwrite=False) == folder
        assert not folder.parent.exists()
        folder.mkdir(parents=True)
        assert common.prepare_output_dir(folder, overwrite=False) == folder
        (folder / "model").write_text("precious")
        with pytest.raises(FileExistsError, match="already holds files; name another, or pass --overwrite"):
            common.prepare_output_dir(folder, overwrite=False)
        with pytest.raises(FileExistsError, match="is a file"):
            common.prepare_output_dir(folder / "model", overwrite=True)
        with pytest.raises(FileNotFoundError, match="nothing to resume from"):
            common.prepare_output_dir(tmp_path / "none", overwrite=False, resume=True)
        common.prepare_output_dir(folder, overwrite=True)
        common.prepare_output_dir(folder, overwrite=False, resume=True)
        assert (folder / "model").read_text() == "precious"

    def test_the_sample_is_the_default_data(self, common):
        rows = DataArguments(language="en", max_samples=2).load("test", 8000)
        assert len(rows) == 2
        assert rows[0]["audio"]["sampling_rate"] == 8000
        assert "text" not in DataArguments(max_samples=1).load("train", RATE, with_text=False)[0]
