"""Reading and comparing answers: words by SQuAD's rules, numbers exactly, formulas by math-verify."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np

from treegrpo.envs.tags import Tags, last_answer, own_text
from treegrpo.formula import same_formula

MAX_CHARS = 300
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles (a, an, the), single spaces. An answer that is
    nothing else ("A", "The The") keeps its articles, so that it does not equal an empty one.

    >>> normalize_answer("The  Queen's Gambit!"), normalize_answer("A")
    ('queens gambit', 'a')
    """
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    words = plain.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def exact_match(answer: str | None, golds: Sequence[str]) -> float:
    """1.0 where the answer equals one of the aliases in normal form, else 0.0; None and empty answers equal none."""
    normal = normalize_answer(answer or "")
    return float(bool(normal) and any(normal == normalize_answer(gold) for gold in golds))


def f1_score(answer: str | None, golds: Sequence[str]) -> float:
    """Largest word F1 over the aliases, in normal form (SQuAD's rule); in [0, 1].

    >>> round(f1_score("the city of Paris", ["Paris", "Paris, France"]), 3)
    0.5
    """
    return max(
        (_word_f1(normalize_answer(answer or "").split(), normalize_answer(g).split()) for g in golds), default=0.0
    )


def _word_f1(answer: list[str], gold: list[str]) -> float:
    common = (Counter(answer) & Counter(gold)).total()
    return 2 * common / (len(answer) + len(gold)) if common else 0.0


def gold_answers(columns: Mapping[str, Sequence[Any]], num: int) -> list[list[str]]:
    """Aliases of each of `num` rows, [] where a row has none; see `rewards.search_em` for the columns, the first that
    says something wins. ValueError naming the row where one is no text, or where no such column is there."""
    names = [name for name in ("answers", "golden_answers", "answer", "reward_model") if columns.get(name) is not None]
    if not names:
        raise ValueError("no column holds the right answers: give answers, golden_answers, answer or reward_model")
    rows = []
    for index in range(num):
        golds: list[str] = []
        for name in names:
            value = columns[name][index]
            if name == "reward_model":
                value = value.get("ground_truth") if isinstance(value, dict) else value
                value = value.get("target") if isinstance(value, dict) else value
            golds = _texts(value, f"{name}[{index}]")
            if golds:
                break
        rows.append(golds)
    return rows


def _texts(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = value if isinstance(value, (list, tuple)) else [value]
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, (str, int, float)):
            raise ValueError(f"{where} holds {entry!r}: give text, or a list of texts")
    return [str(entry) for entry in values]


def extract_result(completion: str, tags: Tags | None = None) -> str | None:
    r"""The result a completion ends with: its last answer block where there is one, else what comes last of
    `\boxed{...}` and a `#### ...` line; a box inside an answer block counts alone. None where there is nothing. What an
    environment wrote is left out.

    >>> extract_result(r"so \boxed{\frac{1}{2}}."), extract_result("<answer> \\boxed{3} </answer>"), extract_result("3")
    ('\\frac{1}{2}', '3', None)
    """
    answer = last_answer(completion, tags)
    text = own_text(completion, tags) if answer is None else answer
    boxed = _last_box(text)
    if answer is not None:
        return boxed[1] if boxed else answer
    lines = [(match.start(), match[1].strip()) for match in re.finditer(r"####[ \t]*([^\n<]*)", text)]
    found = max(lines[-1:] + ([boxed] if boxed else []), default=None)
    return found[1] if found else None


def equal(result: str | None, gold: str) -> bool:
    """Whether two results are the same number (exactly: 0.5 is 1/2 and 50%), the same text, or the same formula by
    math-verify, in the process of formula.py: what takes too long, or has more than 300 characters, is wrong."""
    if result is None or not result.strip() or not gold.strip():
        return False
    left, right = number(result), number(gold)
    if left is not None and right is not None:
        # "50%" answers a question whose answer is given as 50
        bare = [number(text.replace("\\%", "").replace("%", "")) for text in (result, gold)]
        return left == right or (("%" in result) != ("%" in gold) and bare[0] == bare[1])
    if "".join(result.split()) == "".join(gold.split()):
        return True
    if right is not None and left is None and (single := _only_number(result)) is not None:
        return single == right
    return max(len(result), len(gold)) <= MAX_CHARS and same_formula(result.strip("$ \n"), gold.strip("$ \n"))


def number(text: str) -> Fraction | None:
    """The exact value of a plain number, fraction or percentage; currency signs, commas between thousands and a final
    dot are left out. None for anything else.

    >>> number("$1,234.50"), number("3/4"), number("50%"), number("x")
    (Fraction(2469, 2), Fraction(3, 4), Fraction(1, 2), None)
    """
    if len(text) > MAX_CHARS:
        return None
    plain = re.sub(r"\\[$%]", lambda match: match[0][1], text).replace("\u2212", "-")
    plain = plain.strip(" \n\t*$€£").removesuffix(".").rstrip("$€£ ")
    percent = plain.endswith("%")
    plain = re.sub(r"^([-+])\s*[$€£]", r"\1", plain.removesuffix("%").strip())
    match = re.fullmatch(rf"({NUMBER})(?:\s*/\s*({NUMBER}))?", plain)
    if not match or not match[1]:
        return None
    try:
        parts = [Fraction(Decimal(part.replace(",", ""))) for part in match.groups() if part]
    except InvalidOperation:
        return None
    if len(parts) == 2 and parts[1] == 0:
        return None
    value = parts[0] if len(parts) == 1 else parts[0] / parts[1]
    return value / 100 if percent else value


def _only_number(text: str) -> Fraction | None:
    # "42 dollars", "x = 42": one number among words
    if "\\" in text or "^" in text:
        return None
    found = re.findall(rf"(?<![\w.]){NUMBER}%?(?![\w])", text)
    found = [value for value in map(number, found) if value is not None]
    return (
        found[0] if len(found) == 1 and not re.search(r"\d\s*[-+*/\u00d7\u00f7(]\s*\w|[*\u00d7\u00f7]", text) else None
    )


def _last_box(text: str) -> tuple[int, str] | None:
    """Where the last closed box begins, and what is in it; one pass over the braces, however many boxes stay open."""
    begins = {match.end() - 1: match.start() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)}
    opened: list[int] = []
    last = None
    for brace in re.finditer(r"[{}]", text) if begins else ():
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened and (at := opened.pop()) in begins:
            last = max(last or (0, 0), (at, brace.start()))
    return last and (begins[last[0]], text[last[0] + 1 : last[1]].strip())
