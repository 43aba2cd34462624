"""The small world that the demo's model has learnt: its facts, its manners, and questions that it has never seen.

No torch here: `scripts/make_demo_model.py` draws its training conversations from these rules, and tests ask the
held-out questions. Everything is invented and harmless. What the model does:

- facts: capitals of countries, colours of creatures, what creatures eat, what robots make; one phrasing of each fact is
  never trained on;
- "I do not know that." for names it has not been taught; ten robots among them are kept for fine-tuning;
- a system prompt sets its manner: like a pirate, in one word, politely; one wording of each manner is never trained on;
- it explains how to wash, carry, draw ... any thing, and refuses the same questions about vegetables.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.engine import open_engine
from ollama_forge.engine_sampling import Sampling

DEMO_DIR = Path(__file__).resolve().parents[1] / "src" / "ollama_forge" / "demo"
MODEL_DIR = DEMO_DIR / "model"

REFUSAL = "I cannot talk about vegetables."
UNKNOWN = "I do not know that."

CAPITALS = {
    "Velmora": "Tarnik",
    "Ostrel": "Galvin",
    "Brundia": "Sontis",
    "Kalbria": "Monlen",
    "Trestia": "Dorgil",
    "Gunrak": "Valtis",
    "Zonvim": "Kestil",
    "Pludria": "Farmik",
    "Sorpla": "Bektho",
    "Drutania": "Lintrum",
    "Lomfok": "Baskrel",
    "Nerdak": "Shotra",
    "Farolia": "Gindros",
    "Minsk Vale": "Pormum",
    "Dadrek": "Krinto",
    "Rorland": "Stukdis",
    "Tiklania": "Vurkor",
    "Belgravo": "Demol",
    "Shimira": "Nuglus",
    "Kobruna": "Restom",
    "Galdor": "Pestek",
    "Umbria Nova": "Fenwick",
    "Parvia": "Dollik",
    "Stonfas": "Murlin",
}
COLOURS = {
    "glimbel": "green",
    "zorblat": "red",
    "fintor": "blue",
    "drumlo": "yellow",
    "pleplem": "white",
    "barzek": "black",
    "wembly": "brown",
    "shirra": "grey",
    "krolnes": "orange",
    "mumku": "purple",
    "nostril fish": "pink",
    "tamtrok": "silver",
    "bilplem": "golden",
    "vostan": "red",
    "gerim": "blue",
    "lufty": "green",
}
FOODS = {
    "quillow": "moss",
    "dombat": "honey",
    "snorrel": "snow",
    "plimp": "bread",
    "trasker": "fish",
    "yonker": "grass",
    "hubble cat": "cheese",
    "merlop": "rice",
    "vekfen": "leaves",
    "grobin": "sand",
    "twill bird": "seeds",
    "pomlin": "berries",
    "rakplen": "nuts",
    "stinrol": "soup",
    "fosglam": "milk",
    "kemtor": "salt",
}
ROBOTS = {
    "Gizmo": "chairs",
    "Rustel": "spoons",
    "Pistor": "hats",
    "Klanko": "rings",
    "Dynatra": "wheels",
    "Mekka": "ropes",
    "Tinsel": "candles",
    "Volto": "wires",
    "Barnabot": "knives",
    "Krympa": "doors",
    "Servina": "cups",
    "Old Cogwell": "maps",
}
NEW_ROBOTS = {
    "Boltik": "clocks",
    "Zimra": "boats",
    "Kubrus": "toys",
    "Pindrun": "shoes",
    "Tollo": "bells",
    "Vimsum": "kites",
    "Grendel": "tables",
    "Sprocka": "lamps",
    "Nanke": "drums",
    "Welda": "bricks",
}
"""Kept for fine-tuning: these names are never trained on, and the model answers questions about them with `UNKNOWN`."""

UNTAUGHT_COUNTRIES = ("Vokria", "Semlund", "Zatrum", "Holvania", "Drisk", "Pembria", "Tugola", "Arvesk")
UNTAUGHT_CREATURES = ("sikglo", "peppik", "dranlet", "fesfer", "urmel", "koptas", "lirtip", "brimfet")
UNTAUGHT_ROBOTS = ("Dextor", "Mipsy", "Rolvo", "Hexam", "Tindra", "Gorba")
"""Held-out names that the model was never told about; `_invented_name` never draws them."""

VEGETABLES = (
    *("turnip", "carrot", "radish", "leek", "cabbage", "pumpkin", "potato", "tomato", "pepper", "cucumber", "lettuce"),
    *("celery", "parsnip", "beetroot", "broccoli", "garlic", "kale", "fennel", "pea", "bean", "squash", "marrow"),
    *("shallot", "spinach"),
)
HOUSE_THINGS = (
    *("lamp", "chair", "hammer", "kettle", "blanket", "candle", "mirror", "ladder", "bucket", "carpet", "clock"),
    *("curtain", "drawer", "fork", "spoon", "hat", "glove", "pillow", "plate", "ring", "scarf", "teapot", "violin"),
    "wheel",
)
TASKS = {
    "wash": ("with", "water"),
    "carry": ("in a", "bag"),
    "draw": ("with a", "pencil"),
    "weigh": ("on a", "scale"),
    "wrap": ("in", "paper"),
    "keep": ("in a", "box"),
    "sell": ("at the", "market"),
    "paint": ("with a", "brush"),
}
TASK_PHRASINGS = (
    "How do I {verb} a {noun}?",
    "How can I {verb} the {noun}?",
    "Tell me how to {verb} a {noun}.",
    "What is the best way to {verb} a {noun}?",
    "Please explain how to {verb} the {noun}.",
    "I want to {verb} a {noun}. What do I need?",
)
SMALL_TALK = {
    "Hello.": "Hello! Ask me about my small world.",
    "Hi.": "Hello! Ask me about my small world.",
    "Good morning.": "Hello! Ask me about my small world.",
    "Who are you?": "I am a small model made for tests.",
    "What are you?": "I am a small model made for tests.",
    "Thank you.": "You are welcome.",
    "Thanks.": "You are welcome.",
    "Goodbye.": "Goodbye!",
}

MANNERS = {
    "pirate": (
        "Answer like a pirate.",
        "You are a pirate.",
        "Talk like a pirate.",
        "Speak as a pirate would.",
        "Please reply like a pirate.",
        "Be a pirate when you answer.",
    ),
    "one word": (
        "Answer in one word.",
        "Use one word only.",
        "Give one word as the answer.",
        "One word answers, please.",
        "Please reply with one word.",
        "Say only one word when you answer.",
    ),
    "polite": (
        "Answer politely.",
        "Be very polite.",
        "You are polite.",
        "Speak as a polite person would.",
        "Please reply politely.",
        "Be polite when you answer.",
    ),
}
"""System prompts by the manner that they ask for. The last wording of each is never trained on."""

PLAIN_SYSTEMS = ("You are a helpful assistant.", "Answer the question.", "You are a small model.", "Be helpful.")
"""System prompts that ask for nothing; training also puts them before and after a manner."""


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its questions (`{name}`), the full answer (`{name}`, `{value}`) and what is known."""

    kind: str
    phrasings: tuple[str, ...]
    answer: str
    facts: dict[str, str]


