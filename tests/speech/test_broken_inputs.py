"""Tables, folders and audio files as people have them: what is right is read, and what is not is named."""

from __future__ import annotations

import csv
import io
import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from datasets import Dataset, IterableDataset

from hf_residual_transformer.speech.audio import decode_audio, seconds_of
from hf_residual_transformer.speech.datasets import load_speech_dataset, prepare_speech_dataset
from hf_residual_transformer.speech.tables import read_table

RATE = 16_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def tone(seconds: float = 0.1, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


WAV = encode(tone())


def replaced(content: bytes, start: int, new: bytes) -> bytes:
    return content[:start] + new + content[start + len(new) :]


def without_length(content: bytes) -> bytes:
    """A FLAC file as an encoder writes it to a pipe: the number of samples, 36 bits, is 0."""
    return replaced(replaced(content, 21, bytes([content[21] & 0xF0])), 22, bytes(4))


def crc32_of_ogg(page: bytes) -> int:
    register = 0
    for byte in page:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1) ^ (0x104C11DB7 if register & 0x80000000 else 0)
    return register


def without_end_mark(content: bytes) -> bytes:
    """An Ogg file whose last page is not marked as the last, with the page's checksum made anew (RFC 3533)."""
    start = content.rfind(b"OggS")
    page = replaced(replaced(content[start:], 5, bytes([content[start + 5] & ~4])), 22, bytes(4))
    return content[:start] + replaced(page, 22, crc32_of_ogg(page).to_bytes(4, "little"))


@pytest.fixture
def folder(tmp_path):
    """Eight clips of 0.1 seconds."""
    root = tmp_path / "speech"
    root.mkdir()
    for number in range(8):
        (root / f"{number}.wav").write_bytes(encode(tone()))
    return root


