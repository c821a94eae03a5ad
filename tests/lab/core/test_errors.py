# SPDX-License-Identifier: Apache-2.0
"""A wrong input or a failing environment is one line with its mend and a traceback in a file; a bug keeps its own."""

import errno
import os
import re
import tempfile
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save_file

from m3po_lab.core import config_files, errors
from m3po_lab.core.config_files import split_config
from m3po_lab.core.errors import UserError, exit_code, failure, failures_said, short
from m3po_lab.core.files import check_writable, write_text


def raised(action: object, *given: object) -> BaseException:
    """What an action raises."""
    with pytest.raises(Exception) as found:  # noqa: PT011, the test looks at it
        action(*given)  # type: ignore[operator]
    return found.value


def test_a_message_is_cut_at_a_word_and_shows_it() -> None:
    text = "Connection to the Hub was refused by the proxy of this place"
    assert short(text) == text
    assert short(text, 30) == "Connection to the Hub was …"
    assert short("x" * 50, 10) == "xxxxxxxxx…"  # one word only
    assert short("first\n  line\n\nsecond paragraph") == "first line"


@pytest.mark.parametrize("number", sorted(errors.MENDS))
def test_every_error_of_the_operating_system_names_its_file_and_mend(number: int) -> None:
    line = failure(OSError(number, os.strerror(number), "/data/x.json"))
    assert line == f"{os.strerror(number)}: /data/x.json; {errors.MENDS[number]}."


def test_a_full_disk_is_known_however_a_library_says_it(tmp_path: Path) -> None:
    full = tmp_path / "optimizer.pt"
    full.symlink_to("/dev/full")
    of_torch = raised(torch.save, {"a": torch.zeros(100000)}, full)
    assert isinstance(of_torch, RuntimeError) and "the disk is full" in str(failure(of_torch))
    assert "the disk is full" in str(failure(raised(full.write_text, "x" * 100000)))
    of_rust = raised(save_file, {"a": torch.zeros(1)}, tmp_path)
    assert errors.MENDS[errno.EISDIR] in str(failure(of_rust))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError("Unable to allocate 256. TiB"),
    ],
)
def test_a_full_memory_names_the_flag_to_lower(error: Exception) -> None:
    assert str(failure(error, "--batch_size")).endswith(": lower --batch_size.")
    assert str(failure(error)).startswith("the memory is used up (")


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.InvalidURL("Invalid port"), OfflineModeIsEnabled("offline")]
)
def test_an_unreachable_hub_names_the_way_without_it(error: Exception) -> None:
    assert "HF_HUB_OFFLINE=1" in str(failure(error)) and "ALL_PROXY" in str(failure(error))


def test_a_missing_package_is_named_and_a_missing_module_of_ours_is_a_bug() -> None:
    assert "the package nosuchpackage is not installed: run 'make env'" in str(
        failure(raised(__import__, "nosuchpackage"))
    )
    assert failure(ImportError("FlashAttention2 needs flash_attn")) == "FlashAttention2 needs flash_attn."
    assert failure(raised(__import__, "m3po_lab.nosuch")) is None
    assert failure(raised(exec, "from m3po_lab.core.errors import nosuch")) is None


@pytest.mark.parametrize("bug", [KeyError("x"), TypeError("x"), ValueError("x"), RuntimeError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(bug: Exception, tmp_path: Path) -> None:
    def fail() -> None:
        with failures_said(tmp_path):
            raise bug

    with pytest.raises(type(bug)) as found:
        exit_code(fail, "")
    assert found.value is bug and not list(tmp_path.iterdir())


def fail_in(folder: Path | None) -> None:
    """A full disk while something is written into a run folder."""
    with failures_said(folder, way_on=lambda: "Continue so."):
        raise OSError(errno.ENOSPC, "No space left on device", "x.pt")


def test_a_failure_is_one_line_and_its_traceback_lies_in_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda: fail_in(tmp_path), "") == 2
    printed = capsys.readouterr().err
    assert printed == (
        f"error: No space left on device: x.pt; {errors.MENDS[errno.ENOSPC]}. Continue so. "
        f"Traceback: {tmp_path / 'error.log'}\n"
    )
    assert "in fail_in" in (tmp_path / "error.log").read_text()


def test_a_traceback_that_the_folder_cannot_hold_lies_in_a_temporary_file_or_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "error.log").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere", None):
        with pytest.raises(UserError) as found:
            fail_in(folder)
        file = Path(re.findall(r"Traceback: (.*)$", str(found.value))[0])
        assert file.parent == Path(tempfile.gettempdir()) and "in fail_in" in file.read_text()
        file.unlink()

    def no_place(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", no_place)
    with pytest.raises(UserError, match="Continue so.$"):
        fail_in(None)
    assert "in fail_in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: folder / "file" / "run", "a part of this path is a file"),
        (lambda folder: folder / "file", "a part of this path is a file"),
        (lambda folder: folder / ("x" * 300), "give it a shorter name"),
        (lambda folder: Path("/proc/run"), ""),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_it_is_made(make: object, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^--output_dir .* cannot be written: .*{why}"):
        check_writable(make(tmp_path))  # type: ignore[operator]
    check_writable(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("words", "config", "rest"),
    [
        ("a.yaml --mode hrpo", "a.yaml", "--mode hrpo"),
        ("--mode hrpo a.yaml", "a.yaml", "--mode hrpo"),
        ("--mode hrpo a.yml --seed 1", "a.yml", "--mode hrpo --seed 1"),
        ("--lora_target_modules q_proj k_proj a.yaml", "a.yaml", "--lora_target_modules q_proj k_proj"),
        ("--mode=hrpo a.yaml", "a.yaml", "--mode=hrpo"),
        ("--config=a.yaml --seed 1", "a.yaml", "--seed 1"),
        ("--seed 1 --config a.yaml", "a.yaml", "--seed 1"),
        ("--output_dir runs/x.yaml", None, "--output_dir runs/x.yaml"),
        ("--seed 1", None, "--seed 1"),
    ],
)
def test_the_yaml_may_stand_before_or_behind_the_flags(words: str, config: str | None, rest: str) -> None:
    assert split_config(words.split()) == (config, rest.split())


@pytest.mark.parametrize("words", ["a.yaml b.yaml", "a.yaml --seed 1 b.yaml", "--config a.yaml b.yaml"])
def test_two_yaml_files_are_refused_by_name(words: str) -> None:
    with pytest.raises(UserError, match="^a.yaml and b.yaml are two YAML files: give one"):
        split_config(words.split())


@pytest.mark.parametrize("words", ["--config", "--config="])
def test_a_config_flag_without_a_file_is_refused(words: str) -> None:
    with pytest.raises(UserError, match="--config needs the path of a YAML file"):
        split_config([words])


def test_a_folder_is_no_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder. Give the path of a YAML file"):
        config_files.find_config(str(tmp_path))
