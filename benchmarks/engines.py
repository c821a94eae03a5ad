# SPDX-License-Identifier: Apache-2.0
"""GRPO by Unsloth with our patches, by Unsloth without them, and by TRL: tokens/s, memory, log-probs. Needs a GPU.

bash scripts/run.sh python benchmarks/engines.py             the whole comparison, a few minutes on an H200
bash scripts/run.sh python benchmarks/engines.py --dry-run   what it would run; what needs no GPU is made and checked

Same model, LoRA, prompts, lengths and number of rollouts; each engine in a process of its own, one after the other, its
modes in turn over several rounds. A step is rollout, scoring and update; its tokens are the sampled ones. What a killed
comparison has finished is kept in `.cache/engines` and not run again. Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from m3po_lab.core.errors import PROJECT_ROOT
from m3po_lab.grpo.engine import machine_obstacle, trainer_cache

WORKER = Path(__file__).with_name("engine_steps.py")
ENGINES = ("unpatched", "unsloth", "trl")
CHECKOUTS = {"transformers": "src", "trl": ".", "unsloth": ".", "unsloth_zoo": "."}
CACHE = PROJECT_ROOT / ".cache" / "engines"
MIB = 1 << 20


def pristine_trees() -> list[Path]:
    """The upstreams as they are without our patches, unpacked from `vendor/`; the folders for the path."""
    places = []
    for name, inside in CHECKOUTS.items():
        place = CACHE / "pristine" / name
        if not (place / "unpacked").exists():
            place.mkdir(parents=True, exist_ok=True)
            checkout = PROJECT_ROOT / "vendor" / name
            archive = subprocess.run(
                ["git", "-C", str(checkout), "archive", "refs/patchset/pristine"], check=True, capture_output=True
            )
            subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
            (place / "unpacked").touch()
        places.append(place / inside)
    return places


def model_folder(name: str) -> Path:
    """The model as a folder, in bfloat16, which every engine can load."""
    from trl import ModelConfig

    from m3po_lab.models.loading import load_model

    place = CACHE / "models" / re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    if not (place / "config.json").exists():
        for part in load_model(ModelConfig(model_name_or_path=name, dtype="bfloat16")):
            part.save_pretrained(str(place))
    return place


def environment(engine: str) -> dict[str, str]:
    """The variables of an engine's process."""
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine == "unsloth":
        given["UNSLOTH_COMPILE_LOCATION"] = str(trainer_cache())
    if engine == "unpatched":
        path = [*map(str, pristine_trees()), *filter(None, [given.get("PYTHONPATH")])]
        given |= {"PYTHONPATH": os.pathsep.join(path), "UNSLOTH_COMPILE_LOCATION": str(CACHE / "pristine" / "trainers")}
    return given


def missing_runs(engine: str, settings: dict[str, Any], file: Path) -> int:
    """How many runs of an engine are not in its result yet."""
    done = len(json.loads(file.read_text())["runs"]) if file.exists() else 0
    return settings["rounds"] * (1 if engine == "unpatched" else len(settings["modes"])) - done


def run_engine(engine: str, settings: dict[str, Any], folder: Path, dry: bool) -> dict[str, Any] | None:
    """The result of an engine: of a process, or the kept one of the same settings; None in a dry run."""
    file, told = folder / f"{engine}.json", folder / "settings.json"
    if missing_runs(engine, settings, file) == 0:
        print(f"{engine}: done before", flush=True)
        return json.loads(file.read_text())
    command = [sys.executable, str(WORKER), engine, str(told), str(file)]
    variables = environment(engine)
    if dry:
        print("would run:", " ".join(command))
        return None
    told.write_text(json.dumps(settings, indent=1))
    subprocess.run(command, check=True, env=variables, cwd=PROJECT_ROOT)
    return json.loads(file.read_text())


def speeds(result: dict[str, Any], mode: str, of: str = "seconds") -> list[float]:
    """Tokens/s of each timed step of a mode, or of its rollout alone."""
    runs = [run for run in result["runs"] if run["mode"] == mode]
    return [count / time for run in runs for count, time in zip(run["tokens"], run[of], strict=True)]


