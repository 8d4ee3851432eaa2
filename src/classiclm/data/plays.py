"""`plays`: short rhymed scenes that a seeded grammar writes, so that a machine with no network has a corpus.

The grammar is data; two walks go over it. `generate` draws text. `entropy_per_char` adds up, exactly, what
the draws cost, and so makes the corpus an instrument: no model's loss on new text can be lower. There is
something to learn at every range: spelling, word order, agreement (star sleeps, stars sleep), rhymes, some
lines back or in the other's speech, who speaks to whom and by which title, thou or you, and the thing that
the first line names and the last one comes back to.

    text = generate(1_000_000, seed=0)
    limit = entropy_per_char()      # nats; divide by ln 2 for bits
"""

import random
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from itertools import accumulate, cycle
from math import log
from typing import Any

import numpy as np

# Alternatives stand in the order of their frequency: a string is a list of words, a tuple one of phrases. A
# {slot} is filled by the rule of its name, which is one of its words; or recalled, if the scene has settled
# it: the forms of {thou}, the {thing}, the {place}, and {me}, {other} and {title} (the other's), which depend
# on who speaks. The rules of lines lack the last word, the rhyme, a noun (N) or a verb (V). Two things to
# mind in a change: "a" wants consonants, and an opening must show the {thing} and a form of {thou}, for a
# choice that left no trace in the text would give one scene two derivations and make the limit wrong.
GRAMMAR: dict[str, str | tuple[str, ...]] = {
    "heading": ("SCENE. The {sweet} {place}.\n[Enter {ME} and {OTHER}.]\n\n",),
    "event": ("[Enter a {sweet} {star}.]\n\n", "[A {sweet} {star} {sleeps}.]\n\n", "[Thunder.]\n\n"),
    "speech": ("{ME}:\n",),
    "open N": (
        "{other}, {thy} {thing} is {sweet} as {the}",
        "good {title}, behold {thy} {thing} {beneath} {the}",
        "I bring {thee} a {sweet} {thing} from {the}",
        "{thou} {hast} a {thing}, O {title}, and {the}",
    ),
    "open V": (
        "{other}, {thy} {sweet} {thing} made {the} {star}",
        "good {title}, {thy} {thing} and {thy} {star} {will}",
        "O {other}, I {love} {thy} {thing} and",
    ),
    "line N": (
        "{the} {sweet} {star} {sleeps} {beneath} {the}",
        "{the} {sweet} {stars} {sleep} {beneath} {the}",
        "{this} {star} {loves} {the} {sweet}",
        "{these} {stars} {love} {the} {sweet}",
        "I {love} {thy} {star} and {thy} {sweet}",
        "{softly} {sleeps} {the} {star} {beneath} {the}",
        "{softly} {sleep} {the} {stars} {beneath} {the}",
        "{thou} {art} {the} {sweet} {star} of {the}",
        "{the} {star} is {sweet} as {the} {sweet}",
        "{other}, I {softly} {love} {the} {sweet}",
        "{the} {star} and {the} {star} {love} {the}",
        "when {stars} {sleep}, {thou} {dost} {love} {the}",
        "{thou} {hast} {the} {sweet} {star}, and I {the}",
        "nor {star} nor {star} {loves} {the}",
        "I, {me}, {love} {the} {star} of {the}",
    ),
    "line V": (
        "{this} {sweet} {star} {will} {softly}",
        "{these} {sweet} {stars} {will} {softly}",
        "I {love} {the} {star} and {will}",
        "{the} {star} that {loves} {the} {star} {will}",
        "{the} {stars} that {love} {the} {star} {will}",
        "{other}, let {the} {sweet} {star} {softly}",
        "to {love} {the} {sweet} {star} is to",
        "{thou} {wilt} {love} {the} {star} and",
        "good {title}, {beneath} {the} {star} I {will}",
        "if {stars} {sleep} {beneath} {the} {star}, I {will}",
        "{the} {sweet} {star} bids {the} {stars}",
    ),
    "close N": (
        "the {thing}, {other}, is {the} {sweet}",
        "and so the {thing} {sleeps} {beneath} {the}",
        "farewell, {title}: take the {thing} and {the}",
    ),
    "close V": (
        "give me the {thing}, {other}, and I {will}",
        "farewell, sweet {place}: the {thing} {will}",
        "so, {title}, let the {thing} {softly}",
    ),
    "pause": ", ; :",
    "stop": ". !",
    "the": "the my {thy} her our his no their",
    "this": "this that each yon one every",
    "these": "these those all such two few",
    "will": "will must shall may would can could cannot should",
    "beneath": "in by on near past under with upon above before beyond behind beneath against within",
    "softly": "now still then soon ever oft thus once never gladly softly sadly slowly truly madly often "
    "proudly gently boldly again alone always humbly wildly vainly",
    "sweet": "sweet fair dark pale cold soft wild poor dear sad red bold mad kind deep rare warm rich calm "
    "free low dim wan shy coy grim lost vain blind false faint proud brave young cruel noble merry green "
    "dull deaf dead fond glad grey holy keen lean loud meek mild pure rash ripe rude sick slow tall tame "
    "thin torn vast vile weak wise worn weary naked royal silent golden silver bitter tender humble secret "
    "lonely hollow broken deadly frozen gentle sullen velvet wicked hungry jealous strange",
    "star": "star rose moon sun sea king wind song dream dove lark lamb hawk pearl lion road lake wave cloud "
    "storm river thorn bud gem bell lamp boat maid lord poet fool bard queen nurse lover ghost root seed "
    "tear brow swan toad worm moth bear colt bull cat dog harp horn drum wren goat monk nun cup clown raven "
    "tiger widow shadow sorrow sailor candle window temple beggar miller flower tyrant spirit planet falcon "
    "banner serpent soldier garland traitor feather pilgrim lantern mountain fountain",
    "sleep": "sleep sing weep rise fall fade burn wait hide pray dream dance sigh glow wake walk run die "
    "ride sail sink swim howl lie bow beg nod rot sit grow yawn wane leap lurk moan rest rage roam spin "
    "reign bleed drown faint kneel laugh mourn shine snore stare swear wander wither linger murmur tremble "
    "whisper quarrel slumber",
    "love": "love see seek hear hate fear hold keep find know lose leave help wed win rob woo own mock bind "
    "kill feed heal save mend cure hunt lead meet name shun slay warm need want obey spare court tempt "
    "charm chide curse scorn steal serve trust guard crown break haunt wound adore greet doubt blame dread "
    "praise forget follow betray forgive command remember",
    "thing": "letter ring crown dagger lute mask purse book glove sword mirror locket skull map riddle cloak",
    "place": "garden palace forest castle tavern harbour market chapel orchard graveyard bridge kitchen",
    # Which lines of a stanza rhyme; at a stroke the other speaker takes over.
    "scheme": "aa abab abba ab/ab ab/ba a/a",
    "part": "N V",
}
for _base in ("star", "sleep", "love"):  # "stars", "sleeps", "loves"
    GRAMMAR[f"{_base}s"] = " ".join(f"{word}s" for word in str(GRAMMAR[_base]).split())

