"""What an answer says: the number, expression or words a gold answer means, and where a response gives its own.

math-verify reads mathematics well when it is told where it begins and ends, and badly when it has to look for it: in
the bare text ``(1, 2)`` it sees a 2, in ``1e3`` a 1, in ``Paris`` nothing. So a gold answer is read whole, as a number
if it is one, else as an expression between delimiters, else as words. A response answers with the last ``\\boxed{}``,
else with what stands behind ``####``, else behind "the answer is", else with its last line.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import Any

_SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u2060\ufeff"), " ")
_CHARACTERS = _SPACES | dict.fromkeys(map(ord, "\u2212\ufe63\uff0d\u2010\u2013"), "-") | {ord("\u221e"): r"\infty "}
_POWERS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_POWER = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_ROOT = re.compile("\u221a ?(\\d+|[a-z](?![a-z])|\\([^()]*\\))")
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")  # one half and its like, behind a whole number or not
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # but between digits: 3 1/2 is not 31/2
_BASED = re.compile(r"(?P<digits>[0-9A-Z]+)(?:_\{?(?:\\text\{)?(?P<base>\d+)\}*)?")  # 1011_2
_GROUPED = r"\d{1,3}(?:(?:,|\{,\}|\\,| |_|')\d{3})+|\d+"
_CURRENCY = r"\\?[$€£¥]"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?:{_CURRENCY})? ?(?P<inner>[+-]?)(?P<whole>{_GROUPED})?(?P<decimals>\.\d*)?"
    rf"(?P<exponent>[eE][+-]?\d{{1,3}})? ?(?:{_CURRENCY})?"
)
_REPEATING = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d{0,18})\.(?P<fixed>\d{0,18})\\overline\{(?P<repeated>\d{1,18})\}")
_RATIO = re.compile(r"(?P<sign>[+-]?)(?:(?P<whole>\d{1,18}) )?(?P<above>\d{1,18}) ?/ ?(?P<below>\d{1,18})")
_WRAPPERS = (
    re.compile(r"\$\$(.+)\$\$", re.DOTALL),
    re.compile(r"\$([+-]?\\?\$?[^$]+)\$"),  # an amount of dollars may stand between dollar signs
    re.compile(r"\\\((.+)\\\)", re.DOTALL),
    re.compile(r"\\\[(.+)\\\]", re.DOTALL),
    re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}"),
    re.compile(r"\*\*(.+)\*\*"),
)
_BEHIND = re.compile(r"answer(?: is|:)", re.IGNORECASE)
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_COMMANDS = re.compile(r"\\[a-zA-Z]+")
_TEXT = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}")
_QUANTITY = re.compile(r"(?P<number>.*\d) ?(?P<unit>[A-Za-z]{2,}(?: [A-Za-z]{2,})*)")
_FACTORS = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "percent"}
_CLOCK = {"am", "pm"}
_NAMES = {"sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "lim", "max", "min"}
_FUNCTIONS = _NAMES | {"cm", "mm", "km", "kg", "mph"}
_NO_UNITS = _FACTORS | _CLOCK | _NAMES | {"or", "and"}


def plain(text: str) -> str:
    """Return a text without what does not change its meaning: delimiters around it, odd spaces and minus signs."""
    text = " ".join(_latex(text).split())
    while True:
        inner = _unboxed(text)
        for wrapper in _WRAPPERS:
            found = wrapper.fullmatch(inner)
            inner = found.group(1).strip() if found else inner
        if inner == text:
            return text.removesuffix(".").rstrip() if not text.endswith("..") else text
        text = inner


def number(text: str) -> Fraction | None:
    """Return the number a text is: with sign, currency, thousands, decimals, exponent, or as a ratio; else None."""
    text = plain(text)
    ratio = _RATIO.fullmatch(text)
    if ratio and int(ratio["below"]):
        value = int(ratio["whole"] or 0) + Fraction(int(ratio["above"]), int(ratio["below"]))
        return -value if ratio["sign"] == "-" else value
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        digits = repeating["whole"] + repeating["fixed"] + repeating["repeated"]
        once = int(repeating["whole"] + repeating["fixed"] or 0)  # 0.1666... is (16 - 1) / 90
        value = Fraction(int(digits) - once, (10 ** len(repeating["repeated"]) - 1) * 10 ** len(repeating["fixed"]))
        return -value if repeating["sign"] == "-" else value
    found = _NUMBER.fullmatch(text)
    if not found or (found["sign"] and found["inner"]):
        return None
    whole, decimals = re.sub(r"\D", "", found["whole"] or ""), (found["decimals"] or "").strip(".")
    if not (whole or decimals) or len(whole) > 1000:
        return None
    value = Fraction(f"{whole or 0}.{decimals or 0}{found['exponent'] or ''}")
    return -value if "-" in (found["sign"], found["inner"]) else value


def canonical_number(text: str) -> str:
    """Return a number in plain digits, ``-1234.50`` for ``-$1,234.50``; any other text as it is, without space."""
    found = _NUMBER.fullmatch(plain(text))
    if number(text) is None or found is None or found["exponent"]:
        return text.strip()
    sign = "-" if "-" in (found["sign"], found["inner"]) else ""
    return sign + re.sub(r"\D", "", found["whole"] or "0") + (found["decimals"] or "").removesuffix(".")


def quantity(text: str) -> tuple[Fraction | None, str]:
    """Return the number and the unit of ``18 dollars``; an empty unit, and no number, where there is none."""
    found = _QUANTITY.fullmatch(" ".join(_TEXT.sub(r" \1 ", plain(text)).split()))
    value = number(found["number"]) if found and not _NO_UNITS & set(found["unit"].lower().split()) else None
    return (number(text), "") if found is None or value is None else (value, found["unit"].lower().rstrip("s"))


def is_words(text: str) -> bool:
    """Whether an answer is words, a choice or a time of day rather than mathematics."""
    text = plain(text)
    bare = _COMMANDS.sub(" ", text)
    words = [word for word in _WORDS.findall(bare) if word.lower() not in _FUNCTIONS]
    single = re.fullmatch(r"[(\[]?[A-Za-z][)\].]?", text) is not None
    unit = re.match(r"[-+]?[\d.,]+ ?([a-z]+)$", text)
    return bool(words and (unit is None or unit[1] in _CLOCK | _FACTORS)) or single or ":" in text


def final_answer(text: str) -> str:
    """Return the part of a response that is its answer."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    _, *behind = _BEHIND.split(text)
    if behind:
        return behind[-1].strip().partition("\n")[0]
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{}`` whose braces close; None when there is none."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for i in range(start + len(r"\boxed"), len(text)):
            if text[i - 1] == "\\":
                continue
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + len(r"\boxed{") : i]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def same_text(gold: str, answer: str) -> bool:
    """Whether two answers are written alike, but for delimiters, space, case and punctuation around them."""
    return _key(gold) == _key(answer)