def report(results: dict[str, dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Two tables: speed and memory of each engine and mode, and the log-probs of the two patched engines."""
    base = median(speeds(results["unpatched"], "none"))
    columns = (
        "engine",
        "mode",
        "steps",
        "tokens/s, median of the steps (min to max)",
        "over unpatched Unsloth",
        "over TRL, same mode",
        "tokens/s of the rollout alone, median",
        "peak memory, MiB",
        "largest difference of rollout and policy pass",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for engine in ENGINES:
        for mode in settings["modes"]:
            runs = [run for run in results[engine]["runs"] if run["mode"] == mode]
            if not runs:
                continue
            found, trls = speeds(results[engine], mode), speeds(results["trl"], mode)
            alone = median(speeds(results[engine], mode, "rollout_seconds"))
            worst = max((value for run in runs for value in run["rollout_logp_diff_max"]), default=None)
            over_trl = f"{median(found) / median(trls):.2f}" if trls else "-"
            lines.append(
                f"| {engine} | `{mode}` | {len(found)} | {median(found):.0f} ({min(found):.0f} to {max(found):.0f}) | "
                f"{median(found) / base:.2f} | {over_trl} | {alone:.0f} | "
                f"{max(run['peak_bytes'] for run in runs) / MIB:.0f} | {'-' if worst is None else f'{worst:.2f}'} |"
            )
    if not results["trl"]["scores"]:
        return lines
    lines += [
        "",
        "Log-probs of one rollout of Unsloth's (its bags and seeds), by each engine's policy pass in bfloat16, against "
        "TRL's in float32: mean and largest difference.",
        "",
        "| mode | Unsloth | TRL |",
        "|---|---|---|",
    ]
    for mode, found in results["trl"]["scores"].items():
        cells = [f"{found[f'{name}_mean']:.4f}, {found[f'{name}_max']:.3f}" for name in ("unsloth", "trl")]
        lines.append(f"| `{mode}` | {cells[0]} | {cells[1]} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default="smollm2-135m")
    parser.add_argument("--modes", nargs="+", default=["none", "m3po", "hrpo", "h3po"], help="none among them")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step")
    parser.add_argument("--paths", type=int, default=8, help="N, the rollouts of a prompt")
    parser.add_argument("--length", type=int, default=128, help="new tokens of a rollout, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="steps of a run that are not counted")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run that are")
    parser.add_argument("--dry-run", action="store_true", help="make and check what needs no GPU, and stop there")
    args = parser.parse_args(argv)
    names = ("modes", "prompts", "paths", "length", "rounds", "warmup", "steps")
    settings = {name: getattr(args, name) for name in names} | {"dtype": "bfloat16"}
    from rollout import commit, write_results

    key = re.sub(r"\W+", "-", json.dumps([settings[name] for name in names] + [args.model_name_or_path])).strip("-")
    folder = CACHE / f"{trainer_cache().name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    why = machine_obstacle()
    missing = [engine for engine in ENGINES if missing_runs(engine, settings, folder / f"{engine}.json")]
    if missing and why is not None and not args.dry_run:
        print(f"error: this comparison needs Unsloth, and {why}; --dry-run shows what it would do.", file=sys.stderr)
        return 2
    settings["model"] = str(model_folder(args.model_name_or_path))
    found = {engine: run_engine(engine, settings, folder, args.dry_run) for engine in ENGINES}
    if args.dry_run:
        check_modes(settings)
        return 0
    results = {engine: result for engine, result in found.items() if result is not None}
    told = " ".join(["python benchmarks/engines.py", *(sys.argv[1:] if argv is None else argv)])
    machine = results["unsloth"]["machine"]
    head = (
        f"`{told}` at {commit()}: {args.model_name_or_path} bfloat16, LoRA of rank 32 on all projections, "
        f"{args.prompts} prompts x {args.paths} paths x {args.length} tokens, {args.rounds} rounds of {args.steps} "
        f"steps after {args.warmup}; {machine['device']}, torch {machine['torch']}. unpatched: Unsloth's own GRPO on "
        "the pristine upstreams."
    )
    name = f"engines-{re.sub(r'[^a-z0-9]+', '-', machine['device'].lower())}"
    settings.pop("model")
    whole = {"command": told, "commit": commit(), "settings": settings, "engines": results}
    write_results(name, whole, [head, "", *report(results, settings)])
    return 0


def check_modes(settings: dict[str, Any]) -> None:
    """Makes the arguments of each mode, so that a wrong one is told by a dry run."""
    import engine_steps

    with tempfile.TemporaryDirectory() as place:
        for mode in settings["modes"]:
            print(f"mode {mode}: {engine_steps.arguments({**settings, 'dtype': 'float32'}, mode, place).mode}")


if __name__ == "__main__":
    raise SystemExit(main())
