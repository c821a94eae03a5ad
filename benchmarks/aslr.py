# SPDX-License-Identifier: Apache-2.0
"""What ASLR costs: prefill, decoding and policy pass with its inner loop over the same of the plain model.

One model, its ASLR switched on and off in its configuration, in turn in one process as in `rollout.py`; the theoretical
cost in FLOPs and bytes of weights stands beside what was measured. The modules are trained in the policy pass, as the
rest of the model is. Memory is the peak of the tensors alive in a pass (`live_bytes.py`).
"""

import argparse
import sys
from functools import partial
from typing import Any

import torch
from rollout import commit, in_turn, machine, peak_bytes, write_results
from transformers.m3po.aslr.modules import ASLR_MODULES, attach_aslr
from transformers.m3po.aslr.settings import ASLRHyperparameters
from trl import ModelConfig

from m3po_lab.models.embedded import EMBEDDED_MODEL
from m3po_lab.models.loading import load_model

KIB = 1 << 10


def loop_flops(config: Any, numbers: ASLRHyperparameters) -> int:
    """Multiplications and additions of the loop for one token: router, R rounds of P paths, aggregation."""
    size, paths = config.hidden_size, numbers.num_paths
    a_round = 8 * paths * size**2 + 4 * paths**2 * size  # four projections of each path; scores and values
    return 2 * size + numbers.max_iterations * a_round + 2 * paths * size + 2 * size**2


def plain_flops(model: Any) -> int:
    """The same of the model for one token, all its matrices and the head; attention over earlier tokens left out."""
    named = [(name, value.numel()) for name, value in model.named_parameters() if value.dim() == 2]
    own = [count for name, count in named if not any(module in name for module in ASLR_MODULES)]
    embeddings = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return 2 * (sum(own) - (0 if tied else embeddings))


def switch(model: Any, on: bool) -> None:
    model.config.aslr_enabled = on
    model.zero_grad(set_to_none=True)


def prefill(model: Any, on: bool, ids: torch.Tensor) -> None:
    """One forward of `ids` (B, L) with the logits of the last position, as a rollout begins."""
    switch(model, on)
    with torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, is_m3po_inference=False)
    wait(ids)


def decode(model: Any, on: bool, ids: torch.Tensor, length: int) -> None:
    """`length` tokens sampled for each row of a short prompt `ids` (B, L)."""
    switch(model, on)
    flag = {"is_m3po_inference": False} if on else {}
    mask = torch.ones_like(ids)
    sizes = {"max_new_tokens": length, "min_new_tokens": length}
    model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, **sizes, **flag)
    wait(ids)


def policy_pass(model: Any, on: bool, ids: torch.Tensor, length: int) -> None:
    """Log-probs of the last `length` tokens of `ids` (B, L) and their gradient."""
    switch(model, on)
    seeds = {"aslr_row_seeds": torch.arange(len(ids), device=ids.device), "is_m3po_inference": False} if on else {}
    logits = model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=length + 1, **seeds).logits[:, :-1]
    logits.log_softmax(-1).gather(-1, ids[:, -length:, None]).mean().backward()
    wait(ids)


def wait(ids: torch.Tensor) -> None:
    if ids.device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--aslr_num_paths", type=int, default=4)
    parser.add_argument("--aslr_max_iterations", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows decoded together, one case each")
    parser.add_argument("--length", type=int, default=64, help="new tokens per row; of the passes, the completion")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs, at least 7")
    parser.add_argument("--name", default="aslr-cpu", help="name of the files under benchmarks/results/")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(ModelConfig(model_name_or_path=args.model_name_or_path, dtype=args.dtype))
    attach_aslr(model, aslr_num_paths=args.aslr_num_paths, aslr_max_iterations=args.aslr_max_iterations)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    numbers = ASLRHyperparameters.of(model.config, {})
    torch.manual_seed(0)
    most = max(args.rows)
    ids = torch.randint(100, len(tokenizer) - 100, (most, 24 + args.length), device=model.device)
    cases = {
        f"prefill, {most} rows of {ids.shape[1]} tokens": partial(prefill, model, ids=ids),
        **{
            f"decode, {rows} row{'s' * (rows > 1)}, {args.length} tokens": partial(
                decode, model, ids=ids[:rows, :24], length=args.length
            )
            for rows in args.rows
        },
        f"policy pass, {most} rows of {ids.shape[1]} tokens": partial(policy_pass, model, ids=ids, length=args.length),
    }
    speed = {}
    for name, case in cases.items():
        speed[name] = in_turn(partial(case, on=False), partial(case, on=True), args.pairs)
    peaks = {}
    for on in (False, True):  # of the last case, the policy pass
        peaks[on] = peak_bytes(partial(policy_pass, model, on, ids, args.length), device=ids.device)[1]
    loop, plain = loop_flops(model.config, numbers), plain_flops(model)
    weights = sum(
        value.nbytes for name, value in model.named_parameters() if any(part in name for part in ASLR_MODULES)
    )
    theory = {
        "plain_flops_per_token": plain,
        "loop_flops_per_token": loop,
        "loop_weight_bytes": weights,
        "plain_weight_bytes": sum(value.nbytes for value in model.parameters()) - weights,
        "policy_pass_peak_bytes_plain": peaks[False],
        "policy_pass_peak_bytes_aslr": peaks[True],
    }
    result = {
        "command": " ".join(["python benchmarks/aslr.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "machine": machine(),
        **{name: getattr(args, name) for name in ("model_name_or_path", "dtype", "length", "pairs")},
        "numbers": numbers._asdict(),
        "theory": theory,
        "speed": speed,
    }
    more = (peaks[True] - peaks[False]) / ids.numel()
    lines = [
        f"`{result['command']}` at {result['commit']}: {args.model_name_or_path} {args.dtype}, P = {numbers.num_paths}"
        f", R = {numbers.max_iterations}; {result['machine']['device']}, {result['machine']['threads']} threads, torch "
        f"{result['machine']['torch']}.",
        "",
        f"Theory: {loop / 1e6:.1f} MFLOP a token beside {plain / 1e6:.0f}, a factor of {1 + loop / plain:.3f}; "
        f"{weights / 1e6:.1f} MB of weights beside {theory['plain_weight_bytes'] / 1e6:.0f}, a factor of "
        f"{1 + weights / theory['plain_weight_bytes']:.3f}. Policy pass: {more / KIB:.0f} KiB a token more at peak.",
        "",
        f"| what | plain, s | ASLR, s | time over plain, median of {args.pairs} pairs (min to max) |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {one['plain_seconds']:.2f} | {one['mode_seconds']:.2f} | "
        f"{1 / one['ratio_median']:.3f} ({1 / one['ratio_max']:.3f} to {1 / one['ratio_min']:.3f}) |"
        for name, one in speed.items()
    ]
    write_results(args.name, result, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
