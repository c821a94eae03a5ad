# SPDX-License-Identifier: Apache-2.0
"""The torch scoring head that stands in for TRL's Triton kernel.

Oracles: the formulas in float64, written here without the code under test, and the Triton kernel itself, run by
Triton's interpreter in a process of its own (the interpreter has to be chosen before triton is imported).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.chunked_logprob_torch as under_test
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.chunked_logprob_torch import OPTIONAL_OUTPUTS, TorchChunkedLogProbFunction, scorer
from trl.trainer.utils import add_fused_lm_head

ALL = ("log_probs", *OPTIONAL_OUTPUTS)
# temperature, softcap, logit scale, bias
TRANSFORMS = [(1.0, None, 1.0, False), (0.7, None, 0.5, True), (1.3, 3.0, 1.7, True)]

KERNEL_SCRIPT = """
import sys, torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
cases = torch.load(sys.argv[1], weights_only=True)
for case in cases:
    leaves = [None if x is None else x.requires_grad_() for x in case["leaves"]]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["autocast"]):
        out = ChunkedLogProbFunction.apply(*leaves, case["targets"], *case["args"])
    ((out[0] * case["coefficients"][0]).sum() + (out[1] * case["coefficients"][1]).sum()).backward()
    case["out"] = list(out)
    case["grads"] = [None if x is None else x.grad for x in leaves]
result = [{k: [None if x is None else x.detach() for x in c[k]] for k in ("out", "grads")} for c in cases]
torch.save(result, sys.argv[2])
"""

NO_TRITON_SCRIPT = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError, as where it is not installed
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head
config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(config)
add_fused_lm_head(model)
ids = torch.arange(6)[None]
expected = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
torch.testing.assert_close(model(ids, labels=ids, fused_lm_head=True).log_probs, expected)
"""


def make_case(
    shape: tuple[int, int, int], transform: tuple[float, float | None, float, bool], dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Return leaves, targets and arguments for N tokens, hidden size H and vocabulary V.

    The inputs are small multiples of 1/4 and 1/2, so that for H <= 8 every projection is exact in bfloat16: what is
    left to differ is the computation after it. Ties between logits are frequent, and of three targets one is the first
    of the largest logits and one the last of them.
    """
    n, h, v = shape
    temperature, softcap, scale, has_bias = transform
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-4, 5, (n, h), generator=g) / 4
    hidden[1:2] = 0  # without a bias all its logits are tied
    weight = torch.randint(-2, 3, (v, h), generator=g) / 2
    bias = torch.randint(-2, 3, (v,), generator=g) / 4 if has_bias else None
    targets = torch.randint(v, (n,), generator=g)
    logits = hidden @ weight.T + (0 if bias is None else bias)
    targets[1::3] = logits[1::3].argmax(1)
    targets[2::3] = v - 1 - logits[2::3].flip(1).argmax(1)
    return {
        "leaves": [None if x is None else x.to(dtype) for x in (hidden, weight, bias)],
        "targets": targets,
        "args": [temperature, max(2, v // 3), softcap, scale, ALL],
        "coefficients": torch.randn(2, n, generator=g),
        "autocast": False,
    }


def run(case: dict[str, Any], function: Any = TorchChunkedLogProbFunction) -> tuple[list, list]:
    """Return the outputs and the gradients of sum(c0 * log_probs + c1 * entropy)."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in case["leaves"]]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["autocast"]):
        out = function.apply(*leaves, case["targets"], *case["args"])
    (out[0] * case["coefficients"][0] + out[1] * case["coefficients"][1]).sum().backward()
    return list(out), [None if x is None else x.grad for x in leaves]


class Reference:
    """The formulas, in float64 on whole logits, with autograd's gradients."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        y = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        y = y * scale if softcap is None else softcap * torch.tanh(y * scale / softcap)
        log_p = torch.log_softmax(y / temperature, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        picked = log_p[torch.arange(len(targets)), targets]
        sum_sq = log_p.exp().square().sum(-1).log().detach()
        mean = (y / temperature).mean(-1).detach()
        return picked, entropy, sum_sq, mean, y.float().argmax(-1) == targets


def assert_close(actual: list, expected: list, tolerance: float) -> None:
    """Compare lists of tensors; the tolerance is absolute, in units of the largest expected entry (at least 1)."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), i
        if a is not None:
            a, e = a.detach().double(), e.detach().double()
            atol = tolerance * max(1.0, e.abs().max().item())
            torch.testing.assert_close(a, e, rtol=0, atol=atol, msg=lambda m, i=i: f"item {i}: {m}")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens and 64 logits per tile: neither N nor V is a multiple of a tile."""
    monkeypatch.setattr(under_test, "TOKEN_CHUNK_SIZE", 5)
    monkeypatch.setattr(under_test, "TILE_ELEMENTS", 64)


class Recorder(TorchDispatchMode):
    """Records the largest tensor that any operation returned and the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
                self.products.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(1, 3, 5), (13, 8, 257), (6, 8, 1000)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.usefixtures("small_tiles")
def test_outputs_and_gradients_equal_the_formulas(shape, transform, dtype, tolerance):
    case = make_case(shape, transform, dtype)
    outputs, grads = run(case)
    expected, expected_grads = run(case, Reference)
    assert_close(outputs, expected, tolerance)
    assert_close(grads, expected_grads, tolerance)


@pytest.mark.parametrize("transform", TRANSFORMS[:2])
@pytest.mark.parametrize("token_chunk", [5, 4096])
def test_bf16_outputs_are_fp32_accurate_and_gradients_bf16_accurate(transform, token_chunk, monkeypatch):
    monkeypatch.setattr(under_test, "TOKEN_CHUNK_SIZE", token_chunk)
    case = make_case((13, 8, 257), transform, torch.bfloat16)
    outputs, grads = run(case)
    expected, expected_grads = run(case, Reference)
    assert [x.dtype for x in outputs] == [torch.float32] * 4 + [torch.bool]
    assert_close(outputs, expected, 2e-6)
    assert all(x is None or x.dtype == torch.bfloat16 for x in grads)
    assert_close(grads, expected_grads, 2**-7)  # one unit in the last place


def test_the_gradient_of_a_bf16_head_is_summed_in_fp32_over_tiles_of_tokens(monkeypatch):
    monkeypatch.setattr(under_test, "TOKEN_CHUNK_SIZE", 1)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    hidden, targets = torch.ones(400, 4, dtype=torch.bfloat16), torch.zeros(400, dtype=torch.long)
    TorchChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8)[0].sum().backward()
    assert weight.grad[:2].tolist() == [[350.0] * 4, [-50.0] * 4]  # a sum in bfloat16 stops growing at 256


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_passes_with_softcap_bias_and_scale():
    case = make_case((6, 3, 14), TRANSFORMS[2], torch.float64)
    leaves = [x.requires_grad_() for x in case["leaves"]]
    assert torch.autograd.gradcheck(
        lambda *x: TorchChunkedLogProbFunction.apply(*x, case["targets"], *case["args"])[:2], leaves
    )


