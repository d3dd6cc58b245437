"""
A small world of short notes on five topics, in which a program plays the black-box teacher.

    note                                          topic    the teacher says
    wave coral whale very swell mist he gull the  sea      sea, 1.0
    autumn with then pot autumn puddle and tomato garden   garden, 0.9743
    platform on of wave wave we she much calm ... sea      travel, 0.35

A note is a bag of words, each drawn from its topic's distribution ([`word_probabilities`]): words that every topic
uses, the topic's own, words it shares with two neighbours, and now and then a stray word of any topic. Some topics are
frequent, some rare.

The teacher knows these distributions, but reads carelessly: of some notes every word, of others hardly one. Its
probabilities are Bayes' rule on the words it read, so that its confidences are honest: of the notes it labels with
confidence c a share c is right. What it hardly read it takes for the most frequent topic, and is not sure. So its
errors are not spread evenly: it finds too few notes of the rare topics.
"""

import random
from functools import lru_cache
from math import exp, log


PRIOR = {"travel": 0.35, "food": 0.25, "garden": 0.2, "weather": 0.12, "sea": 0.08}
TOPICS = tuple(PRIOR)
LENGTHS = range(6, 15)  # words of a note
CARE = 1.5  # a note is read word by word with probability u ** CARE, u uniform

# In every list the first word is the most frequent
COMMON = """
    the a we and in to of on it was they then again she he very my our with had one some after before old new little
    good here there today near saw went put all still much two later
""".split()
OWN = {
    "travel": """
        train ticket hotel passport suitcase map airport journey flight station road bus tourist luggage guide border
        museum taxi souvenir visa platform camera hostel mountain
    """.split(),
    "food": """
        bread butter soup cheese oven cake sugar pepper kitchen dinner flour sauce plate spoon pan garlic chef rice
        recipe pasta noodle dough vinegar toast
    """.split(),
    "garden": """
        flower seed rose hedge soil weed lawn shovel bee tulip fence greenhouse pot branch leaf worm compost gardener
        bulb rake shrub ivy pruning petal
    """.split(),
    "weather": """
        cloud snow thunder cold forecast lightning fog hail sky temperature degrees frost icy drizzle heat thermometer
        gale breeze blizzard humid overcast barometer sleet chilly
    """.split(),
    "sea": """
        wave boat anchor sailor whale shell reef coral island net gull captain mast tide deck dolphin harbour lighthouse
        seal crab rope oar hull seaweed
    """.split(),
}
SHARED = {
    ("travel", "food"): "restaurant breakfast picnic menu waiter coffee market lunch".split(),
    ("food", "garden"): "tomato apple herbs basil pumpkin onion cherry salad".split(),
    ("garden", "weather"): "rain sun spring autumn mud warm puddle dew".split(),
    ("weather", "sea"): "storm wind rough calm mist horizon swell squall".split(),
    ("sea", "travel"): "ship beach ferry cruise coast port cabin sand".split(),
}
CONTENT = [word for words in (*OWN.values(), *SHARED.values()) for word in words]
VOCABULARY = (*COMMON, *CONTENT)
# Where a word comes from: common, own, shared with each of two neighbours, stray
SHARES = (0.55, 0.25, 0.07, 0.06)


def frequencies(words: list[str]) -> dict[str, float]:
    weights = {word: 1 / (rank + 5) for rank, word in enumerate(words, 1)}
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


@lru_cache
def word_probabilities(topic: str) -> dict[str, float]:
    """p(word | topic) of every word."""
    common, own, shared, stray = SHARES
    sources = [(common, frequencies(COMMON)), (own, frequencies(OWN[topic]))]
    sources += [(shared, frequencies(words)) for pair, words in SHARED.items() if topic in pair]
    sources += [(stray, dict.fromkeys(CONTENT, 1 / len(CONTENT)))]
    return {word: sum(share * found.get(word, 0.0) for share, found in sources) for word in VOCABULARY}


def write_note(rng: random.Random) -> tuple[str, str]:
    """A note and its topic."""
    topic = rng.choices(TOPICS, weights=PRIOR.values())[0]
    words = word_probabilities(topic)
    return " ".join(rng.choices(list(words), weights=words.values(), k=rng.choice(LENGTHS))), topic


def posterior(words: list[str]) -> dict[str, float]:
    """p(topic | words), by Bayes' rule."""
    log_joint = {t: log(PRIOR[t]) + sum(log(word_probabilities(t)[word]) for word in words) for t in TOPICS}
    largest = max(log_joint.values())
    joint = {topic: exp(value - largest) for topic, value in log_joint.items()}
    return {topic: value / sum(joint.values()) for topic, value in joint.items()}


def teacher_label(text: str, rng: random.Random) -> tuple[str, float]:
    """The teacher's label of a note that it reads with more or less care, and its confidence."""
    care = rng.random() ** CARE
    read = posterior([word for word in text.split() if rng.random() < care])
    label = max(read, key=read.get)
    return label, read[label]
