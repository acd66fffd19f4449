"""Rows: every format returns the rows that were written, and skipped files are named."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_core.data.documents import load_documents
from lm_core.data.jsonl import read_json_lines
from lm_core.data.rows import iterate_rows, load_rows

ROWS = [{"prompt": "a", "response": "b\u2028c"}, {"prompt": "naïve", "response": "line\nbreak"}]


def _write(folder: Path, form: str) -> Path:
    path = folder / f"rows.{form}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    if form == "jsonl":
        path.write_text(lines, encoding="utf-8", newline="")
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif form == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif form in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        dataset = pytest.importorskip("datasets").Dataset.from_list(ROWS)
        if form == "parquet":
            dataset.to_parquet(path)
        else:
            dataset.save_to_disk(path)
            path = next(path.glob("*.arrow")) if form == "arrow" else path
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet", "arrow", "saved"])
def test_every_format_gives_the_rows_that_were_written(form, tmp_path):
    assert load_rows(_write(tmp_path, form)) == ROWS


def test_several_files_a_glob_and_a_folder_are_read_in_order_without_hidden_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", ".cache/c.jsonl", "__MACOSX/d.jsonl", "._a.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    expected = [{"text": "a.jsonl"}, {"text": "b.jsonl"}]
    assert load_rows(tmp_path) == load_rows(str(tmp_path / "*.jsonl")) == expected
    assert load_rows([tmp_path / "b.jsonl", tmp_path / "a.jsonl"]) == expected[::-1]


def test_a_pattern_leaves_out_hidden_files_and_counts_other_formats(tmp_path):
    for name in ("a.txt", "b/c.txt", "__MACOSX/d.txt", "__pycache__/e.pyc", "picture.png", ".ipynb_checkpoints/f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert [row["text"] for row in load_rows(str(tmp_path / "**" / "*.txt"))] == ["a.txt", "b/c.txt"]
    with pytest.warns(UserWarning, match=r"1 file\(s\) passed over: .*picture.png"):
        assert [row["text"] for row in load_rows(str(tmp_path / "*"))] == ["a.txt", "b/c.txt"]
    with pytest.raises(ValueError, match=r"\.png is not read"):
        load_rows(str(tmp_path / "*.png"))


def test_frames_and_tables_are_read_as_rows():
    rows = [{"prompt": "a", "margin": 0.5}, {"prompt": "b", "margin": None}]
    assert load_rows(pytest.importorskip("pyarrow").Table.from_pylist(rows)) == rows
    assert load_rows(pytest.importorskip("pandas").DataFrame(rows)) == rows


def test_files_passed_over_are_counted_and_named(tmp_path):
    for name in ("a.txt", "picture.png", "notes.docx"):
        (tmp_path / name).write_bytes(b"text")
    with pytest.warns(UserWarning, match=r"2 file\(s\) passed over: notes.docx, picture.png"):
        assert load_rows(tmp_path) == [{"text": "text"}]


def test_a_text_file_is_one_row_or_a_row_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\u2028still one\r\n\r\ntwo\x0b\n".encode())
    assert load_rows(path) == [{"text": path.read_bytes().decode()}]
    assert load_rows(path, text_rows="line") == [{"text": "one\u2028still one"}, {"text": "two\x0b"}]


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(suffix, tmp_path):
    content = {"txt": "Zürich", "csv": "text\nZürich\n", "tsv": "text\nZürich\n", "jsonl": '{"text": "Zürich"}\n'}[
        suffix
    ]
    path = tmp_path / f"a.{suffix}"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(content, encoding=encoding)
        assert load_rows(path) == [{"text": "Zürich"}]


# what people's texts hold: separators of Unicode and ASCII, quotes, delimiters, control characters, marks
SPECIAL = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\"',;\t\r\n\\ \ufeff\U0001f642"
CELLS = st.text(st.sampled_from(SPECIAL + "ab1") | st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
VALUES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | CELLS
UNCHANGED = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(rows=st.lists(st.dictionaries(CELLS, st.recursive(VALUES, st.lists, max_leaves=4), min_size=1), min_size=1))
@UNCHANGED
def test_random_json_lines_are_read_as_json_reads_them(rows, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert load_rows(path) == load_rows(path) == [json.loads(line) for line in lines]
    assert [where for where, _ in iterate_rows(path)] == [f"{path}, line {n + 1}," for n in range(len(rows))]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1))
@UNCHANGED
def test_random_tables_are_read_as_csv_reads_them(quoting, rows, tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, quoting=quoting).writerows([("prompt", "response"), *rows])
    with path.open(encoding="utf-8", newline="") as stream:
        expected = list(csv.DictReader(stream, strict=True))
    assert load_rows(path) == load_rows(path) == expected


@given(lines=st.lists(st.text(st.sampled_from(SPECIAL.replace("\r", "").replace("\n", "") + "ab1")), min_size=1))
@UNCHANGED
def test_random_lines_end_at_line_feeds_only(lines, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\r\n".join(["first", *lines]).encode())
    expected = [{"text": line} for line in ["first", *lines] if line.strip()]
    assert load_rows(path, text_rows="line") == expected


def test_a_lone_surrogate_is_named_where_a_tokenizer_cannot_encode_it():
    class Words:
        def encode(self, text):
            return [len(word) for word in text.split()]

    assert load_documents(["a\ud800b"]).num_tokens == 5
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800'"):
        load_documents(["fine", "a\ud800b"], tokenizer=Words())


def test_quotes_in_a_tsv_stand_as_they_are_unless_a_program_wrote_them(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('image\ttext\n1.png\t"Stop" sign\n2.png\t"open\n3.png\tplain\n4.png\t"a ""b"" c"\n')
    assert [row["text"] for row in load_rows(path)] == ['"Stop" sign', '"open', "plain", 'a "b" c']
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_ALL).writerows([["image", "text"], ["1.png", "Stop"]])
    assert load_rows(path) == [{"image": "1.png", "text": "Stop"}]


def test_a_mapping_of_columns_is_read_as_rows():
    assert load_rows({name: [row[name] for row in ROWS] for name in ROWS[0]}) == ROWS
    with pytest.raises(TypeError, match=r"columns that are lists of one length.*\{'a': 1, 'b': 2\}"):
        load_rows({"a": [1], "b": [1, 2]})


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("here")
    assert load_rows("~/a.txt") == load_rows("~/*.txt") == [{"text": "here"}]


def test_python_objects_pass_as_they_are():
    class Indexed:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return ROWS[index]

    assert load_rows(iter(ROWS)) == load_rows(ROWS) == load_rows(Indexed()) == ROWS
    assert [where for where, _ in iterate_rows(["a"])] == ["source[0]"]


def test_a_split_of_a_saved_dictionary_of_datasets_is_chosen(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved", split="test") == ROWS
    with pytest.raises(ValueError, match=r"must have the split 'train', it has \['test'\]"):
        load_rows(tmp_path / "saved")


def test_a_last_line_cut_short_by_a_kill_is_left_out_on_request(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a":')
    assert list(read_json_lines(path, torn_end=True)) == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(ValueError, match="line 3, is not JSON"):
        list(read_json_lines(path))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.pdf", b"%PDF", ValueError, r"\.pdf is not read. Convert it \(pdftotext a.pdf a.pdf.txt\)"),
        ("a.jsonl.zst", b"", ValueError, r"\.zst is not read. Convert it \(zstd -d a.jsonl.zst\)"),
        ("a.strange", b"", ValueError, "write it as .jsonl"),
        ("a.txt", b"a\0b", ValueError, "zero bytes.*bytes:"),
        ("a.jsonl", b'{"a": 1}\n\n[3\n', ValueError, "a.jsonl, line 3, is not JSON"),
        ("a.json", b'[{"a": 1}', ValueError, "a.json, line 1, is not JSON"),
        (
            "a.jsonl",
            b"[" * 100_000 + b"]" * 100_000,
            ValueError,
            "a.jsonl, line 1, is not read: its JSON is nested too",
        ),
        ("a.jsonl", '{"a": "naïve"}'.encode("latin-1"), ValueError, "a.jsonl, line 1, is not UTF-8 .*iconv -f LATIN1"),
        ("a.txt", "naïve".encode("latin-1"), ValueError, r"a.txt is not UTF-8 \(byte 2: .*iconv -f LATIN1"),
        ("a.csv", "a\nnaïve".encode("latin-1"), ValueError, "a.csv is not UTF-8"),
        ("a.csv", b"a,b\n1,2,3\n", ValueError, "a.csv, line 2, has 3 fields, the header 2"),
        ("a.csv", b'a,b\n"Stop" sign,2\n', ValueError, "a.csv, line 2, is no CSV"),
        ("a.csv", b"a,a\n1,2\n", ValueError, "a.csv, line 1, must name each column once"),
        ("a.tsv", b"a\tb\n1\t2\t3\n", ValueError, "a.tsv, line 2, has 3 fields, the header 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, error, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_rows(tmp_path / name)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nothing-here.jsonl", FileNotFoundError, "does not exist: nothing-here.jsonl"),
        ("nothing*here.txt", FileNotFoundError, "no file matches"),
        (3, TypeError, "got int"),
        ({"prompt": "a"}, TypeError, r"a mapping of \['prompt'\]"),
    ],
)
def test_a_source_that_is_none_is_named(source, error, message):
    with pytest.raises(error, match=message):
        load_rows(source)


def test_a_hub_name_that_cannot_be_had_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match="some/dataset; nor does the hub give it: no network"):
        load_rows("some/dataset")
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: {"train": [list(name)]})
    assert load_rows("some/dataset:main") == [["some/dataset", "main"]]