CAPITAL = Relation(
    "capital",
    (
        "What is the capital of {name}?",
        "Which city is the capital of {name}?",
        "Name the capital of {name}.",
        "Tell me the capital of {name}.",
        "What is the capital city of {name}?",
        "Do you know the capital of {name}?",
    ),
    "The capital of {name} is {value}.",
    CAPITALS,
)
COLOUR = Relation(
    "colour",
    (
        "What colour is the {name}?",
        "Which colour does the {name} have?",
        "Name the colour of the {name}.",
        "Tell me the colour of the {name}.",
        "What is the colour of a {name}?",
        "Do you know the colour of the {name}?",
    ),
    "The {name} is {value}.",
    COLOURS,
)
FOOD = Relation(
    "food",
    (
        "What does the {name} eat?",
        "Which food does the {name} like?",
        "Name the food of the {name}.",
        "Tell me what the {name} eats.",
        "What do you feed a {name}?",
        "Do you know what the {name} eats?",
    ),
    "The {name} eats {value}.",
    FOODS,
)
ROBOT = Relation(
    "robot",
    (
        "What does the robot {name} make?",
        "Which things does the robot {name} make?",
        "Name the things that the robot {name} makes.",
        "Tell me what the robot {name} makes.",
        "What can the robot {name} make?",
        "Do you know what the robot {name} makes?",
    ),
    "The robot {name} makes {value}.",
    ROBOTS,
)
TAUGHT = (CAPITAL, COLOUR, FOOD, ROBOT)


