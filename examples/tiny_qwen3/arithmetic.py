"""Worked arithmetic word problems: templates, seeds, and a parser for answers.

A template is a function that takes a random generator and returns a question, the sentences of a worked answer, and
the result. Training never uses the templates of `HELD_OUT_TEMPLATES`. Of the other templates, training uses the even
seeds; the odd seeds give held-out problems of a known kind with new numbers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elif",
    "Farid",
    "Grace",
    "Hana",
    "Ivan",
    "Julia",
    "Kofi",
    "Lena",
    "Marco",
    "Nora",
)
THINGS = (
    "apples",
    "books",
    "marbles",
    "stickers",
    "pencils",
    "coins",
    "shells",
    "cards",
    "stamps",
    "buttons",
    "beads",
    "nuts",
)
HELD_OUT_TEMPLATES = ("ages", "two_buses")


@dataclass(frozen=True)
class Problem:
    """A word problem with its answer.

    Attributes:
        template: name of the template.
        question: the question alone.
        steps: sentences of the worked answer.
        result: the number that the answer ends with.
    """

    template: str
    question: str
    steps: tuple[str, ...]
    result: int

    @property
    def prompt(self) -> str:
        """The text that a model gets."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        """The text that a model should write, without the end-of-text token."""
        return f" {' '.join(self.steps)} The answer is {self.result}."


def _pair(rng: random.Random) -> tuple[str, str, str]:
    first, second = rng.sample(NAMES, 2)
    return first, second, rng.choice(THINGS)


def buy_more(rng: random.Random) -> tuple[str, list[str], int]:
    name, _, things = _pair(rng)
    a = rng.randint(5, 60)
    b = rng.randint(3, 40)
    return (
        f"{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        [f"{name} starts with {a} {things}.", f"{name} buys {b} more, so we add: {a} + {b} = {a + b}."],
        a + b,
    )


def give_away(rng: random.Random) -> tuple[str, list[str], int]:
    name, other, things = _pair(rng)
    a = rng.randint(20, 90)
    b = rng.randint(3, a - 5)
    return (
        f"{name} has {a} {things} and gives {b} of them to {other}. How many {things} does {name} have left?",
        [f"{name} starts with {a} {things}.", f"{name} gives {b} to {other}, so we subtract: {a} - {b} = {a - b}."],
        a - b,
    )


def boxes(rng: random.Random) -> tuple[str, list[str], int]:
    name, _, things = _pair(rng)
    a = rng.randint(2, 9)
    b = rng.randint(3, 12)
    return (
        f"{name} fills {a} boxes with {b} {things} each. How many {things} are there in all?",
        [f"There are {a} boxes.", f"Each box holds {b} {things}, so we multiply: {a} * {b} = {a * b}."],
        a * b,
    )


def share(rng: random.Random) -> tuple[str, list[str], int]:
    name, _, things = _pair(rng)
    each = rng.randint(2, 12)
    people = rng.randint(2, 9)
    total = each * people
    return (
        f"{name} shares {total} {things} equally among {people} friends. How many {things} does each friend get?",
        [
            f"There are {total} {things}.",
            f"They are shared among {people} friends, so we divide: {total} / {people} = {each}.",
        ],
        each,
    )


def boxes_then_more(rng: random.Random) -> tuple[str, list[str], int]:
    name, other, things = _pair(rng)
    a = rng.randint(2, 9)
    b = rng.randint(3, 10)
    c = rng.randint(2, 30)
    return (
        f"{name} has {a} boxes with {b} {things} each. {other} brings {c} more. How many {things} are there now?",
        [
            f"First we count the boxes: {a} * {b} = {a * b}.",
            f"Then {other} brings {c} more: {a * b} + {c} = {a * b + c}.",
        ],
        a * b + c,
    )


def spend(rng: random.Random) -> tuple[str, list[str], int]:
    name, _, things = _pair(rng)
    price = rng.randint(2, 9)
    count = rng.randint(2, 8)
    money = price * count + rng.randint(1, 30)
    return (
        f"{name} has {money} dollars and buys {count} {things} for {price} dollars each. How many dollars are left?",
        [
            f"First we find the cost: {count} * {price} = {count * price}.",
            f"Then we subtract the cost from the money: {money} - {count * price} = {money - count * price}.",
        ],
        money - count * price,
    )


def earn_weeks(rng: random.Random) -> tuple[str, list[str], int]:
    name = rng.choice(NAMES)
    day = rng.randint(2, 9)
    days = rng.randint(2, 6)
    weeks = rng.randint(2, 4)
    week = day * days
    return (
        (
            f"{name} earns {day} dollars a day and works {days} days a week. "
            f"How many dollars does {name} earn in {weeks} weeks?"
        ),
        [
            f"In one week {name} earns {day} * {days} = {week} dollars.",
            f"In {weeks} weeks {name} earns {week} * {weeks} = {week * weeks} dollars.",
        ],
        week * weeks,
    )


def three_groups(rng: random.Random) -> tuple[str, list[str], int]:
    name, _, things = _pair(rng)
    a, b, c = (rng.randint(4, 35) for _ in range(3))
    return (
        (
            f"{name} finds {a} {things} on Monday, {b} on Tuesday and {c} on Friday. "
            f"How many {things} does {name} find in all?"
        ),
        [f"Monday and Tuesday together: {a} + {b} = {a + b}.", f"With Friday: {a + b} + {c} = {a + b + c}."],
        a + b + c,
    )


def compare(rng: random.Random) -> tuple[str, list[str], int]:
    name, other, things = _pair(rng)
    a = rng.randint(5, 50)
    more = rng.randint(2, 30)
    b = a + more
    return (
        f"{name} has {a} {things} and {other} has {b}. How many more {things} does {other} have than {name}?",
        [f"{other} has {b} and {name} has {a}.", f"We subtract the smaller number: {b} - {a} = {more}."],
        more,
    )


def times_as_many(rng: random.Random) -> tuple[str, list[str], int]:
    name, other, things = _pair(rng)
    a = rng.randint(3, 15)
    times = rng.randint(2, 5)
    return (
        f"{name} has {a} {things}. {other} has {times} times as many. How many {things} do they have together?",
        [
            f"{other} has {a} * {times} = {a * times} {things}.",
            f"Together they have {a} + {a * times} = {a + a * times} {things}.",
        ],
        a + a * times,
    )


def pages(rng: random.Random) -> tuple[str, list[str], int]:
    name = rng.choice(NAMES)
    day = rng.randint(3, 12)
    days = rng.randint(2, 7)
    total = day * days + rng.randint(5, 60)
    return (
        f"A book has {total} pages. {name} reads {day} pages a day for {days} days. How many pages are left?",
        [
            f"{name} reads {day} * {days} = {day * days} pages.",
            f"The pages left are {total} - {day * days} = {total - day * days}.",
        ],
        total - day * days,
    )


def rows_of_seats(rng: random.Random) -> tuple[str, list[str], int]:
    rows = rng.randint(3, 9)
    seats = rng.randint(4, 12)
    taken = rng.randint(2, rows * seats - 1)
    return (
        f"A hall has {rows} rows of {seats} seats. {taken} seats are taken. How many seats are free?",
        [
            f"The hall has {rows} * {seats} = {rows * seats} seats.",
            f"The free seats are {rows * seats} - {taken} = {rows * seats - taken}.",
        ],
        rows * seats - taken,
    )


def lost_and_found(rng: random.Random) -> tuple[str, list[str], int]:
    name, _, things = _pair(rng)
    a = rng.randint(20, 70)
    lost = rng.randint(2, 15)
    found = rng.randint(2, 20)
    return (
        (
            f"{name} has {a} {things}, loses {lost} and then finds {found}. "
            f"How many {things} does {name} have at the end?"
        ),
        [
            f"After losing {lost}: {a} - {lost} = {a - lost}.",
            f"After finding {found}: {a - lost} + {found} = {a - lost + found}.",
        ],
        a - lost + found,
    )


def pooled_share(rng: random.Random) -> tuple[str, list[str], int]:
    name, other, things = _pair(rng)
    each = rng.randint(2, 9)
    people = rng.randint(2, 6)
    a = rng.randint(1, each * people - 1)
    b = each * people - a
    return (
        (
            f"{name} has {a} {things} and {other} has {b}. They share all of them equally among {people} children. "
            "How many does each child get?"
        ),
        [
            f"Together they have {a} + {b} = {a + b} {things}.",
            f"Each child gets {a + b} / {people} = {each} {things}.",
        ],
        each,
    )


def ages(rng: random.Random) -> tuple[str, list[str], int]:
    name, other = rng.sample(NAMES, 2)
    age = rng.randint(5, 40)
    older = rng.randint(2, 12)
    later = rng.randint(2, 15)
    return (
        f"{name} is {age} years old. {other} is {older} years older. How old will {other} be in {later} years?",
        [
            f"Now {other} is {age} + {older} = {age + older} years old.",
            f"In {later} years: {age + older} + {later} = {age + older + later}.",
        ],
        age + older + later,
    )


def two_buses(rng: random.Random) -> tuple[str, list[str], int]:
    a = rng.randint(10, 45)
    b = rng.randint(10, 45)
    off = rng.randint(2, min(a, b))
    return (
        (
            f"One bus carries {a} people and another carries {b}. {off} people get off. "
            "How many people are still on the buses?"
        ),
        [f"The buses carry {a} + {b} = {a + b} people.", f"After {off} get off: {a + b} - {off} = {a + b - off}."],
        a + b - off,
    )


TEMPLATES: dict[str, Callable[[random.Random], tuple[str, list[str], int]]] = {
    make.__name__: make
    for make in (
        buy_more,
        give_away,
        boxes,
        share,
        boxes_then_more,
        spend,
        earn_weeks,
        three_groups,
        compare,
        times_as_many,
        pages,
        rows_of_seats,
        lost_and_found,
        pooled_share,
        ages,
        two_buses,
    )
}
TRAINED_TEMPLATES = tuple(name for name in TEMPLATES if name not in HELD_OUT_TEMPLATES)


def problem(template: str, seed: int) -> Problem:
    """Return the problem of a template, a key of `TEMPLATES`, for a seed."""
    question, steps, result = TEMPLATES[template](random.Random(f"{template}/{seed}"))
    return Problem(template, question, tuple(steps), result)


def training_problems(count: int) -> Iterator[Problem]:
    """Yield `count` problems of the trained templates from even seeds, without questions of `held_out_problems`."""
    held_out = {p.question for p in held_out_problems(2000)} | {
        p.question for p in held_out_problems(2000, HELD_OUT_TEMPLATES)
    }
    seed = 0
    while count > 0:
        candidate = problem(TRAINED_TEMPLATES[seed % len(TRAINED_TEMPLATES)], 2 * seed)
        seed += 1
        if candidate.question not in held_out:
            count -= 1
            yield candidate


def held_out_problems(count: int, templates: tuple[str, ...] = TRAINED_TEMPLATES) -> list[Problem]:
    """Return the first `count` problems from odd seeds, cycling through `templates`."""
    return [problem(templates[i % len(templates)], 2 * i + 1) for i in range(count)]


def read_answer(text: str) -> int | None:
    """Return the number after "The answer is" in a completion, or None."""
    found = re.search(r"The answer is (-?\d+)", text)
    return int(found.group(1)) if found else None
