"""Small diffusers folders of the published classes, from a seed: what a rehearsal trains, and what tests load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from pose_core.models import small

PROMPTS = ["a seven moving up and left", "an eight moving down"]
LATENTS, TEMPORAL, TEXT_WIDTH, IMAGE_WIDTH = 8, 2, 32, 32


@dataclass(frozen=True)
class Size:
    """Blocks and attention heads of a transformer."""

    layers: int = 2
    heads: int = 2


SMALL = Size()
LEAST = Size(heads=1)


def save_small(folder: Path, family: str, task: str, size: Size) -> None:
    """A folder of the family that ``model.family`` calls so."""
    if family == "wan":
        save_wan(folder, task, size)
    elif family == "wan22_ti2v":
        save_wan22_ti2v(folder, size)
    elif family == "wan22_a14b":
        save_wan22_a14b(folder, task, size)
    elif family == "ltx":
        save_ltx(folder, timestep_conditioning=False, size=size)
    else:
        save_hunyuan15(folder, task, size)


def wan_transformer(in_channels: int, size: Size = LEAST, **more: Any) -> WanTransformer3DModel:
    """Heads of 32 channels."""
    return WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=32,
        in_channels=in_channels,
        out_channels=LATENTS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=96,
        num_layers=size.layers,
        rope_max_seq_len=64,
        **more,
    )


def wan_parts() -> dict[str, Any]:
    """Everything around a Wan transformer, with latents of a mean and a spread of their own."""
    tokenizer = small.build_tokenizer(PROMPTS)
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENTS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.1 * channel - 0.3 for channel in range(LATENTS)],
        latents_std=[0.5 + 0.1 * channel for channel in range(LATENTS)],
        scale_factor_spatial=4,
        scale_factor_temporal=TEMPORAL,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    config = UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    text_encoder = UMT5EncoderModel(config).eval()
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "scheduler": scheduler}


def save_wan(folder: Path, task: str, size: Size = LEAST) -> None:
    """Wan 2.1."""
    with seeded():
        parts = wan_parts()
        if task == "t2v":
            WanPipeline(**parts, transformer=wan_transformer(LATENTS, size)).save_pretrained(folder)
            return
        parts["image_encoder"], parts["image_processor"] = small.build_image_encoder()
        image = {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": 32 * size.heads}
        transformer = wan_transformer(2 * LATENTS + TEMPORAL, size, **image)
        WanImageToVideoPipeline(**parts, transformer=transformer).save_pretrained(folder)


def save_wan22_ti2v(folder: Path, size: Size = LEAST) -> None:
    """Wan 2.2 TI2V 5B: a time for every token; published as a text-to-video pipeline."""
    with seeded():
        pipeline = WanPipeline(**wan_parts(), transformer=wan_transformer(LATENTS, size), expand_timesteps=True)
        pipeline.save_pretrained(folder)


def save_wan22_a14b(folder: Path, task: str, size: Size = LEAST) -> None:
    """Wan 2.2 A14B: two experts; its image to video has no image encoder."""
    with seeded():
        channels = LATENTS if task == "t2v" else 2 * LATENTS + TEMPORAL
        experts = {name: wan_transformer(channels, size) for name in ("transformer", "transformer_2")}
        kind, boundary = (WanPipeline, 0.875) if task == "t2v" else (WanImageToVideoPipeline, 0.9)
        kind(**wan_parts(), **experts, boundary_ratio=boundary).save_pretrained(folder)


def save_ltx(folder: Path, *, timestep_conditioning: bool, size: Size = SMALL) -> None:
    """LTX-Video; ``timestep_conditioning`` is what its later decoders have."""
    with seeded():
        vae = AutoencoderKLLTXVideo(
            latent_channels=LATENTS,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, False, False, False),
            decoder_spatio_temporal_scaling=(True, False, False, False),
            patch_size=4,
            timestep_conditioning=timestep_conditioning,
        ).eval()
        vae.latents_mean.copy_(torch.linspace(-0.3, 0.3, LATENTS))
        vae.latents_std.copy_(torch.linspace(0.5, 1.2, LATENTS))
        transformer = LTXVideoTransformer3DModel(
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_attention_heads=size.heads,
            attention_head_dim=16,
            cross_attention_dim=16 * size.heads,
            num_layers=size.layers,
            caption_channels=TEXT_WIDTH,
        )
        tokenizer = small.build_tokenizer(PROMPTS)
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        )
        text_encoder = t5(len(tokenizer), TEXT_WIDTH)
        parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "scheduler": scheduler}
        LTXPipeline(**parts, transformer=transformer).save_pretrained(folder)


def save_hunyuan15(folder: Path, task: str, size: Size = SMALL) -> None:
    """HunyuanVideo 1.5."""
    with seeded():
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ).eval()
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=size.heads,
            attention_head_dim=8,
            num_layers=size.layers,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=32,
            text_embed_2_dim=16,
            image_embed_dim=IMAGE_WIDTH,
            rope_axes_dim=(2, 2, 4),
            target_size=32,
            task_type=task,
        ).eval()
        tokenizer = qwen_tokenizer()
        parts = {
            "text_encoder": qwen(len(tokenizer)),
            "tokenizer": tokenizer,
            "text_encoder_2": t5(384, 16),
            "tokenizer_2": ByT5Tokenizer(),
            "vae": vae,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
            "guider": ClassifierFreeGuidance(guidance_scale=6.0),
            "transformer": transformer,
        }
        if task == "t2v":
            HunyuanVideo15Pipeline(**parts).save_pretrained(folder)
            return
        config = SiglipVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            patch_size=16,
        )
        parts["image_encoder"] = SiglipVisionModel(config).eval()
        parts["feature_extractor"] = SiglipImageProcessor(size={"height": 32, "width": 32})
        HunyuanVideo15ImageToVideoPipeline(**parts).save_pretrained(folder)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte pairs of the prompts; its chat template puts 108 tokens before a prompt, which the pipelines cut off."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        PROMPTS, BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        + 108 * "<|im_start|>"
        + "{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    return tokenizer


def qwen(vocabulary_size: int) -> Qwen2_5_VLTextModel:
    """A three-layer language model."""
    config = Qwen2_5_VLTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6},
    )
    return Qwen2_5_VLTextModel(config).eval()


def t5(vocabulary_size: int, width: int) -> T5EncoderModel:
    """A one-layer T5 encoder."""
    config = T5Config(vocab_size=vocabulary_size, d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


class seeded:
    """Inside, random numbers come from a seed."""

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng()
        self.fork.__enter__()
        torch.manual_seed(0)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
