# SPDX-License-Identifier: Apache-2.0
"""In mode `none` the patched Unsloth is upstream's, bit for bit, and so is the text of the trainer that it writes.

`plain_unsloth.py` runs twice, each in a process of its own: on our checkouts, and on their pristine trees.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PACKAGES, VENDOR
from trl.trainer.m3po.config import M3POArguments

PATCHES = VENDOR.parent / "patches"
KINDS = ("llama", "qwen2", "qwen3")
CLOCKS = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


@pytest.fixture(scope="module")
def results(beside: dict[str, Future[Any]]) -> dict[str, dict[str, Any]]:
    """What both wrote: `ours` and `upstream`."""
    return {name: beside[name].result() for name in ("ours", "upstream")}


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Equal to the last bit, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name, value in theirs.items():
            assert_same(ours[name], value, f"{where}, {name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}, {index}")
    else:
        assert ours == theirs, where


def test_one_run_was_ours_and_the_other_pristine(results: dict[str, Any]) -> None:
    ours, upstream = results["ours"], results["upstream"]
    for name, place in PACKAGES.items():
        assert Path(ours["places"][name]).parent == (VENDOR / place)
        for where in ("places", "metadata"):
            assert "pristine" in Path(upstream[where][name]).parts, (name, where)
    assert ours["ours"] and not upstream["ours"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_trains_the_same_parameters(kind: str, results: dict[str, Any]) -> None:
    assert len(results["upstream"][f"{kind} trained"]) == 28
    assert results["ours"][f"{kind} trained"] == results["upstream"][f"{kind} trained"]


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_logits_and_random_state_are_upstreams(kind: str, results: dict[str, Any]) -> None:
    ours, theirs = (results[name][f"{kind} rollouts"] for name in ("ours", "upstream"))
    assert_same(ours, theirs, "rollouts")
    assert len(theirs["sampled logits"]) > 2 and not torch.equal(theirs["sampled"], theirs["greedy"])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_upstreams(kind: str, results: dict[str, Any]) -> None:
    ours, theirs = (results[name][f"{kind} forward"] for name in ("ours", "upstream"))
    assert_same(ours, theirs, "forward")
    assert len(theirs) == 29 and all(value.abs().max() > 1e-4 and value.isfinite().all() for value in theirs.values())


def test_training_is_upstreams(results: dict[str, Any]) -> None:
    ours, theirs = (results[name]["llama training"] for name in ("ours", "upstream"))
    for name in ("tokens", "losses", "weights", "rng"):
        assert_same(ours[name], theirs[name], name)
    for batch, wanted in zip(ours["batches"], theirs["batches"], strict=True):
        assert_same({name: batch[name] for name in wanted}, wanted, "batch")
    for entry, wanted in zip(ours["log"], theirs["log"], strict=True):
        assert {"loss", "kl"} <= wanted.keys() or "train_loss" in wanted
        kept = wanted.keys() - set(CLOCKS)
        assert_same({name: entry[name] for name in kept}, {name: wanted[name] for name in kept}, "log")
    # Something was compared: old and reference log-probs, two losses, weights that moved by them.
    assert {"old_per_token_logps", "ref_per_token_logps"} <= theirs["batches"][0].keys()
    assert len(set(theirs["losses"])) == 2 and all(theirs["losses"])


# The text that Unsloth writes its trainer from


def lines_of(text: str) -> Counter[str]:
    """The lines without their indentation, and how often each is there; blank ones are left out."""
    return Counter(line.strip() for line in text.splitlines() if line.strip())


def changed_by_patches(sign: str) -> Counter[str]:
    """The lines that the patches of TRL and Unsloth add (+) or remove (-)."""
    files = [file for name in PACKAGES if name != "transformers" for file in (PATCHES / name).glob("*.patch")]
    diffs = "\n".join(file.read_text().partition("\ndiff --git")[2] for file in files)
    changed = [line[1:] for line in diffs.splitlines() if line.startswith(sign) and not line.startswith(sign * 3)]
    return lines_of("\n".join(changed))


def imported(text: str) -> tuple[set[str], str]:
    """The names that a generated trainer imports from TRL's, and the text without that line."""
    (line,) = [line for line in text.splitlines() if line.startswith("from trl.trainer.grpo_trainer import (")]
    return set(line.partition("(")[2].rstrip(")").split(", ")), text.replace(line, "")


def test_the_generated_trainer_is_upstreams_but_for_the_lines_of_our_patches(results: dict[str, Any]) -> None:
    # A rewrite of upstream's that no longer finds its place in our text is a line that is lost.
    (our_names, ours), (names, theirs) = (imported(results[name]["trainer"]) for name in ("ours", "upstream"))
    ours_of_them = {"GRPORollouts", "create_optimizer", "prepare_policy", "vllm_rollouts"}
    assert names < our_names and our_names - names == ours_of_them
    lost, gained = lines_of(theirs) - lines_of(ours), lines_of(ours) - lines_of(theirs)
    assert not lost - changed_by_patches("-")
    more = gained - changed_by_patches("+")
    # Beside the patches: each of our flags, as an argument of the config and where it is handed on.
    assert all(line.endswith(",") for line in more)
    ours_alone = sorted(line.partition(" = ")[0] for line in more)
    assert ours_alone == sorted(2 * [flag.name for flag in fields(M3POArguments)])
    assert "m3po_rows = ScoredRows" in ours and "self.m3po = GRPORollouts(self)" in ours