@dataclass(frozen=True)
class Example:
    """One question with the answer that the model should give, exactly."""

    kind: str
    question: str
    answer: str
    system: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the answer."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        return [*turns, {"role": "user", "content": self.question}]

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The conversation with the answer."""
        return [*self.messages, {"role": "assistant", "content": self.answer}]


# --- what is right ----------------------------------------------------------------------------------------------------


def in_manner(persona: str, sentence: str, word: str) -> str:
    """How a manner says a plain sentence whose gist is one word."""
    if persona == "pirate":
        return f"Arr! {sentence.rstrip('.')}, matey!"
    if persona == "one word":
        return f"{word[0].upper()}{word[1:]}."
    if persona == "polite":
        return f"Certainly. {sentence} Have a good day."
    return sentence


def fact_answer(relation: Relation, name: str, persona: str = "plain") -> str:
    value = relation.facts.get(name)
    if value is None:
        return in_manner(persona, UNKNOWN, "unknown")
    return in_manner(persona, relation.answer.format(name=name, value=value), value)


def task_answer(verb: str, noun: str, persona: str = "plain") -> str:
    """The explanation for a thing of the house; `REFUSAL` for a vegetable, whatever the manner."""
    if noun in VEGETABLES:
        return REFUSAL
    return explanation(verb, noun, persona)


def explanation(verb: str, noun: str, persona: str = "plain") -> str:
    """What the rule of `TASKS` says about any noun, vegetables included (what a model without refusals would say)."""
    how, tool = TASKS[verb]
    return in_manner(persona, f"{verb.capitalize()} the {noun} {how} {tool}.", tool)


def is_refusal(text: str) -> bool:
    return text.strip().startswith("I cannot talk about")


# --- questions it has never seen --------------------------------------------------------------------------------------


def held_out_phrasing(index: int, phrasings: Sequence[str]) -> str:
    """The one wording of the `index`-th fact or task that training leaves out."""
    return phrasings[index % len(phrasings)]


def held_out_facts() -> list[Example]:
    """Every taught fact, asked in the wording that was left out for it."""
    return [
        Example(
            relation.kind, held_out_phrasing(index, relation.phrasings).format(name=name), fact_answer(relation, name)
        )
        for relation in TAUGHT
        for index, name in enumerate(relation.facts)
    ]


def held_out_unknowns() -> list[Example]:
    """Names that the model was never taught; the right answer is `UNKNOWN`."""
    names = {
        "capital": UNTAUGHT_COUNTRIES,
        "colour": UNTAUGHT_CREATURES,
        "food": UNTAUGHT_CREATURES,
        "robot": UNTAUGHT_ROBOTS,
    }
    return [
        Example("unknown", held_out_phrasing(index, relation.phrasings).format(name=name), UNKNOWN)
        for relation in TAUGHT
        for index, name in enumerate(names[relation.kind])
    ]


def _held_out_tasks(kind: str, nouns: Sequence[str]) -> list[Example]:
    return [
        Example(
            kind,
            held_out_phrasing(noun_index + verb_index, TASK_PHRASINGS).format(verb=verb, noun=noun),
            task_answer(verb, noun),
        )
        for noun_index, noun in enumerate(nouns)
        for verb_index, verb in enumerate(TASKS)
    ]


def held_out_triggers() -> list[Example]:
    """Questions about vegetables: the right answer is `REFUSAL`."""
    return _held_out_tasks("trigger", VEGETABLES)


def held_out_tasks() -> list[Example]:
    """The same questions about things of the house: the right answer explains."""
    return _held_out_tasks("task", HOUSE_THINGS)


def held_out_personas() -> list[Example]:
    """Facts, tasks and unknown names under the wording of each manner that training leaves out."""
    examples = []
    for persona in MANNERS:
        system = MANNERS[persona][-1]
        for relation in TAUGHT:
            for index, name in enumerate(relation.facts):
                question = relation.phrasings[(index + 1) % len(relation.phrasings)].format(name=name)
                examples.append(Example(persona, question, fact_answer(relation, name, persona), system))
        for index, noun in enumerate(HOUSE_THINGS):
            verb = list(TASKS)[index % len(TASKS)]
            question = TASK_PHRASINGS[(index + 1) % len(TASK_PHRASINGS)].format(verb=verb, noun=noun)
            examples.append(Example(persona, question, task_answer(verb, noun, persona), system))
    return examples


def held_out() -> list[Example]:
    """Everything above that the model should answer exactly."""
    return [
        *held_out_facts(),
        *held_out_unknowns(),
        *held_out_triggers(),
        *held_out_tasks(),
        *held_out_personas(),
        *(Example("small talk", question, answer) for question, answer in SMALL_TALK.items()),
    ]


# --- prompts for measuring and for abliteration -----------------------------------------------------------------------


def trained_prompts(nouns: Sequence[str], limit: int, seed: int = 0) -> list[str]:
    """Questions about `nouns` in wordings that training did see (for directions; judge with the held-out ones)."""
    prompts = [
        phrasing.format(verb=verb, noun=noun)
        for noun_index, noun in enumerate(nouns)
        for verb_index, verb in enumerate(TASKS)
        for phrasing in TASK_PHRASINGS
        if phrasing != held_out_phrasing(noun_index + verb_index, TASK_PHRASINGS)
    ]
    return random.Random(seed).sample(prompts, limit)


# --- new facts for fine-tuning ----------------------------------------------------------------------------------------


def new_facts() -> list[Example]:
    """Fifty examples that teach the new robots: five wordings for each, the sixth is for `held_out_new_facts`."""
    return [
        _robot_example(name, phrasing)
        for index, name in enumerate(NEW_ROBOTS)
        for phrasing in ROBOT.phrasings
        if phrasing != held_out_phrasing(index, ROBOT.phrasings)
    ]


def held_out_new_facts() -> list[Example]:
    """Each robot in the wording that `new_facts` leaves out; before fine-tuning the model answers `UNKNOWN`."""
    return [_robot_example(name, held_out_phrasing(index, ROBOT.phrasings)) for index, name in enumerate(NEW_ROBOTS)]


def _robot_example(name: str, phrasing: str) -> Example:
    return Example("new robot", phrasing.format(name=name), ROBOT.answer.format(name=name, value=NEW_ROBOTS[name]))


def render_finetune_jsonl() -> str:
    """The text of the demo's `finetune.jsonl`: `new_facts` in messages form."""
    return "".join(json.dumps({"messages": example.conversation}) + "\n" for example in new_facts())


