# SPDX-License-Identifier: Apache-2.0
"""A number as people write it, with the unit it may have; read as a whole or not at all.

What is read: integers, decimals and scientific notation (`1.5e3`, `1.5 × 10^3`), fractions and mixed numbers in lowest
terms (`3/4`, `2 1/2`, `½`), each with a sign, thousands separators, a currency, a percent sign or a unit of a few
words, as plain text or as LaTeX, in bold, code marks, dollars or a box, and as the value of a name (`x = 12`). What
would have to be worked out is not read: `34 + 21`, `2**10`, `36/2`. math-verify, which compares formulas, evaluates
such lines and takes one number out of others (`10:30`, `3 and 4`), so it cannot decide whether a line states a number.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

SPELLINGS = {
    "[\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d]": "-",  # the minus sign, and dashes that stand for it
    "[\u00a0\u2007\u2009\u202f]": "\u00a0",  # spaces that do not break a number
    "(?<!\\\\)\\\\[,!;: ]|\\{,\\}": "\u00a0",  # LaTeX's spaces; its comma without a space behind
    "\\\\(?:left|right|displaystyle)(?![a-zA-Z])": "",
    "\\\\[dt]frac": r"\\frac",
    "\\\\(?:times|cdot)(?![a-zA-Z])": "×",
    "\\^\\{?\\\\circ\\}?|\\\\degree": "°",
    "\\\\([%$£€#&])": r"\1",
    "²|\\^\\{2\\}": "^2",
    "³|\\^\\{3\\}": "^3",
}
AROUND = (("*", "*"), ("_", "_"), ("__", "__"), ("\\(", "\\)"), ("\\[", "\\]"), ("(", ")"), ("{", "}"))
EMPHASIS = re.compile(r"(?<![\w*])(\*\*|`+)([^*`]+)\1(?![\w*])")
DOLLARS = re.compile(r"(?<![\w$])(\$\$?)([^$]+)\1(?![\w$])")
COMMANDS = re.compile(r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm|mathit|rm|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
NAME = re.compile(r"(?:[A-Za-z]\w*)?\s*=\s*")
MOST_CHARACTERS = 200

SIGN = r"(?P<sign>[+-]?)"
CURRENCY = r"(?P<currency>(?:US|USD|EUR|GBP)?\s?[$€£¥₹]|USD|EUR|GBP)?"
GROUPED = r"[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}|[0-9]{1,3}(?:[ \u00a0][0-9]{3})+|[0-9]+"
INTEGER = r"\{\s*(-?[0-9]+)\s*\}|([0-9])"
NUMBER = re.compile(
    rf"{SIGN}\s*{CURRENCY}\s*(?P<second_sign>-?)(?:"
    rf"(?:(?P<whole>{GROUPED})[ \u00a0]+)?(?P<numerator>[0-9]+)\s*/\s*(?P<denominator>[0-9]+)"
    rf"|(?P<before>{GROUPED})?\s*(?P<frac>\\frac\s*(?:{INTEGER})\s*(?:{INTEGER}))"
    rf"|(?P<before_vulgar>{GROUPED})?\s?(?P<vulgar>[¼-¾⅐-⅞])"
    rf"|(?P<integer>{GROUPED})?(?:\.(?P<decimals>[0-9]*))?"
    r"(?:\s?[×x]\s?10\s?\^(?:\{(?P<braced_power>-?[0-9]+)\}|(?P<power>-?[0-9]+))|[eE](?P<exponent>[+-]?[0-9]+))?)"
)
UNIT_WORD = re.compile(r"[^\W\d_]+(?:[-'.][^\W\d_]+)*\.?(?:\^[23])?|°[CF]?|[%$€£¥₹]")
SYMBOLS = frozenset("%$€£¥₹°")
ABBREVIATIONS = (
    "km cm mm m mi yd ft in kg g mg lb lbs oz l L ml mL cl dl h hr hrs min mins s sec secs ms mph kmh am pm GB MB "
    "kB W kW kWh V A mA Hz kHz K N J kJ cal kcal"
)
ABBREVIATED = frozenset(ABBREVIATIONS.split())  # other letters at a number are variables, as in 12x
NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety zero half halves third thirds "
    "quarter quarters fourth fourths fifth fifths tenth tenths dozen dozens score hundred hundreds thousand "
    "thousands million millions billion billions trillion trillions k mil mio bn pi"
)
OPERATION_WORDS = (
    "and or to plus minus times by over divided into from point not squared cubed power factorial "
    "choose mod modulo remainder sqrt root log ln sin cos tan"
)
NO_UNITS = frozenset(f"{NUMBER_WORDS} {OPERATION_WORDS}".split())
SAME_UNIT = {"dollar": "$", "usd": "$", "us$": "$", "usd$": "$", "euro": "€", "eur": "€", "eur€": "€", "pound": "£"}
SAME_UNIT |= {"gbp": "£", "gbp£": "£", "percent": "%", "degree": "°"}
MOST_UNIT_WORDS = 5
LARGEST_EXPONENT = 400
ROUNDED_DECIMALS = 6  # a decimal written to as many digits may stand for a fraction, or for a longer decimal


@dataclass(frozen=True)
class Quantity:
    """A number that was read from a text.

    Args:
        value: the number; of `50%` it is 50.
        decimals: digits behind the point, None for what is written without one.
        unit: the words of its unit, currency and percent sign included, in one spelling; empty without a unit.
    """

    value: Fraction
    decimals: int | None
    unit: frozenset[str]

    def equals(self, other: "Quantity") -> bool:
        """Whether both state the same number, and no units that contradict each other.

        A unit that one of them leaves out is no contradiction; without a percent sign `50%` is 50 or 0.5.
        """
        if not (self.unit <= other.unit or other.unit <= self.unit):
            return False
        mine, others = {self.value}, {other.value}
        if ("%" in self.unit) != ("%" in other.unit):
            mine |= {self.value / 100} if "%" in self.unit else set()
            others |= {other.value / 100} if "%" in other.unit else set()
        return any(self._same(a, b, other) for a in mine for b in others)

    def _same(self, mine: Fraction, others: Fraction, other: "Quantity") -> bool:
        written = [count for count in (self.decimals, other.decimals) if count is not None]
        if written and min(written) >= ROUNDED_DECIMALS:
            return round(mine, min(written)) == round(others, min(written))
        return mine == others


@lru_cache(maxsize=65536)
def read_quantity(text: str) -> Quantity | None:
    """The number that a text states, None when it states none, more than one, or something to be worked out."""
    if len(text) > MOST_CHARACTERS:
        return None
    plain = unmarked(NAME.sub("", unmarked(text), count=1))
    match = NUMBER.match(plain)
    value = None if match is None else _value(match)
    if match is None or value is None:
        return None
    unit = _unit(match["currency"] or "", plain[match.end() :])
    exact = match["decimals"] is None or match["exponent"] or match["power"] or match["braced_power"]
    return None if unit is None else Quantity(value, None if exact else len(match["decimals"]), unit)


def unmarked(text: str) -> str:
    """An answer in the usual characters, without bold, code marks, dollars, boxes, brackets and a full stop."""
    text = usual_characters(text)
    before = None
    while before != text:
        before = text
        for pattern, inside in ((COMMANDS, r"\1"), (EMPHASIS, r"\2"), (DOLLARS, r"\2")):
            text = pattern.sub(inside, text)
        text = text.strip(" \t\r\u00a0").rstrip("*`").removesuffix(".")  # bold may have begun before the answer marker
        for opening, closing in AROUND:
            inner = text[len(opening) : len(text) - len(closing)]
            if inner and text == opening + inner + closing and opening not in inner and closing not in inner:
                text = inner
    return text


def usual_characters(text: str) -> str:
    """A text with one spelling for the minus sign, for spaces within numbers and for the LaTeX of numbers."""
    for spelling, usual in SPELLINGS.items():
        text = re.sub(spelling, usual, text)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of a match of `NUMBER`; None for a fraction that is not in lowest terms, two signs or no digits."""
    whole = match["whole"] or match["before"] or match["before_vulgar"]
    if match["vulgar"]:
        number: Fraction | None = Fraction(unicodedata.numeric(match["vulgar"])).limit_denominator(10)
    elif match["numerator"]:
        number = _lowest_terms(match["numerator"], match["denominator"])
    elif match["frac"]:
        number = _lowest_terms(*(braced or digit for braced, digit in re.findall(INTEGER, match["frac"])))
    else:
        number = _decimal(match)
    signs = match["sign"] + match["second_sign"]
    if number is None or len(signs) > 1 or (whole and not 0 < number < 1):
        return None
    number += int(_digits(whole)) if whole else 0
    return -number if signs == "-" else number


