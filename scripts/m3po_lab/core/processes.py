# SPDX-License-Identifier: Apache-2.0
"""How many processes a run has: the accelerate config that asks for them, and the checks that they are there.

Several processes that do not see each other would each train alone and write the same files, and one process where two
were asked for looks like a run: both end here, before anything is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from m3po_lab.core.config_files import find_config
from m3po_lab.core.errors import UserError, one_line

if TYPE_CHECKING:
    from trl import GRPOConfig  # a slow import, which the launcher can do without

VARIABLE = "ACCELERATE_CONFIG"


def launch_config() -> tuple[Path, ClusterConfig] | None:
    """The config file of accelerate that the variable ACCELERATE_CONFIG names, read; None where it is not set.

    Raises:
        UserError: when the file does not exist, is not one of accelerate's or does not say the number of processes.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    file = find_config(path, "configs/accelerate")
    try:
        config = load_config_from_file(str(file))
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{VARIABLE}={path} is not a config file of accelerate: {one_line(error)}") from error
    if not isinstance(config, ClusterConfig) or config.num_processes < 1:
        raise UserError(f"{VARIABLE}={path} does not say how many processes to start; set num_processes in it.")
    if config.distributed_type == DistributedType.MULTI_CPU:
        raise UserError(
            f"{VARIABLE}={path} has distributed_type: MULTI_CPU, of which 'accelerate launch' starts one process "
            "only; set MULTI_GPU and use_cpu: true, as configs/accelerate/cpu2.yaml does."
        )
    return file, config


def launch_arguments(file: Path, words: list[str]) -> Any:
    """What `accelerate launch` makes of a config file and the command-line words of a run."""
    return launch_command_parser().parse_args(["--config_file", str(file), "--module", "m3po_lab.train", *words])


def on_cpus() -> bool:
    """Whether a run is on CPUs unless its flags say otherwise: asked for, or all there is."""
    return os.environ.get("ACCELERATE_USE_CPU") == "true" or not torch.accelerator.is_available()


def check_started() -> None:
    """Refuse another number of processes than the config asks for, as far as the launcher's variables say it.

    It comes before the arguments are parsed, which is when processes join each other.

    Raises:
        UserError: with both numbers.
    """
    config = launch_config()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and on_cpus():
        # accelerate would name it "cpu:0", onto which torch.load cannot put the optimizer of a checkpoint.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    if config is not None and config[1].num_processes != started:
        raise UserError(
            f"{VARIABLE}={os.environ[VARIABLE]} asks for num_processes: {config[1].num_processes}, and there "
            f"{'is' if started == 1 else 'are'} {started}; start the run with 'bash scripts/train_grpo.sh', or unset "
            f"{VARIABLE}."
        )


def check_joined(training: GRPOConfig) -> None:
    """Refuse processes that were started together and do not see each other.

    Raises:
        UserError: with both numbers.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if training.world_size != started:
        raise UserError(
            f"{started} processes were started and {training.world_size} take part in the run: --use_cpu false needs "
            "one GPU for each process; leave it out to train on CPUs."
        )


def check_engine(accelerator: Accelerator) -> None:
    """Refuse what would silently run on another engine, or end without a model.

    Raises:
        UserError: names the line of the accelerate config and its mend.
    """
    engine = accelerator.distributed_type.value
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" and engine != name:
            raise UserError(
                f"distributed_type: {name} needs GPUs: accelerate would leave it out on CPUs without a word; take "
                f"{VARIABLE}=configs/accelerate/cpu2.yaml."
            )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise UserError("fsdp_version: 1 is not supported; set 2, as configs/accelerate/fsdp2.yaml does.")
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading: true leaves all processes but one without weights while the held-out "
            "problems are answered before training; set false."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UserError(
            f"fsdp_state_dict_type: {plugin.state_dict_type} writes checkpoints without a loadable model; set "
            "FULL_STATE_DICT."
        )
