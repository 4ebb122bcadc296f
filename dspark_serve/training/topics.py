"""What users ask, as a small grammar: the seeds from which the target writes its own training conversations.

`{name}` expands to a random entry of TABLE[name], `{3-40}` to a whole number in that range. An entry that ends in
OPEN is the beginning of a user turn, which the target completes itself. Written by hand; holds no benchmark's text.
"""

from __future__ import annotations

import random
import re

OPEN = "..."
_SYMBOL = re.compile(r"\{(\w+|\d+-\d+)\}")

# Share of each kind of request; the keys are symbols of TABLE.
KINDS: dict[str, int] = {
    "maths": 24,
    "function": 16,
    "task": 14,
    "writing": 10,
    "roleplay": 5,
    "reasoning": 7,
    "extraction": 5,
    "science": 8,
    "humanities": 8,
    "everyday": 8,
    "free": 5,
}

TABLE: dict[str, tuple[str, ...]] = {
    "name": tuple(
        "Ana Ben Carla Dmitri Elif Farid Grace Hiro Ines Jonas Kofi Lena Marek Nadia Omar Priya Rosa Sven Tara Umar "
        "Vera Wen Yusuf Zoe Tom Maria Kevin Sarah Peter Lucy Daniel Emma Jack Olivia Sam Mia Leo Nora".split()
    ),
    "goods": tuple(
        "apples|pencils|notebooks|cookies|tickets|eggs|books|marbles|cupcakes|roses|shirts|bottles of water|stickers|"
        "chairs|candles|sandwiches|toys|lemons|stamps|tomatoes|postcards|bags of rice".split("|")
    ),
    "place": tuple(
        "a bakery|a school|a farm|a library|a garden shop|a cinema|a bookstore|a factory|a market|a bus station|"
        "a swimming pool|a restaurant|a small museum|a zoo".split("|")
    ),
    "animal": tuple("chickens cows goats horses rabbits dogs cats sheep ducks bees".split()),
    "story": (
        "{name} has {5-60} {goods} and buys {2-40} more. After giving {2-9} to {name}, how many {goods} are left?",
        "{name} sells {goods} for ${2-15} each. On Monday {4-30} are sold, on Tuesday twice as many. How much money "
        "does {name} earn in the two days?",
        "{place} opens at 8 in the morning. Every hour {5-40} people come in and {2-12} people leave. How many people "
        "are inside after {2-6} hours?",
        "A train drives {40-120} kilometers per hour for {2-6} hours and then {30-90} kilometers per hour for {2-5} "
        "hours. How far does it go in total?",
        "{name} saves ${5-50} every week. A bicycle costs ${120-600}. {name} already has ${10-100}. How many weeks will "
        "it take to buy the bicycle?",
        "A farmer keeps {6-40} {animal} and three times as many {animal}. Each animal eats {2-6} kilograms of feed a day. "
        "How many kilograms does the farmer need for a week?",
        "{name} is {4-30} years older than {name}. In {3-10} years their ages will add up to {40-90}. How old is each of "
        "them now?",
        "A box holds {6-24} {goods}. {place} orders {10-60} boxes, and {5-25}% of the {goods} turn out to be broken. How "
        "many {goods} can be used?",
        "{name} reads {8-40} pages a day. {name} has read {20-100} of the {200-500} pages of a book. How many more days "
        "are needed to finish it?",
        "A recipe for {4-8} people needs {2-6} cups of flour and {1-4} cups of sugar. How much of both is needed for "
        "{12-48} people?",
        "{name} works {4-9} hours a day, {3-6} days a week, and earns ${9-30} an hour. For every hour over {20-35} hours a "
        "week the pay is one and a half times as high. What does {name} earn in a week?",
        "A shirt costs ${20-90}. It is reduced by {10-50}%, and then by another {5-20}%. What is the final price?",
        "{name}, {name} and {name} share {30-120} {goods}. {name} gets half of them, and the others share the rest "
        "equally. How many does each get?",
        "A tank holds {100-900} liters. It loses {2-9} liters every hour and {10-40} liters are added twice a day. How "
        "much is in the tank after {2-5} days if it starts full?",
        "There are {18-36} students in a class. A third of them play football, and {2-8} play chess. How many play "
        "neither, if nobody plays both?",
        "{name} walks {2-9} miles to work and back every day, {4-6} days a week. How many miles is that in {2-8} weeks?",
        "{name} bought {3-12} packs of {goods} with {4-20} in each pack for ${3-9} per pack. {name} paid with a $100 bill. "
        "How much change did {name} get, and how many {goods} does {name} have?",
    ),
    "ask_maths": (
        "",
        "",
        "",
        "",
        " Think step by step.",
        " Explain your reasoning.",
        " Show your work.",
        " Please give the final number at the end.",
    ),
    "maths": (
        "{story}{ask_maths}",
        "{story}{ask_maths}",
        "{story}{ask_maths}",
        "{story}{ask_maths}",
        "{story}{ask_maths}",
        "{name} has {3-50} {goods}" + OPEN,
        "{name} and {name} went to {place}" + OPEN,
        "{place} sells {goods} for ${2-20}" + OPEN,
        "A {goods} seller" + OPEN,
        "Solve this word problem: {name}" + OPEN,
        "Every day, {name}" + OPEN,
        "There are {12-90} {goods} in" + OPEN,
        "If {name} can" + OPEN,
        "What is {11-99} times {3-40}?{ask_maths}",
        "Solve for x: {2-9}x + {3-40} = {20-90}.{ask_maths}",
        "What is {5-60}% of {40-900}?",
        "Find the area and perimeter of a rectangle with sides {3-30} and {3-30}.",
        "A circle has a radius of {2-20}. What is its area?",
        "Given that f(x) = {2-6}x^2 - {1-9}x + {1-20}, find f({2-6}).",
        "If x + y = {6-30} and x - y = {1-5}, find x and y.",
        "What is the probability of drawing {2-3} red balls from a bag with {4-9} red and {3-9} blue balls?",
    ),
    "verb": tuple(
        "count|find|remove|replace|reverse|sort|sum|merge|filter|check|compute|convert|return|group|rotate|validate".split(
            "|"
        )
    ),
    "thing": tuple(
        "the vowels in a string|the duplicates in a list|the even numbers of a list|the words of a sentence|"
        "the digits of a number|all pairs of numbers with a given sum|the largest element of a nested list|"
        "the common elements of two lists|the longest word in a text|the prime numbers up to n|"
        "the keys of a dictionary by their values|the characters that appear only once|the columns of a matrix|"
        "the missing number in a sequence|the tuples in a list by their second element|whether a string is a palindrome|"
        "whether brackets are balanced|the greatest common divisor of two numbers|the factorial of a number|"
        "the n-th Fibonacci number|consecutive equal elements|the median of a list|the frequency of each word|"
        "a binary string and a decimal number|the volume of a cylinder|the smallest number in a list|"
        "every n-th element of a list|the uppercase letters in a string|two sorted lists|a list of tuples|"
        "an anagram of a word|a string of comma separated numbers|leap years between two dates".split("|")
    ),
    "signature": (
        'def count_items(items: list[str]) -> dict[str, int]:\n    """Return how often each item occurs.\n    >>> '
        "count_items(['a', 'b', 'a'])\n    {'a': 2, 'b': 1}\n    \"\"\"\n",
        'def running_total(values: List[int]) -> List[int]:\n    """ From a list of integers, return the list of sums '
        'of all values seen so far.\n    >>> running_total([1, 2, 3])\n    [1, 3, 6]\n    """\n',
        'def second_largest(numbers: List[float]) -> float:\n    """Return the second largest number.\n    >>> '
        'second_largest([3.0, 9.5, 7.1])\n    7.1\n    """\n',
        'def is_balanced(text: str) -> bool:\n    """ Check that every opening bracket in text is closed in the right '
        "order.\n    >>> is_balanced('([])')\n    True\n    >>> is_balanced('([)]')\n    False\n    \"\"\"\n",
        "def chunk(items: list, size: int) -> list:\n    '''\n    Split items into pieces of at most size elements.\n    "
        "Example:\n    chunk([1, 2, 3, 4, 5], 2) => [[1, 2], [3, 4], [5]]\n    '''\n",
        'def word_lengths(sentence):\n    """\n    You are given a sentence of words separated by spaces. Return a list '
        'with the length of each word.\n    Example: word_lengths(\'a fine day\') == [1, 4, 3]\n    """\n',
        'from typing import List, Tuple\n\n\ndef min_and_max(numbers: List[int]) -> Tuple[int, int]:\n    """ For a '
        "given list of integers return a tuple of the smallest and the largest.\n    >>> min_and_max([4, 1, 8])\n    (1, 8)"
        '\n    """\n',
        'def caesar(text: str, shift: int) -> str:\n    """\n    Shift every lowercase letter of text by shift places, '
        'wrapping around at \'z\'. Leave other characters as they are.\n    """\n',
        'def digits_sum(n: int) -> int:\n    """Sum of the decimal digits of n.\n    >>> digits_sum(345)\n    12\n    '
        '"""\n',
        'def interleave(first: str, second: str) -> str:\n    """ Take characters from both strings in turn; the rest of '
        "the longer one goes to the end.\n    >>> interleave('abc', 'XY')\n    'aXbYc'\n    \"\"\"\n",
        'def is_square(n):\n    """Return true if n is the square of a whole number.\n    >>> is_square({3-99})\n    """\n',
        'def transpose(matrix):\n    """Return the transpose of a matrix given as a list of rows.\n    >>> '
        'transpose([[1, 2], [3, 4]])\n    [[1, 3], [2, 4]]\n    """\n',
        'def without_digits(text: str) -> str:\n    """\n    Return text without its digits.\n    >>> '
        "without_digits('a1b22')\n    'ab'\n    \"\"\"\n",
        'def compress(text: str) -> str:\n    """ Replace runs of equal characters by the character and the length of the '
        "run.\n    >>> compress('aaab')\n    'a3b1'\n    \"\"\"\n",
    ),
    "complete": (
        "Complete the following Python function:\n\n```python\n{signature}```",
        "Complete this code.\n```python\n{signature}```",
        "{signature}",
        "Write a solution to the following problem:\n```python\n{signature}```",
        "Please finish the function below and return the whole code.\n\n{signature}",
        "Implement the body of this function:\n```python\n{signature}```",
    ),
    "function": (
        "{complete}",
        "{complete}",
        "{complete}",
        "{complete}",
        "Complete the following Python function:\n\n```python\ndef" + OPEN,
        "Write a solution to the following problem:\n```python\nfrom typing import List\n\n\ndef" + OPEN,
        "def {verb}_" + OPEN,
        "Complete this code:\n\n```python\ndef {verb}" + OPEN,
        "Complete the function.\n\ndef is_" + OPEN,
    ),
    "language": ("Python", "Python", "Python", "Python", "JavaScript", "C++", "Java", "SQL", "Bash", "HTML", "Rust"),
    "task": (
        "Write a Python function to {verb} {thing}.",
        "Write a function to {verb} {thing}.",
        "Write a python function to {verb} {thing}. Your code should satisfy these tests:\n\nassert" + OPEN,
        "Write a function to find {thing}.",
        "Write a python function to check whether" + OPEN,
        "Write a function to {verb}" + OPEN,
        "Write a python function to find" + OPEN,
        "How do I {verb} {thing} in {language}?",
        "Write a {language} program that {verb}s {thing}, with comments.",
        "Explain what this code does:\n\n```python\n{signature}    ...\n```",
        "What is the difference between a list and a tuple in Python?",
        "Write a class in {language} for a {thingy} with methods" + OPEN,
        "Write a {language} script that" + OPEN,
        "Write unit tests for a function that should {verb} {thing}.",
        "I get an error in {language}" + OPEN,
    ),
    "thingy": tuple(
        "queue|stack|bank account|shopping cart|library|matrix|timer|game board|contact list|student".split("|")
    ),
    "subject": tuple(
        "climate change|the history of chess|learning to cook|remote work|public libraries|electric cars|a trip to Japan|"
        "healthy sleep|space travel|the first day at school|a lost dog|modern art|coffee|growing tomatoes|friendship|"
        "artificial intelligence|city bicycles|the sea in winter|an old lighthouse|a job interview|saving money|"
        "the joy of reading|a football match|grandmother's kitchen|wild bees|renewable energy|volunteering|meditation|"
        "a rainy afternoon|time management|small businesses|online learning|a mountain village|music festivals".split(
            "|"
        )
    ),
    "form": tuple(
        "a short story|a poem|a haiku|an email to a colleague|a blog post|an essay|a speech|a product description|"
        "a letter to a friend|a limerick|a news article|a dialogue between two friends|a persuasive paragraph|a review|"
        "an outline|an advertisement|a social media post|a cover letter|a song".split("|")
    ),
    "writing": (
        "Write {form} about {subject}.",
        "Write {form} about {subject} in about {50-200} words.",
        "Compose {form} on {subject}, with a surprising ending.",
        "Can you help me write {form} about {subject}?",
        "Draft a professional email" + OPEN,
        "Write {form} that begins with" + OPEN,
        "Describe {subject} in vivid detail.",
        "Give me {3-10} title ideas for {form} about {subject}.",
        "Rewrite the following sentence in a more formal tone:" + OPEN,
        "Edit the following paragraph for grammar:" + OPEN,
        "Write a compelling" + OPEN,
    ),
    "person": tuple(
        "a pirate captain|an old wizard|a math teacher|a doctor|a tour guide in Rome|a stand-up comedian|a detective|"
        "a relationship coach|an astronaut|a chef|a poet|a robot from the future|a football commentator|a historian|"
        "a machine learning engineer|Sherlock Holmes|a tree in a forest|a strict librarian|a travel agent".split("|")
    ),
    "roleplay": (
        "Pretend to be {person} and talk about {subject}.",
        "You are {person}. {name} asks you about {subject}. What do you say?",
        "Act as {person}. Explain {idea} to a child.",
        "Imagine you are {person}" + OPEN,
        "Please take the role of {person}" + OPEN,
    ),
    "reasoning": (
        "If all {animal} can swim and some swimmers can fly, can some {animal} fly? Explain.",
        "{name} is taller than {name}, and {name} is taller than {name}. Who is the shortest?",
        "Which word does not belong: {goods}, {goods}, {animal}, {goods}? Explain.",
        "You are in a race and overtake the person in {2-6}th place. What place are you in?",
        "{name} has {2-5} brothers, and each brother has {1-4} sisters. How many sisters are there?",
        "What is more likely:" + OPEN,
        "A riddle:" + OPEN,
        "Compare {subject} and {subject}. Which one matters more, and why?",
        "What are the pros and cons of {subject}?",
        "Yesterday was {day}. What day will it be in {3-30} days?",
        "Put these in order from smallest to largest: {10-99}, {10-99}, {10-99}, {10-99}.",
        "Suppose that" + OPEN,
        "Should I {verb}" + OPEN,
    ),
    "day": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "extraction": (
        "Extract the names and numbers from this text as JSON: {story}",
        "Classify the sentiment of these reviews as positive, neutral or negative:\n1. I loved {subject}.\n2. It was fine.\n"
        "3. The service at {place} was terrible.",
        "Turn this into a table in CSV format: {name} bought {2-30} {goods} for ${3-40}, {name} bought {2-30} {goods} for "
        "${3-40}.",
        "Identify the named entities in the following text:" + OPEN,
        "Summarize the following text in one sentence:" + OPEN,
        "List the dates and places mentioned in this paragraph:" + OPEN,
        "Given the following data, find the highest value: {day} {10-99}, {day} {10-99}, {day} {10-99}.",
        "Count how often the word 'the' occurs in this text: {story}",
    ),
    "idea": tuple(
        "photosynthesis|gravity|black holes|evolution|vaccines|electricity|the water cycle|DNA|inflation|plate tectonics|"
        "neural networks|entropy|the greenhouse effect|magnetism|atoms|the immune system|quantum mechanics|"
        "supply and demand|blockchain|the speed of light|acids and bases|probability|derivatives|recursion|hash tables|"
        "tides|earthquakes|antibiotics|semiconductors|osmosis|the periodic table|solar eclipses".split("|")
    ),
    "science": (
        "Explain {idea} in simple terms.",
        "What is {idea}?",
        "How does {idea} work, and why does it matter?",
        "Describe an experiment that shows {idea}.",
        "What is the relationship between {idea} and {idea}?",
        "Give {3-6} key facts about {idea}.",
        "Explain {idea} to a student who has just learned about {idea}.",
        "Why do" + OPEN,
        "In the field of" + OPEN,
        "What happens when" + OPEN,
        "How is {idea} used in" + OPEN,
    ),
    "period": tuple(
        "the Roman Empire|the Renaissance|the French Revolution|the Industrial Revolution|ancient Egypt|the Cold War|"
        "the Silk Road|the Middle Ages|the Great Depression|the Enlightenment|the Ottoman Empire|the Bronze Age|"
        "the history of writing|the printing press|Stoic philosophy|existentialism|Shakespeare's plays|Greek mythology|"
        "the Vikings|the Mongol Empire|jazz music|impressionist painting|world religions|human rights".split("|")
    ),
    "humanities": (
        "What were the main causes and effects of {period}?",
        "Write a short overview of {period}.",
        "How did {period} influence {subject}?",
        "Compare {period} with {period}.",
        "Give {3-6} examples of how {period} still matters today.",
        "Who was the most important person of {period}, and why?",
        "Discuss the ethics of {subject}.",
        "Explain the economic consequences of {subject}.",
        "What is the capital of" + OPEN,
        "Who wrote" + OPEN,
        "When did" + OPEN,
        "Explain the philosophy of" + OPEN,
    ),
    "everyday": (
        "Give me a recipe with {goods} for {2-8} people.",
        "How can I learn {idea} in {2-12} weeks?",
        "Plan a weekend trip to {city} with a budget of ${100-900}.",
        "What should I do if" + OPEN,
        "How do I" + OPEN,
        "Can you recommend" + OPEN,
        "What are some tips for {subject}?",
        "What's a good gift for {person}?",
        "Translate to {tongue}: I would like to buy {2-9} {goods}.",
        "List {3-12} ideas for {subject}.",
        "I feel" + OPEN,
        "Hi! My name is {name}" + OPEN,
        "What is the best way to" + OPEN,
        "Make a table of {3-6} {goods} with prices and colors.",
    ),
    "city": tuple(
        "Paris|Lisbon|Tokyo|Nairobi|Istanbul|Lima|Chicago|Prague|Hanoi|Melbourne|Hawaii|Edinburgh".split("|")
    ),
    "tongue": tuple("French German Spanish Italian Portuguese Latin".split()),
    "free": (
        OPEN,
        OPEN,
        OPEN,
        "I" + OPEN,
        "The" + OPEN,
        "What" + OPEN,
        "Write" + OPEN,
        "How" + OPEN,
        "Can you" + OPEN,
        "Create" + OPEN,
        "Given" + OPEN,
        "You are" + OPEN,
        "Explain" + OPEN,
        "Please" + OPEN,
        "A" + OPEN,
    ),
}


def write_turn(random_: random.Random) -> tuple[str, str, bool]:
    """A user turn: its kind, its text, and whether the text is only the beginning of the turn."""
    kind = random_.choices(list(KINDS), weights=list(KINDS.values()))[0]
    text = _expand(f"{{{kind}}}", random_)
    is_open = text.endswith(OPEN)
    text = text.removesuffix(OPEN) if is_open else text
    return kind, text[:1].upper() + text[1:] if kind == "maths" else text, is_open


def _expand(text: str, random_: random.Random) -> str:
    def one(match: re.Match[str]) -> str:
        symbol = match[1]
        if symbol in TABLE:
            return _expand(random_.choice(TABLE[symbol]), random_)
        low, _, high = symbol.partition("-")
        return str(random_.randint(int(low), int(high)))

    return _SYMBOL.sub(one, text)