NAMES = (  # and the titles by which they are addressed
    "Romeo sir, Juliet lady, Hamlet prince, Ophelia maid, Lear king, Portia lady, Macbeth thane, Titania "
    "queen, Puck goblin, Oberon king, Viola lady, Orsino duke, Falstaff knight, Rosalind cousin, Iago "
    "ensign, Cleopatra queen, Othello captain, Prospero master, Miranda maid, Ariel spirit, Caliban monster, "
    "Yorick jester"
)
# The thou of intimates and the you of courtesy: a scene keeps to one of them.
FORMS = ("thou thee thy art hast dost wilt", "you you your are have do will")
STANZAS = (4, 3, 5, 2, 6)  # in a scene
RHYMES = (  # nouns, then verbs; no word stands twice
    "night light sight knight delight might flight height right, fight write unite smite invite",
    "day way clay bay ray dismay prey, stay pray play obey decay sway delay",
    "sky eye lie spy, die fly cry sigh reply deny",
    "heart art part dart cart, start depart smart impart",
    "snow woe foe bow crow, go know grow flow glow",
    "king spring thing wing string, sing cling bring swing",
    "air hair prayer stair snare chair lair, dare swear despair care share stare",
    "fire desire lyre choir squire pyre, expire retire conspire aspire tire",
    "tear fear year spear ear bier, hear appear disappear cheer sneer",
    "hand land sand band command strand, stand understand demand withstand",
    "deed need steed seed weed reed greed creed, bleed plead feed speed succeed proceed",
    "name fame flame shame game dame, proclaim aim tame exclaim",
    "sea tree key bee knee, see flee be agree",
    "stone throne bone tone moan, groan atone postpone",
    "bell spell hell well knell shell cell, tell dwell rebel swell excel",
    "bride pride tide side guide, hide ride abide glide chide confide",
    "rain pain chain brain disdain plain, remain reign complain refrain explain",
    "sheep keep steep, weep sleep creep leap",
    "lake snake stake sake cake, wake shake break quake ache forsake",
    "tomb doom gloom room groom, bloom consume presume loom",
    "gate fate state hate mate weight, wait debate abate hesitate",
    "hall wall ball gall squall, fall call crawl brawl",
    "wine shrine vine line sign, shine pine decline dine",
    "friend end, bend mend ascend descend contend pretend",
)
_END = "[Exeunt.]\n\n"  # it stands nowhere else: the text shows where a scene ends


