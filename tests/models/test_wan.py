"""The Wan adapter is the stock transformer: same numbers, its blocks' features, its folders, and plain refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from pose_core.errors import CheckpointError
from pose_core.models import wan
from pose_core.models.video_model import Condition
from pose_core.models.wan import Wan

GIVEN_TOKENS = 16


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Wan:
    return wan.load(tiny_folder)


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(tiny_folder, subfolder="transformer")


@pytest.fixture(scope="module")
def text_to_video() -> WanTransformer3DModel:
    torch.manual_seed(2)
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )


def latents(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two clips ``[2, 8, 3, 4, 4]`` and their times."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, 3, 4, 4, generator=generator), torch.tensor([0.35, 1.0])


def condition(tokens: int, *, image: bool = True) -> Condition:
    """Prompts of four and nine tokens, zeros behind them up to ``tokens``."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 9, 32, generator=generator)
    text[0, 4:] = 0
    text = torch.nn.functional.pad(text, (0, 0, 0, tokens - 9))
    if not image:
        return Condition(text)
    return Condition(text, torch.randn(2, 5, 32, generator=generator), torch.randn(2, 10, 3, 4, 4, generator=generator))


@torch.no_grad()
def stock_velocity(stock: WanTransformer3DModel, x_t: Tensor, t: Tensor, given: Condition) -> Tensor:
    inputs = x_t if given.first_frame is None else torch.cat([x_t, given.first_frame], dim=1)
    return stock(
        hidden_states=inputs,
        timestep=1000 * t,
        encoder_hidden_states=given.text,
        encoder_hidden_states_image=given.image,
    ).sample


@pytest.mark.parametrize("tokens", [9, GIVEN_TOKENS, wan.TEXT_SLOTS - 1])
def test_a_prompt_without_its_zero_padding_gives_the_stock_velocity(
    model: Wan, stock: WanTransformer3DModel, tokens: int
) -> None:
    x_t, t = latents()
    expected = stock_velocity(stock, x_t, t, condition(wan.TEXT_SLOTS))
    difference = model.velocity(x_t, t, condition(tokens)) - expected
    assert difference.abs().max() <= 1e-5
    assert expected.abs().max() > 0.1


def test_a_full_prompt_gives_exactly_the_stock_velocity(model: Wan, stock: WanTransformer3DModel) -> None:
    given, (x_t, t) = condition(wan.TEXT_SLOTS), latents()
    assert torch.equal(model.velocity(x_t, t, given), stock_velocity(stock, x_t, t, given))


def test_the_padding_matters_to_the_stock_transformer(stock: WanTransformer3DModel) -> None:
    """Otherwise the two tests above would hold for an adapter that forgets the padding."""
    x_t, t = latents()
    cut, full = (stock_velocity_without_slots(stock, x_t, t, condition(n)) for n in (GIVEN_TOKENS, wan.TEXT_SLOTS))
    assert (cut - full).abs().max() > 1e-3


def stock_velocity_without_slots(stock: WanTransformer3DModel, x_t: Tensor, t: Tensor, given: Condition) -> Tensor:
    """The stock network on a prompt as it is; it takes everything before the last 512 tokens for image tokens."""
    no_image = Condition(given.text, None, given.first_frame)
    return stock_velocity(stock, x_t, t, no_image)


def test_text_to_video_gives_the_stock_velocity(text_to_video: WanTransformer3DModel) -> None:
    x_t, t = latents()
    expected = stock_velocity(text_to_video, x_t, t, condition(wan.TEXT_SLOTS, image=False))
    adapted = Wan(WanTransformer3DModel.from_config(text_to_video.config))
    adapted.module.load_state_dict(text_to_video.state_dict())
    full = adapted.velocity(x_t, t, condition(wan.TEXT_SLOTS, image=False))
    cut = adapted.velocity(x_t, t, condition(GIVEN_TOKENS, image=False))
    assert torch.equal(full, expected)
    assert (cut - expected).abs().max() <= 1e-5


def test_features_are_the_outputs_of_the_blocks_asked_for_in_that_order(model: Wan) -> None:
    x_t, t = latents()
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, output: seen.append(output)) for block in model.blocks]
    last, first = model.features(x_t, t, condition(GIVEN_TOKENS), [1, 0])
    for hook in hooks:
        hook.remove()
    assert first is seen[0] and last is seen[1]
    assert first.shape == (2, 3 * 2 * 2, model.width)


