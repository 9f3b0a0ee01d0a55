"""Video-LLaMA's published files become a checkpoint that computes what the original does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importing.originals import (
    Maker,
    State,
    eva,
    imagebind,
    linear,
    make_eva,
    make_imagebind,
    make_qformer,
    norm,
    qformer,
)
from tiny import make_data, make_llm
from tiny_runs import difference, kill_after, run, weights
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from avllm.cli.main import app
from avllm.data.schema import RowError, Sample
from avllm.errors import UserError
from avllm.models.importing.base import Dims
from avllm.models.importing.video_llama import VideoLlama
from avllm.models.modeling_avllm import AVLLM
from avllm.models.processing_avllm import AVProcessor
from avllm.published import PublishedError

TINY = Path(__file__).resolve().parents[2] / "../shared/parity/video_llama_tiny"
REAL_NAMES = ("vl", "al", "imagebind", "vit", "qformer")
DIMS = {
    "vit": {"heads": 4, "depth": 2, "dim": 16, "img": 42},
    "qformer": {"heads": 3},
    "video_qformer": {"heads": 2, "queries": 6},
    "audio_qformer": {"heads": 4},
    "imagebind": {"audio_heads": 2, "mel_bins": 64, "target_len": 80, "stride": 8},
    "frames": 5,
    "segments": 3,
    "image_token_id": 4,
}
FRAMES, SEGMENTS, LLM_WIDTH = 5, 3, 32


def make_files(**changes: float) -> dict[str, State]:
    """The five files, by the option that takes each."""
    buffers = {"llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    vision, sound, blip2 = Maker(5), Maker(6), Maker(7)
    vision.draw("video_frame_position_embedding.weight", 7, 24)
    vision.linear("llama_proj", 24, LLM_WIDTH)
    sound.draw("audio_position_embedding.weight", 4, 12)
    sound.linear("audio_llama_proj", 24, LLM_WIDTH)
    blip2.norm("ln_vision", 16)
    blip2.linear("t5_proj", 24, 9)
    clip: dict[str, Any] = {"layers": 2, "every": 1}
    video = make_qformer("video_Qformer.bert.", "video_query_tokens", 6, 24, seed=8, **clip)
    audio = make_qformer("audio_Qformer.bert.", "audio_query_tokens", 3, 12, seed=9, **clip)
    frame = make_qformer("Qformer.bert.", "query_tokens", 5, 16, text=True)
    return {
        "vl": vision.state | video | buffers,
        "al": sound.state | audio | buffers,
        "imagebind": make_imagebind(),
        "vit": make_eva(**changes),
        "qformer": blip2.state | frame,
    }


@dataclass
class Published:
    """Files on disk, and what is in them."""

    folder: Path
    states: dict[str, State]
    llm: Path

    def write(self) -> None:
        for name, state in self.states.items():
            bare = name in ("vit", "imagebind")
            torch.save(state if bare else {"model": state, "epoch": 3}, self.path(name))
        (self.folder / "dims.json").write_text(json.dumps(DIMS))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.pth"

    def run(self, output: str = "out", *more: str, names: tuple[str, ...] = REAL_NAMES) -> Path:
        """Write the files and import those of the names."""
        self.write()
        folder = self.folder / output
        command = ["ckpt", "import", "video_llama", "--llm", str(self.llm), "--output", str(folder)]
        for name in names:
            command += [f"--{name}", str(self.path(name))]
        command += ["--dims", str(self.folder / "dims.json"), *more]
        result = CliRunner().invoke(app, command)
        if result.exception is not None:
            raise result.exception
        return folder


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path, make_files(), make_llm(tmp_path / "llm", initializer_range=0.3))


@dataclass
class Original:
    """What the original computes of the inputs, by the names of a golden file."""

    arrays: dict[str, Tensor]

    @classmethod
    def of(cls, states: dict[str, State], llm: Path) -> Original:
        random = torch.Generator().manual_seed(11)
        pixels = torch.randn(2, 3, FRAMES, 42, 42, generator=random)
        mel = torch.randn(2, SEGMENTS, 1, 64, 80, generator=random)
        units = pixels.transpose(1, 2).flatten(0, 1)
        vit = eva(states["vit"], units, heads=4, depth=2)
        seen = norm(states["qformer"], "ln_vision", vit, 1e-5)
        frames = qformer(states["qformer"], "Qformer.bert.", "query_tokens", seen, 3)
        vl, al = states["vl"], states["al"]
        placed = frames.unflatten(0, (2, FRAMES))
        placed = placed + vl["video_frame_position_embedding.weight"][:FRAMES, None]
        clip = qformer(vl, "video_Qformer.bert.", "video_query_tokens", placed.flatten(1, 2), 2)
        video = linear(vl, "llama_proj", clip)
        first, embedding = imagebind(states["imagebind"], mel.flatten(0, 1), heads=2, stride=8)
        heard = embedding.unflatten(0, (2, SEGMENTS)) + al["audio_position_embedding.weight"][:3]
        clip = qformer(al, "audio_Qformer.bert.", "audio_query_tokens", heard, 4)
        ids = torch.randint(5, 12, (2, 14), generator=random)
        ids[:, 3:9] = 4
        labels = torch.where(torch.arange(14) > 9, ids, -100)
        model = AutoModelForCausalLM.from_pretrained(llm).eval()
        embeds = model.get_input_embeddings()(ids)
        embeds[:, 3:9] = video
        output = model(inputs_embeds=embeds, labels=labels)
        return cls(
            {
                "pixel_values": pixels,
                "mel": mel,
                "vit": vit,
                "ln_vision": seen,
                "frame_queries": frames,
                "video_tokens": video,
                "imagebind_trunk_cls": first.unflatten(0, (2, SEGMENTS)),
                "imagebind_embedding": embedding.unflatten(0, (2, SEGMENTS)),
                "audio_tokens": linear(al, "audio_llama_proj", clip),
                "input_ids": ids,
                "labels": labels,
                "logits": output.logits,
                "loss": output.loss,
            }
        )

    def save(self, path: Path) -> Path:
        np.savez(path, **{name: x.detach().numpy() for name, x in self.arrays.items()})
        return path


COMPARED = {
    *("vit", "ln_vision", "frame_queries", "video_tokens", "logits", "loss"),
    *("imagebind_trunk_cls", "imagebind_embedding", "audio_tokens"),
}


def verify(folder: Path, golden: Path, *more: str) -> tuple[int, dict[str, float | None]]:
    """The exit code of `avllm ckpt verify --golden`, and each array's difference."""
    command = ["ckpt", "verify", str(folder), "--golden", str(golden), "--json", *more]
    result = CliRunner().invoke(app, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    contents = json.loads(result.stdout.splitlines()[-1])
    assert contents["is_good"] == (result.exit_code == 0)
    return result.exit_code, {one["name"]: one["difference"] for one in contents["arrays"]}


# ---- parity ---------------------------------------------------------------------------------


@torch.no_grad()
def test_every_array_is_the_originals(published: Published) -> None:
    folder = published.run()
    golden = Original.of(published.states, published.llm).save(published.folder / "golden.npz")
    code, differences = verify(folder, golden, "--tol", "1e-4")
    assert set(differences) == COMPARED
    assert max(differences.values()) < 1e-5
    assert code == 0


@torch.no_grad()
def test_the_norm_after_the_vit_has_the_originals_epsilon(published: Published) -> None:
    """With small activations 1e-5 and 1e-6 differ."""
    small = make_eva(std=1e-3)
    for name in small:
        if "attn.proj" in name or "mlp.fc2" in name:
            small[name] = small[name] * 1e-2
    published.states["vit"] = small
    folder = published.run()
    golden = Original.of(published.states, published.llm).save(published.folder / "golden.npz")
    assert verify(folder, golden)[1]["ln_vision"] < 1e-4


@torch.no_grad()
def test_a_weight_that_is_another_is_found(published: Published) -> None:
    folder = published.run()
    name = "video_Qformer.bert.encoder.layer.1.output_query.dense.bias"
    published.states["vl"][name][0] += 0.5
    golden = Original.of(published.states, published.llm).save(published.folder / "golden.npz")
    code, differences = verify(folder, golden)
    assert code == 1
    assert {n for n, d in differences.items() if d > 1e-4} == {"video_tokens", "logits", "loss"}


@pytest.mark.skipif(not TINY.is_dir(), reason=f"{TINY.name} is not beside the repository")
def test_the_originals_own_numbers(tmp_path: Path) -> None:
    """Files and numbers that Video-LLaMA's own code wrote."""
    files = {
        "vl": "VL_finetuned.pth",
        "al": "AL_finetuned.pth",
        "imagebind": "imagebind_huge.pth",
        "vit": "eva_vit_g.pth",
        "qformer": "blip2_pretrained_flant5xxl.pth",
    }
    command = ["ckpt", "import", "video_llama", "--llm", str(TINY / "llama")]
    for option, name in files.items():
        command += [f"--{option}", str(TINY / name)]
    command += ["--output", str(tmp_path / "out"), "--dims", str(TINY / "dims.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    code, differences = verify(tmp_path / "out", TINY / "golden.npz", "--tol", "1e-4")
    assert set(differences) == COMPARED
    assert max(differences.values()) <= 1e-4
    assert code == 0


def test_the_released_sizes_are_the_defaults(tmp_path: Path) -> None:
    """Tensors without memory, as large as the published ones; 40 blocks, of which 39 count."""
    clip: dict[str, Any] = {"width": 768, "hidden": 3072}
    two = {"layers": 2, "every": 1, **clip}
    with torch.device("meta"):
        vision, sound, blip2 = Maker(5), Maker(6), Maker(7)
        vision.draw("video_frame_position_embedding.weight", 32, 768)
        vision.linear("llama_proj", 768, 4096)
        sound.draw("audio_position_embedding.weight", 8, 1024)
        sound.linear("audio_llama_proj", 768, 4096)
        blip2.norm("ln_vision", 1408)
        blip2.linear("t5_proj", 768, 4096)
        files = {
            "vl": vision.state
            | make_qformer("video_Qformer.bert.", "video_query_tokens", 32, 768, **two),
            "al": sound.state
            | make_qformer("audio_Qformer.bert.", "audio_query_tokens", 8, 1024, **two),
            "imagebind": make_imagebind(width=768, depth=12, out=1024, patches=(12, 19)),
            "vit": make_eva(width=1408, depth=39, hidden=6144, side=16),
            "qformer": blip2.state
            | make_qformer("Qformer.bert.", "query_tokens", 32, 1408, layers=12, **clip),
        }
    scale = "modality_postprocessors.audio.1.log_logit_scale"
    files["imagebind"][scale] = torch.tensor(20.0).log()
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pth")
    importer = VideoLlama(**{name: str(tmp_path / f"{name}.pth") for name in REAL_NAMES})
    converted = importer.convert(Dims(VideoLlama.defaults, {}), ())
    weights = converted.weights({"video": 1408, "audio": 1024}, 4096)
    for adapter in converted.adapters:
        adapter.file.refuse_rest()
    assert weights["2.query_tokens"].shape == (1, 32, 768)
    video, audio = (converted.backbones[stream].config for stream in ("video", "audio"))
    assert (video.num_hidden_layers, video.image_size, video.num_attention_heads) == (39, 224, 16)
    assert (audio.num_hidden_layers, audio.frames, audio.num_attention_heads) == (12, 204, 12)
    assert audio.scale == pytest.approx(20)


# ---- branches -------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_that_only_sees(published: Published) -> None:
    folder = published.run(names=("vl", "vit", "qformer"))
    golden = Original.of(published.states, published.llm).save(published.folder / "golden.npz")
    code, differences = verify(folder, golden)
    assert code == 0
    computed = {name for name, difference in differences.items() if difference is not None}
    assert computed == {n for n in COMPARED if "imagebind" not in n and "audio" not in n}


@torch.no_grad()
def test_a_model_that_only_hears(published: Published) -> None:
    folder = published.run(names=("al", "imagebind"))
    golden = Original.of(published.states, published.llm).save(published.folder / "golden.npz")
    _, differences = verify(folder, golden)
    assert differences["audio_tokens"] < 1e-5
    assert differences["video_tokens"] is None


@pytest.mark.parametrize("names", [(), ("vl",), ("vl", "vit", "qformer", "al")])
def test_half_a_branch_is_refused(published: Published, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="expected"):
        published.run(names=names)


# ---- every tensor is accounted for ----------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("vl", "video_Qformer.bert.encoder.layer.1.crossattention.self.key.bias"),
        ("vl", "llama_proj.bias"),
        ("al", "audio_position_embedding.weight"),
        ("vit", "blocks.1.attn.v_bias"),
        ("qformer", "ln_vision.weight"),
        ("imagebind", "modality_trunks.audio.blocks.1.attn.bias_k"),
    ],
)
def test_a_missing_tensor_is_an_error(published: Published, file: str, name: str) -> None:
    del published.states[file][name]
    with pytest.raises(PublishedError, match=name) as error:
        published.run()
    assert error.value.reason == "weights"
    assert f"{file}.pth" in str(error.value)
    assert not (published.folder / "out").exists()


@pytest.mark.parametrize("file", REAL_NAMES)
def test_a_tensor_that_is_left_over_is_an_error(published: Published, file: str) -> None:
    published.states[file]["extra.weight"] = torch.ones(2)
    with pytest.raises(PublishedError, match=r"extra\.weight"):
        published.run()
    assert published.run("allowed", "--allow", r"^extra\.").is_dir()


def test_a_tensor_of_another_shape_is_an_error(published: Published) -> None:
    published.states["vl"]["llama_proj.weight"] = torch.ones(LLM_WIDTH, 25)
    with pytest.raises(PublishedError, match="llama_proj.weight has shape"):
        published.run("out", "--allow", "llama_proj")


def test_a_missing_tensor_may_be_allowed(published: Published) -> None:
    del published.states["vl"]["llama_proj.bias"]
    assert AVLLM.from_pretrained(str(published.run("out", "--allow", r"llama_proj\.bias")))


def test_sizes_that_contradict_the_tensors_are_an_error(published: Published) -> None:
    published.write()
    wrong = published.folder / "wrong.json"
    for dims in ({"vit": {"dim": 17}}, {"vit": {"nose": 1}}, {"frames": "many"}, [1]):
        wrong.write_text(json.dumps(dims))
        with pytest.raises(UserError) as error:
            published.run("out", "--dims", str(wrong))
        assert error.value.reason == "dims"


def test_nan_is_an_error(published: Published) -> None:
    published.states["al"]["audio_llama_proj.bias"][0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        published.run()


def test_a_file_that_runs_code_is_refused(published: Published) -> None:
    published.run("first")

    class Harmful:
        def __reduce__(self) -> Any:
            return print, ("run",)

    for content in ({"model": Harmful()}, [1, 2]):
        torch.save(content, published.path("vl"))
        command = ["ckpt", "import", "video_llama", "--llm", str(published.llm)]
        for name in REAL_NAMES:
            command += [f"--{name}", str(published.path(name))]
        result = CliRunner().invoke(app, [*command, "--output", str(published.folder / "second")])
        assert isinstance(result.exception, PublishedError)
        assert result.exception.reason == "damaged"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder"])
def test_a_damaged_file_is_one_line(published: Published, damage: str) -> None:
    published.write()
    path = published.path("al")
    content = path.read_bytes()
    published.write = lambda: None  # type: ignore[method-assign]
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": content[:5000], "empty": b"", "text": b"not a file\n"}[damage])
    with pytest.raises(PublishedError, match=r"al\.pth") as error:
        published.run()
    assert error.value.reason == ("missing" if damage == "folder" else "damaged")
    assert "\n" not in str(error.value)


def test_options_that_do_not_exist_are_refused(published: Published) -> None:
    for more in (["--vll", "x"], ["x"], ["--vl"]):
        with pytest.raises(UserError):
            published.run("out", *more)
    folder = published.run()
    with pytest.raises(UserError) as error:
        published.run(folder.name)
    assert error.value.reason == "exists"


# ---- the checkpoint -------------------------------------------------------------------------


def test_the_checkpoint_moves_with_its_backbones(published: Published) -> None:
    folder = published.run()
    moved = folder.rename(published.folder / "elsewhere")
    config = json.loads((moved / "config.json").read_text())
    assert config["encoders"]["video"]["name"] == "backbones/video"
    manifest = json.loads((moved / "manifest.json").read_text())
    assert all(record["sha256"] for record in manifest["backbones"].values())
    assert manifest["stages"][0]["importer"] == "video_llama"
    assert AVLLM.from_pretrained(str(moved)).connector[0].qformer.config.num_hidden_layers == 4


def test_a_changed_backbone_is_found(published: Published) -> None:
    folder = published.run()
    weights = folder / "backbones" / "video" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="hash"):
        AVLLM.from_pretrained(str(folder))


def clip_part(path: Path, frames: int) -> tuple[Sample, Path]:
    """A question about a video with so many frames."""
    import av
    from av.video.frame import VideoFrame

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((64, 64, 3), number * 5 % 255, np.uint8)
            container.mux(stream.encode(VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    content = [{"type": "video", "video": path.name}, {"type": "text", "text": "what colour ?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    return Sample.model_validate({"id": "1", "messages": messages}), path.parent


@torch.no_grad()
@pytest.mark.parametrize("frames", [7, 40])
def test_more_frames_than_positions_work(published: Published, frames: int) -> None:
    """The original's table has an entry a frame and ends with an IndexError after the last."""
    folder = published.run()
    model, processor = AVLLM.from_pretrained(str(folder)), AVProcessor.from_pretrained(folder)
    processor.sampling = type(processor.sampling)(num_frames=frames)
    sample, root = clip_part(published.folder / "clip.mp4", 48)
    batch = processor([sample], root=root)
    assert batch.streams["video"].units.tolist() == [frames]
    tokens = model.media_tokens(batch)["video"]
    assert tokens.x.shape == (1, 1, 6, LLM_WIDTH)
    assert tokens.x.isfinite().all()
    assert model.generate(batch, max_new_tokens=2).shape[0] == 1


def test_a_context_that_is_too_long_never_cuts_media(published: Published) -> None:
    """The original drops what exceeds its length from the front, where the video's tokens are."""
    folder = published.run()
    processor = AVProcessor.from_pretrained(folder)
    sample, root = clip_part(published.folder / "clip.mp4", 8)
    whole = processor([sample], root=root)
    video = processor.config.media_token_ids["video"]
    assert (whole.input_ids == video).sum() == 6
    processor.max_length = whole.input_ids.shape[1] - 1
    with pytest.raises(RowError):
        processor([sample], root=root)


@torch.no_grad()
def test_half_precision_files_stay_in_half_precision(published: Published) -> None:
    for name in ("vit", "imagebind"):
        halved = {key: x.half() for key, x in published.states[name].items()}
        published.states[name] = halved
    folder = published.run()
    model, processor = AVLLM.from_pretrained(str(folder)), AVProcessor.from_pretrained(folder)
    assert {e.backbone.dtype for e in model.encoders.values()} == {torch.float16}
    captions, _ = make_data(published.folder / "data", 1)
    batch = processor([json.loads(captions.read_text())], root=captions.parent)
    for tokens in model.media_tokens(batch).values():
        assert tokens.x.dtype == torch.float32
        assert tokens.x.isfinite().all()


def stage(published: Published, init: Path, output: str) -> dict[str, Any]:
    """Settings of a stage that goes on from an imported checkpoint, with sight and sound."""
    captions, _ = make_data(published.folder / "data", 6)
    return {
        "stage": "instruct",
        "init": str(init),
        "output": str(published.folder / output),
        "trainable": [["^connector", 1e-3], [".*", None]],
        "objectives": [{"type": "next_token"}],
        "data": {"train": str(captions), "num_workers": 0},
        "train": {"max_steps": 4, "batch_size": 2, "save_every": 1, "log_every": 1, "trackers": []},
    }


def test_training_goes_on_from_imported_weights_and_resumes(published: Published) -> None:
    """The original starts its schedule and its data again. Three runs, a process each: seconds."""
    folder = published.run()
    straight = run(stage(published, folder, "straight"))
    cut = stage(published, folder, "cut")
    kill_after(cut, 1)
    assert difference(weights(run(cut)), weights(straight)) == 0.0
    chain = json.loads((straight / "manifest.json").read_text())["stages"]
    assert [record["stage"] for record in chain] == ["import", "instruct"]
    before, after = weights(folder), weights(straight)
    assert difference(before, after) > 0
    assert AVLLM.from_pretrained(str(straight)).encoders["audio"].segments == SEGMENTS
