# SPDX-License-Identifier: Apache-2.0
"""Gating functions with parameters: Luong's and Bahdanau's attention on distributions.

They start as an approximation of the dot product p · q, from which they can only learn away: at a random
or zero start all weights are alike, and were seen to stay so. Both read a distribution through linear maps of it, of
(V, r) entries each or, with `project_embeddings`, of (H, r) behind the frozen embedding matrix. A distribution comes
whole or as its likeliest tokens, in which form the rollout keeps it for the policy pass.

Axes: (...) any leading ones; N paths of a group; V vocabulary; K likeliest tokens; H hidden size; r size of the gating
    function.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ... import initialization as init
from ..bag_vectors import bag_vectors
from .base import BaseM3POGating
from .embedding_start import unit_whitening

EmbedTokens = Callable[[torch.Tensor], torch.Tensor]

# Of Bahdanau's start: the bias at which the tanh bends most, where its third derivative is 0; and the size of a
# projection's entries, small enough for the terms of fourth order to be so.
BEND = math.atanh(1.0 / math.sqrt(3.0))
SMALL = 0.1


class LearnableGating(BaseM3POGating):
    """A learnable gating function; a subclass has `size_option`, `default_size`, its parameters and their start.

    Args:
        config: options: `vocab_size`, V, which must be there; the gating function's size under the name `size_option`,
            unless given `default_size`, or twice that with `project_embeddings`, which is False unless given and needs
            `hidden_size`, H. And those of every gating function.

    Raises:
        ValueError: as every gating function, or a size is missing or is no whole number above 0.
    """

    learnable = True
    options = ("project_embeddings", "vocab_size", "hidden_size")
    size_option: ClassVar[str]
    default_size: ClassVar[int]
    whitening: torch.Tensor
    token_scale: torch.Tensor

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__(config)
        chosen = dict(config or {})
        structure = self.structure(chosen)
        self.size: int = structure[self.size_option]
        self.project_embeddings: bool = structure["project_embeddings"]
        for name in ("vocab_size", "hidden_size")[: 2 if self.project_embeddings else 1]:
            if not _is_size(chosen.get(name)):
                raise ValueError(
                    f"{type(self).__name__} needs {name} in its config, the model's; attach_gating(model, ...) gives "
                    f"it, got {chosen.get(name)!r}."
                )
        self.vocab_size: int = chosen["vocab_size"]
        self.input_size: int = chosen["hidden_size"] if self.project_embeddings else self.vocab_size
        if self.project_embeddings:
            self.register_buffer("whitening", torch.eye(self.input_size))
            self.register_buffer("token_scale", torch.ones(self.vocab_size))

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return (*super().known_options(), cls.size_option)

    @classmethod
    def structure(cls, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """The options that say what parameters there are, defaults filled in: what a model's configuration keeps.

        Raises:
            ValueError: the size is no whole number above 0, or `project_embeddings` neither True nor False.
        """
        chosen = dict(config or {})
        projects = chosen.get("project_embeddings", False)
        default = cls.default_size * (2 if projects is True else 1)  # behind an embedding matrix units cost little
        size = chosen.get(cls.size_option, default)
        if not _is_size(size):
            raise ValueError(
                f"gating_config {cls.size_option}={size!r} is no whole number above 0; the default is {default}."
            )
        if not isinstance(projects, bool):
            raise ValueError(f"gating_config project_embeddings={projects!r} must be true or false.")
        return {cls.size_option: size, "project_embeddings": projects}

    def forward(
        self, probs: torch.Tensor, ids: torch.Tensor | None = None, embed_tokens: EmbedTokens | None = None
    ) -> torch.Tensor:
        """The similarity in float32, whatever comes in; arguments as `compute_similarity_matrix`."""
        with torch.autocast(probs.device.type, enabled=False):
            return self.compute_similarity_matrix(probs.float(), ids, embed_tokens)

    @abstractmethod
    def compute_similarity_matrix(
        self, probs: torch.Tensor, ids: torch.Tensor | None = None, embed_tokens: EmbedTokens | None = None
    ) -> torch.Tensor:
        """S of every pair of paths.

        Args:
            probs: (..., N, V) float32, whole distributions, or (..., N, K), the probabilities of `ids`.
            ids: (..., N, K) integers, the likeliest tokens of each path; None for whole distributions.
            embed_tokens: the model's input embedding, read without gradient; needed with `project_embeddings`.

        Returns:
            (..., N, N) float32.

        Raises:
            ValueError: `project_embeddings` and no `embed_tokens`.
        """

    def project(
        self, weights: list[nn.Parameter], probs: torch.Tensor, ids: torch.Tensor | None, embed: EmbedTokens | None
    ) -> list[torch.Tensor]:
        """Each distribution through each of some matrices (V, r) or (H, r): (..., N, r) each."""
        if self.project_embeddings:
            mean = self._embedded(probs, ids, embed)
            return [mean @ weight for weight in weights]
        if ids is None:
            return [probs @ weight for weight in weights]
        rows, shares = ids.flatten(0, -2), probs.flatten(0, -2)
        bags = [F.embedding_bag(rows, weight, per_sample_weights=shares, mode="sum") for weight in weights]
        return [bag.unflatten(0, ids.shape[:-1]) for bag in bags]

    def _embedded(self, probs: torch.Tensor, ids: torch.Tensor | None, embed: EmbedTokens | None) -> torch.Tensor:
        """Σ_v p_v s_v E[v] W, W and s fixed at the start (`unit_whitening`), no gradient to E: (..., N, H)."""
        if embed is None:
            raise ValueError(
                f"{type(self).__name__} with project_embeddings reads the embedding matrix: call it with "
                "embed_tokens=model.get_input_embeddings()."
            )
        if ids is None:
            table = embed(torch.arange(self.vocab_size, device=probs.device)).detach()
            return (probs * self.token_scale) @ table.to(probs.dtype) @ self.whitening
        shares = probs * self.token_scale[ids.long()]
        bags = ids.flatten(0, -2).unsqueeze(0), shares.flatten(0, -2).unsqueeze(0)
        mean = bag_vectors(lambda rows: embed(rows).detach(), *bags, self.input_size).squeeze(0) @ self.whitening
        return mean.unflatten(0, ids.shape[:-1])

    @torch.no_grad()
    def directions(
        self, number: int, generator: torch.Generator | None, embed: EmbedTokens | None, balanced: bool
    ) -> torch.Tensor:
        """Random directions r_d with (1 / n) Σ_d (r_d · p)(r_d · q) near p · q, as columns (V or H, n) of RMS 1.

        Of the vocabulary they are signs. Behind an embedding matrix they are orthogonal, in the space in which
        `unit_whitening` has made the embeddings of likely tokens so; it is kept with the gating function. Without a
        matrix, as for weights that somebody will bring, it is the matrix's own.

        Args:
            number: n.
            generator: of the draw; None is torch's own.
            embed: the input embedding of the model whose gating function it is.
            balanced: Σ_d ±r_d = 0, with + for the even columns and - for the odd ones.
        """
        if not self.project_embeddings:
            drawn = torch.randint(2, (self.vocab_size, number), generator=generator, dtype=torch.float32) * 2 - 1
        else:
            tall, wide = max(self.input_size, number), min(self.input_size, number)
            drawn = torch.linalg.qr(torch.randn(tall, wide, generator=generator))[0] * math.sqrt(tall)
            drawn = drawn if number <= self.input_size else drawn.T
            whitening, lengths = torch.eye(self.input_size), torch.ones(self.vocab_size)
            if embed is not None:
                whitening, lengths = unit_whitening(embed, self.vocab_size)
            init.copy_(self.whitening, whitening.to(self.whitening))
            init.copy_(self.token_scale, (1.0 / lengths).to(self.token_scale))
        if balanced:
            signs = _signs(number)
            drawn = drawn - signs * (drawn * signs).mean(-1, keepdim=True)
        return drawn

    @abstractmethod
    def start(self, generator: torch.Generator | None = None, embed_tokens: EmbedTokens | None = None) -> None:
        """Draws the parameters anew: an approximation of the dot product, see `directions`.

        What was loaded from a checkpoint is left alone.
        """

    def m3po_init_weights(self, model: Any) -> None:
        """What the hook in `_init_weights` calls, once the embeddings of `model` are there."""
        self.start(embed_tokens=model.get_input_embeddings())


class LuongAttentionGating(LearnableGating):
    """`luong`: S = pᵀ U Vᵀ q of rank r (Luong et al., 2015, the general score); U = V at the start.

    With a projection of signs / sqrt(r), S differs from p · q by about |p| |q| / sqrt(r) (Johnson and Lindenstrauss).
    """

    default_temperature = 0.033
    size_option, default_size = "rank", 128
    parameter_names = ("U", "V")

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__(config)
        self.U = nn.Parameter(torch.empty(self.input_size, self.size, dtype=torch.float32))
        self.V = nn.Parameter(torch.empty(self.input_size, self.size, dtype=torch.float32))
        self.start()

    def compute_similarity_matrix(
        self, probs: torch.Tensor, ids: torch.Tensor | None = None, embed_tokens: EmbedTokens | None = None
    ) -> torch.Tensor:
        left, right = self.project([self.U, self.V], probs, ids, embed_tokens)
        return left @ right.transpose(-1, -2)

    @torch.no_grad()
    def start(self, generator: torch.Generator | None = None, embed_tokens: EmbedTokens | None = None) -> None:
        if self.U.is_meta:
            return
        drawn = self.directions(self.size, generator, embed_tokens, balanced=False) / math.sqrt(self.size)
        for weight in (self.U, self.V):
            init.copy_(weight, drawn.to(weight))


class BahdanauAttentionGating(LearnableGating):
    """`bahdanau`: S = vᵀ tanh(W1 p + W2 q + b) with r units (Bahdanau et al., 2015), and a bias, which the paper has
    not.

    Without it the start could not depend on the pair: tanh is odd. A random direction d has two units at the start,
    projections s r_d of p and ±s r_d of q, bias c ε_d, output ±k ε_d, with signs ε_d = ±1 and Σ_d ε_d r_d = 0. With
    x = s r_d · p and y = s r_d · q, tanh(c ε + x + y) - tanh(c ε + x - y) = 2 tanh'(c) y + 2 ε tanh''(c) x y + ...:
    the first term adds to 0 over the directions, the second to a multiple of p · q, and with tanh(c) = 1 / sqrt(3)
    there is no third.
    """

    default_temperature = 0.033
    size_option, default_size = "attention_dim", 256
    parameter_names = ("W1", "W2", "bias", "v")

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__(config)
        if self.size % 4:
            raise ValueError(
                f"gating_config attention_dim={self.size} must be a multiple of 4: two units a direction, and as many "
                "directions of either sign."
            )
        self.W1 = nn.Parameter(torch.empty(self.input_size, self.size, dtype=torch.float32))
        self.W2 = nn.Parameter(torch.empty(self.input_size, self.size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(self.size, dtype=torch.float32))
        self.v = nn.Parameter(torch.empty(self.size, dtype=torch.float32))
        self.start()

    def compute_similarity_matrix(
        self, probs: torch.Tensor, ids: torch.Tensor | None = None, embed_tokens: EmbedTokens | None = None
    ) -> torch.Tensor:
        left, right = self.project([self.W1, self.W2], probs, ids, embed_tokens)
        # A product with v would round by how many rows there are, and rollout and policy pass differ in that.
        return (torch.tanh(left.unsqueeze(-2) + right.unsqueeze(-3) + self.bias) * self.v).sum(-1)

    @torch.no_grad()
    def start(self, generator: torch.Generator | None = None, embed_tokens: EmbedTokens | None = None) -> None:
        if self.W1.is_meta:
            return
        number = self.size // 2
        drawn = SMALL * self.directions(number, generator, embed_tokens, balanced=True)
        signs = _signs(number)
        bend = math.tanh(BEND)
        share = signs / (-4.0 * bend * (1.0 - bend**2) * SMALL**2 * number)  # 2 tanh''(c) s² n under the line
        init.copy_(self.W1, torch.cat([drawn, drawn], dim=-1).to(self.W1))
        init.copy_(self.W2, torch.cat([drawn, -drawn], dim=-1).to(self.W2))
        init.copy_(self.bias, (BEND * signs).repeat(2).to(self.bias))
        init.copy_(self.v, torch.cat([share, -share]).to(self.v))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _signs(number: int) -> torch.Tensor:
    """+1, -1, +1, ... (n,)."""
    return 1.0 - 2.0 * (torch.arange(number) % 2)
