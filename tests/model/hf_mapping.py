"""Our model as ``transformers`` knows it: a LLaVA of a SigLIP encoder and a Qwen3-MoE decoder.

What was found out about transformers 5.23 on the way:

- ``vision_feature_layer=-1`` alone would take the encoder's output *ahead of* ``post_layernorm``: SigLIP records the
  outputs of its layers and does not replace the last one. With ``tie_last_hidden_states=True`` in the SigLIP config,
  ``hidden_states[-1]`` is the normalised output, which is what our ``merge.norm`` makes.
- ``vision_feature_select_strategy="full"``: SigLIP has no class token to cut off.
- The projector has the exact GELU (``"gelu"``), SigLIP's MLP the tanh approximation (``"gelu_pytorch_tanh"``).
- ``norm_topk_prob`` is off by default there; Qwen3-MoE checkpoints, and we, renormalise the weights.
"""

from __future__ import annotations

import re

from torch import Tensor
from transformers import LlavaConfig, Qwen3MoeConfig, SiglipVisionConfig

from megamoe.config import ModelConfig
from megamoe.model.vlm import VisionLanguageModel, named_parameters

# Our name of a parameter -> theirs; the first pattern that fits the whole name.
_VISION, _LANGUAGE = r"vision\.blocks\.(\d+)\.", r"decoder\.blocks\.(\d+)\."
_THEIR_VISION, _THEIR_LANGUAGE = r"model.vision_tower.encoder.layers.\1.", r"model.language_model.layers.\1."
_NAMES = [
    (r"vision\.embed\.embed\.patch\.(weight|bias)", r"model.vision_tower.embeddings.patch_embedding.\1"),
    (r"vision\.embed\.embed\.position", r"model.vision_tower.embeddings.position_embedding.weight"),
    (_VISION + r"norm([12])\.(weight|bias)", _THEIR_VISION + r"layer_norm\2.\3"),
    (_VISION + r"attention\.(q|k|v|out)\.(weight|bias)", _THEIR_VISION + r"self_attn.\2_proj.\3"),
    (_VISION + r"mlp\.(fc[12])\.(weight|bias)", _THEIR_VISION + r"mlp.\2.\3"),
    (r"merge\.norm\.(weight|bias)", r"model.vision_tower.post_layernorm.\1"),
    (r"merge\.fc([12])\.(weight|bias)", r"model.multi_modal_projector.linear_\1.\2"),
    (r"merge\.tokens", r"model.language_model.embed_tokens.weight"),
    (_LANGUAGE + r"norm1\.weight", _THEIR_LANGUAGE + r"input_layernorm.weight"),
    (_LANGUAGE + r"norm2\.weight", _THEIR_LANGUAGE + r"post_attention_layernorm.weight"),
    (_LANGUAGE + r"attention\.out\.weight", _THEIR_LANGUAGE + r"self_attn.o_proj.weight"),
    (_LANGUAGE + r"attention\.(q|k|v)\.weight", _THEIR_LANGUAGE + r"self_attn.\2_proj.weight"),
    (_LANGUAGE + r"attention\.(q|k)_norm\.weight", _THEIR_LANGUAGE + r"self_attn.\2_norm.weight"),
    (_LANGUAGE + r"mlp\.(gate|up|down)\.weight", _THEIR_LANGUAGE + r"mlp.\2_proj.weight"),
    (_LANGUAGE + r"mlp\.router\.weight", _THEIR_LANGUAGE + r"mlp.gate.weight"),
    (_LANGUAGE + r"mlp\.experts\.(gate_up|down)", _THEIR_LANGUAGE + r"mlp.experts.\2_proj"),
    (r"head\.norm\.weight", r"model.language_model.norm.weight"),
    (r"head\.out\.weight", r"lm_head.weight"),
]


def hf_name(name: str) -> str:
    """Our global name of a parameter -> the key in the state dict of ``LlavaForConditionalGeneration``."""
    for pattern, theirs in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(theirs)
    raise KeyError(f"{name} has no place in LlavaForConditionalGeneration")


def hf_state(stack: VisionLanguageModel) -> dict[str, Tensor]:
    """All weights under their names; only the patch projection has another shape there, that of a convolution."""
    state = {}
    for spec, layer in zip(stack.specs, stack.layers, strict=True):
        for name, parameter in named_parameters(spec.name, layer):
            tensor = parameter.detach().clone()
            if name == "vision.embed.embed.patch.weight":
                side = int((tensor.shape[1] // 3) ** 0.5)
                tensor = tensor.view(-1, 3, side, side)
            state[hf_name(name)] = tensor
    return state


def hf_config(model: ModelConfig, image_token: int, attention: str = "eager") -> LlavaConfig:
    """The same model in the settings of ``transformers``. The encoder has to be dense."""
    vision, decoder, moe = model.vision, model.decoder, model.moe
    assert vision.sparse_every == 0, "SigLIP has no experts"
    # A step beyond the depth leaves all blocks dense.
    sparse_step = decoder.sparse_every or decoder.depth + 1
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.norm_eps,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
            tie_last_hidden_states=True,
        ),
        text_config=Qwen3MoeConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.width,
            intermediate_size=decoder.mlp_width,
            num_hidden_layers=decoder.depth,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            rms_norm_eps=decoder.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
            decoder_sparse_step=sparse_step,
            moe_intermediate_size=decoder.expert_width,
            num_experts=moe.experts,
            num_experts_per_tok=moe.top_k,
            norm_topk_prob=True,
        ),
        image_token_index=image_token,
        image_seq_length=vision.patches,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        attn_implementation=attention,
    )
