# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F403 (upstream's way to write a lazy package)
"""M3PO (arXiv 2512.01485, eq. 2-6) and HRPO (arXiv 2505.18454): thinking inputs other than the sampled token.

The patches of this overlay call into this package from `_sample` (generation) and from the forward of the Llama and
Qwen2 models; everything else lives here.

Axes, in every docstring of the package: B rows (paths of all prompts), N paths of the largest group, G groups,
T completion positions, L input positions, K bag entries, V vocabulary, H hidden size.

A *group* is the paths of one prompt. A *bag* is a thinking vector written as token ids (B, T, K) int32 and weights
(B, T, K) float32: the vector is the weighted sum of the embeddings of these tokens. A position whose weights are all
zero has no bag: there the model gets the embedding of its own token.

Names are loaded when they are first asked for, as in upstream's packages: a configuration imports this package too.
"""

from typing import TYPE_CHECKING

from ..utils import _LazyModule
from ..utils.import_utils import define_import_structure

if TYPE_CHECKING:
    from .checkpoint import *
    from .generate import *
    from .interaction import *
    from .residual_gate import *
    from .settings import *
    from .state import *
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, define_import_structure(__file__), module_spec=__spec__)
