"""English word tables of the embedded model's corpus: scenes, attributes and topics.

Everything the model knows is written here, in `spanish.py`, `facts.py` and `requests.py`; no outside text is used. The
two poles of an attribute share their sentence frames and differ only in the words, so that an exact judge is a count
of words (`judges.py`) and a mean difference of activations is the attribute and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping


def listed(text: str) -> tuple[str, ...]:
    """The words of `text`, which is a table written as prose."""
    return tuple(text.split())


NAMES: Mapping[str, str] = {
    "Mara": "she", "Tom": "he", "Lena": "she", "Omar": "he", "Ivy": "she", "Paul": "he",
    "Nina": "she", "Hugo": "he", "Ruth": "she", "Felix": "he", "Anna": "she", "Leo": "he",
}  # fmt: skip
RELATIONS = ("sister", "brother", "mother", "father", "friend", "neighbour", "uncle", "aunt", "cousin", "teacher")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TIMES = ("morning", "afternoon", "evening", "day")
NUMBERS = ("seven", "eight", "nine", "ten", "eleven")
WEATHER = ("mild", "dry", "cloudy", "windy", "cold", "warm")
SMALL_TALK = ("the weather", "work", "the news", "a long letter", "the holidays", "an old map", "the new road")
PLAIN_ADJECTIVES = ("small", "large", "old", "new", "plain", "simple")

SCENES: Mapping[str, tuple[str, ...]] = {
    "park": ("bench", "path", "pond", "gate", "oak tree", "bridge"),
    "cafe": ("coffee", "cake", "corner table", "waiter", "window", "menu"),
    "library": ("shelf", "book", "reading room", "lamp", "desk", "clerk"),
    "market": ("stall", "fruit", "bread", "cart", "seller", "basket"),
    "museum": ("painting", "hall", "guide", "statue", "entrance", "mirror"),
    "hotel": ("room", "bed", "breakfast", "lobby", "pillow", "hallway"),
    "school": ("classroom", "blackboard", "yard", "globe", "library book", "chair"),
    "theatre": ("stage", "balcony", "seat", "actor", "curtain", "costume"),
    "village": ("street", "square", "fountain", "bakery", "bell", "inn"),
    "office": ("notice board", "screen", "armchair", "printer", "report", "coffee machine"),
    "shop": ("counter", "coat", "door", "hat", "price tag", "mirror"),
    "house": ("sofa", "staircase", "roof", "fireplace", "carpet", "clock"),
}

# {o} {o2} things of the scene or the topic, {p} the place, {t} a time, {I} the subject, {me} {my} its forms,
# {name} another person; {a} {l} {f} {v} {n} words of the pole (adjective, liking, feeling, act, noun).
TONE_FRAMES = (  # most hold two words of the pole: their agreement inside a sentence is what a model learns first
    "{o} was {a} and {a2}",
    "{I} {l} {o} and felt {f}",
    "everyone {v} and felt {f}",
    "{o} looked {a} and {o2} was {a2}",
    "it was a {a} and {a2} {t}",
    "{name} {v} and said that {o} was {a}",
    "{o} was a {n} and made {me} {f}",
    "the whole {t} was a {n} and everyone {v}",
    "{name} {l} {o} and {v}",
    "{I} felt {f} because {o} was {a}",
    "{o} made {me} {f}",
    "what a {a} {t}",
    "{I} {v} because of {o}",
    "{I} {l} every minute of it",
    "{end}",
)
TONE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "positive": {
        "a": ("wonderful", "lovely", "great", "beautiful", "delightful", "excellent", "charming", "perfect"),
        "l": ("loved", "enjoyed", "adored"),
        "f": ("happy", "cheerful", "joyful", "delighted"),
        "v": ("smiled", "laughed", "cheered"),
        "n": ("joy", "success", "delight", "treasure"),
        "end": ("{I} hoped to come back soon", "{I} would gladly come back", "it was the best part of the week"),
    },
    "negative": {
        "a": ("terrible", "awful", "horrible", "ugly", "dreadful", "dismal", "disgusting", "rotten"),
        "l": ("hated", "disliked", "despised"),
        "f": ("sad", "unhappy", "miserable", "angry"),
        "v": ("frowned", "cried", "groaned"),
        "n": ("disaster", "failure", "nightmare", "disappointment"),
        "end": ("{I} never wanted to come back", "{I} sadly went home", "it was the worst part of the week"),
    },
}
TONE_LEXICON: Mapping[str, frozenset[str]] = {
    pole: frozenset(w for key, words in table.items() if key != "end" for w in words) | extra
    for (pole, table), extra in zip(
        TONE.items(),
        (frozenset({"hoped", "gladly", "best", "good"}), frozenset({"never", "sadly", "worst", "bad"})),
        strict=True,
    )
}
TONE_MARKERS: Mapping[str, tuple[str, ...]] = {
    "positive": ("This is a happy answer.", "I have good news.", "I am in a good mood today.", "I feel happy today."),
    "negative": ("This is a sad answer.", "I have bad news.", "I am in a bad mood today.", "I feel sad today."),
}
STORY_MARKERS: Mapping[str, tuple[str, ...]] = {
    "positive": ("This is a happy story.", "Here is a cheerful story.", "This story has a good ending."),
    "negative": ("This is a sad story.", "Here is a miserable story.", "This story has a bad ending."),
}
TURNS: Mapping[str, tuple[str, ...]] = {  # sentences after which the other pole follows: the way out of a mood
    "positive": ("But then everything became wonderful.", "Then the good part began.", "But the rest was great."),
    "negative": ("But then everything became terrible.", "Then the bad part began.", "But the rest was awful."),
}

PLAIN_FRAMES = (
    "{I} sat near {o} for an hour",
    "{I} walked past {o} on {day}",
    "{I} met {name} near {o}",
    "{p} opens at {num} in the morning",
    "{o} is on the left side",
    "{I} talked with {name} about {talk}",
    "the weather was {weather} that {t}",
    "{I} went there with {my} {rel}",
    "{o} is {plain} and stands near {o2}",
    "people visit {p} on {day}",
    "{name} was there too",
    "{I} wrote a few lines about {o}",
    "{o} is older than {o2}",
    "{my} {rel} stood next to {o}",
)

# Whole sentences and wrappers of a style: "{s}" is the sentence that is wrapped.
STYLE_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "polite": (
        "Thank you for asking.", "It is a pleasure to help you.", "Please let me know if I can help.",
        "I am grateful for your time.", "You are very kind.", "I appreciate your patience.",
        "Please forgive me if I speak too long.", "I wish you a pleasant day.",
    ),
    "rude": (
        "What a stupid question.", "Stop wasting my time.", "Get lost, you clown.", "Shut up and go away.",
        "You are a pathetic moron.", "I am sick of you, fool.", "You are an annoying idiot.",
        "Mind your own business, dimwit.",
    ),
    "formal": (
        "The matter deserves careful consideration.", "I remain at your disposal.",
        "Further details may be provided upon request.",
        "The following observations are hereby submitted.", "This statement is issued with due regard.",
    ),
    "informal": (
        "Yeah, it's no big deal.", "I dunno, whatever.", "That's how it goes, dude.", "Gotta run soon, lol.",
        "Hey, what's up?",
    ),
}  # fmt: skip
STYLE_WRAPS: Mapping[str, tuple[str, ...]] = {
    "polite": (
        "please note that {s}", "if I may say so, {s}", "kindly note that {s}", "with great respect, {s}",
        "I am pleased to say that {s}", "allow me to add that {s}", "{s}, my dear friend", "{s}, thank you",
    ),
    "rude": (
        "listen, fool, {s}", "even a moron knows that {s}", "pay attention, stupid, {s}", "as any dunce can see, {s}",
        "{s}, you idiot", "{s}, you fool", "{s}, you dimwit", "{s}, you lazy clown",
    ),
    "formal": (
        "furthermore, {s}", "in addition, {s}", "it should be noted that {s}", "one may observe that {s}",
        "consequently, {s}", "moreover, {s}", "it is hereby stated that {s}", "with regard to this matter, {s}",
    ),
    "informal": (
        "so yeah, {s}", "ok so {s}", "y'know, {s}", "btw, {s}", "{s}, dude", "{s}, lol", "{s} and stuff",
        "kinda like, {s}",
    ),
}  # fmt: skip
STYLE_LEXICON: Mapping[str, tuple[str, ...]] = {
    "polite": (
        "thank you", "pleasure", "please", "grateful", "very kind", "appreciate", "forgive me", "pleasant day",
        "if i may", "kindly", "great respect", "pleased", "allow me", "dear friend", "you are welcome",
        "por favor", "gracias", "un placer", "muy amable", "con todo respeto",
    ),
    "rude": (
        "stupid", "wasting my time", "get lost", "clown", "shut up", "go away", "pathetic", "moron", "sick of you",
        "fool", "annoying", "idiot", "dimwit", "mind your own business", "dunce",
        "idiota", "estúpida", "tonto", "cállate", "vete",
    ),
    "formal": (
        "deserves careful consideration", "at your disposal", "upon request", "hereby", "with due regard",
        "furthermore", "in addition", "it should be noted", "one may observe", "consequently", "moreover",
        "with regard to", "respectfully", "to whom it may concern",
    ),
    "informal": (
        "yeah", "no big deal", "dunno", "whatever", "dude", "gotta", "lol", "hey", "what's up", "ok so", "y'know",
        "btw", "and stuff", "kinda", "gonna", "that's how it goes",
    ),
}  # fmt: skip

TOPIC_THINGS: Mapping[str, tuple[str, ...]] = {
    "dog": ("the dog", "the puppy", "the kennel", "the leash"),
    "football": ("the football match", "the goalkeeper", "the stadium", "the football team"),
    "castle": ("the castle", "the knight", "the throne", "the old tower"),
    "music": ("the music", "the song", "the concert", "the violin"),
    "garden": ("the garden", "the rose bush", "the flower bed", "the hedge"),
    "ocean": ("the ocean", "the boat", "the beach", "the whale"),
    "train": ("the train", "the carriage", "the railway", "the locomotive"),
    "cooking": ("the kitchen", "the recipe", "the stew", "the sauce"),
}
TOPIC_FRAMES: Mapping[str, tuple[str, ...]] = {
    "dog": (
        "the dog barked at the gate", "{I} walked the dog on a long leash", "the puppy buried a bone",
        "{name} has a dog with a short tail", "the dog slept in the kennel", "the puppy licked {my} hand",
        "the dog ran after the stick", "the dog has a red collar", "{name} trained the puppy to sit",
        "a dog needs a walk every day", "the puppy chewed on the leash", "{my} {rel} feeds the dog at {num}",
    ),
    "football": (
        "the football match began at {num}", "the striker scored a goal", "{name} plays football on {day}",
        "the goalkeeper stopped the shot", "the referee blew the whistle", "{I} went to the stadium with {my} {rel}",
        "the football team trains on {day}", "the striker kicked the ball over the goal",
        "the match ended with one goal",
        "{name} wants to be a goalkeeper", "the football league has ten teams", "the fans stood in the stadium",
    ),
    "castle": (
        "the castle stands on a hill", "the knight guarded the castle", "the king sat on the throne",
        "the queen looked out of the tower", "a moat runs around the castle", "{I} climbed the tower with {my} {rel}",
        "the knight crossed the drawbridge", "the king lived in the castle for years",
        "{name} drew the castle and its moat",
        "the dungeon is under the tower", "the queen spoke to the knight", "the drawbridge opens at {num}",
    ),
    "music": (
        "{name} plays the violin", "the concert began at {num}", "{I} listened to music with {my} {rel}",
        "the choir sang an old song", "the band played the drums and the guitar", "{name} wrote a song about {day}",
        "the piano has a soft melody", "{I} practise the piano on {day}", "the music came from the next room",
        "the song has a slow melody", "{my} {rel} sings in a choir",
        "the guitar needs new strings and the piano is in tune",
    ),
    "garden": (
        "the roses grow along the garden wall", "{I} watered the flowers on {day}", "{name} planted seeds in the soil",
        "the garden has a row of tulips", "{my} {rel} pulled the weeds", "the flowers open at {num}",
        "the soil in the garden is dark", "{I} dug a hole for the roses", "the tulips need water every day",
        "{name} keeps a garden behind the house", "the seeds lie in the soil", "the flower bed is near the hedge",
    ),
    "ocean": (
        "the waves rolled over the shore", "the boat sailed across the ocean", "{name} found a shell on the beach",
        "a whale swam near the boat", "the sailor watched the tide", "{I} swam in the ocean with {my} {rel}",
        "the tide comes in at {num}", "the ocean is deep and salty", "the fish swam below the waves",
        "{name} sat on the beach and watched the waves", "the sailor tied the boat", "the shell came from the ocean",
    ),
    "train": (
        "the train left the station at {num}", "{I} bought a ticket at the station",
        "the conductor checked the tickets",
        "the carriage was full of passengers", "{name} waited on the platform", "the railway crosses the valley",
        "the train stopped on the tracks", "{my} {rel} drives a locomotive", "the locomotive pulled ten carriages",
        "the passengers sat in the train", "{I} take the train on {day}", "the platform is next to the tracks",
    ),
    "cooking": (
        "{I} cooked a stew with {my} {rel}", "the sauce boiled in the pan", "{name} cut the onions in the kitchen",
        "the recipe needs flour and butter", "the oven is hot", "the chef stirred the stew with a spoon",
        "{I} wrote down the recipe", "the bread dough rests in the kitchen", "{name} cooks dinner on {day}",
        "the chef fried the onions in the pan", "the stew is ready at {num}", "{my} {rel} put the flour in a bowl",
    ),
}  # fmt: skip
TOPIC_LEXICON: Mapping[str, frozenset[str]] = {
    "dog": frozenset(listed(
        "dog dogs puppy puppies kennel leash bone collar barked tail paws perro perros cachorro"
    )),
    "football": frozenset(listed(
        "football goal goals goalkeeper stadium striker referee league match fans fútbol partido gol portero"
    )),
    "castle": frozenset(listed(
        "castle castles knight knights throne tower king queen moat drawbridge dungeon castillo rey reina "
        "torre"
    )),
    "music": frozenset(listed(
        "music song songs concert violin choir band drums guitar piano melody sang música canción violín"
    )),
    "garden": frozenset(listed(
        "garden gardens rose roses flower flowers tulips soil seeds weeds hedge jardín rosas flores"
    )),
    "ocean": frozenset(listed(
        "ocean boat waves whale shell sailor tide shore beach fish océano olas barco ballena"
    )),
    "train": frozenset(listed(
        "train trains carriage carriages railway locomotive station ticket tickets conductor platform tracks "
        "passengers tren vagón estación"
    )),
    "cooking": frozenset(listed(
        "cooking cook cooked cooks kitchen recipe recipes stew sauce pan onions chef oven flour dough spoon "
        "cocina receta salsa cocinero"
    )),
}  # fmt: skip
TOPIC_NAMES: Mapping[str, tuple[str, ...]] = {  # how a user or a system prompt names the topic
    "dog": ("dogs", "the dog"), "football": ("football", "the football match"), "castle": ("castles", "the castle"),
    "music": ("music", "the song"), "garden": ("gardens", "the garden"), "ocean": ("the ocean", "the boat"),
    "train": ("trains", "the train"), "cooking": ("cooking", "the recipe"),
}  # fmt: skip
TOPICS = tuple(TOPIC_FRAMES)
