# SPDX-License-Identifier: Apache-2.0
"""The patches of this project: one author, names in order, and each can be dropped unless another one needs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from patchset import git, pins, series

ROOT = Path(__file__).resolve().parents[2]
UPSTREAMS = pins.load(ROOT)


@pytest.mark.parametrize("up", UPSTREAMS, ids=lambda up: up.name)
def test_names_are_numbered_in_order_and_the_author_is_the_neutral_one(up: pins.Upstream) -> None:
    patches = series.load(up)
    assert [int(patch.name[:4]) for patch in patches] == [*range(1, len(patches) + 1)]
    assert {(patch.author, patch.email) for patch in patches} <= {("M3PO overlay", "overlay@m3po.invalid")}


@pytest.mark.parametrize("up", UPSTREAMS, ids=lambda up: up.name)
def test_a_patch_that_no_other_needs_can_be_dropped_alone(up: pins.Upstream) -> None:
    patches = series.load(up)
    lines = [line for patch in patches for line in re.findall(r"^Needs: (.*)$", patch.body, re.MULTILINE)]
    needed = {name for line in lines for name in re.findall(r"(?<![/\w-])\d{4}-[\w-]+", line)}
    assert needed <= {patch.name.removesuffix(".patch") for patch in patches}
    repo = git.Git(up.git_dir, up.checkout)
    for patch in patches:
        if patch.name.removesuffix(".patch") not in needed:
            repo("apply", "-R", "--check", stdin=patch.diff)