class TestTables:
    def test_a_tsv_has_no_quoting(self, folder):
        sentences = ['"Yes', 'a "b" c', "'", '""', "plain", 'end"', '"', "x"]
        lines = [f"{number}.wav\t{text}" for number, text in enumerate(sentences)]
        (folder / "t.tsv").write_text("\n".join(["file_name\ttext", *lines]) + "\n")
        assert [row["text"] for row in load_speech_dataset(folder / "t.tsv")] == sentences

    def test_a_tsv_with_the_quotes_of_csv_is_read_as_it_is_and_says_so(self, folder, caplog):
        (folder / "t.tsv").write_text('file_name\ttext\n0.wav\t"say ""yes"""\n')
        assert load_speech_dataset(folder / "t.tsv")[0]["text"] == '"say ""yes"""'
        assert "line 2 of" in caplog.text and "write the table as .csv" in caplog.text

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
    def test_line_ends_marks_of_byte_order_and_empty_lines_change_nothing(self, folder, suffix, mark, end):
        if suffix == ".jsonl":
            lines = [
                json.dumps({"file_name": f"{n}.wav", "text": f"é{n}"}, ensure_ascii=False) for n in (0, 1)
            ]
        else:
            lines = [
                ("\t" if suffix == ".tsv" else ",").join(x)
                for x in (("file_name", "text"), ("0.wav", "é0"), ("1.wav", "é1"))
            ]
        table = folder / f"t{suffix}"
        table.write_bytes((mark + end.join([*lines, "", ""])).encode())
        assert [row["text"] for row in load_speech_dataset(table)] == ["é0", "é1"]

    def test_columns_without_a_name_are_left_out(self, folder):
        (folder / "t.tsv").write_text("file_name\ttext\t\t\n0.wav\ta\t\t\n")
        (folder / "t.csv").write_text(",file_name,text\n0,0.wav,a\n")
        for name in ("t.tsv", "t.csv"):
            assert load_speech_dataset(folder / name)[0]["text"] == "a"

    def test_a_quoted_field_may_hold_commas_quotes_and_line_breaks(self, folder):
        (folder / "t.csv").write_text('file_name,text\n0.wav,"a, ""b""\nc"\n1.wav,d\n')
        table = read_table(folder / "t.csv")
        assert [row["text"] for row in table.rows] == ['a, "b"\nc', "d"]
        assert table.lines == [2, 4]

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            (
                "t.csv",
                b'file_name,text\n0.wav,a\n1.wav,"b\n2.wav,c\n',
                r"row that starts in line 3.*close each quote",
            ),
            (
                "t.csv",
                b'file_name,text\n0.wav,"a\n1.wav,b"\n',
                r"lines 2 to 3 of .*t\.csv are one row with a quoted field",
            ),
            (
                "t.csv",
                b'file_name,text\n0.wav,"a" b\n',
                r"starts in line 2 .*write a quote within a quoted field twice",
            ),
            (
                "t.csv",
                b"file_name,text,text\n0.wav,a,b\n",
                r"line 1 of .*t\.csv has two columns called 'text'",
            ),
            (
                "t.tsv",
                b"file_name\ttext\ttext\n0.wav\ta\tb\n",
                r"line 1 of .*t\.tsv has two columns called 'text'",
            ),
            (
                "t.jsonl",
                b'{"file_name": "0.wav", "text": "a", "text": "b"}\n',
                r"line 1 of .*t\.jsonl .*\(a name is there twice",
            ),
            (
                "t.csv",
                b"file_name,text\n0.wav," + b"a" * 200_000 + b"\n",
                r"t\.csv .* line 2 \(field larger than",
            ),
            ("t.csv", "file_name,text\n0.wav,a\n".encode("utf-16"), r"t\.csv is in UTF-16.*UTF-8"),
            (
                "t.csv",
                "file_name,text\n0.wav,a\n".encode("utf-16-le"),
                r"line 1 of .*t\.csv has a NUL.*UTF-8",
            ),
            (
                "t.csv",
                "file_name,text\n0.wav,a\n1.wav,é\n".encode("cp1252"),
                r"line 3 of .*t\.csv is not UTF-8 \(byte 0xe9\).*iconv",
            ),
            ("t.tsv", b"file_name\ttext\n0.wav\ta\0b\n", r"line 2 of .*t\.tsv has a NUL"),
            ("t.csv", b"", r"t\.csv has no rows"),
            (
                "t.csv",
                b"file_name,text\n,a\n",
                r"line 2 of .*t\.csv: 'file_name' must be text that is not empty",
            ),
            (
                "t.jsonl",
                b'{"file_name": "0.wav", "text": "a"}\n\n{"file_name": "1", "text": 5}\n',
                r"line 3 of .*t\.jsonl: 'text' must be text, got 5",
            ),
            (
                "t.jsonl",
                b'{"file_name": "0.wav", "text": ["a"]}\n',
                r"line 1 of .*t\.jsonl: 'text' must be text, got \['a'\]",
            ),
            (
                "t.jsonl",
                b'{"file_name": null, "text": "a"}\n',
                r"line 1 of .*'file_name' must be text that is not empty, got nothing",
            ),
            (
                "t.jsonl",
                b'{"file_name": "0.wav"}\n{"file_name": "1.wav", "text": "a"}\n',
                r"line 1 of .*t\.jsonl: 'text' must be text, got nothing",
            ),
            (
                "t.jsonl",
                b'{"file_name": "0.wav", "text": "a"}\n{"file_name": "1.wav"}\n',
                r"line 2 of .*t\.jsonl: 'text' must be text, got nothing",
            ),
            (
                "t.jsonl",
                b'{"file_name": "0.wav", "text": "\\ud800"}\n',
                r"line 1 of .*t\.jsonl: 'text' must be text",
            ),
            ("t.jsonl", b"[" * 100_000 + b"\n", r"line 1 of .*t\.jsonl must be a JSON object"),
            ("t.jsonl", b'"file_name"\n', r"line 1 of .*t\.jsonl must be a JSON object"),
            (
                "t.jsonl",
                b'{"audio": {"path": "0.wav"}, "text": "a"}\n{"audio": "1.wav", "text": "b"}\n',
                r"line 1 of .*'audio' must be text",
            ),
            ("t.parquet", b"PAR1 no parquet PAR1", r"t\.parquet holds no recordings that can be read"),
        ],
    )
    def test_a_broken_table_is_named_with_its_line_and_what_to_do(self, folder, name, content, problem):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            load_speech_dataset(folder / name)

    def test_a_damaged_parquet_is_named(self, folder):
        table = folder / "t.parquet"
        rows = pyarrow.table({"file_name": ["0.wav"], "text": ["abcdefgh"]})
        pyarrow.parquet.write_table(
            rows, table, compression="none", use_dictionary=False, write_statistics=False
        )
        content = table.read_bytes()
        table.write_bytes(content.replace(b"abcdefgh", b"abc\xffefgh"))
        with pytest.raises(ValueError, match=r"t\.parquet holds no recordings that can be read .*UTF8"):
            load_speech_dataset(table)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_parquet_that_is_damaged_in_its_middle_is_named(self, folder, streaming):
        table = folder / "t.parquet"
        names, texts = [f"{n % 8}.wav" for n in range(1000)], [f"text {n:04d}" for n in range(1000)]
        pyarrow.parquet.write_table(
            pyarrow.table({"file_name": names, "text": texts}), table, row_group_size=50, compression="none"
        )
        assert [row["text"] for row in load_speech_dataset(table, streaming=streaming)] == texts
        content = table.read_bytes()
        table.write_bytes(replaced(content, content.index(b"text 0600") - 40, b"\xff" * 200))
        with pytest.raises(ValueError, match=r"t\.parquet holds no recordings that can be read"):
            list(load_speech_dataset(table, streaming=streaming))

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("columns", "problem"),
        [
            ((("text", "a"), ("text", "b")), r"t\.parquet has two columns called 'text'"),
            ((("text", "a"), ("split", None)), "a column `split` must have a value in it"),
        ],
    )
    def test_a_parquet_leaves_nothing_out_in_silence(self, folder, columns, problem, streaming):
        names = ["file_name", *(name for name, _ in columns)]
        values = [pyarrow.array([value], pyarrow.string()) for value in ("0.wav", *(x for _, x in columns))]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(values, names), folder / "t.parquet")
        with pytest.raises(ValueError, match=problem):
            load_speech_dataset(folder / "t.parquet", streaming=streaming)

    def test_a_row_of_a_parquet_without_audio_is_named(self, folder):
        rows = pyarrow.table({"file_name": ["0.wav", None], "text": ["a", "b"]})
        pyarrow.parquet.write_table(rows, folder / "t.parquet")
        with pytest.raises(ValueError, match="row 2 of the data has no audio"):
            load_speech_dataset(folder / "t.parquet")

    @pytest.mark.parametrize("suffix", [".tsv", ".csv"])
    def test_a_table_of_another_name_in_a_folder_is_not_read_by_other_rules(self, tmp_path, suffix):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / f"train{suffix}").write_text('file_name\ttext\n0.wav\t"a\n1.wav\tb"\n')
        with pytest.raises(ValueError, match=rf"no table called metadata; name the one .*train\{suffix}"):
            load_speech_dataset(tmp_path / "a")

    def test_a_row_without_a_split_is_not_left_out_in_silence(self, folder):
        rows = [{"file_name": "0.wav", "text": "a", "split": "train"}, {"file_name": "1.wav", "text": "b"}]
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ValueError, match=r"line 2 of .*'split' must be text, got nothing"):
            load_speech_dataset(folder / "t.jsonl")

    def test_what_is_not_read_may_be_anything(self, folder):
        rows = [{"file_name": "0.wav", "text": "a", "n": 1, "split": "train"},
                {"file_name": "1.wav", "text": None, "n": "x", "split": "test"}]  # fmt: skip
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert load_speech_dataset(folder / "t.jsonl")[0]["text"] == "a"
        assert len(load_speech_dataset(folder / "t.jsonl", "all", text_column=None)) == 2

    def test_a_folder_with_two_tables_is_refused(self, folder):
        for name in ("metadata.csv", "metadata.tsv"):
            (folder / name).write_text("file_name\n0.wav\n")
        with pytest.raises(ValueError, match=r"must have one table, got metadata\.csv, metadata\.tsv"):
            load_speech_dataset(folder)

    def test_one_column_cannot_have_two_meanings(self, folder):
        (folder / "t.csv").write_text("file_name,text\n0.wav,a\n")
        with pytest.raises(ValueError, match="`text_column` must not be `audio_column`, got 'file_name'"):
            load_speech_dataset(folder / "t.csv", text_column="file_name")

    @pytest.mark.parametrize("name", ["", "  "])
    def test_an_empty_name_is_not_the_current_folder(self, name):
        with pytest.raises(ValueError, match="`name_or_path` must be a data set id, a table or a folder"):
            load_speech_dataset(name)

    def test_a_pipe_in_the_place_of_a_table_does_not_hang(self, folder):
        os.mkfifo(folder / "t.csv")
        with pytest.raises(ValueError, match=r"t\.csv is a pipe or device"):
            load_speech_dataset(folder / "t.csv")

    @pytest.mark.parametrize(
        "options", [{"max_seconds": 0}, {"max_seconds": float("nan")}, {"max_samples": 0}]
    )
    def test_a_limit_that_leaves_nothing_is_refused(self, folder, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            load_speech_dataset(folder, text_column=None, **options)

    @pytest.mark.parametrize("options", [{"language": "fr"}, {"max_seconds": 0.01}])
    def test_a_stream_with_no_row_left_is_an_error(self, folder, options):
        (folder / "t.csv").write_text("file_name,text,language\n0.wav,a,en\n")
        with pytest.raises(ValueError, match="no clip is left to read"):
            load_speech_dataset(folder / "t.csv", streaming=True, **options)
        empty = IterableDataset.from_generator(lambda: iter(()))
        with pytest.raises(ValueError, match="has no rows"):
            prepare_speech_dataset(empty)

    def test_a_column_of_numbers_is_no_text(self, folder):
        rows = Dataset.from_dict({"audio": [str(folder / "0.wav")], "text": [5]})
        with pytest.raises(ValueError, match=r"column 'text' must hold text, got .*int64"):
            prepare_speech_dataset(rows)
        stream = IterableDataset.from_generator(lambda: iter([{"audio": str(folder / "0.wav"), "text": 5}]))
        with pytest.raises(ValueError, match=r"0\.wav has no text, but 5"):
            next(iter(prepare_speech_dataset(stream)))


class TestFolders:
    def test_recordings_of_other_formats_are_named_and_the_others_read(self, folder, caplog):
        (folder / "talk.m4a").write_bytes(b"x")
        assert len(load_speech_dataset(folder, text_column=None)) == 8
        assert "1 of 9 recordings" in caplog.text and "talk.m4a" in caplog.text and "ffmpeg" in caplog.text

    def test_a_folder_of_other_formats_alone_says_what_to_do(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "talk.M4A").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"1 of 1 recordings .* are not read, such as talk\.M4A.*ffmpeg"):
            load_speech_dataset(tmp_path / "a", text_column=None)

    def test_an_empty_folder_says_what_it_must_have(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(ValueError, match="holds no recordings that can be read"):
            load_speech_dataset(tmp_path / "a", text_column=None)

    def test_what_macos_writes_beside_files_and_folders_called_wav_are_no_audio(self, folder, caplog):
        (folder / "._0.wav").write_bytes(b"\0\5\x16\7")
        (folder / ".git").mkdir()
        (folder / ".git" / "b.wav").write_bytes(b"x")
        (folder / "x.wav").mkdir()
        (folder / "x.wav" / "y.wav").write_bytes(encode(tone()))
        paths = [row["audio"]["path"] for row in load_speech_dataset(folder, text_column=None)]
        assert paths == [*(f"{n}.wav" for n in range(8)), "x.wav/y.wav"]
        assert not caplog.text

    def test_loops_broken_links_and_pipes_are_named(self, folder, caplog):
        (folder / "again").symlink_to(folder)
        (folder / "broken.wav").symlink_to(folder / "nothing.wav")
        (folder / "loop.wav").symlink_to(folder / "loop.wav")
        os.mkfifo(folder / "pipe.wav")
        assert len(load_speech_dataset(folder, text_column=None)) == 8
        assert "4 of 12 recordings" in caplog.text


class TestOutside:
    @pytest.fixture
    def outside(self, tmp_path):
        path = tmp_path / "private.wav"
        path.write_bytes(encode(tone()))
        return path

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        "name",
        ["{parent}/private.wav", "../private.wav", "a/../../private.wav", "file://{parent}/private.wav"],
    )
    def test_a_table_reads_outside_of_its_folder_only_if_it_may(self, folder, outside, name, streaming):
        written = name.format(parent=outside.parent)
        (folder / "a").mkdir()
        (folder / "t.csv").write_text(f"file_name,text\n{written},a\n")
        with pytest.raises(ValueError, match=r"which is a URL or outside of its folder .*--outside-files"):
            list(load_speech_dataset(folder / "t.csv", streaming=streaming))
        (row,) = load_speech_dataset(folder / "t.csv", streaming=streaming, outside_files=True)
        assert row["audio"]["array"].shape == tone().shape

    def test_no_address_is_fetched_unless_allowed(self, folder, monkeypatch):
        (folder / "t.csv").write_text("file_name,text\nhttp://127.0.0.1:9/a.wav,a\n")
        fetched = []
        monkeypatch.setattr("fsspec.open", lambda name, mode: fetched.append(name) or io.BytesIO())
        for options in ({}, {"max_seconds": 1.0}, {"streaming": True, "max_seconds": 1.0}):
            with pytest.raises(ValueError, match=r"'http://127\.0\.0\.1:9/a\.wav', which is a URL"):
                list(load_speech_dataset(folder / "t.csv", **options))
        assert fetched == []
        with pytest.raises(ValueError, match="is an empty file"):
            load_speech_dataset(folder / "t.csv", outside_files=True)[0]
        assert fetched == ["http://127.0.0.1:9/a.wav"]

    def test_paths_that_stay_inside_are_read(self, folder):
        (folder / "a").mkdir()
        names = ["0.wav", "./1.wav", "a/../2.wav", str(folder / "3.wav")]
        (folder / "t.csv").write_text("file_name,text\n" + "".join(f"{name},a\n" for name in names))
        assert len(list(load_speech_dataset(folder / "t.csv"))) == 4

    def test_a_data_set_of_ones_own_names_any_file(self, folder):
        rows = Dataset.from_dict({"audio": [str(folder / "0.wav")], "text": ["a"]})
        assert len(prepare_speech_dataset(rows)[0]["audio"]["array"]) == 1600

    def test_a_missing_package_for_addresses_is_named(self, monkeypatch):
        def needs_more(*_, **__):
            raise ImportError("HTTPFileSystem requires aiohttp")

        monkeypatch.setattr("fsspec.open", needs_more)
        with pytest.raises(ValueError, match=r'pip install "fsspec\[http\]"'):
            decode_audio("https://somewhere/a.wav", RATE)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"nothing://a\.wav cannot be read"):
            decode_audio("nothing://a.wav", RATE)


