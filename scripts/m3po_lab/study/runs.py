# SPDX-License-Identifier: Apache-2.0
"""The runs of a study, one after the other or one on each GPU, with the time that is left; and what they will cost."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any

from m3po_lab.core.files import read_json, shown_path, write_json
from m3po_lab.grpo.checkpoints import checkpoints, resuming
from m3po_lab.study.plan import StudyRun, finished_summary

TIMES_FILE = "times.json"  # seconds that each finished run took, start and evaluations included
LOG_FILE = "output.log"  # of a run that is one of several at once


def duration(seconds: float) -> str:
    """A time as one says it."""
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def seconds_per_run(folder: Path, pilots: Sequence[Mapping[str, Any]]) -> float | None:
    """What a run takes: mean of the finished ones, else of the pilots' trainings; None where there are none."""
    times = read_json(folder / TIMES_FILE)
    if times:
        return fmean(times.values())
    return fmean(run["train_seconds"] for run in pilots) if pilots else None


def cost_line(runs: Sequence[StudyRun], folder: Path, pilots: Sequence[Mapping[str, Any]], jobs: int) -> str:
    """How many runs are left, and how long they will take."""
    left = [run for run in runs if not is_done(folder, run)]
    each = seconds_per_run(folder, pilots)
    text = f"{len(runs)} runs, {len(runs) - len(left)} of them done"
    if not left:
        return text
    if each is None:
        return f"{text}; what a run costs is not known before the first one has ended"
    return f"{text}; about {duration(each)} each, {duration(each * len(left) / jobs)} for what is left"


def is_done(folder: Path, run: StudyRun) -> bool:
    """Whether the run has its summary, be it one that was brought from another machine."""
    return finished_summary(folder, run.name) is not None


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA names them."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]


def environments(jobs: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """What each of the runs at once has in its environment: its GPU, or its share of the processor's cores."""
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": devices[index % len(devices)]} for index in range(jobs)]
    return (
        [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))} for _ in range(jobs)]
        if jobs > 1
        else [{}]
    )


def run_study(runs: Sequence[StudyRun], folder: Path, jobs: int) -> int:
    """Run what is not done; returns the exit code of the first run that failed, or 0.

    Args:
        runs: in their order.
        folder: of the study.
        jobs: runs at once.
    """
    left = [run for run in runs if not is_done(folder, run)]
    done = len(runs) - len(left)
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for own in environments(jobs, gpus()):
        free.put(own)
    lock, began = threading.Lock(), time.monotonic()
    failed: list[int] = []
    numbers = {run.name: number for number, run in enumerate(left, start=done + 1)}

    def work(run: StudyRun) -> None:
        if failed:
            return
        own = free.get()
        with lock:
            print(f"run {numbers[run.name]} of {len(runs)}: {run.variant}, seed {run.seed}", flush=True)
        start = time.monotonic()
        code = train(run, folder, own, quiet=jobs > 1)
        free.put(own)
        with lock:
            if code:
                failed.append(code)
                print(f"error: {run.name} ended with exit code {code}; the same command goes on.", file=sys.stderr)
                return
            for checkpoint in checkpoints(folder / run.name):  # several times the model, which is in final/
                shutil.rmtree(checkpoint)
            times = read_json(folder / TIMES_FILE) or {}
            write_json(folder / TIMES_FILE, {**times, run.name: time.monotonic() - start})
            print(progress_line(runs, folder, jobs, time.monotonic() - began), flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, left))
    return failed[0] if failed else 0


def progress_line(runs: Sequence[StudyRun], folder: Path, jobs: int, elapsed: float) -> str:
    """What is done, and when the rest will be."""
    left = sum(not is_done(folder, run) for run in runs)
    rest = (seconds_per_run(folder, []) or 0.0) * left / jobs
    end = time.strftime("%a %H:%M", time.localtime(time.time() + rest))
    done = len(runs) - left
    return f"{done} of {len(runs)} runs done, {duration(elapsed)} since the start; {duration(rest)} left ({end})"


def train(run: StudyRun, folder: Path, own: Mapping[str, str], quiet: bool) -> int:
    """One run in a process of its own; it goes on where it was stopped.

    Args:
        run: of the study.
        folder: of the study.
        own: of its environment.
        quiet: its output goes into a file of its folder.
    """
    place = folder / run.name
    words = [sys.executable, "-m", "m3po_lab.train", *run.words, *resuming(place), "--output_dir", shown_path(place)]
    with output(place if quiet else None) as stream:
        return subprocess.run(words, env={**os.environ, **own}, stdout=stream, stderr=stream, check=False).returncode


@contextmanager
def output(place: Path | None) -> Iterator[Any]:
    """Where a run writes: its log file, or the terminal (None)."""
    if place is None:
        yield None
        return
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOG_FILE).open("a", encoding="utf-8") as stream:
        yield stream
