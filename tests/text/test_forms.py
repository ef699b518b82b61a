"""Every form of text that `--text` takes, and what is refused with file, record and byte."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from cramlab.errors import TextError
from cramlab.text import Corpus, Document, corpus_of, read_corpus
from cramlab.text.corpus import joined

TEXTS = ["one", "two\nlines", "three"]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


def texts(*sources, **options):
    return [document.text for document in read_corpus(*sources, **options).documents]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def given(monkeypatch):
    """Puts bytes on standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def parquet(path, **columns):
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table(columns), path)
    return path


def test_a_pattern_is_its_files_in_order_and_one_that_matches_nothing_is_refused(tmp_path):
    for name in ("b/one.md", "a/two.md", "a/c/three.md", "a/four.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}<|endoftext|>end")
    found = read_corpus(f"{tmp_path}/**/*.md")
    assert [document.name for document in found.documents] == [
        f"{tmp_path}/{name}" for name in ("a/c/three.md", "a/two.md", "b/one.md")
    ]
    assert found.documents[1].text == "a/two.md<|endoftext|>end"  # a file found is one document, as in a folder
    with pytest.raises(TextError, match=r"matches no file.*quote it"):
        read_corpus(f"{tmp_path}/*.rst")


def test_standard_input_is_json_lines_or_one_text(given):
    given(lines({"text": text} for text in TEXTS).encode())
    assert texts("-") == TEXTS
    given("\ufeffone\r\ntext<|endoftext|>another".encode())
    assert texts("-") == ["one\ntext", "another"]
    given(b"a\n\xff")
    with pytest.raises(TextError, match=r"standard input, line 2: is not UTF-8 text .* at byte 2"):
        read_corpus("-")
    given(b"")
    with pytest.raises(TextError, match="holds no document"):
        read_corpus("-")


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.ndjson", "d.JSONL", "d.json", "d.json.gz", "d.parquet"])
def test_records_of_every_form_are_the_same_documents(name, tmp_path):
    path, records = tmp_path / name, [{"id": i, "content": text} for i, text in enumerate(TEXTS)]
    if name.endswith(".parquet"):
        parquet(path, id=[0, 1, 2], content=TEXTS)
    else:
        data = (json.dumps(records) if ".json" in name and "jsonl" not in name.lower() else lines(records)).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = read_corpus(path)
    assert found.documents == tuple(Document(f"{name}:{i}", text) for i, text in enumerate(TEXTS))
    assert found.notes == ('texts are taken from the field "content"; the others (id) are not read',)


def test_a_gzipped_text_is_its_text_and_a_cut_one_is_refused(tmp_path):
    path = tmp_path / "d.txt.gz"
    path.write_bytes(gzip.compress(b"one<|endoftext|>two"))
    assert texts(path) == ["one", "two"]
    assert texts(tmp_path) == ["one<|endoftext|>two"]
    for damaged in (path.read_bytes()[:-9], b"one", path.read_bytes()[:12] + b"\xff" * 20):
        path.write_bytes(damaged)
        with pytest.raises(TextError, match=r"d\.txt\.gz is no whole gzip file"):
            read_corpus(path)


def test_a_folder_gives_its_texts_and_records_but_no_settings(tmp_path):
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "b.jsonl").write_text(lines([{"text": "two"}, {"text": " "}, {"text": "three"}]))
    (tmp_path / "c.json").write_text('{"indent": 4}')
    found = read_corpus(tmp_path)
    assert [(d.name, d.text) for d in found.documents] == [
        ("a.md", "one"),
        ("b.jsonl:0", "two"),
        ("b.jsonl:2", "three"),
    ]
    assert found.notes[1].endswith("1 blank documents are left out")


