"""SpellingBee (how often is a letter in a word?) and SimpleSpelling (spell a word): generated, endless, the same for each seed.

The tasks are nanochat's (https://github.com/karpathy/nanochat, tasks/spellingbee.py); words, questions and solutions are our
own. Words: a file with one a line (--eval-data spelling-bee=FILE), else WORDS. `conversation` gives a row to train on, whose
random numbers are never those of a test question. Not here: the model's answers (evaluation.py).
"""

import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sft.errors import DataError
from megatron_sft.tasks import gsm8k
from megatron_sft.tasks.question import Question

PROBLEMS = 256
"""Of each task."""
TEST_SEED = 10_000_000
"""The first seed of a test question; seeds below it are for training."""
ASKED = (
    "How many {letter} are in {word}?",
    "How often does the letter {letter} occur in the word {word}?",
    "Count the {letter} in {word}.",
    "In {word}, how many times is there a {letter}",
    "what is the number of {letter}s in the word {word}",
    "Tell me how many letters {letter} the word {word} has.",
)
WORDS = """
able absolute accident account active address advance afternoon agreement airport already although amazing anchor ancient
animal anniversary answer apple apricot architecture arrange article assassin assistant attention autumn avocado balance
balloon banana barrel basket beautiful bedroom believe between bicycle biscuit blanket blossom borrow bottle breakfast bridge
broccoli brother bubble butterfly cabbage calendar camera candle capital carpenter carrot castle category celebrate century
challenge channel cheerful cherry chicken children chocolate cinnamon circle classroom climate coconut coffee collection
college colour committee community computer connection continent cooperate cottage country crocodile cucumber curtain customer
daughter december decision delicious dentist department desert dictionary difference difficult dinosaur disappear discover
distance dolphin dragon eagle earthquake economy education eleven elephant embarrass emergency encourage engine environment
equipment evening example excellent experience experiment explosion factory familiar favourite february festival finger
flamingo flower football forest fountain freedom friend furniture garage garden garlic general gentle giraffe glacier grammar
grandmother grapefruit guitar hammer harbour harvest helicopter hippopotamus history holiday honest horizon hospital hundred
hurricane illness imagine important independent information insect instrument interest island jacket january jealous journey
juggle jungle kangaroo kettle keyboard kingdom kitchen kitten knowledge ladder lemon leopard letter library lightning lizard
lobster luggage machine magazine magnet mammal mandarin marriage mathematics meadow medicine melon memory message microscope
millennium million minute mirror mississippi mistake monkey mosquito mountain muffin museum mushroom musician narrow nature
necessary necklace neighbour nephew noodle notebook november obvious occasion ocean october octopus office onion opinion
orange orchestra original ostrich oxygen package paddle painter palace pancake panther parallel parliament parrot passenger
peaceful peanut pebble penguin pepper perhaps photograph piano pineapple planet pocket possess potato practice president
pretzel prisoner problem professor pumpkin puzzle pyramid quarrel question quickly rabbit raccoon rainbow raspberry recommend
referee refrigerator restaurant rhythm ribbon river roller rotten rubber saddle sailor sandwich satellite sausage scissors
scorpion secretary sentence september seventeen shadow shoulder signature silver sister skeleton sleepy soccer soldier
spaghetti sparrow spinach squirrel staircase strawberry success sudden suggest summer sunflower surprise swallow syllable
table tattoo teacher telephone temperature tennessee theatre thunder tiger tobacco together tomato tomorrow tortoise travel
treasure triangle trumpet tunnel turkey twenty umbrella uncle unless unnecessary vacuum valley vanilla vegetable village
violin volcano voyage waffle walnut weather wednesday welcome whistle willow window winner wonderful xylophone yellow
yesterday zebra zipper zucchini
""".split()


def load_of(task: str) -> Callable[[str, int], list[tuple[Question, Sequence[Question]]]]:
    """load(place, few_shots) of spelling-bee or simple-spelling; there are no examples."""

    def load(place: str, few_shots: int) -> list[tuple[Question, Sequence[Question]]]:
        words = read_words(place)
        make = bee if task == "spelling-bee" else simple
        return [(make(words, TEST_SEED + number), ()) for number in range(PROBLEMS)]

    return load


def read_words(place: str) -> list[str]:
    """The words of a file, one a line; WORDS where none is named. DataError where it has none of letters alone."""
    if not place:
        return WORDS
    try:
        lines = Path(place).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: cannot be read ({error}); expected words, one a line. Correct --eval-data.") from None
    words = [word.lower() for word in lines if word.isascii() and word.isalpha()]
    if not words:
        raise DataError(f"{place}: has no word of letters alone; expected one a line. Correct --eval-data.")
    return words


def bee(words: Sequence[str], seed: int) -> Question:
    """How often a letter is in a word; nine times in ten it is one of the word's."""
    draw = random.Random(seed)
    word = draw.choice(words)
    letter = draw.choice(word if draw.random() < 0.9 else string.ascii_lowercase)
    quote = draw.choice(("", "'", '"'))
    asked = draw.choice(ASKED).format(letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}")
    return Question(word, asked, (letter,), str(word.count(letter)), f"spelling-bee:{seed}")


def simple(words: Sequence[str], seed: int) -> Question:
    """The letters of a word, with commas: apple:a,p,p,l,e"""
    word = random.Random(seed).choice(words)
    return Question(word, f"Spell the word: {word}", (), f"{word}:{','.join(word)}", f"simple-spelling:{seed}")


def conversation(question: Question) -> list[dict[str, str]]:
    """A row to train on: the question and its solution."""
    answer, word = str(question.answer), question.subject
    if question.choices:
        letter, count, lines = question.choices[0], 0, []
        for place, character in enumerate(word, start=1):
            count += character == letter
            lines.append(f"{place}:{character}" + (f" yes, that makes {count}" if character == letter else ""))
        spelled = f"The letters of {word} are {','.join(word)}. I look for {letter}:\n" + "\n".join(lines)
        answer = f"{spelled}\n\n#### {answer}"
    return [{"role": "user", "content": question.question}, {"role": "assistant", "content": answer}]


def prompt(question: Question, shots: Sequence[Question]) -> str:
    """What a user says."""
    return question.question


bee_score = gsm8k.score
"""The number after ####."""


def simple_score(question: Question, answer: str) -> float:
    """1 where the answer is the word and its letters, whatever blanks stand between them."""
    return float("".join(answer.split()).lower() == question.answer)
