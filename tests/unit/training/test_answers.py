"""Gold answers mean what they say: read whole, right for every way of writing them, wrong for their parts."""

from __future__ import annotations

from fractions import Fraction

import pytest

from vllm_cospec.training.tasks.answers import canonical_number, fault, final_answer, number, score

CASES = [  # gold, right responses, wrong responses
    (r"\dfrac{1}{2}", [r"The answer is $\boxed{\dfrac{1}{2}}$", r"\boxed{\frac12}", "0.5"], [r"$\boxed{3}$", "1", "2"]),
    ("Paris", ["Paris", "The answer is Paris.", r"\boxed{\text{Paris}}", "paris"], ["London", "Par", ""]),
    (
        "A",
        ["A", r"The answer is \boxed{A}", "The answer is (A).", "answer: A"],
        ["B", r"\boxed{B}", "The answer is AB"],
    ),
    ("yes", ["yes", "Yes.", r"\boxed{yes}"], ["no", "y"]),
    ("\u22125", ["-5", "\u22125", r"\boxed{-5}", "so x is -5"], ["5", "-50"]),
    ("(1, 2)", ["(1, 2)", "$(1,2)$", r"\boxed{(1,2)}"], ["2", "1", "(2, 1)", "(1, 3)"]),
    (r"2\sqrt{3}", [r"$2\sqrt{3}$", r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$"], ["2", "3", r"$\sqrt{3}$"]),
    ("1e3", ["1000", "1,000", "1e3"], ["1", "3", "10"]),
    ("12:30", ["12:30", r"\boxed{12:30}"], ["12", "30", "0.4"]),
    ("1/2", ["0.5", "1/2", r"\frac{1}{2}", "$0.50"], ["2", "1"]),
    ("x^2+1", ["$x^2+1$", r"\boxed{1 + x^2}"], ["x", "1", "$x^2$"]),
    ("50%", ["50%", r"\boxed{50\%}"], ["5", "51%"]),
    ("1,234", ["1234", "1 234", "$1,234"], ["1", "234", "1.234"]),
    ("{1,2}", [r"$\{1,2\}$", r"\boxed{\{2, 1\}}"], ["2", "1"]),
    ("$5", ["5", "$5", "five is wrong, it is $5.00"], ["4", "50"]),
    ("3 cm", ["3", "3 cm"], ["4", "30 cm"]),
    ("3, 4", ["$3,4$", r"\boxed{3, 4}"], ["4", "3", "34"]),
    (r"3\frac{1}{2}", ["3.5", r"\boxed{\frac{7}{2}}"], ["3", "0.5", "1.5"]),
    ("3 1/2", ["3.5", r"\boxed{\frac{7}{2}}"], ["3", "1/2", "31/2"]),
    ("18", ["She makes $18 every day.", "#### 18", r"first 17, then \boxed{18}"], ["She makes $17", r"18 \boxed{17}"]),
    (".5", ["0.5", ".5", r"\frac{1}{2}"], ["5", "05"]),
    (r"0.1\overline{6}", [r"\boxed{\frac16}", "1/6", r"$0.1\overline{6}$"], ["0.16", "0.1", "6", r"0.\overline{16}"]),
    ("1/3", [r"\boxed{0.\overline{3}}"], [r"\boxed{0.\overline{4}}", "0.33"]),
    ("18 dollars", ["18", "$18", "18.0 dollars", "The answer is 18 dollars."], ["17", "18 euros", "1", "17 dollars"]),
    ("12/5 hours", ["2.4", r"\boxed{12/5}", "2.4 hours"], ["12", "5", "2.4 days"]),
    ("2 pi", ["2 pi"], ["2"]),
    ("2 million", ["2 million"], ["2"]),
    ("3 pm", ["3 pm"], ["3", "3 am"]),
    (r"18 \text{ dollars}", ["18", r"\boxed{18\text{ dollars}}"], ["17", "1"]),
    ("5!", ["5!", "120"], ["5"]),
    ("n!", ["n!", r"\boxed{n!}"], ["n"]),
    ("yes!", ["Yes", "yes!!"], ["no!"]),
    ("1011_2", ["1011_2", r"\boxed{1011_{2}}", r"\boxed{1011_{\text{2}}}", "1011"], ["1011_3", "1010_2", "11"]),
    ("5\u00b2", ["25", "$5^2$", "5\u00b2"], ["5", "2", "52"]),
    ("\u221a2", [r"\boxed{\sqrt{2}}", "\u221a2"], ["2", "1.4"]),
    ("3\u00bd", ["3.5", "7/2", "3 1/2"], ["3", "0.5", "31/2"]),
    ("\u221e", [r"$\infty$", "\u221e"], ["1", r"$-\infty$"]),
    ("1\u20135", ["1-5", "1\u20135"], ["1", "5"]),
    ("42", [r"\boxed{41} no: \boxed{42}", "**42**", r"\[42\]"], [r"\boxed{42} no: \boxed{41}"]),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), CASES, ids=[case[0] for case in CASES])
def test_a_gold_answer_is_read_whole(gold: str, right: list[str], wrong: list[str]) -> None:
    assert {text: score(gold, text) for text in right} == dict.fromkeys(right, 1.0)
    assert {text: score(gold, text) for text in wrong} == dict.fromkeys(wrong, 0.0)
    assert fault(gold) is None
    for form in ("{}", "${}$", r"\boxed{{{}}}", "The answer is {}."):
        assert score(gold, form.format(gold)) == 1.0


@pytest.mark.parametrize("gold", [r"\boxed{3", "3}", "a\nb", r"\frac{1}{2}}"])
def test_what_cannot_be_delimited_has_a_fault(gold: str) -> None:
    assert "does not score 1 against itself" in str(fault(gold))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-$1,234.50", Fraction("-1234.5")), ("$-5", -5), ("+5", 5), ("--5", None), ("1e-3", Fraction(1, 1000)),
        ("1,23", None), ("12,345,678", 12345678), (r"1{,}234", 1234), ("1.", 1), (".5", Fraction(1, 2)), (".", None),
        ("", None), ("1/0", None), ("-3/4", Fraction(-3, 4)), ("\u22123", -3), ("1\u00a0234", 1234), ("20\u20ac", 20),
        (r"\$7", 7), ("1 2", None), ("0x10", None), ("\u0661", 1),
        (r"-2.3\overline{45}", Fraction(-129, 55)), (r"0.\overline{9}", 1), (r".\overline{3}", Fraction(1, 3)),
        (r"0.\overline{}", None),
    ],
)  # fmt: skip
def test_numbers_are_read_with_signs_currency_and_thousands(text: str, value: Fraction | None) -> None:
    assert number(text) == value


def test_plain_digits_are_what_a_number_is_kept_as() -> None:
    assert [canonical_number(t) for t in ("-$1,234.50", " +5 ", "18.", "1e3", "3/4", "x")] == [
        "-1234.50", "5", "18", "1e3", "3/4", "x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"a \boxed{1} b \boxed{\frac{2}{3}} c", r"\frac{2}{3}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        ("steps\n#### 5\nmore", "5"),
        ("The answer is 4. No, the answer is 5", "5"),
        ("line\n\nlast \n", "last "),
        ("", ""),
    ],
)
def test_where_a_response_gives_its_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer
