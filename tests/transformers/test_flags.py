# SPDX-License-Identifier: Apache-2.0
"""The fields on the configuration classes need no torch, as the classes themselves do not."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib.util, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] == "torch" else find_spec(name, *more)
sys.meta_path.insert(0, Blocked())

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.nanochat.configuration_nanochat import NanoChatConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

for kind in (LlamaConfig, Qwen2Config):
    saved = kind(aslr_enabled=True, thinking_residual_enabled=True, mhc_enabled=True).to_dict()
    assert {"aslr_num_paths", "thinking_residual_r_min", "mhc_num_streams"} <= saved.keys(), saved
    assert not {"aslr_enabled", "thinking_residual_enabled", "mhc_enabled"} & kind().to_dict().keys()
    try:
        kind(aslr_enabled=True, aslr_threshold=2.0)
        raise SystemExit("a threshold of 2 was taken")
    except Exception as error:
        assert "aslr_threshold" in str(error), error
assert "mhc_num_streams" in NanoChatConfig(mhc_enabled=True).to_dict()
assert "torch" not in sys.modules
"""


def test_configurations_are_made_where_torch_cannot_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