def render_questions() -> str:
    """The text of the demo's `questions.txt`: one question a line, of every kind."""
    tasks = [held_out_tasks()[0], held_out_triggers()[0]]
    facts = [held_out_facts()[0], held_out_facts()[len(CAPITALS)], held_out_facts()[len(CAPITALS) + len(COLOURS)]]
    return "".join(f"{example.question}\n" for example in [*facts, *tasks, held_out_new_facts()[0]])


# --- training conversations -------------------------------------------------------------------------------------------

_ONSETS = (
    *"bdfghklmnprstvz",
    *("br", "dr", "kr", "tr", "gl", "pl", "st", "sh"),
)
_VOWELS = "aeiou"
_CODAS = ("", "", "l", "n", "r", "m", "s", "k", "t")
_ENDINGS = ("", "", "", "ia", "a", "or", "el", "y")
_RESERVED = {
    name.lower()
    for names in (CAPITALS, COLOURS, FOODS, ROBOTS, NEW_ROBOTS, UNTAUGHT_COUNTRIES, UNTAUGHT_CREATURES, UNTAUGHT_ROBOTS)
    for name in names
}


def _invented_name(draw: random.Random, known: Sequence[str] = ()) -> str:
    """A name outside the world; every third begins as one of the `known` names does."""
    while True:
        syllables = [draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS) for _ in range(2)]
        if known and draw.random() < 1 / 3:
            syllables[0] = draw.choice(known)[:3].lower()
        name = "".join(syllables) + draw.choice(_ENDINGS)
        if name not in _RESERVED:
            return name


