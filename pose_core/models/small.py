"""Small instances of the stock Wan classes, from a seed: what the embedded domain trains instead of downloading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_WIDTH = 64
IMAGE_WIDTH = 32
LATENT_CHANNELS = 12
SPATIAL_FACTOR = 4
TEMPORAL_FACTOR = 2


def build_vae(channels: int = LATENT_CHANNELS) -> AutoencoderKLWan:
    """A causal video VAE that compresses 4 x 4 pixels and 2 frames to 12 channels (1.0M parameters).

    It folds 2 x 2 pixels into channels first, as Wan 2.2's does, which makes it three times faster on a CPU.
    """
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=channels,
        dim_mult=[1, 3],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_spatial=SPATIAL_FACTOR,
        scale_factor_temporal=TEMPORAL_FACTOR,
    )


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames ``[B, 3, F, H, W]`` before the stock decoder clamps them to [-1, 1].

    A clamped pixel has no gradient, so a VAE that once paints all black would stay black for ever.
    """
    chunks: list[Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda _module, _inputs, output: chunks.append(output))
    try:
        vae.decode(latents)
    finally:
        hook.remove()
    return unpatchify(torch.cat(chunks, dim=2), patch_size=vae.config.patch_size)


def build_transformer(
    task: str = "i2v",
    heads: int = 4,
    layers: int = 6,
    channels: int = LATENT_CHANNELS,
    text_width: int = TEXT_WIDTH,
) -> WanTransformer3DModel:
    """A transformer for ``i2v``, with the CLIP branch of Wan 2.1, or for ``t2v`` (1.8M parameters by default)."""
    image = {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": heads * 32} if task == "i2v" else {}
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=channels + (channels + TEMPORAL_FACTOR if task == "i2v" else 0),
        out_channels=channels,
        text_dim=text_width,
        freq_dim=64,
        ffn_dim=heads * 96,
        num_layers=layers,
        rope_max_seq_len=64,
        **image,
    )


def build_tokenizer(prompts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of ``prompts``, with the text encoder's pad, end and unknown tokens."""
    words = sorted({word for prompt in prompts for word in prompt.split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocabulary_size: int, width: int = TEXT_WIDTH) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder. It learns with the transformer, which cannot tell by itself whose word a word is."""
    config = UMT5Config(
        vocab_size=vocabulary_size, d_model=width, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def build_image_encoder(image_size: int = 32) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """A two-layer CLIP vision model, left as initialised, and the preprocessing it goes with."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=16,
    )
    size = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return CLIPVisionModel(config).eval(), processor


def build_pipeline(
    prompts: Iterable[str],
    seed: int,
    task: str = "i2v",
    *,
    channels: int = LATENT_CHANNELS,
    text_width: int = TEXT_WIDTH,
) -> WanImageToVideoPipeline | WanPipeline:
    """Every part of a small pipeline for ``i2v`` or ``t2v``, initialised from ``seed``; nothing is trained yet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(prompts)
        parts = {
            "tokenizer": tokenizer,
            "text_encoder": build_text_encoder(len(tokenizer), text_width),
            "vae": build_vae(channels),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
            "transformer": build_transformer(task, channels=channels, text_width=text_width),
        }
        if task == "t2v":
            return WanPipeline(**parts)
        image_encoder, image_processor = build_image_encoder()
        return WanImageToVideoPipeline(**parts, image_encoder=image_encoder, image_processor=image_processor)


def copy_weights(folder: Path, pipeline: WanPipeline | WanImageToVideoPipeline) -> None:
    """Give ``pipeline`` a diffusers folder's VAE and, if both have one, its image encoder, which stay; begin its
    transformer and text encoder with those of the folder.

    Where a weight takes fewer inputs than the folder's, as the patches of text to video do, the first ones are taken.
    """
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    pipeline.vae.load_state_dict(vae.state_dict())
    pipeline.vae.register_to_config(latents_mean=vae.config.latents_mean, latents_std=vae.config.latents_std)
    source = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    weights = pipeline.transformer.state_dict()
    for name, weight in weights.items():
        found = source[name]
        weight.copy_(found if found.shape == weight.shape else found[:, : weight.shape[1]])
    pipeline.text_encoder.load_state_dict(
        UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder").state_dict()
    )
    if isinstance(pipeline, WanImageToVideoPipeline) and (folder / "image_encoder").is_dir():
        encoder = CLIPVisionModel.from_pretrained(folder, subfolder="image_encoder")
        pipeline.image_encoder.load_state_dict(encoder.state_dict())