def test_several_sources_are_read_in_turn(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    found = read_corpus(tmp_path / "b.txt", tmp_path / "a.txt")
    assert (found.name, [d.text for d in found.documents]) == ("b.txt and a.txt", ["b.txt", "a.txt"])
    assert corpus_of([tmp_path / "b.txt", tmp_path / "a.txt"]) == found
    assert corpus_of(str(tmp_path / "a.txt")) == read_corpus(tmp_path / "a.txt")
    assert [d.text for d in corpus_of(["one", "two"]).documents] == ["one", "two"]
    with pytest.raises(TextError, match=r"holds paths, such as .*a\.txt.*pathlib\.Path"):
        corpus_of([str(tmp_path / "a.txt")])
    with pytest.raises(TextError, match="at least one text"):
        corpus_of(["one", Path("two")])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a", "messages": CHAT},
            "line 1: has the fields text and messages, each of which .*--text-field text",
        ),
        ({"body": "a", "id": 1}, "line 1: has none of the fields text, .* but only body, id; .*--text-field NAME"),
    ],
)
def test_a_field_that_is_not_clear_is_asked_for(record, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(lines([record]))
    with pytest.raises(TextError, match=message):
        read_corpus(path)
    assert texts(path, field=next(iter(record))) == ["a"]
    with pytest.raises(TextError, match=r'd\.jsonl, line 1: has no field "txt" but only'):
        read_corpus(path, field="txt")
    table = parquet(tmp_path / "d.parquet", **{name: [str(value)] for name, value in record.items()})
    with pytest.raises(TextError, match=message.replace("line 1", r"d\.parquet")):
        read_corpus(table)


def test_the_field_of_the_first_record_is_that_of_all(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(lines([{"text": "a"}, {"content": "b"}]))
    with pytest.raises(TextError, match=r'line 2: has no field "text" but only content'):
        read_corpus(path)


def test_conversations_are_messages_of_either_name(tmp_path):
    path = tmp_path / "d.jsonl"
    sharegpt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    parts = [
        CHAT[0],
        {"role": "assistant", "content": [{"type": "text", "text": "good "}, {"type": "text", "text": "day"}]},
    ]
    for field, messages in (("messages", CHAT), ("conversations", sharegpt), ("messages", parts)):
        path.write_text(lines([{"id": 7, field: messages}]))
        (document,) = read_corpus(path).documents
        assert document.messages == tuple(CHAT)
        assert document.text == joined(CHAT) == "user: hello\n\nassistant: good day"
    table = parquet(tmp_path / "d.parquet", messages=[CHAT])
    assert read_corpus(table).documents[0].messages == tuple(CHAT)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "message 1 has the fields role, but a message has role and content"),
        ([CHAT[0], {"role": "user", "content": 3}], r'message 2: "content" is 3 and not text'),
        ([{"role": "user", "content": [{"type": "image"}]}], '"content" is .* and not text; leave such messages out'),
        ([{"role": 1, "content": "a"}], '"role" is 1 and not a string'),
        (["a"], "is .* and not a string, nor a list of messages"),
        ([], "is .* and not a string, nor a list of messages"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(lines([{"messages": messages}]))
    with pytest.raises(TextError, match=rf"d\.jsonl, line 1: .*{message}"):
        read_corpus(path)


def test_conversations_are_written_as_the_template_does_or_refused():
    corpus = Corpus("c", (Document("c:0", joined(CHAT), tuple(CHAT)), Document("c:1", "plain")))
    shout = corpus.written(lambda messages: "".join(f"<{m['role']}>{m['content']}" for m in messages))
    assert [d.text for d in shout.documents] == ["<user>hello<assistant>good day", "plain"]
    assert shout.digest != corpus.digest
    with pytest.raises(TextError, match="tokenizer has no chat template; join them as plain text with --chat plain"):
        corpus.written(None)
    assert corpus.written(None, "plain").documents == corpus.documents
    with pytest.raises(TextError, match=r"chat\) = \"loud\" is unknown"):
        corpus.written(None, "loud")

    def refuse(messages):
        raise ValueError("roles must alternate")

    with pytest.raises(
        TextError, match=r"c:0: the tokenizer's chat template refuses .*roles must alternate.*--chat plain"
    ):
        corpus.written(refuse)
    plain = Corpus("c", (Document("c:1", "plain"),))
    assert plain.written(None) is plain


def test_a_tokenizers_own_template_is_applied():
    from families import build
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from cramlab.hf.loading import with_tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert with_tokenizer("m", build("llama"), tokenizer, "", "m").chat is None
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    chat = with_tokenizer("m", build("llama"), tokenizer, "", "m").chat
    assert chat(CHAT) == "[user] hello\n[assistant] good day\n"


def test_a_damaged_table_and_a_missing_library_are_named(tmp_path, monkeypatch):
    table = parquet(tmp_path / "d.parquet", text=TEXTS)
    data = table.read_bytes()
    table.write_bytes(data[:-20])
    with pytest.raises(TextError, match=r"d\.parquet cannot be read as Parquet"):
        read_corpus(table)
    parquet(table, text=["a", None])
    with pytest.raises(TextError, match=r'd\.parquet, row 1: "text" is null and not a string'):
        read_corpus(table)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TextError, match=r"d\.parquet needs pyarrow to be read; pip install \"cramlab\[parquet\]\""):
        read_corpus(table)


@pytest.fixture
def library():
    """The library datasets, which warns of its own dependencies."""
    return pytest.importorskip("datasets")


def test_what_datasets_saved_is_read_without_it(library, tmp_path, monkeypatch):
    table = library.Dataset.from_dict({"id": list(range(3)), "text": TEXTS})
    table.save_to_disk(tmp_path / "one", num_shards=2)
    library.DatasetDict(train=table, test=table.select([2, 0])).save_to_disk(tmp_path / "two")
    library.DatasetDict(train=table.map(lambda row: {"messages": CHAT}).remove_columns("text")).save_to_disk(
        tmp_path / "c"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert texts(tmp_path / "one") == TEXTS
    assert texts(f"{tmp_path}/two@test") == ["three", "one"]
    assert read_corpus(tmp_path / "c").documents[0].messages == tuple(CHAT)
    with pytest.raises(TextError, match=r"two has the splits train, test; choose one: .*two@train"):
        read_corpus(tmp_path / "two")
    with pytest.raises(TextError, match='has the splits train, test, not "dev"'):
        read_corpus(f"{tmp_path}/two@dev")
    with pytest.raises(TextError, match="has no splits"):
        read_corpus(f"{tmp_path}/one@train")
    shard = next((tmp_path / "one").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(TextError, match="cannot be read as Arrow"):
        read_corpus(tmp_path / "one")


def test_a_data_set_of_the_hub_is_loaded_by_name_config_and_split(library, monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return library.Dataset.from_dict({"text": TEXTS, "id": [0, 1, 2]})

    monkeypatch.setattr(library, "load_dataset", load)
    monkeypatch.setattr(
        library, "get_dataset_split_names", lambda name, config: ["train"] if config else ["train", "dev"]
    )
    assert texts("someone/some-texts@dev[:10%]") == texts("someone/some-texts:en") == TEXTS
    assert asked == [("someone/some-texts", None, "dev[:10%]"), ("someone/some-texts", "en", "train")]
    with pytest.raises(TextError, match="has the splits train, dev; choose one: someone/some-texts@train"):
        read_corpus("someone/some-texts")


def test_a_hub_out_of_reach_and_a_missing_library_say_so(library, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match=r"is no file or folder here, and could not be loaded .* out of reach"):
        read_corpus("someone/some-texts@train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r'pip install "cramlab\[datasets\]"'):
        read_corpus("someone/some-texts@train")