def test_outputs_not_asked_for_are_none_and_entropy_alone_has_the_right_gradient():
    case = make_case((4, 8, 31), TRANSFORMS[0], torch.float64)
    only = TorchChunkedLogProbFunction.apply(*case["leaves"], case["targets"], *case["args"][:4], ("log_probs",))
    assert [x is None for x in only] == [False, True, True, True, True]
    case["coefficients"][0] = 0
    assert_close(run(case)[1], run(case, Reference)[1], 1e-12)


def test_no_tokens_give_empty_outputs_and_zero_gradients():
    case = make_case((0, 8, 31), TRANSFORMS[1], torch.float32)
    outputs, grads = run(case)
    assert [tuple(x.shape) for x in outputs] == [(0,)] * 5
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(grads, case["leaves"], strict=True))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.slow
def test_outputs_and_gradients_equal_the_triton_kernel(tmp_path):
    cases = [
        make_case(shape, transform, dtype, seed)
        for seed, shape in enumerate([(1, 8, 40), (9, 8, 1500)])
        for transform in TRANSFORMS
        for dtype in (torch.float32, torch.bfloat16)
    ]
    cases.append(make_case((5, 8, 300), TRANSFORMS[1], torch.float32) | {"autocast": True})
    torch.save(cases, tmp_path / "cases.pt")
    _python(KERNEL_SCRIPT, tmp_path / "cases.pt", tmp_path / "out.pt", TRITON_INTERPRET="1")
    oracle = torch.load(tmp_path / "out.pt", weights_only=True)
    for case, kernel in zip(cases, oracle, strict=True):
        outputs, grads = run(case)
        exact = case["leaves"][0].dtype == torch.float32 and not case["autocast"]
        assert [x.dtype for x in outputs] == [x.dtype for x in kernel["out"]]
        assert_close(outputs, kernel["out"], 2e-6)
        assert_close(grads, kernel["grads"], 2e-6 if exact else 1e-2)
        reference = run(case, Reference)[1] if not case["autocast"] else grads
        for ours, theirs, truth in zip(grads, kernel["grads"], reference, strict=True):
            if truth is not None:  # never further from the truth than the kernel, up to one rounding
                error, kernel_error = ((x.double() - truth.double()).norm() for x in (ours, theirs))
                assert error <= kernel_error + 4e-3 * truth.double().norm() * (not exact) + 1e-5


