"""The rich profile: little stories from several hundred words, and conversations about their people."""

from __future__ import annotations

from random import Random

from data_prep.synth_types import Fact, Question


def _words(text: str) -> tuple[str, ...]:
    """Words separated by spaces; an underscore stands for a space inside one."""
    return tuple(word.replace("_", " ") for word in text.split())


# Nothing that may follow "a" begins with a vowel sound.
NAMES = _words(
    "Ada Bella Clara Daisy Ella Flora Grace Hazel Ivy Julia Kate Lily Mia Nora Olive Poppy Ruby Sara Tess "
    "Violet Adam Basil Caleb David Eric Felix George Henry Isaac Jasper Kevin Leo Max Noah Oscar Peter "
    "Robin Simon Toby Victor"
)
KINDS = _words(
    "baker farmer painter gardener fisher tailor singer teacher doctor sailor miller potter weaver cook "
    "shepherd carpenter librarian postman clockmaker beekeeper drummer pilot"
)
ADJECTIVES = _words(
    "brave clever gentle cheerful curious patient loyal quiet lively kind careful friendly proud polite "
    "stubborn thoughtful merry shy bold dreamy"
)
PLACES = _words(
    "forest harbour meadow mill valley village market castle orchard lighthouse desert island mountain river "
    "bridge school bakery library stable station temple cottage tower vineyard swamp canyon"
)
OBJECTS = _words(
    "kite lantern drum basket ladder wagon blanket parasol mirror compass teapot violin whistle hammer "
    "bucket pillow candle telescope bicycle boat necklace map scarf puzzle trumpet saddle"
)
COLOURS = _words(
    "red blue green yellow purple turquoise white black silver golden brown pink grey crimson violet"
)
FOODS = _words(
    "soup bread cheese pancakes apples cherries noodles honey porridge dumplings strawberries rice carrots "
    "pumpkin chocolate walnuts beans pears mushrooms potatoes"
)
ANIMALS = _words(
    "dog cat goat parrot rabbit pony turtle hedgehog squirrel finch duck lamb fox mouse sparrow donkey crow "
    "lizard"
)
WEATHER = _words("sunny rainy windy foggy snowy stormy cloudy frosty mild chilly")
FEARS = _words("thunder spiders heights darkness bees ghosts deep_water loud_noises snakes wolves")
GAMES = _words("chess marbles football cards tag hopscotch darts skittles dominoes hide-and-seek")

_PLOTS = (
    (
        "One day the {item} was gone.",
        "{hero} looked under the bed, behind the door and all around the {place}.",
        "At last {friend} found it beside a sleeping {animal}.",
        "Everyone laughed, and {hero} promised to take better care of it.",
    ),
    (
        "Then a terrible storm broke the roof of the house.",
        "{friend} came running with a {item} and a rope.",
        "Together they worked until the evening, while the {animal} kept watch.",
        'When it was done they shared some {food} and said, "We make a good team!"',
    ),
    (
        "A stranger asked for the way to the {place}.",
        "{hero} was afraid of {fear}, but went along all the same.",
        "On the way they met {friend}, who carried a {item} and sang an old song.",
        "The stranger thanked them and gave each of them a bag of {food}.",
    ),
    (
        "{friend} wanted to win the great contest of {game}.",
        "Every morning the two friends met near the {place} to practise.",
        "On the day of the contest {friend} lost the first round, then won all the others.",
        "The prize was a {colour} {item}, and {friend} gave it to {hero}.",
    ),
    (
        "A small {animal} had fallen into the well.",
        "{hero} tied a {item} to a long rope and let it down slowly.",
        "{friend} whispered kind words until the little {animal} climbed in.",
        "From then on the {animal} followed {hero} everywhere.",
    ),
    (
        "One winter nobody in the village had any {food} left.",
        "So {hero} and {friend} set out for the {place} before sunrise.",
        "They traded a {colour} {item} for twelve heavy sacks.",
        "That night nobody went to bed hungry, not even the {animal}.",
    ),
    (
        "During a picnic a gust of wind carried the {item} into the top of a tall oak.",
        "{hero} climbed from branch to branch, while {friend} shouted directions from below.",
        "A curious {animal} watched them and dropped an acorn on the plate of {food}.",
        "When the {item} finally came down, it was torn, but they fixed it with needle and thread.",
    ),
    (
        "{friend} had a secret: a hidden path that led straight to the {place}.",
        "They packed {food}, a {item} and two warm coats and left at midnight.",
        "Something rustled in the grass, yet it was only a {animal} looking for supper.",
        "At dawn they saw the sun rise above the clouds, and neither of them spoke a word.",
    ),
    (
        "The mayor announced a festival and needed somebody to decorate the square.",
        "{hero} hung {colour} ribbons on every window, and {friend} painted a giant {animal} on the wall.",
        "Visitors arrived from far away to dance, to play {game} and to taste the {food}.",
        "At the end the mayor gave a speech and handed {hero} a shiny {item}.",
    ),
)
_OPENINGS = (
    "Once upon a time there was a {adjective} {kind} named {hero} who lived near the {home}.",
    "Long ago, in a house by the {home}, lived {hero}, a {adjective} {kind}.",
    "{hero} was a {adjective} {kind} and knew every stone around the {home}.",
    "Near the old {home} everybody knew {hero}, the {adjective} {kind}.",
)
_MIDDLES = (
    "It was a {weather} morning, and {hero} was eating {food} with {friend}.",
    "{hero} had a {colour} {item} and was very fond of it.",
    "The best friend of {hero} was {friend}, and they often played {game}.",
    "On {weather} days {hero} liked to sit outside with a {animal} and a bowl of {food}.",
)
_ENDINGS = (
    "And they remembered that day for many years.",
    "After that, {hero} was never afraid of {fear} again.",
    "They walked home slowly, tired and happy.",
    '"Tomorrow we shall do it all again," said {friend}.',
)
_LEADS = ("I want to tell you that", "Did you know that", "Please remember that", "Yesterday I learned that")
_REPLIES = (
    "Thank you for telling me.",
    "That is good to know.",
    "I will remember it.",
    "How interesting! Tell me more.",
)
_FILLERS = (
    ("How are you today?", "I am very well, thank you."),
    ("What a long day it has been!", "I hope that you can rest soon."),
    ("Do you enjoy our talk?", "Yes, I like it a lot."),
    ("Can you tell me a joke?", "Why did the clock go to school? It wanted to learn the time."),
    ("Thank you for listening.", "You are welcome."),
    ("Is it late already?", "No, there is plenty of time."),
    ("Let us talk about something else.", "Of course, whatever you like."),
    ("I am a little hungry.", "Then you should eat something."),
)

