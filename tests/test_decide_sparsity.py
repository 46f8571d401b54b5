"""One spelling of sparsity inside, whatever the user wrote; a wrong one is answered with what was meant."""

from fractions import Fraction

import pytest
from pydantic import BaseModel, ValidationError

from structprune.decide.sparsity import Sparsity, check_groups, fraction_of, parse_sparsity, pattern_of
from structprune.errors import UsageError


class Settings(BaseModel):
    sparsity: Sparsity = 0.5


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (0.5, 0.5),
        (0, 0.0),
        (-0.0, 0.0),
        ("0.5", 0.5),
        (" .5 ", 0.5),
        ("5e-1", 0.5),
        ("50%", 0.5),
        ("50 %", 0.5),
        ("29%", 0.29),
        ("57%", 0.57),
        ("33.3%", 0.333),
        ("0%", 0.0),
        ("2:4", "2:4"),
        (" 2 : 4 ", "2:4"),
        ("01:4", "1:4"),
        ("3:4", "3:4"),
        ("4:8", "4:8"),
        ("16:32", "16:32"),
    ],
)
def test_every_way_to_write_a_sparsity_is_read(written: object, meant: float | str) -> None:
    found = parse_sparsity(written)
    assert found == meant
    assert type(found) is type(meant)
    assert str(found) == str(meant)
    assert Settings(sparsity=written).sparsity == meant


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (50, "did you mean 0.5?"),
        ("50", "did you mean 0.5?"),
        (2.5, "did you mean 0.025?"),
        (29, "did you mean 0.29?"),
        (124, 'did you mean "2:4" in quotes'),
        (184, 'did you mean "3:4" in quotes'),
        (248, 'did you mean "4:8" in quotes'),
        (64, 'did you mean 0.64 or "1:4" in quotes'),
        (1, "would remove everything"),
        ("100%", "would remove everything"),
        (1.5, "in [0, 1)"),
        (-0.1, "in [0, 1)"),
        ("-10%", "in [0, 1)"),
        ("150%", "150% is not a sparsity"),
        (float("nan"), "nan is not a sparsity"),
        ("nan", "nan is not a sparsity"),
        (float("inf"), "inf is not a sparsity"),
        ("-inf", "-inf is not a sparsity"),
        (float("-inf"), "-inf is not a sparsity"),
        (True, "True is not a sparsity"),
        (False, "False is not a sparsity"),
        (None, "None is not a sparsity"),
        ([0.5], "[0.5] is not a sparsity"),
        ("half", "half is not a sparsity"),
        ("", "is not a sparsity"),
        ("%", "is not a sparsity"),
        ("0_5", "is not a sparsity"),
        ("\u0660.\u0665", "is not a sparsity"),
        ("4:2", 'did you mean "2:4"?'),
        ("4:4", "to remove nothing say 0"),
        ("0:4", "0 < N < M"),
        ("0:0", "0 < N < M"),
        ("2:4:8", "is not a sparsity"),
        ("99999:100000", "is not a sparsity"),
        (10**400, "an integer of 1329 bits is not a sparsity"),
        ("9" * 5000, "is not a sparsity"),
        ("9" * 5000 + "%", "is not a sparsity"),
        ("1e99999999999%", "is not a sparsity"),
        ("1e-99999999999%", "is not a sparsity"),
        ("1e999%", "is not a sparsity"),
        (f"{'9' * 5000}:4", "is not a sparsity"),
    ],
)
def test_what_is_not_a_sparsity_is_answered(written: object, answer: str) -> None:
    with pytest.raises(ValueError, match="not a") as found:
        parse_sparsity(written)
    assert answer in str(found.value)
    assert len(str(found.value)) < 300
    with pytest.raises(ValidationError, match="sparsity"):
        Settings(sparsity=written)


def test_an_integer_too_long_to_print_is_answered() -> None:
    with pytest.raises(ValueError, match="an integer of 16610 bits is not a sparsity"):
        parse_sparsity(10**5000)


def test_fractions_are_those_of_the_decimal_text() -> None:
    assert fraction_of(0.29) == Fraction(29, 100)
    assert fraction_of(0.0) == 0
    assert fraction_of("2:4") == Fraction(1, 2)
    assert fraction_of("1:4") == Fraction(3, 4)


def test_a_pattern_is_kept_of_group() -> None:
    assert pattern_of("4:8") == (4, 8)
    assert pattern_of(0.5) is None


def test_a_matrix_that_does_not_divide_is_refused_with_its_shape() -> None:
    check_groups((3, 8), 4)
    with pytest.raises(UsageError, match=r"shape \[3, 6\]: 6 inputs do not divide into groups of 4"):
        check_groups((3, 6), 4)
