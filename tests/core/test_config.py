"""Strict configuration: what is accepted, what is refused and how it is said."""

import contextlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from onestepsr.core.config import apply_overrides, from_mapping, merged, parse_yaml, read_mapping, to_mapping
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


def test_a_date_is_the_name_of_a_folder():
    assert from_mapping(Outer, apply_overrides({}, ["folder=2026-01-02"])).folder == Path("2026-01-02")


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
    assert re.search(r"line \d, column \d", str(caught.value))
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


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10))
MANY = ",".join(["1"] * 200_000)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "more than 50,000 values"),
        (MERGES, "more than 50,000 values"),
        ("a: &a [*a]", "an alias that contains itself"),
        ("a: &a {b: *a}", "an alias that contains itself"),
        ("a: &a {<<: *a, b: 1}", "an alias that contains itself"),
        ("a: " + "[" * 100 + "]" * 100, "levels deep"),
        ("a: " + "[" * 200_000, "levels deep"),
        ("- " * 140_000, "levels deep"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: 0x" + "9" * 5000, "a number of 5,002 characters"),
        ("a: !!int '" + "1:" * 2000 + "1'", "a number of 4,001 characters"),
        ("a: !!float '" + "59:" * 100 + "1.0'", "too large|number of"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!timestamp 2001-99-99", "."),
        ("a: [" + MANY[:290_000] + "1]", "more than 50,000 values"),
        ("a: &" + "x" * 100_000 + " 1", "."),
        ("? [1]: 2", "."),
        ("a: b: c", "mapping values are not allowed"),
        ("\x00", "."),
    ],
)
def test_yaml_that_takes_more_than_it_shows_is_refused_at_once(text, reason, tmp_path):
    path, begun = tmp_path / "recipe.yaml", time.monotonic()
    path.write_text(text)
    if text[:4] != "a: &" or "*a" in text:  # a long anchor is only odd
        with pytest.raises(UserError, match=rf"recipe\.yaml: .*({reason})") as caught:
            read_mapping(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    with contextlib.suppress(UserError):
        apply_overrides({}, [f"x={text}"])
    assert time.monotonic() - begun < 15


def test_aliases_and_merges_within_reason_are_read():
    text = "base: &base {rate: 1e-4, sizes: [1, 2]}\nfirst: {<<: *base, rate: 2}\nsecond: *base\n"
    values = parse_yaml(text)
    assert values["first"] == {"rate": 2, "sizes": [1, 2]}
    assert values["second"] == {"rate": "1e-4", "sizes": [1, 2]}
    assert parse_yaml("[1:30, 2001-01-01, 010, 0x1F, 1.5, -3, 1_000, .inf, 12:30:45.5]") == [
        "1:30",
        "2001-01-01",
        8,
        31,
        1.5,
        -3,
        1000,
        float("inf"),
        "12:30:45.5",
    ]
    assert parse_yaml("") is None


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b"])
def test_impossible_names_are_one_line(name):
    with pytest.raises(UserError, match="cannot be read"):
        read_mapping(Path(name))


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(UserError) as caught:
        from_mapping(Outer, {"inner": ["x" * 10**6] * 100})
    assert len(str(caught.value)) < 1000