class _Choice:
    """One decision: its `values`, and their probabilities `p`, which fall with the rank as those of English
    words do (Mandelbrot 1953: in proportion to 1 / (rank + 2.7)); `nats` = -ln p. For a pair of different
    values both are drawn again until they differ, so that its two orders are equally likely."""

    def __init__(self, values: Iterable[Any]):
        self.values = tuple(values)
        weights = [1 / (rank + 2.7) for rank in range(1, len(self.values) + 1)]
        self.cumulative = tuple(accumulate(weights))  # not sum(), whose rounding changed in Python 3.12
        self.p = np.array(weights) / self.cumulative[-1]
        self.nats = tuple((-np.log(self.p)).tolist())

    @cached_property
    def p_differ(self) -> float:
        return float(1 - self.p @ self.p)

    @cached_property
    def pair_p(self) -> np.ndarray:
        return np.outer(self.p, self.p) * (1 - np.eye(len(self.p))) / self.p_differ


def _words(text: str) -> _Choice:
    return _Choice(text.split())


def _rule(alternatives: str | tuple[str, ...]) -> _Choice:
    """Each alternative is cut at its slots: [literal, slot, literal, slot, ..., literal]."""
    phrases = alternatives.split() if isinstance(alternatives, str) else alternatives
    return _Choice(re.split(r"{(\w+)}", phrase) for phrase in phrases)


_RULES = {name: _rule(alternatives) for name, alternatives in GRAMMAR.items()}
_FORMS = _Choice(dict(zip(FORMS[0].split(), forms.split(), strict=True)) for forms in FORMS)
_NAMES = _Choice(name.split() for name in NAMES.split(", "))
_STANZAS = _Choice(STANZAS)
_RHYMES = _Choice(dict(zip("NV", map(_words, rhyme.split(",")), strict=True)) for rhyme in RHYMES)


class _Poet:
    """Takes decisions and keeps their cost: `nats` = -ln of the product of their probabilities. It draws with
    `random()` alone, the one method whose stream Python promises never to change."""

    def __init__(self, rng: random.Random):
        self.random, self.nats = rng.random, 0.0

    def draw(self, choice: _Choice) -> int:
        return bisect(choice.cumulative, self.random() * choice.cumulative[-1])

    def one(self, choice: _Choice) -> Any:
        index = self.draw(choice)
        self.nats += choice.nats[index]
        return choice.values[index]

    def two(self, choice: _Choice) -> tuple[Any, Any]:
        first = second = 0
        while first == second:
            first, second = self.draw(choice), self.draw(choice)
        self.nats += choice.nats[first] + choice.nats[second] + log(choice.p_differ)
        return choice.values[first], choice.values[second]

    def write(self, name: str, memory: dict[str, str]) -> str:
        """What the scene has settled under this name, else an alternative of the rule, its slots filled."""
        if name in memory:
            return memory[name]
        parts = self.one(_RULES[name])
        return "".join([self.write(part, memory) if i % 2 else part for i, part in enumerate(parts)])


