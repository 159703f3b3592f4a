"""Stackformer: generates the codes of an MQ-VAE and their positions.

    Stackformer     "Not All Image Regions Matter: Masked Vector Quantization for Autoregressive
                    Image Generation" (Huang et al., CVPR 2023), sec. 3.3

A sequence is the (code, position) pairs of the N kept cells in raster order. The Code-Transformer
reads the pairs so far and predicts the next code. The Position-Transformer reads its hidden states
and that code, and predicts the position.

    model = Stackformer(codebook_size=1024, grid=32, num_codes=256, num_classes=1000)
    loss = model(codes, labels)["loss"]     # codes = {"indices": (B, 256), "positions": (B, 256)}
    codes = model.sample(8, labels=labels)  # for MQVAE.decode

Differences from the release: start tokens have their own table and no logits; label dropout allows
guidance. Copy with gpt.py.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from gpt import (
    Blocks, Cache, CodeHead, Codes, CodeTransformer, Count, Generators, Probability,
    check_sampling, code_ends, divided, draw, filter_logits, kept_first, read_codes, sides,
    uniforms)


class Stackformer(CodeTransformer):
    """Code-Transformer, then Position-Transformer.

    codebook_size, grid, num_codes     K, the side of the grid of cells or its [height, width], and
                                       the number N of cells with a code
    num_classes, label_dropout         see CodeTransformer
    code_layers, position_layers       depth of each transformer
    n_head, n_embd, dropout, codebook_factors    as in GPT
    """

    reads = ("indices", "positions")

    def __init__(self, codebook_size: int, grid: int | list[int], num_codes: int,
                 num_classes: Count = 0, code_layers: int = 12, position_layers: int = 12,
                 n_head: int = 16, n_embd: int = 1024, dropout: Probability = 0.1,
                 label_dropout: Probability = 0.1, codebook_factors: list[int] | None = None):
        super().__init__(num_classes, label_dropout, codebook_size, dropout)
        self.grid = sides(grid)
        self.cells = math.prod(self.grid)
        self.length = num_codes
        self.start_emb = nn.Embedding(self.num_starts, n_embd)
        self.code_emb, code_head = code_ends(codebook_size, n_embd, codebook_factors)
        self.position_emb = nn.Embedding(self.cells + 1, n_embd)  # the last: the start token's
        self.index_emb = nn.Parameter(torch.zeros(num_codes, n_embd))
        self.code_blocks = Blocks(code_layers, n_head, n_embd, dropout)
        self.code_norm = nn.LayerNorm(n_embd)
        self.code_head = code_head
        self.position_blocks = Blocks(position_layers, n_head, n_embd, dropout)
        self.position_norm = nn.LayerNorm(n_embd)
        self.position_head = CodeHead(n_embd, self.cells, bias=False)
        self.init_weights()

    @classmethod
    def settings_for(cls, stage1, size):
        grid = divided(size, stage1.factor)
        return super().settings_for(stage1, size) | {"grid": grid, "num_codes": stage1.num_codes}

    def logits(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Next-token logits under teacher forcing, {"indices": (B, N, K), "positions":
        (B, N, h * w)}."""
        h, p = self._hidden(codes, labels)
        return {"indices": self.code_head(h), "positions": self.position_head(p)}

    def _nats(self, codes, labels):
        """Cross-entropies in nats, (B, N) each."""
        h, p = self._hidden(codes, labels)
        return {"code": self.code_head.nats(h, codes["indices"]),
                "position": self.position_head.nats(p, codes["positions"])}

    def _hidden(self, codes, labels):
        """The inputs of both heads, (B, N, C) each."""
        shape = (self.length,)
        indices, positions = read_codes(codes, indices=shape, positions=shape)
        starts = self.start_tokens(len(indices), labels, indices.device)
        code = self.code_emb(indices)                                   # (B, N, C)
        pairs = code + self.position_emb(positions)                     # (B, N, C)
        first = self.start_emb(starts) + self.position_emb.weight[-1]   # (B, C)
        x = torch.cat([first.unsqueeze(1), pairs[:, :-1]], dim=1)
        h = self.code_blocks(self.drop(x + self.index_emb))             # (B, N, C)
        p = self.position_blocks(h + code)                              # (B, N, C)
        return self.code_norm(h), self.position_norm(p)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, cfg_scale: float = 1.0,
               generator: Generators = None, temperature_pos: float | None = None,
               top_k_pos: int | None = None, top_p_pos: float | None = None,
               codes: Codes | None = None, known: Tensor | None = None) -> Codes:
        """Codes of n new images, {"indices": (n, N), "positions": (n, N)}, positions ascending.

        As GPT.sample; *_pos apply to positions (temperature_pos default: temperature). A position
        must follow the last one and leave room for the codes to come. Cells without a code also
        stay without one where they are known.
        """
        temperature_pos = temperature if temperature_pos is None else temperature_pos
        filters = check_sampling(temperature, top_k, top_p)
        position_filters = check_sampling(temperature_pos, top_k_pos, top_p_pos)
        starts, guide = self.start_sampling(n, labels, cfg_scale)
        device = starts.device
        code_cache = Cache(self.code_blocks, len(starts), self.length)
        position_cache = Cache(self.position_blocks, len(starts), self.length)
        numbers = uniforms(n, (self.length, self.code_head.digits + 1), generator, device)

        indices = starts.new_zeros(n, self.length)
        positions = torch.zeros_like(indices)
        known_cells = kept_first(n, self.grid, codes, known).to(device).unsqueeze(1)    # (n, 1)
        if codes is not None:
            indices = codes["indices"].to(device).clone()
            positions = codes["positions"].to(device).clone()
        kept = (positions < known_cells).sum(1)                         # codes that stay, (n,)

        cells = torch.arange(self.cells, device=device)
        last = known_cells - 1  # (n, 1): cells up to here are decided
        x = self.start_emb(starts) + self.position_emb.weight[-1]       # (n or 2n, C)
        for t in range(self.length):
            h = code_cache.step(x + self.index_emb[t], t)
            code = self.code_head.draw(self.code_norm(h), guide, filters, numbers[:, t])
            indices[:, t] = torch.where(t < kept, indices[:, t], code)
            code = self.code_emb(indices[:, t].repeat(guide.copies))

            p = position_cache.step(h + code, t)
            logits = guide(self.position_head(self.position_norm(p)))   # (n, h * w)
            no_room = cells > self.cells - self.length + t
            logits = logits.masked_fill((cells <= last) | no_room, -math.inf)
            position = draw(filter_logits(logits, *position_filters), numbers[:, t, -1])
            positions[:, t] = torch.where(t < kept, positions[:, t], position)
            last = last.maximum(positions[:, t:t + 1])
            x = code + self.position_emb(positions[:, t].repeat(guide.copies))
        guide.check()
        return {"indices": indices, "positions": positions}
