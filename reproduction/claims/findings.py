"""Everything that claims, tables and figures take from the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reproduction.claims import bounds_rows, carried_rows, irregular_rows, practice_rows, transfer_rows, transition_rows
from reproduction.claims.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Each finding is computed once; rows, tables and figures take it from here.

    Attributes:
        evidence: the documents.
        courses: attention over training, by run.
        practice: practice logs, by experiment, size, mixer and variant.
        points: trained models against Theorem 1.
        transfers: runs on the targets of the transfer.
        carried: documents of models carried over to irregular series.
        irregular: the other documents of irregular series.
    """

    evidence: Evidence
    courses: Sequence[transition_rows.Course]
    practice: Mapping[practice_rows.Key, practice_rows.Logs]
    points: Sequence[bounds_rows.BoundPoint]
    transfers: Sequence[transfer_rows.Row]
    carried: carried_rows.Groups
    irregular: irregular_rows.Groups

    @classmethod
    def of(cls, evidence: Evidence) -> Findings:
        """Computes all findings; practice logs are fitted when a summary is first asked for."""
        return cls(
            evidence=evidence,
            courses=transition_rows.courses(evidence),
            practice=practice_rows.logs(evidence),
            points=bounds_rows.points(evidence),
            transfers=transfer_rows.on_targets(evidence),
            carried=carried_rows.groups(evidence),
            irregular=irregular_rows.groups(evidence),
        )
