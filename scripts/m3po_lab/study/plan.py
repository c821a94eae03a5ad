# SPDX-License-Identifier: Apache-2.0
"""A study: variants of a run over training seeds, written down in one YAML file before the first of them.

`study.json` in the folder of the study keeps what was written down, its digest, the digest of the code, and the flags
of every run. Each run has both digests in its summary. A run counts if it is one of these: with these flags, this code
and for this study; another one in the folder is refused by its name.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from m3po_lab.command_line.idle_flags import given_flags, idle_flags, without
from m3po_lab.core.config_files import find_config
from m3po_lab.core.errors import PROJECT_ROOT, UserError, one_line
from m3po_lab.core.files import read_json, shown_path, write_json
from m3po_lab.core.identity import RUN_FILE, difference, folder_of, short_digest
from m3po_lab.core.provenance import CODE, git_state, source_digest
from m3po_lab.core.user_files import read_text
from m3po_lab.grpo.config import parse_run
from m3po_lab.grpo.engine import choose_engine
from m3po_lab.grpo.identity import of_run
from m3po_lab.study.measures import MEASURES

STUDY_FILE = "study.json"
FOLDER = "configs/studies"
SEEDS_APART = 100_000  # generated tasks take seed + index for their problems
OF_A_STUDY = ("seed", "problem_seed", "study", "output_dir", "overwrite", "resume_from_checkpoint")


@dataclass(frozen=True)
class Study:
    """What a study's YAML file says.

    Args:
        question: what the study is to answer, a sentence.
        base: the YAML file of all runs, seen from the project's root or from the current folder.
        variants: the flags of each variant by its name, over those of `flags` and `base`.
        seeds: each variant has a run for each; the order of the training problems goes by it too.
        smallest_effect: the difference of the primary measure that would matter.
        stop_rule: when it ends, said beforehand.
        control: the variant without what is studied.
        gates: variants among which the question is about the choice.
        placebos: variants in which it is there and can do nothing.
        decision_rule: which results answer the question how, said beforehand.
        primary_measure: one of `measures.MEASURES`.
        equivalence_margin: differences within it count as none; as large as `smallest_effect` if not given.
        accuracy_level: of the rollouts; `steps_to_level` is the step in which it is reached.
        comparisons: pairs of variants [one, other]; all pairs if not given.
        flags: of all variants in which they do something.
        pilots: folders of earlier runs, which say what a run costs and how seeds scatter.
    """

    question: str
    base: str
    variants: dict[str, dict[str, Any]]
    seeds: list[int]
    smallest_effect: float
    stop_rule: str
    decision_rule: str
    control: str
    gates: list[str]
    placebos: list[str]
    primary_measure: str = "accuracy"
    equivalence_margin: float | None = None
    accuracy_level: float | None = None
    comparisons: list[list[str]] | None = None
    flags: dict[str, Any] | None = None
    pilots: list[str] | None = None

    @property
    def margin(self) -> float:
        """The equivalence margin."""
        return self.smallest_effect if self.equivalence_margin is None else self.equivalence_margin

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons, each variant minus the one behind it."""
        if self.comparisons is not None:
            return [(one, other) for one, other in self.comparisons]
        names = list(self.variants)
        return [(names[late], names[early]) for early in range(len(names)) for late in range(early + 1, len(names))]


@dataclass(frozen=True)
class StudyRun:
    """A run of a study: its variant and seed, the name of its folder, its command and the flags that define it."""

    variant: str
    seed: int
    name: str
    words: list[str]
    flags: dict[str, Any]


def read_study(file: Path) -> Study:
    """The study in a YAML file.

    Raises:
        UserError: one line on what is missing, unknown or contradicts itself.
    """
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: no YAML ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: it must be keys and values, see {FOLDER}/.")
    return check_study(shown_path(file), content)


def check_study(file: str, content: Mapping[str, Any]) -> Study:
    """The study of these contents; the errors of `read_study`."""
    known = {entry.name: entry for entry in fields(Study)}
    for name in content:
        if name not in known:
            raise UserError(f"{file}: unknown key {name!r}; known are {', '.join(known)}.")
    needed = [name for name, entry in known.items() if entry.default is MISSING and name not in content]
    if needed:
        raise UserError(f"{file}: {needed[0]} is missing; a study says it before its first run.")
    study = Study(**content)
    if not isinstance(study.variants, dict) or len(study.variants) < 2:
        raise UserError(f"{file}: variants must be two at least, each a name with its flags.")
    named = [study.control, *study.gates, *study.placebos, *(name for pair in study.comparisons or [] for name in pair)]
    unknown = [name for name in named if name not in study.variants]
    if unknown:
        raise UserError(f"{file}: {unknown[0]!r} is none of the variants {', '.join(study.variants)}.")
    if any(len(pair) != 2 for pair in study.comparisons or []):
        raise UserError(f"{file}: comparisons are pairs of variants, e.g. [baseline, none].")
    if study.primary_measure not in MEASURES:
        raise UserError(f"{file}: primary_measure {study.primary_measure!r} is none of {', '.join(MEASURES)}.")
    if len(set(study.seeds)) < len(study.seeds) or len(study.seeds) < 2:
        raise UserError(f"{file}: seeds must be two different ones at least.")
    if not study.smallest_effect > 0 or not study.margin > 0:
        raise UserError(f"{file}: smallest_effect and equivalence_margin must be above 0.")
    return study


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags from a YAML file as words of a command line."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flags.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def plan_runs(study: Study, digest: str) -> list[StudyRun]:
    """The runs of a study, seed by seed, so that a part of it has all variants.

    Raises:
        UserError: a command is wrong, sets what the study sets, or two variants are the same.
    """
    base = find_config(study.base)
    runs: list[StudyRun] = []
    known: dict[str, str] = {}
    for seed in study.seeds:
        for variant, own in study.variants.items():
            clashing = [name for name in {**(study.flags or {}), **own} if name in OF_A_STUDY]
            if clashing:
                raise UserError(f"variant {variant}: {clashing[0]} is the study's to set; leave it out.")
            shared = flag_words({name: value for name, value in (study.flags or {}).items() if name not in own})
            words = [shown_path(base), *shared, *flag_words(own)]
            run = parse_run(words, idle=True)
            words = [shown_path(base), *without(shared, idle_flags(run.groups, given_flags(shared))), *flag_words(own)]
            problem_seed = run.script.problem_seed + SEEDS_APART * seed
            words += [f"--seed={seed}", f"--problem_seed={problem_seed}", f"--study={digest}"]
            flags = of_run(parse_run(words, choose_engine(words)))
            same = known.setdefault(json.dumps(flags, sort_keys=True), variant)
            if same != variant:
                raise UserError(f"variants {same} and {variant} are the same run: leave out one of them.")
            runs.append(StudyRun(variant, seed, folder_of(variant, seed), words, flags))
    return runs


