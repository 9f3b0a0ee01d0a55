"""Hold the parts of a composed model in config.json: enough to build it without any weights."""

from __future__ import annotations

import datetime
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from avllm.config_model import ModelConfig
from avllm.streams import medium_of
from avllm.weights import whole_name


class AVConfig(PretrainedConfig):
    """Configuration of :class:`~avllm.models.modeling_avllm.AVLLM`.

    Args:
        llm: the fields of :class:`~avllm.config.LLMConfig`, and ``config``: the LLM's own config as
            a dict. ``name`` is the source of its weights, ``date`` the day on which the model was
            composed, which chat templates that write a date keep writing.
        encoders: ``{stream: {"medium", "type", "name", "revision", "config", "options"}}``.
        connector: adapters in order, ``[{"type", **options}]``.
        layout: ``{"type", **options}``.
        fusion: ``{"type", **options}`` of the part by which streams act inside the LLM, or None.
        sampling: how frames are chosen (:class:`~avllm.config_model.SamplingConfig`).
        selector: ``{"type", **options}`` of the part that chooses frames by the question, or None.
        media_token_ids: the placeholder's token id of each stream that reaches the LLM.
        lora: ``{set: {"r", "alpha", "dropout", "targets", "active"}}`` of the LoRA sets on the LLM,
            or ``{set: {"type", "targets", "active"}}`` of another method of PEFT, with options.
        trained: parts whose weights were trained (``connector``, ``encoders.audio``, ``llm``): a
            checkpoint holds them whole.
        system: system prompt for chats that bring none.
        media_text: text around a media part, by its type; ``{media}`` stands for its tokens.
        time_codec: how times are written into text, ``{"type", **options}``.
        words: token id of each added word, see :class:`~avllm.models.words.AddedWords`.
    """

    model_type = "avllm"

    def __init__(
        self,
        llm: dict[str, Any] | None = None,
        encoders: dict[str, dict[str, Any]] | None = None,
        connector: list[dict[str, Any]] | None = None,
        layout: dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        selector: dict[str, Any] | None = None,
        media_token_ids: dict[str, int] | None = None,
        lora: dict[str, dict[str, Any]] | None = None,
        trained: list[str] | None = None,
        system: str | None = None,
        media_text: dict[str, str] | None = None,
        time_codec: dict[str, Any] | None = None,
        words: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.llm = llm or {}
        self.encoders = encoders or {}
        self.connector = connector or []
        self.layout = layout or {"type": "concat"}
        self.fusion = fusion
        self.sampling = sampling or {"num_frames": 8}
        self.selector = selector
        self.media_token_ids = media_token_ids or {}
        self.lora = lora or {}
        self.trained = trained or ["connector"]
        self.system = system
        self.media_text = media_text or {}
        self.time_codec = time_codec or {"type": "seconds"}
        self.words = words or {}
        super().__init__(**kwargs)

    @property
    def active_lora(self) -> list[str]:
        """Return the LoRA sets that are active by default (:meth:`AVLLM.lora` activates others)."""
        return sorted(name for name, settings in self.lora.items() if settings["active"])

    @property
    def media(self) -> dict[str, str]:
        """Return the medium of each encoder's stream."""
        return {stream: medium_of(stream, record) for stream, record in self.encoders.items()}

    @classmethod
    def of(
        cls,
        description: ModelConfig,
        llm: dict[str, Any],
        encoders: dict[str, dict[str, Any]],
        media_token_ids: dict[str, int],
    ) -> AVConfig:
        """Make the config of a preset's ``model`` section.

        Args:
            description: the section.
            llm: the LLM's record.
            encoders: the encoders' records, by stream.
            media_token_ids: placeholder ids by stream.
        """
        today = datetime.date.today().isoformat()
        return cls(
            llm=llm | {"date": llm.get("date") or today, "name": whole_name(llm["name"])},
            encoders=dict(encoders),
            connector=description.connector,
            layout=description.layout,
            fusion=description.fusion,
            sampling=description.sampling.model_dump(),
            selector=description.selector,
            media_token_ids=media_token_ids,
            trained=_trained_from_the_start(description, encoders),
            system=description.system,
            media_text={str(k): v for k, v in description.media_text.items()},
            time_codec=description.time_codec,
        )


def _trained_from_the_start(
    description: ModelConfig, encoders: dict[str, dict[str, Any]]
) -> list[str]:
    """Return the parts that only a checkpoint holds, also encoders made from a config."""
    made = [f"encoders.{stream}" for stream, record in encoders.items() if record["name"] is None]
    fusion = ["fusion"] if description.fusion else []
    return ["connector", *made, *fusion]


AutoConfig.register(AVConfig.model_type, AVConfig)
