# SPDX-License-Identifier: Apache-2.0
"""What hyper-connections cost: training step and decoding of NanoChat with them over the baseline.

Models of d12's width with fewer layers, and a vocabulary smaller by the same factor, so that the head is the share of
the work that it is in d12; they run in turn in one process as in `rollout.py`, once for each way to make H_res. A
training step is forward, backward and AdamW in float32. Memory: the peak of the tensors that forward and backward make
and hold at once (`live_bytes.py`); AdamW's, which is larger in these models and the same in each, is left out.
"""

import argparse
import os
import sys
from functools import partial
from typing import Any

import torch
from rollout import commit, in_turn, machine, peak_bytes, write_results
from transformers import NanoChatConfig, NanoChatForCausalLM
from transformers.m3po.hyper_connections.connections import MHC_MODULES

WIDTH, HEADS, LAYERS, VOCABULARY = 768, 6, 12, 50304  # of d12
TARGETS = {"training step": 1.25, "decode": 1.3}
KINDS = ("birkhoff", "sinkhorn")
KIB = 1 << 10


def build(layers: int, kind: str | None, **more: Any) -> Any:
    """A model of random weights, the baseline where `kind` is None."""
    torch.manual_seed(0)
    on = {"mhc_enabled": True, "mhc_residual": kind} if kind else {}
    config = NanoChatConfig(
        vocab_size=VOCABULARY * layers // LAYERS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        **on,
        **more,
    )
    return NanoChatForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


def wait(ids: torch.Tensor) -> None:
    if ids.device.type == "cuda":
        torch.cuda.synchronize()


def backward(model: Any, forward: Any, ids: torch.Tensor) -> None:
    """The gradients of the loss on `ids` (B, L)."""
    model.zero_grad(set_to_none=True)
    model.train()
    forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def train(model: Any, forward: Any, optimizer: Any, ids: torch.Tensor) -> None:
    """One step on `ids` (B, L)."""
    backward(model, forward, ids)
    optimizer.step()
    wait(ids)


def decode(model: Any, ids: torch.Tensor, length: int) -> None:
    """`length` tokens, greedily, for each row of a prompt `ids` (B, L)."""
    model.eval()
    sizes = {"max_new_tokens": length, "min_new_tokens": length}
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=1, **sizes)
    wait(ids)


def own_parameters(model: Any) -> int:
    """The number of parameters of the hyper-connections."""
    named = model.named_parameters()
    return sum(value.numel() for name, value in named if any(part in MHC_MODULES for part in name.split(".")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=4, help="of d12's 12")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a training step")
    parser.add_argument("--length", type=int, default=256, help="their tokens")
    parser.add_argument("--new_tokens", type=int, default=32, help="decoded per row")
    parser.add_argument("--decode_rows", type=int, nargs="+", default=[1, 8], help="rows decoded together, a case each")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs, at least 7")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models for the training step")
    parser.add_argument("--name", default="hyper-connections-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    models = {kind: build(args.layers, kind) for kind in (None, *KINDS)}
    device = models[None].device
    ids = torch.randint(2, VOCABULARY * args.layers // LAYERS, (max(args.rows, *args.decode_rows), args.length))
    ids = ids.to(device)
    first = ids[: args.rows]
    forwards = {kind: torch.compile(model) for kind, model in models.items()} if args.compile else models
    cases: dict[str, dict[str | None, Any]] = {f"training step, {args.rows} rows of {args.length} tokens": {}}
    for kind, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        cases[next(iter(cases))][kind] = partial(train, model, forwards[kind], optimizer, first)
        for rows in args.decode_rows:
            case = f"decode, {rows} row{'s' * (rows > 1)}, {args.new_tokens} tokens"
            cases.setdefault(case, {})[kind] = partial(decode, model, ids[:rows, :24], args.new_tokens)
    speed = {
        name: {kind: in_turn(case[None], case[kind], args.pairs) for kind in KINDS} for name, case in cases.items()
    }
    eager = args.compile and device.type == "cpu"  # tensors inside compiled code cannot be counted there
    if eager:
        forwards = models
    peaks = {
        kind or "baseline": peak_bytes(backward, model, forwards[kind], first, device=device)[1]
        for kind, model in models.items()
    }
    whole = sum(value.numel() for value in models[None].parameters())
    own = {kind: own_parameters(models[kind]) for kind in KINDS}
    result = {
        "command": " ".join(["python benchmarks/hyper_connections.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        "load_average_before": load,
        **{name: getattr(args, name) for name in ("layers", "rows", "length", "new_tokens", "pairs", "compile")},
        "parameters": {"baseline": whole, **own},
        "forward_and_backward_peak_bytes": peaks,
        "targets": TARGETS,
        "speed": speed,
    }
    lines = [
        f"`{result['command']}` at {result['commit']}: NanoChat float32 of d12's width, {args.layers} of its {LAYERS} "
        f"layers, vocabulary {VOCABULARY * args.layers // LAYERS}, 4 streams{', compiled' * args.compile}; "
        f"{result['machine']['device']}, {result['machine']['threads']} threads, torch {result['machine']['torch']}; "
        f"load average before {load:.1f}.",
        "",
        f"Parameters: {own['birkhoff'] / whole:.2%} more with birkhoff, {own['sinkhorn'] / whole:.2%} with sinkhorn. "
        f"Peak of forward and backward{', not compiled' * eager}: {peaks['birkhoff'] / peaks['baseline']:.2f} and "
        f"{peaks['sinkhorn'] / peaks['baseline']:.2f} times the baseline's {peaks['baseline'] / KIB / KIB:.0f} MiB.",
        "",
        f"| what | H_res by | baseline, s | mHC, s | time over baseline, median of {args.pairs} pairs (min to max) | "
        "target |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {kind} | {one['plain_seconds']:.2f} | {one['mode_seconds']:.2f} | "
        f"{1 / one['ratio_median']:.3f} ({1 / one['ratio_max']:.3f} to {1 / one['ratio_min']:.3f}) | "
        f"{TARGETS[name.split(',')[0]] if kind == 'birkhoff' else '-'} |"
        for name, case in speed.items()
        for kind, one in case.items()
    ]
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