def test_asking_for_features_leaves_no_hook_behind(model: Wan) -> None:
    x_t, t = latents()
    model.features(x_t, t, condition(GIVEN_TOKENS), [0])
    with pytest.raises(RuntimeError):
        model.features(x_t[:, :3], t, condition(GIVEN_TOKENS), [0])
    assert all(not block._forward_hooks for block in model.blocks)


def test_gradients_pass_through_features_to_the_input(model: Wan) -> None:
    x_t, t = latents()
    x_t.requires_grad_()
    model.features(x_t, t, condition(GIVEN_TOKENS), [0])[0].sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().sum() > 0


def test_bfloat16_leaves_the_time_in_float32_and_the_result_as_the_input(tiny_folder: Path) -> None:
    model = wan.load(tiny_folder)
    model.module.to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    seen: dict[str, Tensor] = {}
    model.module.register_forward_pre_hook(lambda _m, _a, inputs: seen.update(inputs), with_kwargs=True)
    x_t, _ = latents()
    result = model.velocity(x_t, torch.tensor([0.9, 0.901]), condition(GIVEN_TOKENS))
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    torch.testing.assert_close(seen["timestep"], torch.tensor([900.0, 901.0]))
    assert result.dtype == torch.float32


def test_saved_weights_load_again_bit_by_bit(model: Wan, tmp_path: Path) -> None:
    weights = {name: value + 0.5 for name, value in model.module.state_dict().items()}
    model.save(tmp_path / "transformer", weights)
    loaded = wan.load(tmp_path, image_tokens=5)
    assert loaded.module.config.num_layers == 2
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_stock_class_loads_what_was_saved(model: Wan, tmp_path: Path) -> None:
    model.save(tmp_path, dict(model.module.state_dict()))
    given, (x_t, t) = condition(wan.TEXT_SLOTS), latents()
    stock = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(stock_velocity(stock, x_t, t, given), model.velocity(x_t, t, given))


def test_the_meta_device_needs_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_folder, tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    model = wan.load(folder, meta=True)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert model.width == 32


def test_image_tokens_are_the_encoders_patches_and_its_class_token(tiny_folder: Path, tmp_path: Path) -> None:
    assert wan.count_image_tokens(tiny_folder) == 2 * 2 + 1
    folder = copy(tiny_folder, tmp_path)
    change(folder / "transformer" / "config.json", image_dim=None)
    assert wan.count_image_tokens(folder) == 0


@pytest.mark.parametrize("missing", ["transformer/config.json", "image_encoder/config.json"])
def test_a_missing_part_is_named(tiny_folder: Path, tmp_path: Path, missing: str) -> None:
    folder = copy(tiny_folder, tmp_path)
    (folder / missing).unlink()
    refused(folder, missing)


def test_missing_weights_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_folder, tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, f"{folder}/transformer cannot be loaded")


def test_weights_that_end_early_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_folder, tmp_path)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(folder, f"{folder}/transformer cannot be loaded")


def test_weights_of_another_size_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_folder, tmp_path)
    change(folder / "transformer" / "config.json", ffn_dim=64)
    refused(folder, f"{folder}/transformer cannot be loaded")


@pytest.mark.parametrize(
    ("layers", "fault"), [(3, "missing weights, e.g. blocks.2."), (1, "unexpected weights, e.g. blocks.1.")]
)
def test_weights_of_another_depth_are_refused(tiny_folder: Path, tmp_path: Path, layers: int, fault: str) -> None:
    folder = copy(tiny_folder, tmp_path)
    change(folder / "transformer" / "config.json", num_layers=layers)
    refused(folder, fault)


def test_a_config_that_is_not_json_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_folder, tmp_path)
    (folder / "transformer" / "config.json").write_text("{")
    refused(folder, "transformer/config.json")


def test_another_familys_transformer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_folder, tmp_path)
    change(folder / "transformer" / "config.json", _class_name="LTXVideoTransformer3DModel")
    refused(folder, "LTXVideoTransformer3DModel")


def refused(folder: Path, text: str) -> None:
    """Loading fails in one line that holds ``text``, as something the person can correct in the call."""
    with pytest.raises(CheckpointError) as caught:
        wan.load(folder)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def copy(folder: Path, into: Path) -> Path:
    return Path(shutil.copytree(folder, into / "copy"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
