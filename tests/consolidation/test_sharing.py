"""A consolidation that is saved, pushed and loaded again is the same; nothing private goes along, no code is run."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from consolidated import examples, make
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

import cramlab
from cramlab import Consolidation
from cramlab.cli.main import main
from cramlab.consolidation.folder import RECORD, WEIGHTS
from cramlab.consolidation.hub import folder_named
from cramlab.consolidation.in_use import FILE, measure_in_use
from cramlab.errors import ConsolidationError
from cramlab.hf.loading import load
from cramlab.report.card import CARD
from cramlab.report.consolidation_page import PAGE, render_consolidation

pytest.importorskip("glassllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("consolidated") / "less"
    make(out)
    pretrained = load("glassllm")
    measure_in_use(pretrained, out, examples(pretrained))
    return out


@pytest.fixture
def tokens():
    return examples(load("glassllm"))[0][1][None]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@torch.no_grad()
def test_a_saved_folder_gives_the_same_outputs_bit_by_bit(folder, tokens, tmp_path):
    ours = Consolidation.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "copy")
    assert names(tmp_path / "copy") == sorted([CARD, RECORD, WEIGHTS, FILE, PAGE])
    theirs = Consolidation.from_pretrained(str(tmp_path / "copy"))
    assert theirs.record == ours.record
    expected = cramlab.load_consolidated("glassllm", folder)(tokens).logits
    assert torch.equal(theirs.load_into("glassllm")(tokens).logits, expected)
    assert torch.equal(cramlab.load_consolidated("glassllm", tmp_path / "copy")(tokens).logits, expected)
    assert not torch.equal(load("glassllm").model(tokens).logits, expected)
    for name in (RECORD, WEIGHTS):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_the_sample_text_stays_at_home_unless_it_is_asked_for(folder, tmp_path):
    ours = Consolidation.from_pretrained(folder)
    assert ours.in_use["sample"]["document"] == "document 0"
    ours.save_pretrained(tmp_path / "shared")
    ours.save_pretrained(tmp_path / "whole", sample=True)
    shared, whole = (Consolidation.from_pretrained(tmp_path / name) for name in ("shared", "whole"))
    assert shared.in_use == ours.in_use | {"sample": None}
    assert whole.in_use == ours.in_use
    for path in (tmp_path / "shared").iterdir():
        assert "document 0" not in path.read_text(errors="replace")
        assert "return" not in path.read_text(errors="replace")
    assert "document 0" in (tmp_path / "whole" / PAGE).read_text()


def test_what_is_there_already_is_not_lost(folder, tmp_path):
    ours = Consolidation.from_pretrained(folder)
    with pytest.raises(FileExistsError, match="is the folder of this consolidation itself"):
        ours.save_pretrained(folder)
    (tmp_path / CARD).write_text("mine")
    ours.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"
    make(tmp_path / "other", skipped_frac=0.5)
    before = (tmp_path / "other" / RECORD).read_bytes()
    with pytest.raises(FileExistsError, match="holds another consolidation"):
        ours.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / RECORD).read_bytes() == before


@pytest.mark.parametrize("at", [WEIGHTS, FILE, PAGE, CARD, RECORD])
def test_a_full_disk_or_a_kill_leaves_an_unfinished_folder_and_no_half_file(at, folder, tmp_path, monkeypatch):
    """Whatever is written when it happens: the record comes last."""
    write = Path.write_bytes

    def failing(self, data):
        write(self, data[: len(data) // 2])
        if self.name.startswith(f".{at}."):
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(OSError, match="No space left on device; make room"):
        Consolidation.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    monkeypatch.undo()
    assert RECORD not in names(tmp_path / "copy")
    assert not [name for name in names(tmp_path / "copy") if name.endswith("partial")]
    with pytest.raises(ConsolidationError, match="unfinished"):
        Consolidation.from_pretrained(tmp_path / "copy")
    Consolidation.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert Consolidation.from_pretrained(tmp_path / "copy").record == Consolidation.from_pretrained(folder).record


def test_damaged_files_are_refused_without_the_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ConsolidationError, match="not the file that"):
        Consolidation.from_pretrained(tmp_path / "copy")


class Hub:
    """What the library asks of the hub."""

    def __init__(self, monkeypatch, folder=None):
        self.asked, self.pushed = [], {}
        hub = self

        class Api:
            def __init__(self, token=None):
                hub.asked.append(("token", token))

            def create_repo(self, repo_id, *, private=None, exist_ok=False):
                hub.asked.append(("create", repo_id, private, exist_ok))
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, *, repo_id, folder_path, commit_message):
                hub.pushed = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
                hub.asked.append(("upload", repo_id, commit_message))
                return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

        def snapshot_download(repo_id, *, revision=None, token=None, allow_patterns=None):
            hub.asked.append(("download", repo_id, revision, allow_patterns))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_pushing_creates_a_repository_and_uploads_what_save_pretrained_writes(folder, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    ours = Consolidation.from_pretrained(folder)
    address = ours.push_to_hub("user/less", private=True, token="t", base_model="org/glass", licence="mit")
    assert address == "https://hub/user/less/commit/1"
    assert hub.asked == [("token", "t"), ("create", "user/less", True, True),
                         ("upload", "user/less", "Upload consolidation")]  # fmt: skip
    ours.save_pretrained(tmp_path, repository="user/less", base_model="org/glass", licence="mit")
    assert hub.pushed == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert b'load_consolidated(pretrained.model, "user/less")' in hub.pushed[CARD]


def test_a_hub_that_refuses_is_said_in_one_line(folder, monkeypatch):
    Hub(monkeypatch)

    def refuse(*_, **__):
        raise ValueError("Repo id must use alphanumeric chars\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ConsolidationError, match=r'"user/l ss" could not be pushed .*\(Repo id must use alphanumeric'):
        Consolidation.from_pretrained(folder).push_to_hub("user/l ss")


@torch.no_grad()
def test_a_repository_is_loaded_by_its_name_and_only_data_is_fetched(folder, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "cache")
    (tmp_path / "cache" / "modeling.py").write_text("raise SystemExit('run')")
    hub = Hub(monkeypatch, tmp_path / "cache")
    expected = cramlab.load_consolidated("glassllm", folder)(tokens).logits
    model = cramlab.load_consolidated("glassllm", "user/less", revision="v1")
    assert torch.equal(model(tokens).logits, expected)
    assert hub.asked == [("download", "user/less", "v1", [RECORD, WEIGHTS, FILE])]
    assert all(name.endswith((".json", ".safetensors")) for name in hub.asked[0][3])
    assert Consolidation.from_pretrained("user/less").name == "user/less"
    (tmp_path / "cache" / RECORD).unlink()
    with pytest.raises(ConsolidationError, match=r'"user/less" on the hub holds no consolidation\.json'):
        cramlab.load_consolidated("glassllm", "user/less")


def test_a_folder_here_comes_first_and_other_paths_never_go_to_the_hub(folder, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "user" / "less")
    assert cramlab.skip_counts(cramlab.load_consolidated("glassllm", "user/less")).live
    for name in ("./user/none", "/user/none", "~/none", "none", "a/b/c", Path("user/none")):
        assert folder_named(name) == Path(name)
        with pytest.raises(ConsolidationError, match="it is not a consolidation, or an unfinished one"):
            Consolidation.from_pretrained(name)
    assert hub.asked == []


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("cannot find it\nin the cache"), OSError("no network")])
def test_without_a_network_the_error_names_both_ways_out(error, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConsolidationError, match=r'"user/less" is not a folder here and .* hub.*out of reach') as found:
        cramlab.load_consolidated("glassllm", "user/less")
    assert "\n" not in str(found.value)
    assert main(["try", "glassllm", "user/less", "text"]) == 2
    assert "is not a folder here" in capsys.readouterr().err


def test_errors_of_the_hub_are_ours():
    assert not issubclass(HfHubHTTPError, ConsolidationError)  # else the tests above would prove nothing


def test_the_page_is_written_again_from_python(folder, tmp_path):
    ours = Consolidation.from_pretrained(folder)
    assert ours.report() == folder / PAGE
    assert (folder / PAGE).read_text() == render_consolidation(ours.record, ours.in_use)
    ours.report(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == (folder / PAGE).read_bytes()
    assert ours.card("user/less").startswith("---\nlibrary_name: cramlab\n")
