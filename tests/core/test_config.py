"""Strict configuration: what is accepted, what is refused and how it is said."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from onestepsr.core.config import apply_overrides, from_mapping, merged, read_mapping, to_mapping
from onestepsr.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    mode: Literal["a", "b"] = "a"
    folder: Path | None = None
    inner: Inner = field(default_factory=Inner)
    named: dict[str, Inner] = field(default_factory=dict)
    flag: bool = False

    def __post_init__(self):
        if self.inner.rate < 0:
            raise ValueError("rate must not be negative")


@dataclass(frozen=True, kw_only=True)
class Holder:
    slow: Inner = field(default_factory=lambda: Inner(rate=0.1, sizes=(3,)))
    maybe: Inner | None = Inner(rate=0.2)
    either: Inner | Outer = field(default_factory=lambda: Inner(rate=0.3))
    outer: Outer = field(default_factory=lambda: Outer(flag=True, inner=Inner(rate=0.4)))


def test_round_trip_keeps_everything():
    values = {
        "mode": "b",
        "folder": "x/y",
        "inner": {"rate": 2, "sizes": [3]},
        "named": {"g": {"rate": 0.5}},
        "flag": True,
    }
    config = from_mapping(Outer, values)
    assert config.inner == Inner(rate=2.0, sizes=(3,))
    assert from_mapping(Outer, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mod": "a"}, "did you mean 'mode'"),
        ({"inner": {"rat": 1}}, "'inner.rat': did you mean 'rate'"),
        ({"mode": "c"}, "mode: 'c' is not one of 'a', 'b'"),
        ({"inner": {"rate": "fast"}}, "inner.rate: expected float, got 'fast'"),
        ({"inner": {"rate": float("nan")}}, "inner.rate: expected a finite number, got nan"),
        ({"inner": {"rate": "inf"}}, "inner.rate: expected a finite number, got inf"),
        ({"inner": {"rate": 10**400}}, "inner.rate: expected float, got 1000"),
        ({"flag": 1}, "flag: expected bool"),
        ({"inner": {"sizes": [True]}}, r"inner.sizes\[0\]: expected int"),
        ({"inner": {"pair": [1.0]}}, "inner.pair: expected 2 values, got 1"),
        ({"inner": 3}, "inner: expected a mapping"),
        ({"inner": {"rate": -1.0}}, "rate must not be negative"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        from_mapping(Outer, values)


def test_exponents_without_a_dot_are_numbers():
    assert from_mapping(Inner, {"rate": "5e-5"}).rate == 5e-5


def test_overrides_reach_into_groups_and_leave_the_source_alone():
    source = {"inner": {"rate": 1.0}}
    changed = apply_overrides(source, ["inner.rate=3", "inner.sizes=[4, 5]", "folder=null"])
    assert changed == {"inner": {"rate": 3, "sizes": [4, 5]}, "folder": None}
    assert source == {"inner": {"rate": 1.0}}


def test_overrides_make_a_group_of_what_is_null():
    assert apply_overrides({"folder": None}, ["folder.inner.rate=2"]) == {"folder": {"inner": {"rate": 2}}}


def test_a_date_is_refused_where_a_path_is_expected():
    with pytest.raises(UserError, match=r"folder: expected Path, got datetime.date\(2026, 1, 2\)"):
        from_mapping(Outer, apply_overrides(apply_overrides({}, ["folder=2026-01-02"]), []))


@pytest.mark.parametrize(
    ("override", "message"),
    [("rate", "expected key=value"), ("=3", "expected key=value"), ("paths=[a-{0..9}.tar]", "not valid YAML; quote")],
)
def test_malformed_overrides_are_refused(override, message):
    with pytest.raises(UserError, match=message) as caught:
        apply_overrides({}, [override])
    assert "\n" not in str(caught.value)


def test_files_that_are_no_mapping_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="expected a mapping"):
        read_mapping(path)
    path.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML") as caught:
        read_mapping(path)
    assert "line 1, column 6" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_mapping(tmp_path / "missing.yaml")


@dataclass(frozen=True, kw_only=True)
class Words:
    precision: Literal["no", "bf16"] | None = None
    blend: Literal["on", "off"] = "on"
    sure: bool | Literal["yes", "no"] = True


def test_words_that_yaml_takes_for_truth_values_are_words():
    values = apply_overrides({}, ["precision=no", "blend=off", "sure=no"])
    assert values["precision"] is False, "YAML 1.1"
    assert from_mapping(Words, values) == Words(precision="no", blend="off", sure=False)
    with pytest.raises(UserError, match="precision: True is not one of 'no', 'bf16'"):
        from_mapping(Words, {"precision": True})


def test_merging_goes_key_by_key_and_replaces_everything_else():
    base = {"a": {"x": 1, "y": [1, 2], "z": {"deep": 1}}, "b": "word", "c": 3}
    result = merged(base, {"a": {"y": [3], "z": {"more": 2}}, "b": {"now": "a mapping"}, "c": None})
    assert result == {"a": {"x": 1, "y": [3], "z": {"deep": 1, "more": 2}}, "b": {"now": "a mapping"}, "c": None}
    assert base["a"]["y"] == [1, 2], "the base stays as it was"


def test_a_part_of_a_group_changes_the_default_of_its_field_not_of_its_class():
    part = {"pair": [1, 2]}
    held = from_mapping(Holder, {"slow": part, "maybe": part, "either": part, "outer": {"inner": part}})
    assert held.slow == Inner(rate=0.1, sizes=(3,), pair=(1.0, 2.0))
    assert held.maybe == Inner(rate=0.2, pair=(1.0, 2.0))
    assert held.either == Inner(pair=(1.0, 2.0)), "it may be a part of another group too"
    assert held.outer == Outer(flag=True, inner=Inner(rate=0.4, pair=(1.0, 2.0)))
    assert from_mapping(Holder, {"maybe": None}).maybe is None
