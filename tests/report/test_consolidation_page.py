"""The page, the terminal's tables and the card of a consolidation say what the record and the measurements say."""

import copy
import html
import io
import json
import re

import pytest
from consolidated import examples, make
from pages import Page, in_browser
from rich.console import Console

from cramlab.consolidation.in_use import load_in_use, measure_in_use
from cramlab.hf.loading import load
from cramlab.report.card import render_card
from cramlab.report.consolidation_figures import layer_ranges
from cramlab.report.consolidation_page import render_consolidation
from cramlab.report.consolidation_table import consolidation_table

pytest.importorskip("glassllm")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Record, and what was measured in use."""
    folder = tmp_path_factory.mktemp("consolidated")
    record = make(folder)
    pretrained = load("glassllm")
    measure_in_use(pretrained, folder, examples(pretrained))
    return record, load_in_use(folder, record)


def in_terminal(*made, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(consolidation_table(*made))
    return console.export_text(styles=False)


PROMISED = ["at most 0.043 nats per token", "0.9", "80 tokens", "31", "+0.0237 nats per token", "0.0347 nats per token",
            "0.0456", "0.21 nats per token, exceeded by 1 of 31 documents", "7", "+0.0213 ± 0.0021 nats per token",
            "61.7%", "44.3%", "12 and 2"]  # fmt: skip


def test_the_page_has_each_part_and_fetches_nothing(made):
    text = render_consolidation(*made)
    page = Page(text)
    assert {"promise", "promised", "loss", "tested", "reads", "sample", "cost"} <= page.ids
    assert "missing" not in page.ids
    assert page.count["svg"] == 2
    assert page.count.get("script", 0) == 0
    assert all(target.startswith(("#", "data:")) for target in page.fetched)
    assert "own &lt;text&gt;" in text
    assert "own <text>" not in text


def test_other_lengths_are_said_with_their_documents(made):
    record, in_use = made
    test = {"documents": 5, "increase": 0.0517, "standard_error": 0.004, "skipped_frac": 0.537, "pairs_frac": 0.4}
    lengths = [{"length": 60, "documents": 23, "tested": record["tested"], "test": test}]
    page = Page(render_consolidation(record | {"lengths": lengths}, in_use))
    assert "holds at 60 tokens as well; calibration documents" in page.heads
    assert "mean increase of 5 test documents at 60 tokens" in page.heads
    at = page.cells.index("+0.0517 nats per token, 53.7% of far reads skipped")
    assert page.cells[at - 1] == "23"


def test_the_promise_and_every_threshold_are_those_of_the_record(made):
    page, shown = Page(render_consolidation(*made)), in_terminal(*made)
    for value in PROMISED:
        assert value in page.cells
        assert value in shown
    for share, mean, bound in (
        ("50%", "+0.0125", "0.0235"),
        ("60%", "+0.0237", "0.0347"),
        ("70%", "+0.0462", "0.0572"),
    ):
        at = page.cells.index(share)
        assert page.cells[at + 1 : at + 3] == [mean, bound]
        assert re.search(rf"{share}\D+{re.escape(mean)}\D+{bound}", shown)
    assert "60% (chosen)" in " ".join(page.cells)
    for row in made[1]["baselines"]:
        assert f"{row['increase']:+.4f}" in page.cells
        assert f"{row['increase']:+.4f}" in shown


def test_tokens_say_their_layers_and_losses(made):
    record, in_use = made
    text = render_consolidation(record, in_use)
    remarks = re.findall(r'class="t s(-?\d)" tabindex="-1" data-remark="([^"]*)"', text)
    sample = in_use["sample"]
    assert len(remarks) == len(sample["pieces"])
    for i, (shade, remark) in enumerate(remarks):
        assert remark.startswith(f"token {i}: ")
        if i < record["window"] + record["n_sinks"]:
            assert "no far keys" in remark
            assert shade == "-1"
        else:
            read = sample["reads"][i]
            assert f"{len(read)} of 4 layers read" in remark
            assert int(shade) == -(-5 * len(read) // 4)
            assert layer_ranges(read) in remark
        if i:
            assert f"loss {sample['loss'][i]:.3f} nats, original {sample['original'][i]:.3f}" in remark
    shown = text.partition('<div id="sample">')[2].partition("</div>")[0]
    assert html.unescape(re.sub("<[^>]*>", "", shown)) == "".join(sample["pieces"])


def test_what_is_dearer_is_red(made):
    record, in_use = made
    in_use = copy.deepcopy(in_use)
    cost = in_use["cost"]
    cost["prompt"]["consolidated"]["speedup"]["median"] = 0.8
    cost["decode"]["consolidated"]["speedup"]["median"] = 2.5
    cost["prompt"]["consolidated"]["pairs"] = cost["prompt"]["original"]["pairs"] / 4
    text = render_consolidation(record, in_use)
    rows = re.findall(
        r"<tr><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td>\n<td( class=\"failed\")?>([^<]*)</td>", text
    )
    ratios = {what: (bool(red), ratio) for what, _, _, red, ratio in rows}
    n = cost["prompt"]["tokens"]
    assert ratios[f"prompt of {n} tokens: ms"] == (True, "1.25 (more)")
    assert ratios[f"prompt of {n} tokens: pairs per head"] == (False, "0.25")
    assert ratios[f"a token after {n}: ms"] == (False, "0.40")
    assert ratios["bytes of weights"][0]
    median = cost["prompt"]["original"]["ms"]["median"]
    assert any(f"{median:,.2f} [" in original for _, original, *_ in rows)
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=True)
    console.print(consolidation_table(record, in_use))
    assert re.search(r"\x1b\[31m1\.25 \(more\)", console.export_text(styles=True))


def test_an_increase_above_the_promise_is_red(made):
    record = made[0] | {"test": made[0]["test"] | {"increase": 0.05}}
    assert '<td class="failed">+0.0500 ± 0.0021 nats per token</td>' in render_consolidation(record, None)
    assert '<td class="failed">+0.0213' not in render_consolidation(made[0], None)


def test_an_older_folder_shows_what_it_has_and_says_what_is_missing(made):
    text, shown = render_consolidation(made[0], None), in_terminal(made[0], None)
    page = Page(text)
    assert {"promised", "loss", "tested", "missing"} <= page.ids
    assert page.ids.isdisjoint({"reads", "sample", "cost"})
    for said in (text, " ".join(shown.split())):
        assert "Reads by layer, the sample text, baselines and costs are missing" in said
        assert "cramlab consolidate with --from and this folder" in said
    with_digests = made[0] | {"made_of": {"config_sha256": "0" * 64, "held_out_sha256": "0" * 64}}
    assert "measures them with --resume" in render_consolidation(with_digests, None)


def test_a_page_without_its_sample_says_so(made):
    text = render_consolidation(made[0], made[1] | {"sample": None})
    assert "The sample text was left out" in text
    assert 'id="sample"' not in text
    assert {"reads", "cost"} <= Page(text).ids


def test_the_same_record_gives_the_same_page(made):
    assert render_consolidation(*made) == render_consolidation(*json.loads(json.dumps(made)))


def test_every_record_that_is_kept_has_a_page_and_tables():
    from pathlib import Path

    from cramlab.consolidation.folder import load_record

    folders = [path.parent for path in (Path(__file__).parents[2] / "results").rglob("consolidation.json")]
    assert len(folders) >= 3
    for folder in folders:
        record = load_record(folder)
        Page(render_consolidation(record, None))
        assert f"{record['test']['increase']:+.4f}" in in_terminal(record, None)


def test_ranges_of_layers():
    assert layer_ranges([]) == ""
    assert layer_ranges([0, 2, 3, 4, 7]) == "0, 2-4, 7"


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(made, tmp_path, width):
    """With a token that is focused, and a word longer than the window."""
    record, in_use = made[0], copy.deepcopy(made[1])
    in_use["sample"]["pieces"][40] = "x" * 500
    shown = in_browser(
        render_consolidation(record, in_use), width, tmp_path,
        """(() => { inside.querySelectorAll("#sample .t")[30].focus();
        const remark = inside.defaultView.getComputedStyle(inside.querySelectorAll("#sample .t")[30], "::after");
        return [inside.querySelectorAll("svg").length, inside.querySelectorAll("#sample .t").length,
        Math.ceil(parseFloat(remark.width)), remark.position === "fixed" ? 1 : 0,
        ...[...inside.querySelectorAll(".wide")].map((table) => table.scrollWidth - table.clientWidth)]; })()""",
    )  # fmt: skip
    n_figures, n_tokens, remark, is_fixed, *too_wide = shown
    assert (n_figures, n_tokens) == (2, len(in_use["sample"]["pieces"]))
    assert is_fixed
    assert 0.8 * width < remark <= width
    assert too_wide == [0, 0, 0]


def test_the_card_says_what_the_record_says(made):
    record, in_use = made
    card = render_card(record, in_use, repository="user/less", base_model="org/glass", licence="apache-2.0")
    head = card.split("---\n")[1]
    assert 'base_model: "org/glass"\n' in head
    assert 'license: "apache-2.0"\n' in head
    assert "library_name: cramlab\n" in head
    for value in PROMISED:
        assert f"| {value} |" in card
    assert "at most 0.043 nats per token in expectation. It rests on 31 calibration documents" in card
    assert record["model"]["sha256"] in card
    assert r"random gates \| for tests" in card
    assert r"learned from the outputs of org/glass on own \<text\>" in card
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    assert code.splitlines() == [
        "import cramlab", 'pretrained = cramlab.load_pretrained("org/glass")',
        'model = cramlab.load_consolidated(pretrained.model, "user/less")',
    ]  # fmt: skip
    median = in_use["cost"]["decode"]["consolidated"]["ms"]["median"]
    assert f"| {median:,.2f} [" in card


def test_a_card_takes_no_markup_from_a_record(made):
    hostile = made[0] | {"name": 'a"\nlicense: mit\n# <script>x</script> [y](z)', "note": "| b |\n\n# c"}
    card = render_card(hostile, None, repository='r")\nimport os #')
    assert "<script>" not in card
    assert "\nlicense" not in card
    assert "base_model:" not in card
    assert "\n# c" not in card
    compile(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], "card", "exec")
    assert "import os" not in card.splitlines()