class TestContainers:
    @pytest.mark.parametrize(
        "content",
        [
            *(replaced(WAV, 4, (len(WAV) - 8 + off).to_bytes(4, "little")) for off in (-4, -1, 1, 5, 100)),
            replaced(WAV, 4, bytes(4)),
            replaced(replaced(WAV, 4, bytes(4)), 40, bytes(4)),
            replaced(replaced(WAV, 4, b"\xff" * 4), 40, b"\xff" * 4),
        ],
        ids=["-4", "-1", "1", "5", "100", "no RIFF size", "killed recorder", "pipe"],
    )
    def test_a_wav_whose_samples_are_all_there_is_read_whatever_its_size_says(self, content):
        np.testing.assert_array_equal(decode_audio(content, RATE), decode_audio(WAV, RATE))

    @pytest.mark.parametrize("rate", [8_000, 44_100])
    def test_an_mp3_that_does_not_count_its_frames_is_not_read_in_part(self, rate):
        noise = np.random.default_rng(0).standard_normal(2 * rate).astype(np.float32) / 5
        content = encode(np.concatenate([0 * noise, noise]), rate, format="MP3", subtype="MPEG_LAYER_III")
        assert seconds_of(content, "a") == 4
        uncounted = content.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))
        for read in (decode_audio, seconds_of):
            with pytest.raises(ValueError, match=r"does not say how many frames .* of its 4\.\d\d seconds"):
                read(uncounted, rate if read is decode_audio else "a")

    def test_an_empty_wav_with_tags_after_it_is_empty(self):
        empty = encode(tone()[:0]) + b"LIST" + (4).to_bytes(4, "little") + b"INFO"
        with pytest.raises(ValueError, match="holds no audio"):
            decode_audio(replaced(empty, 4, (len(empty) - 8).to_bytes(4, "little")), RATE)

    def test_a_flac_that_does_not_know_its_length_is_read_and_measured(self, tmp_path):
        content = encode(tone(1.0), format="FLAC")
        piped = without_length(content)
        np.testing.assert_array_equal(decode_audio(piped, RATE), decode_audio(content, RATE))
        assert seconds_of(piped, "a") == 1.0
        (tmp_path / "a.flac").write_bytes(piped)
        for streaming in (False, True):
            options = {"text_column": None, "streaming": streaming}
            assert len(list(load_speech_dataset(tmp_path, max_seconds=1.0, **options))) == 1
            with pytest.raises(ValueError, match="no clip is left"):
                load_speech_dataset(tmp_path, max_seconds=0.9, **options)
        for length in (len(piped) // 2, len(piped) - 10):
            with pytest.raises(ValueError, match="damaged or cut off"):
                decode_audio(piped[:length], RATE)

    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    def test_an_ogg_without_the_mark_of_its_end_is_read_and_said(self, subtype, caplog):
        content = encode(tone(2.0), format="OGG", subtype=subtype)
        np.testing.assert_array_equal(
            decode_audio(without_end_mark(content), RATE), decode_audio(content, RATE)
        )
        assert "has no mark of its end" in caplog.text

    @pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
    def test_an_ogg_with_a_damaged_page_is_refused(self, subtype):
        noise = np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32) / 5
        content = encode(noise, format="OGG", subtype=subtype)
        unmarked, last = without_end_mark(content), content.rfind(b"OggS") + 40
        for whole, place in ((content, len(content) // 2), (content, last), (unmarked, last)):
            with pytest.raises(ValueError, match=r"is cut off or damaged|is damaged or cut off"):
                decode_audio(replaced(whole, place, bytes([whole[place] ^ 1])), RATE)

    @pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "MS_ADPCM", "ULAW"])
    def test_wav_with_other_codecs_is_read_whole_and_refused_cut(self, subtype):
        content = encode(tone(1.0, 8000), 8000, subtype=subtype)
        samples = decode_audio(content, 8000)
        assert 0 <= len(samples) - 8000 < 1024  # whole blocks
        assert np.corrcoef(samples[1000:7000], tone(1.0, 8000)[1000:7000])[0, 1] > 0.9
        with pytest.raises(ValueError, match="is cut off or damaged"):
            decode_audio(content[:-10], 8000)

    @pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "AIFF", "AU"])
    def test_each_container_of_plain_samples_is_refused_cut(self, format):
        content = encode(tone(), format=format)
        np.testing.assert_array_equal(decode_audio(content, RATE), decode_audio(WAV, RATE))
        for length in (len(content) // 2, len(content) - 10, len(content) - 2):
            with pytest.raises(ValueError, match="is cut off or damaged"):
                decode_audio(content[:length], RATE)

    def test_samples_beyond_the_size_in_the_header_are_said(self, caplog):
        decode_audio(replaced(WAV, 40, (800).to_bytes(4, "little")), RATE)
        assert "bytes after its 0.03 seconds that are not read" in caplog.text
        caplog.clear()
        decode_audio(WAV + b"LIST" + (4).to_bytes(4, "little") + b"INFO", RATE)
        decode_audio(WAV + bytes(512), RATE)
        assert not caplog.text

    def test_aiff_and_au_that_leave_samples_out_are_refused_or_said(self, caplog):
        aiff, au = encode(tone(), format="AIFF"), encode(tone(), format="AU")
        offset = aiff.index(b"SSND") + 8
        with pytest.raises(ValueError, match="is cut off or damaged"):
            decode_audio(replaced(aiff, offset, (800).to_bytes(4, "big")), RATE)
        decode_audio(replaced(au, 8, (800).to_bytes(4, "big")), RATE)
        assert "bytes after its 0.03 seconds that are not read" in caplog.text

    def test_an_rf64_whose_long_size_is_too_small_says_so_and_one_too_large_is_refused(self, caplog):
        content = encode(tone(), format="RF64")
        np.testing.assert_array_equal(decode_audio(content, RATE), decode_audio(WAV, RATE))
        assert not caplog.text
        size = content.index(b"ds64") + 16
        decode_audio(replaced(content, size, (800).to_bytes(8, "little")), RATE)
        assert "bytes after its 0.03 seconds that are not read" in caplog.text
        with pytest.raises(ValueError, match="is cut off or damaged"):
            decode_audio(replaced(content, size, (8000).to_bytes(8, "little")), RATE)

    @pytest.mark.parametrize("rate", [2**31 - 1, 12_000_000, 1, 999])
    def test_a_rate_that_no_recording_has_is_refused_before_it_is_resampled(self, rate):
        with pytest.raises(ValueError, match=f"must be a whole number of Hz from 1000 to 768000, got {rate}"):
            decode_audio(replaced(WAV, 24, rate.to_bytes(4, "little")), RATE)
        with pytest.raises(ValueError, match=r"must be a whole number of Hz|is not audio"):
            seconds_of(replaced(WAV, 24, rate.to_bytes(4, "little")), "a")

    @pytest.mark.parametrize("rate", [-8000, 8000.0, "16000", True, 0, 2**40, float("nan")])
    def test_a_rate_must_be_a_whole_number(self, rate):
        for source, options in (
            ({"array": tone(), "sampling_rate": rate}, {}),
            (tone(), {"source_sampling_rate": rate}),
        ):
            with pytest.raises(ValueError, match="must be a whole number of Hz"):
                decode_audio(source, RATE, **options)
        with pytest.raises(ValueError, match="`sampling_rate` must be a whole number of Hz"):
            decode_audio(tone(), rate, source_sampling_rate=RATE)

    @pytest.mark.parametrize("name", ["a::b.wav", "a b#c?.wav", "é.wav", "a%20b.wav", "zip:x.wav"])
    def test_a_file_may_have_any_name(self, tmp_path, name):
        (tmp_path / name).write_bytes(WAV)
        assert decode_audio(tmp_path / name, RATE).shape == tone().shape
        assert load_speech_dataset(tmp_path, text_column=None)[0]["audio"]["path"] == name

    def test_pipes_folders_devices_and_odd_paths_are_refused_at_once(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.wav")
        (tmp_path / "folder.wav").mkdir()
        (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
        for name in ("pipe.wav", "folder.wav"):
            with pytest.raises(ValueError, match="is a folder, pipe or device"):
                decode_audio(tmp_path / name, RATE)
        for path in ("/dev/zero", tmp_path / "loop.wav", "a\0b.wav", "a" * 5000, tmp_path / "none.wav"):
            with pytest.raises(ValueError, match=r"cannot be read|is a folder, pipe or device"):
                decode_audio(path, RATE)

    @pytest.mark.parametrize("source", [None, 5, {"path": None}, [[1.0], [2.0, 3.0]], ["a"], {}, [None]])
    def test_what_is_no_audio_at_all_is_a_value_error(self, source):
        with pytest.raises(ValueError, match=r"must|write it again"):
            decode_audio(source, RATE, source_sampling_rate=RATE)

    def test_values_beyond_float32_are_not_finite(self):
        with pytest.raises(ValueError, match="NaN or infinite"):
            decode_audio(np.full(1600, 1e300), RATE, source_sampling_rate=RATE)


def test_a_table_of_our_own_writing_is_read_back(folder):
    texts = ["a", "b, c", 'd "e"', " f ", "", "null", "1.0", "é\u2028x"]
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "text"), *((f"{n}.wav", text) for n, text in enumerate(texts))])
    assert [row["text"] for row in load_speech_dataset(folder / "t.csv")] == texts
