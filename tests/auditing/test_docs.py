"""The figures of docs/audit.md are those of the records."""

import json
from pathlib import Path

import pytest

from cramlab.auditing import AuditResult, over_training
from cramlab.report.audit_page import render_audit, render_over_training
from reproduction.pages import audit as audit_tables
from reproduction.pages.renew import renewed

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "results" / "audit").rglob("*.json"))


def test_every_table_is_made_from_the_records():
    text = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    assert text.count(": end -->") >= 10
    assert renewed(text, audit_tables.sections(), "audit.md") == text


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.parent.name)
def test_every_record_is_valid_clean_and_can_be_drawn(path):
    data = json.loads(path.read_text())
    assert data["revision"]
    assert not data["revision"].endswith("+")
    if data["kind"] == "audit":
        assert "<svg" in render_audit(AuditResult.read(path).data)
    else:
        assert "<svg" in render_over_training(over_training.read(path))


def test_all_records_are_there():
    assert [path.parent.name for path in RECORDS] == ["glassllm", "over_training", "smollm2"]
