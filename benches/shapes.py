"""Shapes of models whose weights are random, to measure."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of the llama family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_base: float
    # Whether the embedding is also the matrix that logits are made with.
    tied: bool
    context: int = 8192
    rms_eps: float = 1e-5

    @property
    def head_dim(self):
        return self.hidden // self.heads


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, 1e5, tied=True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256, 5e5, tied=False),
    # To try programs with.
    "tiny": Shape(2, 256, 512, 4, 2, 50000, 1e4, tied=False),
}