def content_of(study: Study) -> dict[str, Any]:
    """What the digest of a study is of: all that it says, and the content of its base file."""
    said = {entry.name: getattr(study, entry.name) for entry in fields(Study)}
    return {**said, "base_content": yaml.safe_load(read_text(find_config(study.base)))}


def open_study(study: Study, folder: Path) -> tuple[list[StudyRun], dict[str, Any]]:
    """The runs of a study and the content of its `study.json`, which is checked, or made where there is none.

    Raises:
        UserError: the folder is that of another study, or of this one with other code or flags; or it has a run that is
            none of the study's.
    """
    content = content_of(study)
    digest = short_digest(content)
    runs = plan_runs(study, digest)
    code = source_digest(PROJECT_ROOT, CODE)
    planned = {run.name: {"variant": run.variant, "seed": run.seed, "flags": run.flags} for run in runs}
    stored = read_json(folder / STUDY_FILE)
    if stored is None:
        commit, dirty = git_state(PROJECT_ROOT)
        stored = {"study": content, "digest": digest, "code": code, "commit": commit, "dirty": dirty, "runs": planned}
    elif stored["digest"] != digest:
        name = next((name for name, value in content.items() if stored["study"].get(name) != value), "something")
        raise UserError(
            f"{shown_path(folder)} has a study with another {name}: what was written down before the runs stays; give "
            "another --output_dir for a new study."
        )
    elif stored["code"] != code:
        raise UserError(
            f"{shown_path(folder)} was begun with other code (commit {stored['commit']}): check that out in a clone "
            "and go on there, or give another --output_dir."
        )
    check_folder(folder, stored)
    return runs, stored


def begin_study(folder: Path, stored: Mapping[str, Any]) -> None:
    """Writes `study.json` before the first run."""
    if read_json(folder / STUDY_FILE) is None:
        write_json(folder / STUDY_FILE, dict(stored))


def check_folder(folder: Path, stored: Mapping[str, Any]) -> None:
    """Refuse a folder with a run in it that is none of the study's, finished or not, or its summary (`NAME.json`).

    Raises:
        UserError: it names the run, and the first flag in which it differs.
    """
    for place in sorted(folder.glob("*/")):
        summary, recorded = read_json(place / "summary.json"), read_json(place / RUN_FILE)
        if summary is not None or recorded is not None:
            check_run(place.name, summary or recorded or {}, stored, finished=summary is not None)
    for file in sorted(folder.glob("*.json")):
        summary = read_json(file)
        if summary is not None and "flags" in summary:
            check_run(file.stem, summary, stored, finished=True)


def finished_summary(folder: Path, name: str) -> dict[str, Any] | None:
    """The summary of a finished run: `NAME/summary.json`, or `NAME.json` where only that was kept of it; else None."""
    return read_json(folder / name / "summary.json") or read_json(folder / f"{name}.json")


def check_run(name: str, found: Mapping[str, Any], stored: Mapping[str, Any], finished: bool) -> None:
    """Refuse a run that is not the one that the study has under this name.

    Args:
        name: of its folder.
        found: its summary, or its `run.json` if it is not finished.
        stored: the content of `study.json`.
        finished: whether it has a summary, which says for which study and by which code it was made.

    Raises:
        UserError: it says what is different.
    """
    planned = stored["runs"].get(name)
    if planned is None:
        raise UserError(f"{name} is no run of this study: move it out of the folder.")
    differing = difference(planned["flags"], found.get("flags", {}))
    if differing is not None:
        flag, wanted, value = differing
        raise UserError(f"{name} was run with --{flag} {value}, the study has {wanted}: move it out of the folder.")
    if not finished:
        return
    for key, what in (("study", "for another study"), ("code", "by other code")):
        wanted = stored["digest" if key == "study" else key]
        if found.get(key) != wanted:
            raise UserError(f"{name} was run {what} ({found.get(key)}, not {wanted}): move it out of the folder.")


def finished_runs(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """`study.json`, the summaries of the runs that are finished, each with variant and seed, and the others' names.

    Raises:
        UserError: there is no `study.json`, or a run in the folder is none of the study's.
    """
    stored = read_json(folder / STUDY_FILE)
    if stored is None:
        raise UserError(
            f"{folder} has no {STUDY_FILE}: give the folder of a study (scripts/run_experiment.sh makes it)."
        )
    check_folder(folder, stored)
    runs, missing = [], []
    for name, planned in stored["runs"].items():
        summary = finished_summary(folder, name)
        if summary is None:
            missing.append(name)
        else:
            runs.append({**summary, "variant": planned["variant"], "seed": planned["seed"], "name": name})
    return stored, runs, missing