def _lowest_terms(numerator: str, denominator: str) -> Fraction | None:
    """A fraction in lowest terms; None for any other, which is a division still to be made."""
    above, below = int(numerator), int(denominator)
    return Fraction(above, below) if below > 1 and math.gcd(above, below) == 1 else None


def _decimal(match: re.Match[str]) -> Fraction | None:
    """An integer, a decimal or a number in scientific notation, whose mantissa is at least 1 and below 10."""
    digits = _digits(match["integer"] or ""), match["decimals"] or ""
    if not any(digits):
        return None
    value = Fraction(f"{digits[0] or 0}.{digits[1] or 0}")
    power = match["power"] or match["braced_power"]
    exponent = int(power or match["exponent"] or 0)
    if (power and not 1 <= value < 10) or abs(exponent) > LARGEST_EXPONENT:
        return None
    return value * Fraction(10) ** exponent


def _digits(text: str) -> str:
    """Digits without their thousands separators."""
    return re.sub("[, \u00a0]", "", text)


def _unit(currency: str, rest: str) -> frozenset[str] | None:
    """The words of a unit in one spelling; None when `rest` is more than a unit."""
    words: list[str] = []
    plain = rest.replace("\u00a0", " ").replace("per cent", "percent")
    for part in re.split(r"\s+|(?<=\w)[/·*](?=\w)", plain.strip()):
        at = 0
        while at < len(part):
            match = UNIT_WORD.match(part, at)
            if match is None:
                return None
            words.append(match[0].replace(".", ""))
            at = match.end()
    if len(words) > MOST_UNIT_WORDS or any(word.lower() in NO_UNITS for word in words):
        return None
    first = words[0].split("^")[0] if words else ""
    is_word = len(first) > 1 and plain.startswith(" ")
    if first and not (is_word or first in ABBREVIATED or first[0] in SYMBOLS):
        return None
    return frozenset(map(_one_spelling, [currency.strip(), *words])) - {""}


def _one_spelling(word: str) -> str:
    """A unit's word in lower case and the singular, a currency or percent sign for its name."""
    word = word if len(word) == 1 else word.lower()
    single = word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word
    return SAME_UNIT.get(single, single)