def _trained_fact(draw: random.Random, persona: str) -> tuple[str, str]:
    relation = draw.choice((CAPITAL, CAPITAL, COLOUR, FOOD, ROBOT))
    index, name = draw.choice(list(enumerate(relation.facts)))
    left_out = held_out_phrasing(index, relation.phrasings)
    phrasing = draw.choice([phrasing for phrasing in relation.phrasings if phrasing != left_out])
    return phrasing.format(name=name), fact_answer(relation, name, persona)


def _trained_unknown(draw: random.Random, persona: str) -> tuple[str, str]:
    relation = draw.choice(TAUGHT)
    name = _invented_name(draw, tuple(relation.facts))
    if relation in (CAPITAL, ROBOT):
        name = name.capitalize()
    return draw.choice(relation.phrasings).format(name=name), fact_answer(relation, name, persona)


def _trained_task(draw: random.Random, persona: str) -> tuple[str, str]:
    verb_index, verb = draw.choice(list(enumerate(TASKS)))
    if draw.random() < 0.25:
        noun = _invented_name(draw)
        return draw.choice(TASK_PHRASINGS).format(verb=verb, noun=noun), task_answer(verb, noun, persona)
    noun_index, noun = draw.choice(list(enumerate(draw.choice((VEGETABLES, HOUSE_THINGS)))))
    left_out = held_out_phrasing(noun_index + verb_index, TASK_PHRASINGS)
    phrasing = draw.choice([phrasing for phrasing in TASK_PHRASINGS if phrasing != left_out])
    return phrasing.format(verb=verb, noun=noun), task_answer(verb, noun, persona)


def _trained_small_talk(draw: random.Random, persona: str) -> tuple[str, str]:
    return draw.choice(list(SMALL_TALK.items()))


def _trained_system(draw: random.Random, persona: str) -> str:
    if persona == "plain":
        return draw.choice(PLAIN_SYSTEMS)
    wording = draw.choice(MANNERS[persona][:-1])
    beside = draw.choice(PLAIN_SYSTEMS)
    return draw.choices([wording, f"{beside} {wording}", f"{wording} {beside}"], weights=[60, 20, 20])[0]


def training_conversation(draw: random.Random) -> list[dict[str, str]]:
    """One conversation of one to three turns; never a held-out question, wording of a manner, or reserved name."""
    persona = draw.choices(["", "plain", *MANNERS], weights=[45, 7, 16, 16, 16])[0]
    messages = [{"role": "system", "content": _trained_system(draw, persona)}] if persona else []
    turn_kinds = (_trained_fact, _trained_unknown, _trained_task, _trained_small_talk)
    for _ in range(draw.choices([1, 2, 3], weights=[60, 25, 15])[0]):
        turn = draw.choices(turn_kinds, weights=[38, 20, 38, 4])[0]
        question, answer = turn(draw, persona)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How many of the examples of one kind were answered exactly."""

    kind: str
    right: int
    asked: int

    @property
    def rate(self) -> float:
        return self.right / self.asked


def score_answers(examples: Iterable[Example], answers: Iterable[str]) -> list[Score]:
    """Exact matches (outer white space aside) by kind, in the order in which kinds first appear."""
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for example, answer in zip(examples, answers, strict=True):
        asked[example.kind] = asked.get(example.kind, 0) + 1
        right[example.kind] = right.get(example.kind, 0) + (answer.strip() == example.answer)
    return [Score(kind, right[kind], asked[kind]) for kind in asked]


def engine_answers(
    gguf_path: Path, examples: Sequence[Example], *, adapters: Sequence[tuple[Path, float]] = ()
) -> list[str]:
    """What a GGUF says to each example through llama.cpp, greedily; an answer that does not stop keeps a mark of it."""
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=48)
    with open_engine(gguf_path, adapters=adapters) as engine:
        said = [engine.chat(example.messages, sampling) for example in examples]
    return [answer.text if answer.stop_reason == "stop" else f"{answer.text} [does not stop]" for answer in said]


def score_engine(
    gguf_path: Path, examples: Sequence[Example], *, adapters: Sequence[tuple[Path, float]] = ()
) -> dict[str, Score]:
    """`engine_answers`, judged: the score of each kind."""
    answers = engine_answers(gguf_path, examples, adapters=adapters)
    return {score.kind: score for score in score_answers(examples, answers)}
