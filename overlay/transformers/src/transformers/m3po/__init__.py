# SPDX-License-Identifier: Apache-2.0
"""M3PO (arXiv 2512.01485, eq. 2-6), HRPO (arXiv 2505.18454) and ASLR: paths that interact, soft thoughts as inputs,
latent paths inside the model.

The patches of this overlay call into this package from `_sample` (generation) and from the forward of the Llama and
Qwen2 models; everything else lives here.

Axes, in every docstring of the package: B rows (paths of all prompts), N paths of the largest group, G groups,
T completion positions, L input positions, K bag entries, V vocabulary, H hidden size.

A *group* is the paths of one prompt. A *bag* is a thinking vector written as token ids (B, T, K) int32 and weights
(B, T, K) float32: the vector is the weighted sum of the embeddings of these tokens. A position whose weights are all
zero has no bag: there the model gets the embedding of its own token.

Names are loaded when they are first asked for: a configuration class imports this package too, long before torch.
"""

from .lazy import loader

_HOMES = {
    "CHECKPOINT_FILE": ".checkpoint",
    "M3POGenerateOutput": ".generation.output",
    "M3POGenerationState": ".generation.state",
    "M3POPathAggregator": ".aslr.modules",
    "M3POPathCollaborator": ".aslr.modules",
    "M3PORouter": ".aslr.modules",
    "PathGroups": ".thinking.interaction",
    "ThinkingResidualLambda": ".thinking.residual_gate",
    "ThinkingSettings": ".settings",
    "apply_cross_path_interaction": ".thinking.interaction",
    "apply_m3po_to_logits": ".thinking.logits",
    "attach_gating": ".gating.module",
    "cosine_similarity": ".gating.parameter_free_gates",
    "cross_path_weights": ".thinking.interaction",
    "generate_with_m3po": ".generation.generate",
    "load_prototype_modules": ".aslr.legacy_checkpoint",
    "load_seed_modules": ".aslr.legacy_checkpoint",  # its name before
    "read_checkpoint_info": ".checkpoint",
    "write_checkpoint_info": ".checkpoint",
}

__all__ = [*_HOMES]


__getattr__ = loader(__name__, __package__ or "", _HOMES)