_ATTRIBUTES: dict[str, tuple[tuple[str, ...], str, str, str, str, str]] = {
    # name: values, clause, the same in other words, question, answer before and after the value
    "home": (PLACES, "{name} lives near the {value}", "the {value} is close to the house of {name}",
             "Where does {name} live?", "{name} lives near the ", "."),
    "work": (KINDS, "{name} works as a {value}", "the work of {name} is that of a {value}",
             "What is the work of {name}?", "{name} is a ", "."),
    "food": (FOODS, "{name} loves to eat {value}", "nothing tastes better to {name} than {value}",
             "What does {name} love to eat?", "{name} loves ", "."),
    "pet": (ANIMALS, "{name} has a tame {value}", "a tame {value} belongs to {name}",
            "Which animal belongs to {name}?", "It is a ", "."),
    "game": (GAMES, "{name} is good at {value}", "nobody beats {name} at {value}",
             "Which game is {name} good at?", "{name} is good at ", "."),
    "fear": (FEARS, "{name} is afraid of {value}", "{value} always frightened {name}",
             "What is {name} afraid of?", "{name} is afraid of ", "."),
    "character": (ADJECTIVES, "people call {name} {value}", "being {value} is in the nature of {name}",
                  "How do people describe {name}?", "They say that {name} is ", "."),
}  # fmt: skip


class RichProfile:
    """See the module's text."""

    def facts(self, random: Random) -> list[Fact]:
        """Facts about four people: seven attributes each, and a coloured thing that each of them owns."""
        people = random.sample(NAMES, 4)
        facts = [self._attribute(random, name, attribute) for name in people for attribute in _ATTRIBUTES]
        for name, item in zip(people, random.sample(OBJECTS, len(people)), strict=True):
            facts.append(self._possession(name, item, random.choice(COLOURS)))
        random.shuffle(facts)
        return facts

    def _attribute(self, random: Random, name: str, attribute: str) -> Fact:
        values, clause, restated, query, before, after = _ATTRIBUTES[attribute]
        value = random.choice(values)
        return Fact(
            clause=clause.format(name=name, value=value),
            restated=restated.format(name=name, value=value),
            questions=(Question(query.format(name=name), before.format(name=name), value, after),),
        )

    def _possession(self, name: str, item: str, colour: str) -> Fact:
        return Fact(
            clause=f"{name} owns a {colour} {item}",
            restated=f"the {colour} {item} belongs to {name}",
            questions=(
                Question(f"What colour is the {item} of {name}?", f"The {item} is ", colour, "."),
                Question(f"Who owns the {colour} {item}?", "It belongs to ", name, "."),
            ),
        )

    def state(self, random: Random, facts: list[Fact]) -> tuple[str, str]:
        """A sentence that states the facts, and a reply that does not repeat them."""
        lead = random.choice(_LEADS)
        mark = "?" if lead.startswith("Did") else "."
        return f"{lead} {' and '.join(fact.clause for fact in facts)}{mark}", random.choice(_REPLIES)

    def filler(self, random: Random) -> tuple[str, str]:
        """Small talk."""
        return random.choice(_FILLERS)

    def story(self, random: Random) -> str:
        """An opening, a scene, a plot of four sentences, sometimes facts about a person, and an ending."""
        words = self._cast(random)

        sentences = [random.choice(_OPENINGS)]
        sentences += random.sample(_MIDDLES, random.randint(1, 2))
        sentences += random.choice(_PLOTS)
        sentences.append(random.choice(_ENDINGS))
        story = [sentence.format_map(words) for sentence in sentences]
        if random.random() < 0.5:
            fact = self._attribute(random, words["friend"], random.choice(list(_ATTRIBUTES)))
            known = (f"By the way, {fact.clause}.", f"Everybody knew that {fact.restated}.")
            story.insert(-1, random.choice(known))
        return " ".join(story)

    def _cast(self, random: Random) -> dict[str, str]:
        hero, friend = random.sample(NAMES, 2)
        home, place = random.sample(PLACES, 2)
        lists = {"kind": KINDS, "adjective": ADJECTIVES, "item": OBJECTS, "colour": COLOURS, "food": FOODS}
        lists |= {"animal": ANIMALS, "weather": WEATHER, "fear": FEARS, "game": GAMES}
        words = {key: random.choice(values) for key, values in lists.items()}
        return {**words, "hero": hero, "friend": friend, "home": home, "place": place}
