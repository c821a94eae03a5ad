# SPDX-License-Identifier: Apache-2.0
"""A session's trainer: its reference model is the start model, whatever that was loaded as."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from m3po_lab import session
from m3po_lab.config import parse_run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_model_is_the_start_model(tiny_config: Path, tmp_path: Path, dtype: str) -> None:
    """TRL loads it anew, in fp32 unless told: a KL that is not 0 at the start would be against another model."""
    words = ["--beta", "0.1", "--dtype", dtype, "--output_dir", str(tmp_path)]
    run = parse_run([str(tiny_config), *words])
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 1 + 2 ?"}], "reference": "3"}] * 8)
    trainer = session.build_trainer(run, rows, session.TrainingClock())
    start, reference = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert start.keys() == reference.keys()
    assert all(value.dtype == getattr(torch, dtype) for value in reference.values())
    assert all(torch.equal(value, reference[name]) for name, value in start.items())
