"""Model cards: the hub's own library reads their header, and their code runs as it stands."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import yaml
from huggingface_hub import ModelCard

from pose_core.inference.card import Facts, folder_card, lora_card, teacher_licence
from pose_core.models import families
from pose_core.models.lora_file import Extraction

FACTS = Facts(
    name="mine",
    teacher="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    published=True,
    pipeline="WanImageToVideoPipeline",
    method="pose",
    licence={"license": "other", "license_name": "theirs", "license_link": "https://example.org/licence"},
    size=(81, 480, 832),
    data={"source": "s3://bucket/raw", "clips": "10 for training, 4 held out"},
    settings={"run": {"seed": 3}, "priming": {"steps": 7}},
    figures={"SA": 91.54, "motion": 0.87654321},
    table="| | SA |\n|---|---|\n| one step | 91.54 |\n",
    conditions=("4 held-out clips.", "100 network evaluations."),
)
EXTRACTION = Extraction(rank=64, matrices_error=0.25, total_error=0.375, error_by_rank={32: 0.5})
CARDS = {"folder": folder_card(FACTS), "lora": lora_card(FACTS, 64, EXTRACTION)}


@pytest.mark.parametrize("kind", CARDS)
def test_the_hub_reads_the_header(kind: str) -> None:
    data = ModelCard(CARDS[kind]).data.to_dict()
    assert data["base_model"] == FACTS.teacher
    assert data["base_model_relation"] == {"folder": "finetune", "lora": "adapter"}[kind]
    assert {key: data[key] for key in FACTS.licence} == FACTS.licence
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "image-to-video")
    assert {"one-step", "distillation", "pose"} <= set(data["tags"])
    assert ("lora" in data["tags"]) == (kind == "lora")
    (result,) = data["model-index"]
    assert result["name"] == "mine"
    metrics = {metric["name"]: metric["value"] for metric in result["results"][0]["metrics"]}
    assert metrics == {"SA": 91.54, "motion": 0.8765}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_says_licence_data_settings_scores_with_conditions_and_shows_samples(kind: str) -> None:
    text = ModelCard(CARDS[kind]).text
    for part in ("theirs https://example.org/licence", "s3://bucket/raw", "| one step | 91.54 |"):
        assert part in text
    assert "* 4 held-out clips.\n* 100 network evaluations." in text
    assert "](samples/contact_sheet.png)" in text and "](samples/comparison.mp4)" in text
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]) == FACTS.settings


@pytest.mark.parametrize("kind", CARDS)
def test_the_code_is_python_and_asks_for_one_step_of_the_trained_size(kind: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", CARDS[kind], re.DOTALL)
    compile(code, "card", "exec")
    for argument in (
        "height=480, width=832, num_frames=81",
        "num_inference_steps=1, guidance_scale=1.0",
        "image=image",
    ):
        assert argument in code
    assert ("load_lora_weights" in code) == (kind == "lora")


def test_a_card_says_what_the_generator_is_told_of_its_noise_where_that_is_not_time_one() -> None:
    told = replace(FACTS, conditioning_time=0.96)
    for usual, card in zip(CARDS.values(), (folder_card(told), lora_card(told, 64, EXTRACTION)), strict=True):
        assert "told time 0.96 of its noise" in card and "told time" not in usual
    assert "FlowMatchEulerDiscreteScheduler(shift=1.0)" in CARDS["lora"]
    assert "FlowMatchEulerDiscreteScheduler(num_train_timesteps=960, shift=1.0)" in lora_card(told, 64, EXTRACTION)


def test_a_text_to_video_model_is_called_without_an_image() -> None:
    card = folder_card(replace(FACTS, pipeline="WanPipeline"))
    assert "image=" not in card and ModelCard(card).data.to_dict()["pipeline_tag"] == "text-to-video"


def test_a_local_teacher_is_named_and_not_passed_off_as_a_hub_model() -> None:
    card = folder_card(replace(FACTS, teacher="teachers/digits_i2v", published=False))
    assert "base_model" not in ModelCard(card).data.to_dict() and "`teachers/digits_i2v`" in card


def test_a_teacher_that_is_shipped_with_the_project_is_loaded_from_its_place_there() -> None:
    card = lora_card(replace(FACTS, teacher="teachers/digits_i2v", published=False), 64, EXTRACTION)
    (place,) = re.findall(r'from_pretrained\("(.*)"\)  # in POSE', card)
    assert (Path(__file__).parents[2] / place / "model_index.json").is_file()
    assert f'from_pretrained("{FACTS.teacher}")\n' in CARDS["lora"]


def test_an_extracted_lora_says_what_it_misses_and_a_trained_one_that_it_misses_nothing() -> None:
    text = ModelCard(CARDS["lora"]).text
    assert "0.375" in text and "| 32 | 0.500 |\n| 64 | 0.250 |" in text
    assert "trained as it is" in lora_card(FACTS, 8, None)


def test_the_licence_is_the_teachers_own_else_what_is_stated_else_said_to_be_unknown(tmp_path: Path) -> None:
    assert teacher_licence(tmp_path, "apache-2.0") == {"license": "apache-2.0"}
    assert teacher_licence(tmp_path, "") == {"license": "unknown"}
    assert "find it out" in folder_card(replace(FACTS, licence={"license": "unknown"}))
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Teacher\n")
    assert teacher_licence(tmp_path, "apache-2.0") == {"license": "mit"}
    (tmp_path / "README.md").write_text("no header at all\n")
    assert teacher_licence(tmp_path, "apache-2.0") == {"license": "apache-2.0"}


@pytest.mark.parametrize("family", families.FILES)
def test_the_code_calls_the_pipelines_of_every_family_with_what_they_take(family: str) -> None:
    for pipeline in families.get(family).pipelines.values():
        kind, facts = getattr(diffusers, pipeline), replace(FACTS, pipeline=pipeline)
        folder, lora = folder_card(facts), lora_card(facts, 8, None)
        (call,) = re.findall(r"= pipe\((.*?)\)\.frames", folder)
        inspect.signature(kind.__call__).bind(None, **eval(f"dict({call})", {"image": None, "prompt": ""}))
        assert ("guidance_scale=1.0" in call) or (
            "pipe.guider = " in lora and hasattr(diffusers, "ClassifierFreeGuidance")
        )
        assert hasattr(kind, "load_lora_weights") or ".load_lora_adapter(" in lora