def _scene(rng: random.Random) -> tuple[str, float]:
    """A scene, and -ln of the probability that it is this one."""
    poet = _Poet(rng)
    settled = {**poet.one(_FORMS), "thing": poet.write("thing", {}), "place": poet.write("place", {})}
    (a, title_a), (b, title_b) = poet.two(_NAMES)
    first = settled | {"me": a, "ME": a.upper(), "other": b, "OTHER": b.upper(), "title": title_b}
    second = settled | {"me": b, "ME": b.upper(), "other": a, "OTHER": a.upper(), "title": title_a}
    voices, n_stanzas = cycle([first, second]), poet.one(_STANZAS)
    text = [poet.write("heading", first)]
    for i in range(1, n_stanzas + 1):
        if i == n_stanzas:
            text.append(poet.write("event", first))
        text += _stanza(poet, voices, "open" if i == 1 else "line", "close" if i == n_stanzas else "line")
    return "".join([*text, _END]), poet.nats


def _stanza(poet: _Poet, voices: Iterator[dict[str, str]], first: str, last: str) -> Iterator[str]:
    """One speech, or two that share their rhymes; `first` and `last` are the rules of the outer lines."""
    scheme = poet.write("scheme", {})
    rhymes = poet.two(_RHYMES) if "b" in scheme else (poet.one(_RHYMES),)
    ends = {letter: _rhymed(poet, rhyme) for letter, rhyme in zip("ab", rhymes, strict=False)}
    rules = [last, *["line"] * (2 * len(rhymes) - 2), first]  # taken from the end
    for speech in scheme.split("/"):
        voice = next(voices)
        yield poet.write("speech", voice)
        for i, letter in enumerate(speech, start=1):
            part, word = ends[letter].pop()
            line = poet.write(f"{rules.pop()} {part}", voice)
            mark = poet.write("stop" if i == len(speech) else "pause", voice)
            yield f"{line[0].upper()}{line[1:]} {word}{mark}\n"
        yield "\n"


def _rhymed(poet: _Poet, rhyme: dict[str, _Choice]) -> list[tuple[str, str]]:
    """Two different words that rhyme, each after its part of speech."""
    first, second = poet.write("part", {}), poet.write("part", {})
    words = poet.two(rhyme[first]) if first == second else (poet.one(rhyme[first]), poet.one(rhyme[second]))
    return [(first, words[0]), (second, words[1])]


def generate(n_chars: int, seed: int) -> str:
    """The first `n_chars` characters of this seed's endless text: the same on every machine and Python."""
    rng, scenes, length = random.Random(seed), [], 0
    while length < n_chars:
        scenes.append(_scene(rng)[0])
        length += len(scenes[-1])
    return "".join(scenes)[:n_chars]


@cache
def entropy_per_char() -> float:
    """The entropy rate of the text in nats per character: H(scene) / E[length of a scene], both exact.

    Why this is the rate: scenes are independent, "[Exeunt.]" shows where each ends, and each has just one
    derivation; so the text gives away every choice, and -ln p(text) is the sum of what the choices cost. By
    the law of large numbers, n scenes cost about n H and are about n E[length] long; the quotient is the
    price of a character (renewal-reward theorem; the entropy of a grammar as an expectation: Grenander 1967,
    Soule 1974).

    Why no model does better: the mean of -ln q is at least that of -ln p for every q (Gibbs' inequality). On
    one text, only luck (it dies out as 1 / sqrt(length)) or having seen that text goes below. A context
    window shorter than a scene hides choices that the text has already given away, and can only add.
    """
    nats, chars = _scene_cost()
    return float(nats / chars)


