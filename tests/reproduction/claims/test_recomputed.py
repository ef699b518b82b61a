"""Every row of docs/claims.md is computed a second time, from the records and by other code, and has to agree."""

import ast
import re
import sys
from pathlib import Path

import pytest
import recomputed

from reproduction.claims.evidence import Evidence
from reproduction.claims.findings import Findings
from reproduction.claims.page import claim_rows

ROOT = Path(__file__).parents[3]
NUMBER = re.compile(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


@pytest.fixture(scope="module")
def again():
    return recomputed.rows()


@pytest.fixture(scope="module")
def page():
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    table = text.split("<!-- claims: begin -->")[1].split("<!-- claims: end -->")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| C")]
    return {row[1]: (row[3], row[5]) for row in cells}


@pytest.fixture(scope="module")
def objects():
    evidence = Evidence(
        runs=recomputed.runs(),
        audits={model: recomputed.audit(model) for model in ("glassllm", "smollm2")},
        over_training=recomputed.over_training(),
        irregular=[*recomputed.documents("nafld2"), *recomputed.documents("pbcseq")],
    )
    return {row.what: (row.ours, row.verdict) for row in claim_rows(Findings.of(evidence))}


def disagreements(text, expected):
    """Numbers of a text that are further from the expected ones than their last digit and a stated tolerance allow."""
    found = NUMBER.findall(text)
    if len(found) != len(expected):
        return [f"{len(found)} numbers, {len(expected)} expected: {found}, {expected}"]
    wrong = []
    for written, value in zip(found, expected, strict=True):
        value, tolerance = value if isinstance(value, tuple) else (value, 0.0)
        digits = len(written.partition(".")[2])
        if abs(float(written.replace(",", "")) - value) > 0.5 * 10**-digits + tolerance + 1e-6 * abs(value) + 1e-9:
            wrong.append(f"{written} where {value:.6g} was found")
    return wrong


@pytest.mark.parametrize("source", ["page", "objects"])
def test_every_row_agrees_with_its_recomputation(source, again, request):
    rows = request.getfixturevalue(source)
    assert rows.keys() == again.keys(), "a row lacks its recomputation, or the other way round"
    wrong = {}
    for what, (text, verdict) in rows.items():
        numbers, expected = again[what]
        found = disagreements(text, numbers)
        if found or verdict != expected:
            wrong[what] = (found, str(verdict), expected)
    assert not wrong, "run python -m reproduction.pages.claims results"


def test_a_wrong_digit_and_a_missing_number_are_noticed():
    assert disagreements("0.43 [0.42, 0.44], 1,234 of 5", [0.4312, 0.42, 0.4401, 1234, 5]) == []
    assert disagreements("0.43 [0.42, 0.44]", [0.45, 0.42, 0.44]) == ["0.43 where 0.45 was found"]
    assert disagreements("-0% of .05x", [0, 0.05]) == []
    assert len(disagreements("0.43", [0.43, 1])) == 1


def test_the_recomputation_shares_no_code():
    tree = ast.parse(Path(recomputed.__file__).read_text(encoding="utf-8"))
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in modules} <= {*sys.stdlib_module_names, "numpy", "scipy"}
