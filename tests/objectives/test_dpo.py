"""DPO: numbers by hand, rows of pairs, packed and single, and a stage from start to kill to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import World, make_world, row, settings, text, write_rows
from tiny_runs import difference, kill_after, rows, run, train, weights
from torch import Tensor

from avllm.config_model import ModelConfig
from avllm.config_peft import LoraConfig
from avllm.data.collate import Batch
from avllm.data.dataset import SampleDataset
from avllm.data.packing import fill_sequences, share_media
from avllm.data.row import Row
from avllm.data.row_makers.preference import Preference
from avllm.errors import UserError
from avllm.models.building.placeholders import load_tokenizer
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.objectives.dpo import DPO, dpo_loss, pairs_of
from avllm.training.start import LineageError

COLOURS = ("red", "green", "blue", "white")


def test_the_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -2.0])
    reference = (torch.tensor([-2.0, -3.0]), torch.tensor([-2.5, -3.0]))
    losses, margins = dpo_loss(chosen, rejected, *reference, beta=0.5)
    # (-1 + 2) - (-3 + 2.5) = 1.5, (-4 + 3) - (-2 + 3) = -2
    assert margins.tolist() == [0.75, -1.0]
    expected = [math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(1.0))]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    smoothed, _ = dpo_loss(chosen, rejected, *reference, beta=0.5, label_smoothing=0.1)
    turned = [math.log(1 + math.exp(0.75)), math.log(1 + math.exp(-1.0))]
    assert smoothed.tolist() == pytest.approx(
        [0.9 * a + 0.1 * b for a, b in zip(expected, turned, strict=True)]
    )


def test_where_policy_and_reference_are_equal_the_loss_is_log_two() -> None:
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([-9.0])
    losses, _ = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3)
    assert losses.item() == pytest.approx(math.log(2.0))


def test_each_rejected_answer_belongs_to_the_chosen_one_before_it() -> None:
    chosen = torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    rejected = torch.tensor([0, 0, 1, 1, 0, 1]).bool()
    places, own = pairs_of(chosen, rejected)
    assert places.tolist() == [2, 3, 5]
    assert own.tolist() == [1, 1, 4]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny world for all tests of this file."""
    return make_world(tmp_path_factory.mktemp("world"), clips=6)


@pytest.fixture(scope="module")
def preferences(world: World) -> Path:
    """Questions about the clips, two of them about each; some have two rejected answers."""
    made: list[dict[str, Any]] = []
    for number in range(6):
        media = {"type": "video", "video": f"{number:03d}.mp4"}
        colour = COLOURS[number % 4]
        others = [other for other in COLOURS if other != colour][: 1 + number % 2]
        question = [media, text("what colour is it ?")]
        made.append(row(f"colour-{number}", question, colour, "seen.colour") | {"rejected": others})
        question = [media, text("do you hear a low sound ?")]
        made.append(row(f"sound-{number}", question, "no nothing there") | {"rejected": ["yes"]})
    return write_rows(world.captions.parent / "preferences.jsonl", made)


