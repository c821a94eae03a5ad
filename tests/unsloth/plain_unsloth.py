# SPDX-License-Identifier: Apache-2.0
"""What Unsloth computes on tiny models without any of our modes, on whichever checkouts come first on the path.

python plain_unsloth.py RESULT.pt     writes what `main` lists, and where it was imported from

Nothing of ours is imported, so that it runs on the pristine upstreams too. UNSLOTH_COMPILE_LOCATION is an empty folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import standins

standins.enter()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402

_spec = importlib.util.spec_from_file_location("tiny_grpo", Path(__file__).parents[1] / "trl" / "tiny_grpo.py")
assert _spec is not None and _spec.loader is not None
tiny_grpo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_grpo)

UPSTREAMS = ("transformers", "trl", "unsloth", "unsloth_zoo")
KINDS = ("llama", "qwen2", "qwen3")
PROMPTS = torch.tensor([[0, 0, 4, 5], [3, 8, 2, 7], [0, 0, 0, 7]])  # padded on the left
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "use_gradient_checkpointing": False,
}
RUN = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 4,
    "gradient_accumulation_steps": 1,
    "beta": 0.1,  # a reference
    "num_iterations": 2,  # old log-probs
}


def loaded(kind: str, folder: str) -> Any:
    """The tiny model as Unsloth's loader gives it, with a LoRA whose values are not zero."""
    from unsloth import FastLanguageModel

    words = tiny_grpo.tokenizer()
    words.unk_token = words.eos_token  # else Qwen2's tokenizer class adds one, beyond the model's embeddings
    net = tiny_grpo.model(kind)
    net.lm_head.weight.data[0] = 0  # it hardly ever pads; Unsloth drops a padding token inside a completion
    for part in (net, words):
        part.save_pretrained(folder)
    given = {"dtype": torch.float32, "load_in_4bit": False, "device_map": "cpu", "max_seq_length": 64}
    net = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(folder, **given)[0], **LORA)
    for index, (_, value) in enumerate(sorted((n, v) for n, v in net.named_parameters() if "lora_" in n)):
        value.data = 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
    return net


def rollouts(net: Any) -> dict[str, torch.Tensor]:
    """Completions of a greedy and of a sampled `generate`, the latter with its logits."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(net)
    given = {"attention_mask": (PROMPTS != 0).long(), "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": [1, 14]}
    greedy = net.generate(input_ids=PROMPTS, do_sample=False, **given)
    torch.manual_seed(4)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "return_dict_in_generate": True, "output_logits": True}
    sampled = net.generate(input_ids=PROMPTS, **sampling, **given)
    FastLanguageModel.for_training(net, use_gradient_checkpointing=False)
    return {
        "greedy": greedy.clone(),
        "sampled": sampled.sequences.clone(),
        "sampled logits": torch.stack(sampled.logits).clone(),
        "random state": torch.get_rng_state(),
    }


def forward(net: Any, sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits of the training forward on whole sequences, and the gradients of a sum of their log-probs."""
    net.train()
    logits = net(input_ids=sequences, attention_mask=(sequences != 0).long(), use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)
    (logps * (sequences[:, 1:] != 0)).sum().backward()
    trained = {f"gradient {name}": value.grad for name, value in net.named_parameters() if value.requires_grad}
    result = {"logits": logits.detach().clone(), **{name: value.clone() for name, value in trained.items()}}
    net.zero_grad(set_to_none=True)
    return result


def training(net: Any, folder: str) -> dict[str, Any]:
    """Two steps of Unsloth's GRPOTrainer: what `tiny_grpo.record` keeps, and the batches with their log-probs."""
    import trl

    batches: list[dict[str, Any]] = []

    def build(**given: Any) -> Any:
        run = trl.GRPOTrainer(
            model=net,
            args=trl.GRPOConfig(output_dir=folder, **{**tiny_grpo.FLAGS, **RUN}),
            train_dataset=Dataset.from_dict({"prompt": ["7", "2+b="]}),
            processing_class=tiny_grpo.tokenizer(),
            **given,
        )
        batches.append(tiny_grpo.keep_batches(run))
        return run

    done = tiny_grpo.record(build)
    kept = [{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)} for batch in batches[0]]
    return {**done, "batches": kept}


def main(argv: list[str]) -> int:
    """argv: the file for the results: where the upstreams lie, the trainer's text, and per kind what was computed."""
    import trl
    from unsloth import FastLanguageModel
    from unsloth.models.rl import PatchFastRL

    torch.set_num_threads(1)
    standins.generate_trainers(PatchFastRL, FastLanguageModel)
    results: dict[str, Any] = {
        "places": {name: os.path.dirname(sys.modules[name].__file__) for name in UPSTREAMS},
        "metadata": {name: str(importlib.metadata.distribution(name).locate_file("")) for name in UPSTREAMS},
        "ours": sorted(name for name in sys.modules if "m3po" in name),
        "trainer": Path(inspect.getfile(trl.GRPOTrainer)).read_text(),
    }
    for kind in KINDS:
        net = loaded(kind, f"{argv[0]}.{kind}")
        results[f"{kind} trained"] = [name for name, value in net.named_parameters() if value.requires_grad]
        results[f"{kind} rollouts"] = rollouts(net)
        results[f"{kind} forward"] = forward(net, results[f"{kind} rollouts"]["sampled"])
        if kind == "llama":  # the trainer does not ask for the family
            results[f"{kind} training"] = training(net, f"{argv[0]}.{kind}.run")
    torch.save(results, argv[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