# A cost is an array [nats, characters]. Expectations add up whatever depends on what, so a thing recalled
# costs no nats and its mean length, however far back it was chosen; but whether it is recalled must not hang
# on its value.


def _text(text: str) -> np.ndarray:
    return np.array([0.0, len(text)])


def _item(key: Any) -> Callable[[Any], np.ndarray]:
    return lambda value: _text(value[key])


def _nats(p: np.ndarray) -> np.ndarray:
    return np.array([-np.sum(p * np.log(p)), 0.0])


def _one(choice: _Choice, cost: Callable[[Any], np.ndarray]) -> np.ndarray:
    """`_Poet.one` in expectation: the decision, and then the cost of the value taken."""
    return _nats(choice.p) + choice.p @ np.stack([cost(value) for value in choice.values])


def _two(choice: _Choice, cost: Callable[[Any], np.ndarray]) -> np.ndarray:
    """`_Poet.two` in expectation; each member of the pair has the distribution of the other."""
    member_p = choice.pair_p.sum(axis=0)
    return _nats(choice.pair_p[choice.pair_p > 0]) + 2 * member_p @ np.stack([cost(v) for v in choice.values])


def _write(name: str, memory: dict[str, np.ndarray]) -> np.ndarray:
    """`_Poet.write` in expectation; what is in memory has been paid for."""

    def fill(parts: list[str]) -> np.ndarray:
        return sum((_write(x, memory) if i % 2 else _text(x) for i, x in enumerate(parts)), start=np.zeros(2))

    return memory[name] * [0, 1] if name in memory else _one(_RULES[name], fill)


def _scene_cost() -> np.ndarray:
    """`_scene` in expectation."""
    memory = {name: _write(name, {}) for name in ("thing", "place")}
    memory |= {form: _one(_FORMS, _item(form)) for form in FORMS[0].split()}
    names, titles = _two(_NAMES, _item(0)), _two(_NAMES, _item(1))
    settled = (memory["thing"] + memory["place"] + memory["thou"] + names) * [1, 0]
    memory |= dict.fromkeys(("me", "ME", "other", "OTHER"), names / 2) | {"title": titles / 2}

    def line_cost(rule: str) -> np.ndarray:
        return _one(_RULES["part"], lambda part: _write(f"{rule} {part[0]}", memory))

    first, line, last = map(line_cost, ("open", "line", "close"))
    stanza = _one(_RULES["scheme"], lambda scheme: _stanza_cost(scheme[0], line, memory))
    stanzas = _one(_STANZAS, lambda n: n * stanza) + (first - line) + (last - line)
    return settled + _write("heading", memory) + _write("event", memory) + stanzas + _text(_END)


def _stanza_cost(scheme: str, line: np.ndarray, memory: dict[str, np.ndarray]) -> np.ndarray:
    """`_stanza` in expectation, given its scheme and the mean cost of a `line`, part of speech included."""
    n_speeches, n_lines = len(scheme.split("/")), len(scheme.replace("/", ""))
    speech, pause, stop = (_write(name, memory) for name in ("speech", "pause", "stop"))
    rhymes = (_two if "b" in scheme else _one)(_RHYMES, _rhyme_cost)
    marks = n_speeches * stop + (n_lines - n_speeches) * pause
    return n_speeches * (speech + _text("\n")) + n_lines * (line + _text(" \n")) + marks + rhymes


def _rhyme_cost(rhyme: dict[str, _Choice]) -> np.ndarray:
    """`_rhymed` in expectation, less the parts of speech, which the lines pay for."""
    p_noun, p_verb = _RULES["part"].p
    alike = p_noun**2 * _two(rhyme["N"], _text) + p_verb**2 * _two(rhyme["V"], _text)
    return alike + 2 * p_noun * p_verb * (_one(rhyme["N"], _text) + _one(rhyme["V"], _text))
