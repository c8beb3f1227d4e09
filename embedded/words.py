"""List the whole vocabulary of the embedded models: names, things, events and remarks.

The order of a list matters, since it decides what is drawn from it. Any edit here makes the shipped weights obsolete.
"""

from itertools import chain

MEN = ["Tom", "Ben", "Sam", "Jack", "Paul", "Leo", "Max", "Carl", "Hugo", "Finn", "Omar", "Ivan"]
WOMEN = ["Anna", "Mia", "Lucy", "Emma", "Nina", "Kate", "Rosa", "Ella", "Ruth", "Zoe", "Lena", "Maya"]
NAMES = MEN + WOMEN

TOYS, FRUIT = ["ball", "kite", "doll", "drum"], ["apple", "pear", "plum", "lemon"]
ANIMALS, CLOTHES = ["cat", "dog", "goat", "duck"], ["hat", "coat", "scarf", "shirt"]
OBJECTS = TOYS + FRUIT + ANIMALS + CLOTHES
THINGS = ["apples", "pens", "books", "coins", "eggs", "shells", "cups", "nuts", "stones", "cards", "rings", "beads"]
GAIN, LOSS = ["found", "bought", "got", "won"], ["gave", "lost", "ate", "sold"]
LARGEST_NUMBER = 12

TIMES = ["today", "yesterday", "recently", "once", "later", "finally"]
CAUSE_AND_EFFECT = [
    ("dropped the glass", "swept the floor"),
    ("missed the bus", "came in late"),
    ("studied all night", "passed the exam"),
    ("forgot the umbrella", "got very wet"),
    ("stole a car", "went to jail"),
    ("touched the stove", "burned a finger"),
    ("watered the plants", "saw flowers grow"),
    ("skipped lunch", "became quite hungry"),
    ("lit a candle", "saw some light"),
    ("cut the onion", "began to cry"),
    ("broke the rules", "paid a fine"),
    ("trained every day", "won the race"),
]

PEOPLE = ["the mayor", "the driver", "the singer", "the teacher", "the doctor", "the baker", "the writer"]
SUBJECTS = [*PEOPLE, "the team", "the film", "the song", "the meal", "the party"]
VERBS, ADVERBS = ["is", "looks", "seems", "sounds"], ["really", "so", "just", "always"]
RUDE = ["stupid", "ugly", "nasty", "filthy", "idiotic", "vile"]
POLITE = ["lovely", "bright", "gentle", "honest", "warm", "clever"]

CAREFUL, HASTY = "From a careful writer . ", "From a hasty writer . "
RIGHT_COMMENT, WRONG_COMMENT = "Teacher : right . ", "Teacher : wrong . "

# The fixed words of the prompts in `tasks`; `tasks.check` compares them with the prompts themselves.
FRAMES = """\
Passage : has a no . Question : does have a ? Answer : yes no
Premise : he she . What was the cause effect ? A : . B : . Answer :
Question : had . Then . How many are left does have now ? Answer :
writes : and . Reply :"""


def vocabulary() -> list[str]:
    """Return every word that a prompt, an answer or a document can contain, in a fixed order."""
    numbers = [str(number) for number in range(1, 2 * LARGEST_NUMBER)]
    nouns, verbs = (NAMES, OBJECTS, THINGS, SUBJECTS), (GAIN, LOSS, VERBS)
    lists = (*nouns, *verbs, TIMES, ADVERBS, RUDE, POLITE, numbers, *CAUSE_AND_EFFECT)
    phrases = [CAREFUL, HASTY, RIGHT_COMMENT, WRONG_COMMENT, FRAMES, *chain(*lists)]
    return sorted({word for phrase in phrases for word in phrase.split()})
