"""Parts by name: listing imports nothing, mistakes name the right one, a user's class works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from avllm.adapters.base import Adapter
from avllm.errors import UserError
from avllm.registry import (
    UnknownPartError,
    build,
    check,
    check_options,
    choices,
    kinds,
    load,
    option_types,
    options,
)

OWN = '''
from avllm.adapters.linear import Linear


class Doubled(Linear):
    """Twice the linear layer."""

    def __init__(self, widths, llm_dim, *, times: float = 2.0, **rest):
        super().__init__(widths, llm_dim, **rest)
        self.times = times

    def adapt(self, tokens, prompt=None):
        return tokens.with_x(self.times * super().adapt(tokens).x)


class Stranger:
    pass
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_parts_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_every_file_is_one_part() -> None:
    for kind in kinds():
        assert choices(kind) == sorted(choices(kind))
        for name in choices(kind):
            part = load(kind, name)
            assert part.__doc__, f"{kind} {name} says nothing about itself"
            assert all(p.kind is p.KEYWORD_ONLY for p in options(part).values())


def test_base_and_private_files_are_no_choices() -> None:
    assert all(
        not name.startswith("_") and name != "base" for kind in kinds() for name in choices(kind)
    )


def test_listing_imports_nothing() -> None:
    code = (
        "import sys; from avllm.registry import choices, kinds; [choices(k) for k in kinds()]; "
        "heavy = ('torch', 'transformers', 'avllm.adapters', 'avllm.encoders'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("value", [[2, 3], (2, 3)])
def test_what_a_file_can_write_stands_for_other_types(value: object, own: str) -> None:
    class Sized(Adapter):
        def __init__(self, *, size: tuple[int, int] = (1, 1), where: Path | None = None) -> None:
            self.size, self.where = size, where

    check_options(Sized, {"size": value, "where": "a.pt"}, "sized")
    for option in ({"size": [2, "three"]}, {"where": 3}):
        with pytest.raises(UserError, match=f"sized.*{next(iter(option))}") as refused:
            check_options(Sized, option, "sized")
        assert refused.value.reason == "option_type"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownPartError, match="'qfomer'.*'qformer'") as refused:
        load("adapters", "qfomer")
    assert refused.value.reason == "unknown_part"
    with pytest.raises(UnknownPartError, match="linear"):
        load("adapters", "zzz")


def test_a_wrong_option_gets_the_right_ones() -> None:
    with pytest.raises(UnknownPartError, match="adapter 'mlp'.*'deph'.*'depth'") as refused:
        build("adapters", {"type": "mlp", "stream": "video", "deph": 2}, {"video": 4}, 8)
    assert refused.value.reason == "unknown_option"
    with pytest.raises(UnknownPartError, match="adapter 'mlp'.*'stream'") as refused:
        build("adapters", {"type": "mlp"}, {"video": 4}, 8)
    assert refused.value.reason == "missing_option"
    with pytest.raises(UnknownPartError, match="'type'.*mlp") as refused:
        build("adapters", {"stream": "video"}, {"video": 4}, 8)
    assert refused.value.reason == "no_type"


def test_own_part_by_module_and_class(own: str) -> None:
    spec = {"type": f"{own}:Doubled", "stream": "video", "times": 3.0, "dim": 5}
    adapter = build("adapters", spec, {"video": 4}, 8)
    assert isinstance(adapter, Adapter)
    assert (adapter.times, adapter.out_widths) == (3.0, {"video": 5})
    assert set(options(type(adapter))) == {
        "times",
        "stream",
        "dim",
        "norm",
    }  # its own and those that it hands on
    with pytest.raises(UnknownPartError, match="'time'.*'times'") as refused:
        build("adapters", spec | {"time": 1}, {"video": 4}, 8)
    assert refused.value.reason == "unknown_option"


def test_own_module_that_is_not_found() -> None:
    with pytest.raises(UnknownPartError, match="'nowhere.parts:A'.*'nowhere'") as refused:
        load("adapters", "nowhere.parts:A")
    assert refused.value.reason == "no_module"


@pytest.mark.parametrize(
    "name, reason, named",
    [("Stranger", "wrong_class", "Stranger"), ("Doubld", "no_class", r"\.py.*'Doubled'")],
)
def test_own_class_of_another_kind_or_none(own: str, name: str, reason: str, named: str) -> None:
    expected = "avllm.adapters.base.Adapter"
    with pytest.raises(UnknownPartError, match=f"{own}:{name}.*{expected}") as refused:
        load("adapters", f"{own}:{name}")
    assert refused.value.reason == reason
    assert re.search(named, str(refused.value))


SIGNATURES = """
from avllm.decoders.base import Decoder
from avllm.adapters.linear import Linear


class ByPosition(Decoder):
    def __init__(self, strength=1.0):
        self.strength = strength


class NoArguments(Linear):
    def __init__(self, *, stream: str):
        super().__init__({}, 1, stream=stream)
"""


def test_a_constructor_of_another_form_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_signatures.py").write_text(SIGNATURES)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnknownPartError, match=r"'strength'.*\*, strength") as refused:
        build("decoders", {"type": "odd_signatures:ByPosition", "strength": 2.0})
    assert refused.value.reason == "signature"
    spec = {"type": "odd_signatures:NoArguments", "stream": "video"}
    with pytest.raises(UnknownPartError, match="NoArguments.*2 arguments") as refused:
        build("adapters", spec, {"video": 4}, 8)
    assert refused.value.reason == "signature"


@pytest.mark.parametrize(
    "option, names",
    [
        ({"depth": "two"}, "adapter 'mlp'.*depth.*'two'.*integer"),
        ({"depth": 2.5}, "depth.*2.5.*integer"),
        ({"stream": 3}, "stream.*3.*string"),
    ],
)
def test_an_option_of_another_type_is_named(option: dict[str, object], names: str) -> None:
    with pytest.raises(UserError, match=names) as refused:
        check("adapters", {"type": "mlp", "stream": "video", **option})
    assert refused.value.reason == "option_type"
    assert (
        option_types(check("adapters", {"type": "mlp", "stream": "video", "depth": 2}))["depth"]
        is int
    )


def test_annotations_that_cannot_be_read_let_everything_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_parts.py").write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from avllm.layouts.base import Layout\n"
        "if TYPE_CHECKING:\n    from nowhere import Odd\n"
        "class Own: ...\n"
        "class A(Layout):\n    def __init__(self, *, odd: Odd) -> None: ...\n"
        "class B(Layout):\n    def __init__(self, *, own: Own) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    check("layouts", {"type": "odd_parts:A", "odd": 3})
    check("layouts", {"type": "odd_parts:B", "own": 3})