def _python(script: str, *args: Path, **environment: str) -> None:
    """Run a script in a process of its own, on one thread; its error output is the failure's message."""
    command = [sys.executable, "-c", script, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_are_never_alive_and_none_are_kept_for_backward(dtype, monkeypatch):
    monkeypatch.setattr(under_test, "TILE_ELEMENTS", 4096)
    n, h, v = 64, 4, 2000
    case = make_case((n, h, v), TRANSFORMS[0], dtype)
    saved: list[int] = []
    with (
        Recorder() as recorder,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        run(case)
    assert recorder.largest == v * h  # the head's gradient; a tile is smaller, all logits are n * v = 128,000
    assert max(saved) == v * h  # the head itself


def test_gradients_that_nothing_needs_are_not_computed():
    n, h, v = 6, 8, 40
    hidden, weight, _ = make_case((n, h, v), TRANSFORMS[0], torch.float32)["leaves"]
    with Recorder() as recorder:
        out = TorchChunkedLogProbFunction.apply(
            hidden.requires_grad_(), weight, None, torch.zeros(n, dtype=torch.long), 1.0, v, None, 1.0, ("log_probs",)
        )
        (out[0][:2].sum() + 0 * out[0][2:].sum()).backward()
    # forward: six tokens; backward: the two tokens with a gradient, and no product for the frozen head
    assert recorder.products == [(6, v), (2, v), (2, h)]
    assert hidden.grad[2:].abs().max() == 0 < hidden.grad[:2].abs().max()


def test_a_gpu_with_triton_gets_the_kernel_itself_and_everything_else_the_torch_function():
    class Kernel(torch.autograd.Function):
        pass

    devices = [torch.device(x) for x in ("cuda", "cuda:1", "xpu", "cpu", "mps")]
    assert [scorer(Kernel, x) is Kernel for x in devices] == [True, True, True, False, False]
    assert {scorer(Kernel, devices[3]), *(scorer(None, x) for x in devices)} == {TorchChunkedLogProbFunction}


@pytest.mark.slow
def test_completions_are_scored_where_triton_is_not_installed():
    _python(NO_TRITON_SCRIPT)


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def test_ignored_labels_score_zero_and_the_model_gets_the_gradient_of_plain_logits():
    model = tiny_llama(61)
    ids = torch.randint(2, 61, (3, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    kept = labels[:, 1:] != -100
    log_p = (model(ids).logits[:, :-1] / 0.8).log_softmax(-1)
    expected = log_p.gather(2, ids[:, 1:, None]).squeeze(2) * kept
    expected.sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    out = model(ids, labels=labels, fused_lm_head=True)
    out.log_probs.sum().backward()
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=1e-5)
    assert torch.equal(out.label_mask, kept)
    assert (out.log_probs == 0).equal(~kept)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def tokenizer_of_numbers(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers below `size`, after a padding and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<end>": 1} | {str(i): i + 2 for i in range(size - 2)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left")


def train_two_steps(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Run GRPO for two steps; return the weights' change and the logged gradient norms."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = tiny_llama(61)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer_of_numbers(61),
        reward_funcs=lambda completions, **_: [float(sum(map(int, c.split()))) for c in completions],
        train_dataset=Dataset.from_dict({"prompt": ["1 2 3", "4 5", "6 7 8 9"] * 2}),
        args=GRPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, optim="sgd", learning_rate=0.1, max_steps=2,
            per_device_train_batch_size=4, num_generations=4, max_completion_length=6, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False, seed=3,
        ),
    )  # fmt: skip
    trainer.train()
    norms = [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x]
    return {name: x - before[name] for name, x in model.state_dict().items()}, norms


def test_grpo_takes_two_steps_on_a_cpu_with_the_gradient_of_plain_logits(tmp_path, monkeypatch):
    calls: list[int] = []
    forward = TorchChunkedLogProbFunction.forward
    counted = staticmethod(lambda ctx, *x: calls.append(len(x[0])) or forward(ctx, *x))
    monkeypatch.setattr(TorchChunkedLogProbFunction, "forward", counted)
    change, norms = train_two_steps(tmp_path / "torch")
    assert len(calls) >= 2 and min(calls) >= 4
    assert len(norms) == 2 and min(norms) > 0.01
    monkeypatch.setattr(under_test, "scorer", lambda kernel, device: PlainLogits)
    plain, plain_norms = train_two_steps(tmp_path / "plain")
    assert norms == pytest.approx(plain_norms, rel=1e-4)
    for name, x in change.items():
        torch.testing.assert_close(x, plain[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


class PlainLogits:
    """The formulas in float32 on whole logits."""

    @staticmethod
    def apply(hidden, *rest):
        return tuple(x.float() if x.is_floating_point() else x for x in Reference.apply(hidden, *rest))
