# SPDX-License-Identifier: Apache-2.0
"""The workflows call what the project has: the CI script, and the check of each upstream against its newest release."""

from pathlib import Path
from typing import Any

import yaml

from patchset.pins import load

ROOT = Path(__file__).resolve().parents[2]


def workflow(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    content["on"] = content.pop(True)  # YAML 1.1 reads the word as a truth value
    return content


def test_every_change_has_to_pass_the_ci_script() -> None:
    content = workflow("ci")
    assert content["on"]["push"] == {"branches": ["main"]} and "pull_request" in content["on"]
    assert content["jobs"]["ci"]["steps"][-1] == {"run": "bash .ci/run"}
    assert (ROOT / ".ci" / "run").is_file()
    assert content["jobs"]["vllm"]["steps"][-1] == {"run": "make test-vllm"}


def test_every_upstream_is_checked_against_its_newest_release_every_week() -> None:
    content = workflow("drift")
    minute, hour, day, month, weekday = content["on"]["schedule"][0]["cron"].split()
    assert (day, month, weekday) == ("*", "*", "1") and int(hour) < 24 and int(minute) < 60
    job = content["jobs"]["drift"]
    assert job["strategy"]["matrix"]["upstream"] == [up.name for up in load(ROOT)]
    assert 'make check-patches "UPSTREAM=$UPSTREAM" AGAINST=latest' in job["steps"][-1]["run"]