@pytest.fixture(scope="module")
def built(world: World) -> tuple[AVLLM, AVProcessor]:
    """A model whose policy (`prefer`) has left the reference (`default`)."""
    description = ModelConfig.model_validate(world.model)
    tokenizer, ids = load_tokenizer(description)
    torch.manual_seed(1)
    model = AVLLM.from_backbones(description, ids)
    model.add_lora(LoraConfig(r=2)).add_lora(LoraConfig(name="prefer", r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            parameter.requires_grad_(name.startswith("connector") or "lora_A.prefer" in name)
    return model.eval(), AVProcessor.from_model(model, tokenizer)


def rows_of(processor: AVProcessor, manifest: Path) -> list[Row]:
    """The rows of preference samples."""
    dataset = SampleDataset([str(manifest)], processor, maker=Preference())
    return [one for item in range(len(dataset)) for one in dataset[item].rows]


def test_a_row_holds_both_answers_after_one_copy_of_clip_and_question(
    built: tuple[AVLLM, AVProcessor], preferences: Path
) -> None:
    model, processor = built
    made = rows_of(processor, preferences)[2]  # two rejected answers
    assert [part.role for part in made.parts] == ["chosen", "rejected", "rejected"]
    assert [part.target for part in made.parts] == ["green", "red", "blue"]
    assert len(made.clips) == 1
    words = [processor.tokenizer.decode(made.input_ids[part.trained]) for part in made.parts]
    assert [w.split()[0] for w in words] == ["green", "red", "blue"]
    trained = torch.zeros_like(made.is_media)
    trained[made.parts[0].trained] = True
    assert torch.equal(made.labels >= 0, trained), (
        "what counts tokens learns the chosen answer alone"
    )


def losses_of(
    objective: DPO, model: AVLLM, batches: Sequence[Batch]
) -> tuple[Tensor, list[Tensor]]:
    """The mean loss of the pairs of some batches, and the connector's gradients."""
    model.zero_grad()
    pairs = sum(objective.weight(batch) for batch in batches)
    total = torch.stack([objective(model, batch)[0] for batch in batches]).sum() / pairs
    total.backward()
    return total.detach(), [p.grad.clone() for p in model.connector.parameters()]


def test_a_common_beginning_counts_nothing(built: tuple[AVLLM, AVProcessor], world: World) -> None:
    """So a pair of sentences after one context trains the sentences alone (arXiv 2507.12455)."""
    model, processor = built
    video = {"type": "video", "video": "000.mp4"}
    asked = [video, text("describe the clip")]
    pair = row("pair", asked, "red clip , low sound") | {"rejected": ["red clip , high sound"]}
    manifest = write_rows(world.captions.with_name("sentences.jsonl"), [pair])
    (whole,) = rows_of(processor, manifest)
    cut = replace(
        whole, parts=tuple(replace(part, trained=part.trained[3:]) for part in whole.parts)
    )
    objective = DPO(model, beta=0.5, reference=["default"])
    loss, gradients = losses_of(objective, model, [processor.collate([whole])])
    cut_loss, cut_gradients = losses_of(objective, model, [processor.collate([cut])])
    assert abs(float(loss) - math.log(2.0)) > 1e-4
    torch.testing.assert_close(cut_loss, loss)
    for one, other in zip(cut_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_packed_and_single_rows_have_one_loss_and_one_gradient(
    built: tuple[AVLLM, AVProcessor], preferences: Path
) -> None:
    model, processor = built
    made = rows_of(processor, preferences)
    objective = DPO(model, beta=0.5, reference=["default"])
    single = [processor.collate([one]) for one in made]
    expected, gradients = losses_of(objective, model, single)
    assert sum(objective.weight(batch) for batch in single) == 15
    media = [share_media(made[n : n + 2], 999) for n in range(0, len(made), 2)]
    ways = {
        "one batch": [processor.collate(made)],
        "sequences": [processor.collate(fill_sequences(made, 200))],
        "about one clip": [processor.collate([one for group in media for one in group])],
    }
    for name, batches in ways.items():
        loss, others = losses_of(objective, model, batches)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6), name
        assert sum(objective.weight(batch) for batch in batches) == 15, name
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_log_probabilities_are_those_of_the_answers_by_themselves(
    built: tuple[AVLLM, AVProcessor], preferences: Path
) -> None:
    model, processor = built
    dataset = SampleDataset([str(preferences)], processor)
    plain = dataset[2].rows[0]  # the chosen answer in a row of its own kind
    made = rows_of(processor, preferences)[2]
    objective = DPO(model, reference=["default"])
    with torch.no_grad():
        batch = processor.collate([plain])
        logits = model(batch).logits.log_softmax(-1)[0]
        places = plain.parts[0].trained
        expected = logits[places - 1, plain.input_ids[places]].sum()
        pair = processor.collate([made])
        found = objective.log_probs(model, pair, model.media_tokens(pair))
    assert found[0].item() == pytest.approx(expected.item(), abs=1e-5)
    assert len(found) == 3


def test_settings_that_do_not_fit_are_refused(
    built: tuple[AVLLM, AVProcessor], preferences: Path
) -> None:
    model, processor = built
    with pytest.raises(ValueError, match="'gone'"):
        DPO(model, reference=["gone"])
    with pytest.raises(ValueError, match="beta"):
        DPO(model, beta=0.0)
    batch = processor.collate(rows_of(processor, preferences)[:1])
    with pytest.raises(UserError, match="no reference is kept"):
        DPO(model, reference=["prefer"])(model, batch)


def test_what_trains_without_a_reference_is_refused(
    world: World, preferences: Path, instructed: Path, tmp_path: Path
) -> None:
    for rule in ("^llm\\..*embed", "^encoders.audio"):
        config = prefer(world, preferences, instructed, tmp_path / rule[-5:])
        config["trainable"] = [[rule, 1e-4], *config["trainable"]]
        with pytest.raises(UserError, match="no reference is kept"):
            train(config)


def test_samples_without_a_pair_are_bad_rows(
    world: World, built: tuple[AVLLM, AVProcessor], tmp_path: Path
) -> None:
    clip = {"type": "video", "video": str(world.captions.parent / "000.mp4")}
    samples = [row("none", [clip], "red"), row("equal", [clip], "red") | {"rejected": ["red"]}]
    dataset = SampleDataset(
        [str(write_rows(tmp_path / "m.jsonl", samples))], built[1], maker=Preference()
    )
    assert [bad.reason for n in range(2) for bad in dataset[n].bad] == [
        "no_rejected",
        "equal_answers",
    ]


# ---- the stage ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instructed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage 3 with the set `default`."""
    rules = [["^connector", 1e-3], ["lora_", 1e-2], [".*", None]]
    asked = settings(
        world, tmp_path_factory.mktemp("instruct") / "run", "instruct", trainable=rules
    )
    return run(asked | {"lora": {"r": 2, "alpha": 4}})


def prefer(
    world: World, preferences: Path, init: Path, folder: Path, **changes: Any
) -> dict[str, Any]:
    """A stage 4 on the tiny world."""
    asked = settings(
        world, folder, "prefer", **{"train__max_steps": 8, "train__warmup": 0, **changes}
    )
    del asked["model"], asked["init_from_scratch"]
    asked["data"] |= {"train": str(preferences), "rows": {"type": "preference"}}
    asked["train"] |= {"batch_size": 4, "schedule": "constant"}
    return asked | {
        "init": str(init),
        "lora": {"name": "prefer", "copy_of": "default"},
        "trainable": [["lora_[AB].prefer", 1e-2], ["^connector", 1e-3], [".*", None]],
        "objectives": [{"type": "dpo", "beta": 0.5, "reference": ["default"]}],
    }


@pytest.fixture(scope="module")
def preferred(
    world: World, preferences: Path, instructed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A stage 4 that nothing disturbs."""
    return run(prefer(world, preferences, instructed, tmp_path_factory.mktemp("prefer") / "run"))


def test_chosen_answers_rise_above_rejected_ones(preferred: Path, instructed: Path) -> None:
    figures = rows(preferred)
    assert figures[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-5), (
        "a copy is the reference at first"
    )
    assert figures[0]["dpo/margin"] == pytest.approx(0.0, abs=1e-5)
    assert figures[-1]["dpo/margin"] > 0.1
    assert figures[-1]["loss"] < figures[0]["loss"]
    lora = "lora/{}/adapter_model.safetensors"
    before = load_file(instructed / lora.format("default"))
    assert difference(load_file(preferred / lora.format("default")), before) == 0.0
    assert difference(load_file(preferred / lora.format("prefer")), before) > 0


def test_the_sound_branch_learns_from_preferences(preferred: Path, instructed: Path) -> None:
    before, after = weights(instructed), weights(preferred)
    sound = [name for name in after if name.startswith("connector.1.")]
    assert sound
    assert any(not torch.equal(after[name], before[name]) for name in sound)


def test_the_reference_is_the_model_of_the_stage_before(
    preferred: Path, instructed: Path, preferences: Path
) -> None:
    old, new = AVLLM.from_pretrained(str(instructed)), AVLLM.from_pretrained(str(preferred))
    processor = AVProcessor.from_pretrained(preferred)
    objective = DPO(new, reference=["default"])
    copies = {
        n.removeprefix("dpo."): x
        for n, x in load_file(preferred / "objectives.safetensors").items()
    }
    objective.load_state_dict(copies)
    batch = processor.collate(rows_of(processor, preferences))
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(name.startswith("connector"))
    with torch.no_grad():
        reference = objective.reference_log_probs(new, batch, new.media_tokens(batch))
        expected = DPO(old, reference=[]).log_probs(old, batch, old.media_tokens(batch))
        policy = objective.log_probs(new, batch, new.media_tokens(batch))
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-5)
    assert (policy - expected).abs().max() > 1e-2


def test_a_killed_stage_goes_on_bit_identically(
    world: World, preferences: Path, instructed: Path, preferred: Path, tmp_path: Path
) -> None:
    asked = prefer(world, preferences, instructed, tmp_path / "run", train__save_every=2)
    kill_after(asked, 5)
    found = run(asked)
    assert rows(found) == rows(preferred)
    assert difference(weights(found), weights(preferred)) == 0.0
    assert difference(*(load_file(f / "objectives.safetensors") for f in (found, preferred))) == 0.0


@pytest.mark.parametrize("pack", ["media", "sequences", "both"])
def test_packed_stages_are_the_stage(
    world: World, preferences: Path, instructed: Path, preferred: Path, tmp_path: Path, pack: str
) -> None:
    asked = prefer(
        world, preferences, instructed, tmp_path / "run", data__pack=pack, train__max_steps=1
    )
    if pack == "sequences":
        assert rows(run(asked))[0]["loss"] == pytest.approx(rows(preferred)[0]["loss"], abs=1e-6)
    else:
        assert rows(run(asked))[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-5)


def test_the_stage_follows_instructions(world: World, preferences: Path, tmp_path: Path) -> None:
    captioned = run(settings(world, tmp_path / "caption", "caption", train__max_steps=1))
    with pytest.raises(LineageError):
        train(prefer(world, preferences, captioned, tmp_path / "run"))
