"""Settings of the model: vision encoder, decoder, sparse blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megamoe.config.section import Count, NonNegative, Positive, PositiveInt, Section


class VisionConfig(Section):
    """Vision encoder in the SigLIP layout (arXiv:2303.15343): patch convolution, pre-norm blocks, GELU-tanh MLP."""

    image_size: PositiveInt = Field(224, description="Side in pixels to which pictures are resized.")
    patch_size: PositiveInt = Field(16, description="Side of a patch in pixels; divides image_size.")
    width: PositiveInt = Field(768, description="Width of the residual stream.")
    depth: PositiveInt = Field(12, description="Number of blocks.")
    heads: PositiveInt = Field(12, description="Attention heads; divides width.")
    mlp_width: PositiveInt = Field(3072, description="Hidden width of a dense block's MLP.")
    sparse_every: Count = Field(
        0, description="Every n-th block has experts instead of an MLP (n=2: blocks 1, 3, 5, ...); 0: all dense."
    )
    expert_width: PositiveInt = Field(1024, description="Hidden width of one expert in the sparse blocks.")
    norm_eps: Positive = Field(1e-6, description="Epsilon of the layer norms.")

    @property
    def patches(self) -> int:
        """Tokens per picture, in the encoder and, after the projector, in the decoder."""
        return (self.image_size // self.patch_size) ** 2

    def is_sparse(self, block: int) -> bool:
        """Return whether block ``block`` (from 0) has experts."""
        return self.sparse_every > 0 and (block + 1) % self.sparse_every == 0

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class DecoderConfig(Section):
    """Language decoder in the Qwen3-MoE layout (arXiv:2505.09388): RMSNorm, RoPE, GQA with q/k norm, SwiGLU."""

    vocab_size: PositiveInt = Field(32000, description="Rows of the embedding; at least the tokenizer's pieces.")
    width: PositiveInt = Field(1024, description="Width of the residual stream.")
    depth: PositiveInt = Field(12, description="Number of blocks.")
    heads: PositiveInt = Field(16, description="Query heads.")
    kv_heads: PositiveInt = Field(4, description="Key/value heads (grouped-query attention); divides heads.")
    head_dim: PositiveInt = Field(64, description="Width of one head; even, for rotary positions.")
    mlp_width: PositiveInt = Field(4096, description="Hidden width of a dense block's SwiGLU.")
    sparse_every: Count = Field(1, description="Every n-th block has experts instead of an MLP; 0: all dense.")
    expert_width: PositiveInt = Field(1024, description="Hidden width of one expert in the sparse blocks.")
    rope_theta: Positive = Field(1e6, description="Base of the rotary position frequencies.")
    norm_eps: Positive = Field(1e-6, description="Epsilon of the RMS norms.")

    def is_sparse(self, block: int) -> bool:
        """Return whether block ``block`` (from 0) has experts."""
        return self.sparse_every > 0 and (block + 1) % self.sparse_every == 0

    @model_validator(mode="after")
    def _divides(self) -> DecoderConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even number")
        return self


class MoEConfig(Section):
    """Sparse blocks of both towers: softmax top-k router in fp32, renormalised weights, dropless."""

    experts: PositiveInt = Field(8, description="Experts per sparse block.")
    top_k: PositiveInt = Field(2, description="Experts that each token visits.")
    aux_loss: NonNegative = Field(
        0.01, description="Weight of the load-balancing loss (arXiv:2101.03961), computed per packed sequence."
    )
    z_loss: NonNegative = Field(0.001, description="Weight of the router z-loss (arXiv:2202.08906).")

    @model_validator(mode="after")
    def _k_of_e(self) -> MoEConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}")
        return self


class ModelConfig(Section):
    """The vision-language model: encoder, two-layer MLP projector, decoder."""

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    moe: MoEConfig = MoEConfig()
    init_std: Positive = Field(0.02, description="Standard deviation of the initial weights.")
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="Attention kernel for packed sequences. sdpa: dense mask; flex: block mask (CUDA); auto: chosen by "
        "device.",
    )
