# SPDX-License-Identifier: Apache-2.0
"""How the tasks of `configs/eval` score a problem's completions: lm-eval calls these as `process_results`.

Strict: exactly one answer marker, and the line behind it equals the reference (the rule of the correct reward).
Flexible: that, or the last number, formula or letter of the text equals it, wherever it stands. With N paths both are
means over the paths, and two more follow: the majority vote over the well-formed answer lines, and pass@N. A tied vote
counts by the share of right answers among the tied, its expected value under a draw; pass@N from N samples is unbiased
as it is.
"""

import operator
from collections.abc import Sequence
from typing import Any

from m3po_lab.problems.answers import KINDS, Equal, Kind
from m3po_lab.problems.rewards import answer_line


def scores(doc: dict[str, Any], responses: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of a document's completions, compared as its kind of answer is."""
    return score(doc, responses[0], KINDS[doc["kind"]])


def score(doc: dict[str, Any], texts: Sequence[str], kind: Kind) -> dict[str, float]:
    """The scores of one problem's completions, each in [0, 1]."""
    reference = doc["reference"]
    lines = [answer_line(text, doc["marker"]) for text in texts]
    right = [line is not None and kind.equal(reference, line) for line in lines]
    formed = [line for line in lines if line is not None and kind.readable(line)]
    ends = [kind.last(text) for text in texts]
    at_end = [end is not None and kind.equal(reference, end) for end in ends]
    shares = {
        "strict_match": sum(right) / len(texts),
        "flexible_match": sum(map(operator.or_, right, at_end)) / len(texts),
        "well_formed": len(formed) / len(texts),
    }
    if len(texts) > 1:
        shares |= {"majority_vote": vote(formed, reference, kind.equal), "pass_at_n": float(any(right))}
    return shares


def vote(lines: Sequence[str], reference: str, equal: Equal) -> float:
    """1.0 when the most frequent answer is right, 0.0 when it is not, the share of right ones when several tie."""
    classes: list[list[str]] = []
    for line in lines:
        for members in classes:
            if equal(members[0], line):
                members.append(line)
                break
        else:
            classes.append([line])
    most = max((len(members) for members in classes), default=0)
    tied = [members[0] for members in classes if len(members) == most]
    return sum(equal(reference, answer) for answer in tied) / len(tied) if tied else 0.0
