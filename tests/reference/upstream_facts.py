# SPDX-License-Identifier: Apache-2.0
"""Writes what Transformers and TRL do when nothing of ours is asked for: run over pristine and patched code alike.

Everything is a hash of raw bytes or a text, so that equal means equal bit for bit.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}


def digest(tensor: Any) -> str:
    import torch

    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def facts_of(family: str, dtype_name: str) -> dict[str, Any]:
    """Tokens, random state, logits, gradients, keys and saved JSON of one tiny model."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = families().build(family, SIZES).to(getattr(torch, dtype_name)).eval()
    ids = torch.randint(3, 256, (2, 7))
    ids[0, :3] = 0
    mask = (ids != 0).long()
    facts: dict[str, Any] = {"keys": list(model.state_dict())}

    sampling = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "temperature": 0.8}
    calls = {
        "sample": sampling,
        "static": sampling | {"cache_implementation": "static"},
        "uncached": sampling | {"use_cache": False},
        "greedy": {"do_sample": False, "max_new_tokens": 12},
        "beam": {"num_beams": 3, "do_sample": False, "max_new_tokens": 8},
    }
    for name, arguments in calls.items():
        torch.manual_seed(1)
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **arguments)
        facts[f"{name} fields"] = list(out)
        facts[f"{name} tokens"] = out.sequences.tolist()
        facts[f"{name} scores"] = digest(torch.stack(out.scores))
        facts[f"{name} random state"] = digest(torch.get_rng_state())

    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    facts["logits"], facts["loss"] = digest(out.logits), digest(out.loss)
    facts["gradients"] = {name: digest(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ("config.json", "generation_config.json"):
            facts[name] = (Path(folder) / name).read_text()
        facts["files"] = sorted(path.name for path in Path(folder).iterdir())
    facts["default generation config"] = transformers.GenerationConfig().to_json_string(use_diff=False)
    return facts


def families() -> Any:
    """The module `families.py` beside this one."""
    return load(Path(__file__).with_name("families.py"))


def tiny_grpo() -> Any:
    """The module `tests/trl/tiny_grpo.py`: its folder is no package."""
    return load(Path(__file__).parents[1] / "trl" / "tiny_grpo.py")


def load(path: Path) -> Any:
    """The module of a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str]) -> int:
    """argv: `pristine` or `patched`, or the process refuses to speak for the wrong code; FILE; the runs as JSON.

    Writes FILE.json, what models do, and FILE.pt, what the runs of `tiny_grpo.py` do.
    """
    which, file, runs = argv
    patched = importlib.util.find_spec("transformers.m3po") is not None
    if patched != (which == "patched"):
        print(f"this is not the {which} transformers", file=sys.stderr)
        return 2
    kinds = [(family, dtype) for family in families().WITH_STREAMS for dtype in ("float32", "bfloat16")]
    facts = {f"{family} {dtype}": facts_of(family, dtype) for family, dtype in kinds}
    Path(f"{file}.json").write_text(json.dumps(facts))
    return int(tiny_grpo().main([f"{file}.pt", runs]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
