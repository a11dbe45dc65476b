"""Reading speech: known waves, every source with the same rows, every bad input, batches by hand."""

from __future__ import annotations

import csv
import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import wav2vec2_processor, whisper_processor
from datasets import Audio, Dataset, Features, IterableDataset, Value
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor, WhisperProcessor

from hf_residual_transformer.speech.audio import decode_audio
from hf_residual_transformer.speech.collators import CTCCollator, Seq2SeqCollator, SpeechCollator, batched
from hf_residual_transformer.speech.datasets import load_speech_dataset, prepare_speech_dataset
from hf_residual_transformer.speech.windows import calibration_batches, split_windows

RATE = 16_000
SAMPLE = Path(__file__).resolve().parent.parent.parent / "sample"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def tone(seconds: float = 0.1, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode(
    samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = "FLOAT"
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def row(samples: np.ndarray, **columns) -> dict:
    return {"audio": {"array": samples, "sampling_rate": RATE, "path": "clip.wav"}, **columns}


class TestDecoding:
    def test_bytes_path_dict_and_array_give_the_same_samples(self, tmp_path):
        wave = tone()
        path = tmp_path / "a.wav"
        path.write_bytes(encode(wave))
        sources = [
            path,
            str(path),
            path.read_bytes(),
            {"path": str(path), "bytes": None},
            {"path": "elsewhere.wav", "bytes": path.read_bytes()},
            {"array": wave.astype(np.float64), "sampling_rate": RATE},
            {"array": wave.tolist(), "sampling_rate": RATE},
        ]
        for source in sources:
            samples = decode_audio(source, RATE)
            assert samples.dtype == np.float32
            np.testing.assert_array_equal(samples, wave)
        np.testing.assert_array_equal(decode_audio(wave, RATE, source_sampling_rate=RATE), wave)

    def test_channels_are_averaged(self):
        left, right = tone(), 0.25 * tone(hertz=100)
        samples = decode_audio(encode(np.stack([left, right], axis=1)), RATE)
        np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-7)

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
    def test_another_rate_is_resampled_to_the_same_sine(self, rate):
        samples = decode_audio(encode(tone(1.0, rate), rate), RATE)
        assert samples.shape == (RATE,)
        middle = slice(RATE // 10, -RATE // 10)
        np.testing.assert_allclose(samples[middle], tone(1.0)[middle], atol=2e-3)

    def test_what_the_lower_rate_cannot_hold_is_removed_not_folded_back(self):
        samples = decode_audio(encode(tone(1.0, 48_000, hertz=11_000), 48_000), RATE)
        assert np.abs(samples[1000:-1000]).max() < 5e-3

    @pytest.mark.parametrize(
        ("format", "subtype"),
        [
            ("WAV", "PCM_16"),
            ("FLAC", "PCM_16"),
            ("OGG", "OPUS"),
            ("OGG", "VORBIS"),
            ("MP3", "MPEG_LAYER_III"),
        ],
    )
    def test_whole_files_are_read_and_cut_ones_are_refused(self, tmp_path, format, subtype):
        content = encode(tone(3.0), format=format, subtype=subtype)
        path = tmp_path / "clip.audio"
        path.write_bytes(content)
        assert abs(len(decode_audio(path, RATE)) - 3 * RATE) <= 0.1 * RATE
        for length in (50, len(content) // 2, len(content) - 10):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"clip\.audio is (cut off|damaged or cut off|not audio)"):
                decode_audio(path, RATE)

    def test_an_mp3_without_a_header_of_its_length_is_read_though_the_length_is_estimated(self):
        buffer = io.BytesIO()
        constant = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
        soundfile.write(buffer, tone(3.0), RATE, format="MP3", subtype="MPEG_LAYER_III", **constant)
        content = buffer.getvalue()
        second = content.index(content[:2], 4)  # the first frame is the header
        bare = content[second:-10]
        tag = b"ID3\x04\0\0" + bytes([0, 0, 8, 0]) + b"Information".ljust(1024, b"\0")
        for clip in (bare, tag + bare):
            with soundfile.SoundFile(io.BytesIO(clip)) as file:
                assert len(file.read()) < file.frames
            assert abs(len(decode_audio(clip, RATE)) - 3 * RATE) <= 0.1 * RATE
        with pytest.raises(ValueError, match="cut off"):
            decode_audio(tag + content[: len(content) // 2], RATE)

    def test_a_wav_written_to_a_pipe_does_not_know_its_size(self):
        content = bytearray(encode(tone(), subtype="PCM_16"))
        content[4:8] = b"\xff\xff\xff\xff"
        assert decode_audio(bytes(content), RATE).shape == tone().shape

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "is an empty file"),
            (encode(np.zeros(0, np.float32)), "holds no audio"),
            (encode(np.array([0.0, np.nan, 0.1], np.float32)), "NaN or infinite"),
            (encode(np.array([0.0, np.inf, 0.1], np.float32)), "NaN or infinite"),
            (b"<!DOCTYPE html>" * 20, "is not audio that libsndfile reads .* convert it"),
        ],
        # the bytes hold the time of writing, and each xdist worker must collect the same names
        ids=["empty", "no frames", "nan", "inf", "html"],
    )
    def test_a_bad_file_is_named_with_its_problem(self, tmp_path, content, problem):
        path = tmp_path / "bad.wav"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.wav.* {problem}|bad\.wav has values that are {problem}"):
            decode_audio(path, RATE)

    @pytest.mark.parametrize(
        ("source", "options", "problem"),
        [
            ("nowhere.wav", {}, "nowhere.wav cannot be read"),
            ({"path": None, "bytes": None}, {}, "must hold 'path', 'bytes' or 'array'"),
            (tone(), {}, "does not tell its sampling rate"),
            ({"array": tone()}, {}, "does not tell its sampling rate"),
            (
                {"array": tone(), "sampling_rate": 8000},
                {"source_sampling_rate": RATE},
                "8000 Hz, not .*16000",
            ),
            (encode(tone(), 8000), {"source_sampling_rate": RATE}, "8000 Hz, not .*16000"),
            ((tone() * 32767).astype(np.int16), {"source_sampling_rate": RATE}, "floating-point.* int16"),
            (np.stack([tone(), tone()]), {"source_sampling_rate": RATE}, r"one-dimensional.*\(2, 1600\)"),
            (np.zeros(0), {"source_sampling_rate": RATE}, "holds no audio"),
            (np.full(9, np.nan), {"source_sampling_rate": RATE}, "NaN or infinite"),
        ],
    )
    def test_a_bad_source_is_refused_with_what_to_do(self, source, options, problem):
        with pytest.raises(ValueError, match=problem):
            decode_audio(source, RATE, **options)


ROWS = [
    {"file_name": "a/one.wav", "text": "1", "language": "en", "split": "train"},
    {"file_name": "a/two.wav", "text": "null, or \"none\"", "language": "en", "split": "test"},
    {"file_name": "a/drei.wav", "text": "drei", "language": "de", "split": "test"},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Three clips of 0.1, 0.2 and 0.3 seconds and no table."""
    root = tmp_path / "speech"
    (root / "a").mkdir(parents=True)
    for number, entry in enumerate(ROWS, 1):
        (root / entry["file_name"]).write_bytes(encode(tone(0.1 * number)))
    return root


def write_table(path: Path, rows=ROWS) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    else:
        with path.open("w", newline="") as file:
            plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
            writer = csv.DictWriter(file, list(rows[0]), **(plain if path.suffix == ".tsv" else {}))
            writer.writeheader()
            writer.writerows(rows)
    return path


class TestLoading:
    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_table_gives_its_split_decoded_with_text_and_language(self, folder, suffix, streaming):
        write_table(folder / f"metadata{suffix}")
        rows = load_speech_dataset(folder, "test", streaming=streaming)
        assert isinstance(rows, IterableDataset if streaming else Dataset)
        first, second = rows
        assert set(first) == {"audio", "text", "language"}
        assert (first["text"], first["language"], second["text"]) == ('null, or "none"', "en", "drei")
        assert first["audio"]["path"] == "a/two.wav"
        assert first["audio"]["sampling_rate"] == RATE
        np.testing.assert_array_equal(first["audio"]["array"], tone(0.2))

    def test_a_number_as_transcript_stays_text(self, folder):
        assert load_speech_dataset(write_table(folder / "table.csv"))[0]["text"] == "1"

    def test_all_takes_every_split(self, folder):
        assert len(load_speech_dataset(write_table(folder / "table.csv"), "all")) == 3

    @pytest.mark.parametrize("streaming", [False, True])
    def test_language_and_length_select_rows(self, folder, streaming):
        table = write_table(folder / "table.csv")
        german = load_speech_dataset(table, "test", language="de", streaming=streaming)
        assert [entry["text"] for entry in german] == ["drei"]
        short = load_speech_dataset(table, "all", max_seconds=0.25, streaming=streaming)
        assert [len(entry["audio"]["array"]) for entry in short] == [1600, 3200]
        first = load_speech_dataset(table, "all", max_samples=1, streaming=streaming)
        assert [entry["text"] for entry in first] == ["1"]

    def test_audio_is_resampled_to_the_rate_asked_for(self, folder):
        audio = load_speech_dataset(write_table(folder / "table.csv"), sampling_rate=8000)[0]["audio"]
        assert (len(audio["array"]), audio["sampling_rate"]) == (800, 8000)

    def test_each_split_may_have_its_own_folder_and_table(self, folder):
        (folder / "test").mkdir()
        (folder / "a" / "two.wav").rename(folder / "test" / "two.wav")
        write_table(folder / "test" / "metadata.csv", [{"file_name": "two.wav", "text": "two"}])
        (only,) = load_speech_dataset(folder, "test", language="en")
        assert (only["text"], only["language"], only["audio"]["path"]) == ("two", "en", "two.wav")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_audio_files_alone_are_recordings_without_text(self, folder, streaming):
        rows = list(load_speech_dataset(folder, text_column=None, streaming=streaming))
        assert [entry["audio"]["path"] for entry in rows] == ["a/drei.wav", "a/one.wav", "a/two.wav"]
        assert "text" not in rows[0]

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("where", ["file", "clone of a Hub data set"])
    def test_an_audio_feature_with_bytes_is_read_without_its_decoder(self, tmp_path, streaming, where):
        features = Features({"audio": Audio(sampling_rate=8000), "sentence": Value("string")})
        audio = [{"bytes": encode(tone(0.1 * n)), "path": f"{n}.wav"} for n in (1, 2)]
        table = pyarrow.table({"audio": audio, "sentence": ["one", "two"]})
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
        )
        path = tmp_path / "clone" / "data" / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(table, path)
        source = path if where == "file" else tmp_path / "clone"
        options = {"text_column": "sentence", "language": "en", "max_seconds": 0.15, "streaming": streaming}
        (only,) = load_speech_dataset(source, **options)
        assert (only["text"], only["language"], only["audio"]["path"]) == ("one", "en", "1.wav")
        np.testing.assert_array_equal(only["audio"]["array"], tone(0.1))

    def test_bare_arrays_take_the_rate_they_are_said_to_have(self):
        arrays = Dataset.from_dict({"audio": [tone(0.1, 8000).tolist()], "text": ["a"]})
        rows = prepare_speech_dataset(arrays, source_sampling_rate=8000, max_seconds=0.2)
        assert rows[0]["audio"]["array"].shape == (1600,)
        with pytest.raises(ValueError, match="does not tell its sampling rate"):
            prepare_speech_dataset(arrays)[0]

    def test_rows_survive_the_way_to_a_worker_process(self, folder):
        rows = load_speech_dataset(write_table(folder / "table.csv"))
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[0]["audio"]["array"], tone(0.1))

    def test_the_sample_in_this_repository_is_read(self):
        rows = load_speech_dataset(SAMPLE, "test", language="en")
        with (SAMPLE / "metadata.csv").open(encoding="utf-8") as file:
            entry = next(e for e in csv.DictReader(file) if (e["split"], e["language"]) == ("test", "en"))
        first = rows[0]
        assert (first["text"], first["audio"]["path"]) == (entry["text"], entry["file_name"])
        assert len(first["audio"]["array"]) / RATE == pytest.approx(float(entry["duration"]), abs=0.01)
        assert 0.01 < np.abs(first["audio"]["array"]).max() <= 1.0

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"split": "dev"}, r"`split` must be one of those in the data \(test, train\), got 'dev'"),
            ({"text_column": "sentence"}, "`text_column` must be one of file_name, text.*, got 'sentence'"),
            ({"audio_column": "clip"}, "`audio_column` must be one of .*, got 'clip'"),
            ({"language_column": "locale"}, "`language_column` must be one of .*, got 'locale'"),
            ({"language": "fr"}, r"`language` must be one of those in the data \(en\), got 'fr'"),
            ({"max_seconds": 0.01}, "no clip is left"),
        ],
    )
    def test_an_option_that_fits_nothing_is_named_with_what_there_is(self, folder, options, problem):
        table = write_table(folder / "table.csv")
        with pytest.raises(ValueError, match=problem):
            load_speech_dataset(table, **options)

    def test_a_missing_file_is_found_before_anything_is_read(self, folder):
        (folder / "a" / "one.wav").unlink()
        with pytest.raises(ValueError, match=r"1 of 1 audio files are missing in .*speech: a/one\.wav"):
            load_speech_dataset(write_table(folder / "table.csv"))

    def test_a_row_without_text_is_named(self, folder):
        table = write_table(folder / "t.jsonl", [{"file_name": "a/one.wav", "text": None}])
        with pytest.raises(ValueError, match=r"line 1 of .*t\.jsonl: 'text' must be text, got nothing"):
            load_speech_dataset(table)
        rows = prepare_speech_dataset(
            Dataset.from_dict({"audio": ["a/one.wav"], "text": [None]}), base_dir=folder
        )
        with pytest.raises(ValueError, match=r"a/one\.wav has no text"):
            rows[0]

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("t.csv", "file_name,text\na/one.wav\n", r"line 2 of .*t\.csv must have as many fields"),
            ("t.csv", "file_name,text\na/one.wav,a,b\n", r"line 2 of .*t\.csv must have as many fields"),
            ("t.csv", "file_name,text\n", r"t\.csv has no rows"),
            ("t.jsonl", '{"file_name": "a/one.wav"\n', r"line 1 of .*t\.jsonl must be a JSON object"),
            ("t.jsonl", "[1]\n", r"line 1 of .*t\.jsonl must be a JSON object"),
            ("t.xlsx", "", r"a table must be one of \.csv, .*, got .*t\.xlsx"),
        ],
    )
    def test_a_broken_table_is_refused_by_line(self, folder, name, content, problem):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=problem):
            load_speech_dataset(folder / name)

    def test_a_table_without_splits_has_only_train(self, folder):
        table = write_table(folder / "t.csv", [{"file_name": "a/one.wav", "text": "one"}])
        assert len(load_speech_dataset(table)) == 1
        with pytest.raises(ValueError, match=r"`split` must be 'train' or 'all'.* got 'test'"):
            load_speech_dataset(table, "test")

    @pytest.mark.parametrize("name", ["missing.csv", "/no/such/folder", "a/b/c"])
    def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(self, name):
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            load_speech_dataset(name)

    def test_a_hub_data_set_of_loose_files_is_refused_with_the_way_out(self, monkeypatch):
        monkeypatch.setattr(
            "hf_residual_transformer.speech.datasets.load_dataset_builder",
            lambda *_, **__: type("AudioFolder", (), {})(),
        )
        with pytest.raises(ValueError, match="refs/convert/parquet"):
            load_speech_dataset("someone/recordings")


def lengths(windows) -> list[int]:
    return [len(window) for window in windows]


class TestCalibration:
    clips = tuple(np.full(length, float(length), np.float32) for length in (3, 4, 5, 2))

    def test_packing_fills_windows_with_whole_clips_and_silence_between(self):
        windows = list(split_windows(self.clips, window=10, silence=1, pack=True))
        assert [window.tolist() for window in windows] == [
            [3, 3, 3, 0, 4, 4, 4, 4],
            [5, 5, 5, 5, 5, 0, 2, 2],
        ]

    def test_a_window_that_the_silence_would_overfill_is_closed(self):
        assert lengths(split_windows(self.clips, window=7, silence=1, pack=True)) == [3, 4, 5, 2]
        assert lengths(split_windows(self.clips, window=8, silence=1, pack=True)) == [8, 8]

    def test_without_packing_a_window_is_a_clip(self):
        assert lengths(split_windows(self.clips, window=10, silence=1, pack=False)) == [3, 4, 5, 2]

    @pytest.mark.parametrize("pack", [False, True])
    def test_a_clip_longer_than_a_window_is_cut_in_equal_parts(self, pack):
        long = np.arange(25, dtype=np.float32)
        windows = list(split_windows([long], window=10, silence=1, pack=pack))
        assert lengths(windows) == [9, 8, 8]
        np.testing.assert_array_equal(np.concatenate(windows), long)

    def test_whisper_gets_features_of_its_full_window_whatever_the_batch_size(self):
        extractor = whisper_processor().feature_extractor
        rows = [row(tone(seconds)) for seconds in (0.3, 0.4, 0.5, 1.5)]
        one, three = (calibration_batches(rows, extractor, batch_size=size) for size in (1, 3))
        assert [batch["input_features"].shape for batch in three] == [(3, 16, 100), (2, 16, 100)]
        for key in ("input_features",):
            assert torch.equal(torch.cat([b[key] for b in one]), torch.cat([b[key] for b in three]))
        packed = calibration_batches(rows, extractor, pack=True, silence_seconds=0.1)
        assert packed[0]["input_features"].shape == (4, 16, 100)
        assert len(calibration_batches(rows, extractor, num_windows=2, batch_size=1)) == 2

    def test_by_default_one_window_of_four_is_a_single_clip_and_the_others_are_full(self):
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
        options = {"num_windows": 4, "batch_size": 4, "window_seconds": 0.5, "silence_seconds": 0.1}
        (batch,) = calibration_batches((row(tone(0.2)) for _ in range(10)), extractor, **options)
        assert batch["attention_mask"].sum(dim=1).tolist() == [3200, 8000, 8000, 8000]

    def test_recordings_that_do_not_fill_the_windows_are_said(self, caplog):
        extractor = Wav2Vec2FeatureExtractor()
        calibration_batches([row(tone(0.5))] * 4, extractor, num_windows=3, pack=0.0)
        assert not caplog.text
        calibration_batches([row(tone(0.5))] * 4, extractor, num_windows=64, pack=0.0)
        assert "the recordings fill 4 of 64 windows, 2 seconds in all" in caplog.text

    def test_wav2vec2_gets_one_length_and_a_mask_of_what_was_said(self):
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
        rows = [row(tone(seconds)) for seconds in (0.3, 0.1, 0.2)]
        batches = calibration_batches(rows, extractor, batch_size=2)
        assert [batch["input_values"].shape for batch in batches] == [(2, 4800), (1, 4800)]
        assert [batch["attention_mask"].sum(dim=1).tolist() for batch in batches] == [[4800, 1600], [3200]]
        cut = calibration_batches(rows, extractor, window_seconds=0.15)
        assert cut[0]["attention_mask"].sum(dim=1).tolist() == [2400, 2400, 1600, 1600, 1600]

    @pytest.mark.parametrize(
        ("rows", "options", "problem"),
        [
            ([], {}, "has no rows"),
            ([row(tone())], {"num_windows": 0}, "`num_windows` must be at least 1, got 0"),
            ([row(tone())], {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
            (
                [row(tone())],
                {"window_seconds": 31},
                "`window_seconds` must be above 0 and at most 30, got 31",
            ),
            ([row(tone())], {"window_seconds": 0}, "`window_seconds` must be above 0"),
            ([row(tone())], {"pack": 2}, "`pack` must be from 0 to 1, got 2"),
            ([{"audio": {"array": tone(), "sampling_rate": 8000}}], {}, "model's rate of 16000 Hz, got 8000"),
            ([row(np.zeros(1600)), row(np.zeros(800))], {}, "calibration data is silent"),
        ],
    )
    def test_bad_arguments_are_refused(self, rows, options, problem):
        with pytest.raises(ValueError, match=problem):
            calibration_batches(rows, WhisperFeatureExtractor(), **options)


class TestCollators:
    def test_whisper_labels_lack_the_start_token_and_are_padded_by_minus_100(self):
        processor = whisper_processor()
        ids = processor.tokenizer.get_vocab()
        rows = [row(tone(), text="abc", language="en"), row(tone(0.2), text="a", language="zh")]
        batch = Seq2SeqCollator(processor)(rows)
        end, english = ids["<|endoftext|>"], ids["<|en|>"]
        chinese = english + 1  # Whisper numbers its languages from the start token on
        prefix = [ids["<|transcribe|>"], ids["<|notimestamps|>"]]
        assert batch["labels"].tolist() == [
            [english, *prefix, ids["a"], ids["b"], ids["c"], end],
            [chinese, *prefix, ids["a"], end, -100, -100],
        ]
        assert batch["input_features"].shape == (2, 16, 100)
        alone = processor.feature_extractor(tone(0.2), sampling_rate=RATE, return_tensors="pt")
        torch.testing.assert_close(batch["input_features"][1:], alone["input_features"])

    def test_language_and_task_may_be_set_for_all_rows(self):
        processor = whisper_processor()
        ids = processor.tokenizer.get_vocab()
        collate = Seq2SeqCollator(processor, language="english", task="translate")
        labels = collate([row(tone(), text="a", language="zh")])["labels"]
        assert labels.tolist() == [
            [ids["<|en|>"], ids["<|translate|>"], ids["<|notimestamps|>"], ids["a"], ids["<|endoftext|>"]]
        ]

    def test_an_english_only_whisper_has_no_language_and_task_in_its_labels(self):
        processor = whisper_processor()
        ids = processor.tokenizer.get_vocab()
        labels = Seq2SeqCollator(processor, multilingual=False)([row(tone(), text="a")])["labels"]
        assert labels.tolist() == [[ids["<|notimestamps|>"], ids["a"], ids["<|endoftext|>"]]]

    def test_labels_of_an_english_only_whisper_do_not_depend_on_how_its_processor_was_saved(self, tmp_path):
        processor = whisper_processor()
        plain = Seq2SeqCollator(processor, multilingual=False)([row(tone(), text="a")])["labels"]
        processor.tokenizer.set_prefix_tokens(language="german", task="translate", predict_timestamps=True)
        processor.save_pretrained(tmp_path)
        loaded = WhisperProcessor.from_pretrained(tmp_path)
        labels = Seq2SeqCollator(loaded, multilingual=False)([row(tone(), text="a", language="en")])["labels"]
        assert labels.tolist() == plain.tolist()

    def test_an_english_only_whisper_is_not_trained_on_another_language_or_task(self):
        for options in ({"language": "de"}, {"task": "translate"}):
            with pytest.raises(ValueError, match=r"must be English|must be 'transcribe'"):
                Seq2SeqCollator(whisper_processor(), multilingual=False, **options)
        with pytest.raises(ValueError, match="must be English for an English-only Whisper, got 'de'"):
            Seq2SeqCollator(whisper_processor(), multilingual=False)([row(tone(), text="a", language="de")])
        for language in ("en", "English", "eng", "en-US"):
            Seq2SeqCollator(whisper_processor(), language, multilingual=False)

    def test_ctc_labels_and_audio_are_padded_and_masked(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        vocabulary = processor.tokenizer.get_vocab()
        rows = [row(tone(0.1), text="a bad"), row(tone(0.2), text="cab")]
        batch = CTCCollator(processor)(rows)
        assert batch["labels"].tolist() == [
            [vocabulary[c] for c in "a|bad"],
            [*(vocabulary[c] for c in "cab"), -100, -100],
        ]
        assert batch["input_values"].shape == (2, 3200)
        assert batch["attention_mask"].tolist() == [[1] * 1600 + [0] * 1600, [1] * 3200]
        assert (batch["input_values"][0, 1600:] == 0).all()
        alone = processor.feature_extractor(tone(0.1), sampling_rate=RATE, return_tensors="pt")
        torch.testing.assert_close(batch["input_values"][:1, :1600], alone["input_values"])

    def test_a_ctc_text_outside_of_the_vocabulary_is_refused_or_normalised(self, tmp_path):
        processor = wav2vec2_processor(tmp_path)
        rows = [row(tone(), text="A Bad!")]
        with pytest.raises(ValueError, match="tokenizer has no '!AB', which is in 'A Bad!'"):
            CTCCollator(processor)(rows)
        normalized = CTCCollator(processor, normalize=lambda text: text.lower().strip("!"))(rows)
        assert (
            normalized["labels"].tolist()
            == CTCCollator(processor)([row(tone(), text="a bad")])["labels"].tolist()
        )

    def test_rows_without_text_give_inputs_alone(self, tmp_path):
        ctc, seq2seq = wav2vec2_processor(tmp_path), whisper_processor()
        assert set(CTCCollator(ctc)([row(tone())])) == {"input_values", "attention_mask"}
        assert set(Seq2SeqCollator(seq2seq)([row(tone())])) == {"input_features"}
        assert set(SpeechCollator(seq2seq.feature_extractor)([row(tone(), text="a")])) == {"input_features"}

    def test_a_collator_survives_the_way_to_a_worker_process(self, tmp_path):
        rows = [row(tone(), text="abc", language="en")]
        for collate in (Seq2SeqCollator(whisper_processor()), CTCCollator(wav2vec2_processor(tmp_path))):
            torch.testing.assert_close(pickle.loads(pickle.dumps(collate))(rows), collate(rows))

    @pytest.mark.parametrize(
        ("entry", "problem"),
        [
            (row(tone(), text="a"), "need a language"),
            (row(tone(), text="a", language="klingon"), "Unsupported language: klingon"),
            (row(tone(1.01), text="a", language="en"), r"clip\.wav must be of at most 1 seconds, got 1\.01"),
            (
                {"audio": {"array": tone(), "sampling_rate": 8000, "path": "a.wav"}},
                r"a\.wav must have .* 16000 Hz",
            ),
        ],
    )
    def test_rows_that_do_not_fit_whisper_are_refused(self, entry, problem):
        with pytest.raises(ValueError, match=problem):
            Seq2SeqCollator(whisper_processor())([entry])


def test_batched_leaves_nothing_out():
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]


@pytest.mark.pretrained
def test_labels_of_the_real_whisper_are_what_it_was_trained_on(monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLE.parent / "research"))
    from pretrained import resolve_pretrained

    processor = WhisperProcessor.from_pretrained(resolve_pretrained("openai/whisper-base"))
    rows = [row(tone(), text="Hello world.", language="en"), row(tone(), text="Hola.", language="spanish")]
    labels = Seq2SeqCollator(processor)(rows)["labels"].tolist()
    # <|en|>, <|transcribe|>, <|notimestamps|>, text, <|endoftext|> as numbered by openai/whisper
    assert labels[0] == [50259, 50359, 50363, 15947, 1002, 13, 50257]
    assert labels[1][:3] == [50262, 50359, 50363]
    assert labels[1][-1] in (50257, -100)
