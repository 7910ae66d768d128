"""Parts of error messages."""

import pytest

from onestepsr.core.errors import MissingExtra, error_context, first_line, join_names


def test_names_are_shortened_beyond_a_limit() -> None:
    assert join_names(["a", "b"], 2) == "a, b"
    assert join_names(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_an_error_of_another_library_gives_one_line() -> None:
    assert first_line(ValueError("\nbroken\nat byte 3"), 4) == "brok"
    assert first_line(KeyError()) == "KeyError"


def test_a_line_says_what_it_is_about_and_the_error_keeps_its_type() -> None:
    def fails() -> None:
        with error_context("config.steps"):
            raise MissingExtra("this", "extra")

    with pytest.raises(MissingExtra, match=r"^config\.steps: this needs"):
        fails()
    with pytest.raises(ValueError, match=r"^defect$"), error_context("config.steps"):
        raise ValueError("defect")