def score(gold: str, text: str) -> float:
    """Return 1.0 when a response gives the gold answer, else 0.0.

    Written alike is right; two numbers are compared as numbers; the rest is math-verify's, which has no time limit of
    its own here: the caller has one.
    """
    answer = final_answer(text)
    if same_text(gold, answer):
        return 1.0
    expected = number(gold)
    if expected is not None and expected == number(answer):
        return 1.0
    (amount, unit), (own, own_unit) = quantity(gold), quantity(answer)
    if unit and own is not None and own_unit in ("", unit):
        return float(own == amount)
    if expected is None and is_words(gold):
        return float(_key(gold).strip("()[]") == _key(answer).strip("()[]"))
    based = _BASED.fullmatch(plain(gold))
    if based and based["base"]:  # math-verify reads past it
        given = _BASED.fullmatch(plain(answer))
        return float(
            given is not None and given["digits"] == based["digits"] and given["base"] in (None, based["base"])
        )
    from math_verify import parse, verify

    found = parse(_latex(text), parsing_timeout=None)
    return float(verify(_parsed(gold), found, timeout_seconds=None))


def fault(gold: str) -> str | None:
    """Return why a gold answer cannot be graded; None when it scores 1 against itself however it is delimited."""
    for form in ("{}", "${}$", r"\boxed{{{}}}"):
        written = form.format(gold)
        if not same_text(gold, final_answer(written)):
            return f"{gold!r} does not score 1 against itself when it is written {written!r}"
    return None


@lru_cache(maxsize=4096)
def _parsed(gold: str) -> Any:
    from math_verify import parse

    value = number(gold)
    if value is None:
        return parse(rf"$\boxed{{{plain(gold)}}}$", parsing_timeout=None)
    written = str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return parse(rf"$\boxed{{{written}}}$", parsing_timeout=None)


def _key(text: str) -> str:
    key = _SPACE.sub("", plain(text)).casefold().lstrip("\"'`").rstrip("\"'`.,;")
    return re.sub(r"(?<=[a-z]{2})!+$", "", key)  # of a word; behind a number or a letter it is a factorial


def _latex(text: str) -> str:
    """A text with LaTeX for signs that math-verify does not read: minus, infinity, powers, roots, fractions."""
    text = text.translate(_CHARACTERS)
    text = _VULGAR.sub(lambda found: f"{found[1]} " * bool(found[1]) + unicodedata.normalize("NFKC", found[2]), text)
    text = _POWER.sub(lambda found: f"^{{{found[0].translate(_POWERS)}}}", text.replace("\u2044", "/"))
    return _ROOT.sub(lambda found: rf"\sqrt{{{found[1]}}}", text)


def _unboxed(text: str) -> str:
    """The content of a text that is one box as a whole."""
    boxed = last_boxed(text)
    return boxed.strip() if boxed is not None and text in (rf"\boxed{{{boxed}}}", rf"$\boxed{{{boxed}}}$") else text
