"""The embedded corpus: reproducible, and its entropy exactly as stated.

The entropy is checked against the mean cost of sampled scenes; and, because costs only add up to it if a text
has one derivation, against a parser that knows the grammar but not the generator and adds up all derivations.
"""

import hashlib
import itertools
import lzma
import math
import random
import re
from collections import defaultdict

import numpy as np
import pytest

from classiclm.data import plays

TITLES = dict(name.split() for name in plays.NAMES.split(", "))
FORMS = [dict(zip(plays.FORMS[0].split(), forms.split(), strict=True)) for forms in plays.FORMS]
RHYMES = [dict(zip("NV", map(str.split, rhyme.split(",")), strict=True)) for rhyme in plays.RHYMES]
RHYME_OF = {word: i for i, rhyme in enumerate(RHYMES) for part in "NV" for word in rhyme[part]}


def scenes(n, seed=0):
    rng = random.Random(seed)
    return [plays._scene(rng) for _ in range(n)]


# --- generate ---


def test_text_is_a_pure_function_of_length_and_seed():
    assert plays.generate(5000, 3) == plays.generate(5000, 3)
    assert plays.generate(5000, 3) != plays.generate(5000, 4)


def test_text_is_the_same_on_every_machine_and_python():
    """Change this digest only with the grammar: every loss reported on `plays` is a loss on this text."""
    digest = hashlib.sha256(plays.generate(100_000, 0).encode()).hexdigest()
    assert digest == "d1e49f4b4af5e27c826e71bf4c40b59289157b8b06bf564ee62310ce03adc0d3"


@pytest.mark.parametrize("n", [0, 1, 599, 10_000])
def test_shorter_text_is_a_prefix_of_longer(n):
    text = plays.generate(n, 7)
    assert len(text) == n
    assert plays.generate(20_000, 7).startswith(text)


def test_text_is_scenes_in_a_row():
    whole = "".join(text for text, _ in scenes(30, seed=5))
    assert plays.generate(len(whole), 5) == whole


def test_alphabet_and_vocabulary_are_small():
    text = plays.generate(500_000, 0)
    assert 40 <= len(set(text)) <= 60
    assert 500 <= len(set(re.findall("[a-z]+", text))) <= 1500


# --- entropy ---


def test_entropy_agrees_with_sampled_scenes():
    costs = np.array([[nats, len(text)] for text, nats in scenes(4000)])
    standard_error = costs.std(axis=0) / math.sqrt(len(costs))
    assert (abs(costs.mean(axis=0) - plays._scene_cost()) < 4 * standard_error).all()
    surplus = costs[:, 0] - plays.entropy_per_char() * costs[:, 1]  # of mean 0, and much steadier than either
    assert abs(surplus.mean()) < 4 * surplus.std() / math.sqrt(len(costs))
    assert surplus.std() / math.sqrt(len(costs)) < 0.002 * costs[:, 0].mean()  # so an error of 1% would show


def test_cost_of_a_rhyme_is_the_sum_over_all_rhymes():
    """The one place where choices depend on each other, enumerated: the two words of a couplet."""
    p_part, ends = dict(zipf("NV")), []
    for rhyme, p in zipf(RHYMES):
        for first, second in itertools.product("NV", repeat=2):
            q = p * p_part[first] * p_part[second]
            if first == second:
                pairs = zipf_pairs(rhyme[first])
            else:
                pairs = {(a, b): r * s for a, r in zipf(rhyme[first]) for b, s in zipf(rhyme[second])}
            ends += [(q * r, len(a) + len(b)) for (a, b), r in pairs.items()]
    p, chars = np.array(ends).T
    parts = -2 * sum(q * math.log(q) for q in p_part.values())
    cost = plays._one(plays._RHYMES, plays._rhyme_cost)
    assert cost == pytest.approx([-p @ np.log(p) - parts, p @ chars], rel=1e-12)


def test_entropy_is_like_that_of_english():
    assert 0.45 < plays.entropy_per_char() < 0.9


def test_compressor_stays_above_the_entropy():
    text = plays.generate(300_000, 1)
    bits_per_char = 8 * len(lzma.compress(text.encode(), preset=9)) / len(text)
    assert plays.entropy_per_char() / math.log(2) < bits_per_char < 3


# --- one text, one derivation ---


def zipf(values):
    """[(value, probability)]: the law that the module's docstrings state, written again."""
    weights = [1 / (rank + 2.7) for rank in range(1, len(values) + 1)]
    return [(value, weight / sum(weights)) for value, weight in zip(values, weights, strict=True)]


def zipf_pairs(values):
    """{(first, second): probability} of two draws, given that they differ."""
    pairs = {(a, b): p * q for (a, p), (b, q) in itertools.product(zipf(values), repeat=2) if a != b}
    return {pair: p / sum(pairs.values()) for pair, p in pairs.items()}


class Parser:
    """Total probability of a scene's text: the forward algorithm over derivations, by matching prefixes."""

    def __init__(self):
        self.rules = {name: self.split(rule) for name, rule in plays.GRAMMAR.items()}
        self.parts = dict(zipf(plays.GRAMMAR["part"].split()))
        self.last_words = {part: {word for rhyme in RHYMES for word in rhyme[part]} for part in "NV"}
        self.words = [{part: dict(zipf(rhyme[part])) for part in "NV"} for rhyme in RHYMES]
        self.word_pairs = [{part: zipf_pairs(rhyme[part]) for part in "NV"} for rhyme in RHYMES]
        self.rhyme_p, self.rhyme_pairs = zipf(range(len(RHYMES))), zipf_pairs(range(len(RHYMES)))

    @staticmethod
    def split(rule):
        phrases = rule.split() if isinstance(rule, str) else rule
        return [(re.split(r"{(\w+)}", phrase), p) for phrase, p in zipf(phrases)]

    def match(self, name, text, at, memory):
        """{end: probability that the rule `name` writes text[at:end]}."""
        if name in memory:
            return literal(memory[name], text, at)
        total = defaultdict(float)
        for parts, p in self.rules[name]:
            if not text.startswith(parts[0], at):  # said again below, only slower
                continue
            ends = {at: p}
            for i, part in enumerate(parts):
                step = defaultdict(float)
                for start, q in ends.items():
                    nexts = self.match(part, text, start, memory) if i % 2 else literal(part, text, start)
                    for end, r in nexts.items():
                        step[end] += q * r
                ends = step
            for end, q in ends.items():
                total[end] += q
        return total

    def lines(self, rule, mark, text, at, memory):
        """Readings of a line at `at`: (end, part of speech, last word, probability but for these two)."""
        rest = text[at + 1 : text.find("\n", at) + 1]
        for first, part in itertools.product({text[at], text[at].lower()}, "NV"):  # whose capital is it?
            line = first + rest
            for body, p in self.match(f"{rule} {part}", line, 0, memory).items():
                for word in [word for word in self.last_words[part] if line.startswith(f" {word}", body)]:
                    for end, q in self.match(mark, line, body + 1 + len(word), memory).items():
                        if line[end:] == "\n":
                            yield at + end + 1, part, word, p * q

    def speech(self, letters, rules, text, at, voice):
        """Readings of a speech: (end, [(letter, part, word)], probability)."""
        readings = [(end, [], p) for end, p in self.match("speech", text, at, voice).items()]
        for i, (letter, rule) in enumerate(zip(letters, rules, strict=True)):
            mark = "stop" if i == len(letters) - 1 else "pause"
            readings = [
                (end, [*ends, (letter, part, word)], p * q)
                for at, ends, p in readings
                for end, part, word, q in self.lines(rule, mark, text, at, voice)
            ]
        return [(at + 1, ends, p) for at, ends, p in readings if text.startswith("\n", at)]

    def rhymed(self, rhyme, ends):
        (part, word), (other_part, other_word) = ends
        p = self.parts[part] * self.parts[other_part]
        if part == other_part:
            return p * self.word_pairs[rhyme][part].get((word, other_word), 0)
        return p * self.words[rhyme][part].get(word, 0) * self.words[rhyme][other_part].get(other_word, 0)

    def rhyme(self, ends):
        by_letter = {x: [(part, word) for letter, part, word in ends if letter == x] for x in "ab"}
        a = [self.rhymed(i, by_letter["a"]) for i in range(len(RHYMES))]
        if not by_letter["b"]:
            return sum(p * a[i] for i, p in self.rhyme_p)
        b = [self.rhymed(i, by_letter["b"]) for i in range(len(RHYMES))]
        return sum(p * a[i] * b[j] for (i, j), p in self.rhyme_pairs.items() if a[i] and b[j])

    def stanza(self, text, at, voices, first, last):
        """{(end, voices in the order of their next turns): probability}."""
        total = defaultdict(float)
        for (scheme,), p in self.rules["scheme"]:
            n_lines = len(scheme.replace("/", ""))
            rules, turn = iter([first, *["line"] * (n_lines - 2), last]), 0
            readings = [(at, [], p)]
            for letters in scheme.split("/"):
                here = list(itertools.islice(rules, len(letters)))
                readings = [
                    (end, ends + more, q * r)
                    for start, ends, q in readings
                    for end, more, r in self.speech(letters, here, text, start, voices[turn % 2])
                ]
                turn += 1
            for end, ends, q in readings:
                total[end, turn % 2] += q * self.rhyme(ends)
        return total

    def advance(self, states, text, voices, first, last):
        """One more stanza after each of the `states`, {(end, whose turn): probability}."""
        step = defaultdict(float)
        for (at, turn), p in states.items():
            order = voices[turn:] + voices[:turn]
            starts = self.match("event", text, at, order[0]) if last == "close" else {at: 1.0}
            for start, q in starts.items():
                for (end, turns), r in self.stanza(text, start, order, first, last).items():
                    step[end, (turn + turns) % 2] += p * q * r
        return step

    def stanzas(self, text, at, voices):
        """Probability that text[at:] is the stanzas of a scene, the event before the last, and the end."""
        states, total = self.advance({(at, 0): 1.0}, text, voices, "open", "line"), 0.0
        for n in range(2, max(plays.STANZAS) + 1):
            for (end, _), p in self.advance(states, text, voices, "line", "close").items():
                total += p * dict(zipf(plays.STANZAS))[n] if text[end:] == "[Exeunt.]\n\n" else 0
            states = self.advance(states, text, voices, "line", "line")
        return total

    def scene(self, text):
        total = 0.0
        for (a, b), p_names in zipf_pairs(list(TITLES)).items():
            if f"[Enter {a.upper()} and {b.upper()}.]" not in text:  # or else the heading cannot match
                continue
            for ((place,), p), ((thing,), q), (forms, r) in itertools.product(
                self.rules["place"], self.rules["thing"], zipf(FORMS)
            ):
                settled = forms | {"thing": thing, "place": place}
                voices = [
                    settled | {"me": x, "ME": x.upper(), "other": y, "OTHER": y.upper(), "title": TITLES[y]}
                    for x, y in ((a, b), (b, a))
                ]
                for at, s in self.match("heading", text, 0, voices[0]).items():
                    total += p_names * p * q * r * s * self.stanzas(text, at, voices)
        return total


def literal(part, text, at):
    return {at + len(part): 1.0} if text.startswith(part, at) else {}


def test_every_scene_has_one_derivation():
    parser = Parser()
    for text, nats in scenes(200, seed=11):
        assert math.log(parser.scene(text)) == pytest.approx(-nats, abs=1e-6)


@pytest.mark.parametrize(("rule", "alternatives"), [("stop", ". ! ."), ("beneath", "in in"), ("scheme", "aa a/a aa")])
def test_parser_notices_a_second_derivation(monkeypatch, rule, alternatives):
    monkeypatch.setitem(plays.GRAMMAR, rule, alternatives)
    monkeypatch.setitem(plays._RULES, rule, plays._rule(alternatives))
    parser = Parser()
    assert any(math.log(parser.scene(text)) > -nats + 0.1 for text, nats in scenes(5))


def test_other_texts_have_no_derivation():
    parser, (text, _) = Parser(), scenes(1)[0]
    assert parser.scene(text.replace("[Exeunt.]", "")) == 0
    assert parser.scene(text.replace(":\n", ":\nAlas, ", 1)) == 0


def spellings(token):
    """All that a blank-free piece of a template, such as "{other}," can become."""
    pieces = [alternatives(x) if i % 2 else {x} for i, x in enumerate(re.split(r"{(\w+)}", token))]
    return {"".join(choice) for choice in itertools.product(*pieces)}


def alternatives(slot):
    if slot in FORMS[0]:
        return {forms[slot] for forms in FORMS}
    if slot in ("me", "other", "title"):
        return set(TITLES.values() if slot == "title" else TITLES)
    return {spelling for word in plays.GRAMMAR[slot].split() for spelling in spellings(word)}


@pytest.mark.parametrize("rule", ["open", "line", "close"])
def test_no_line_fits_two_templates(rule):
    """A proof, not a sample: two templates of a rule differ in their number of words, or at some word they
    have no spelling in common. As no list has a word twice, a line then tells all its choices. What is left
    is told by the heading (names, place), the first line (thing, form of address), the turns and rhymes
    (schemes) and the event, which stands before the last stanza."""
    templates = []
    for part in "NV":
        last = {word for rhyme in RHYMES for word in rhyme[part]}
        for template in plays.GRAMMAR[f"{rule} {part}"]:
            first, *others = [spellings(token) for token in template.split(" ")]
            templates.append([{word[0].upper() + word[1:] for word in first}, *others, last])
    assert all(" " not in word for template in templates for words in template for word in words)
    for one, other in itertools.combinations(templates, 2):
        assert len(one) != len(other) or any(a.isdisjoint(b) for a, b in zip(one, other, strict=True))


def test_choices_leave_a_trace():
    for forms in FORMS:  # no list says a word twice, whichever the form of address
        for rule in plays.GRAMMAR.values():
            words = [word.format_map(forms) for word in rule.split()] if isinstance(rule, str) else rule
            assert len(set(words)) == len(words)
    assert len(TITLES) == len(plays.NAMES.split(", "))
    assert len(RHYME_OF) == sum(len(rhyme[part]) for rhyme in RHYMES for part in "NV")
    assert all(FORMS[0][form] != FORMS[1][form] for form in FORMS[0])
    for opening in plays.GRAMMAR["open N"] + plays.GRAMMAR["open V"]:
        assert "{thing}" in opening
        assert any(f"{{{form}}}" in opening for form in FORMS[0])


def test_scene_ends_where_the_text_says():
    """So no scene begins another, and the text of many scenes falls apart in one way only."""
    assert not any("Exeunt" in "".join(rule) for rule in plays.GRAMMAR.values())
    assert "Exeunt" not in plays.NAMES
    assert all(text.find("[Exeunt.]\n\n") == len(text) - len("[Exeunt.]\n\n") for text, _ in scenes(500))


# --- what there is to learn ---


def speeches(text):
    """[(speaker, [line, ...])]."""
    blocks = [block.split("\n") for block in text.split("\n\n")]
    return [(head[:-1], lines) for head, *lines in blocks if head.endswith(":")]


def test_two_speakers_alternate():
    for text, _ in scenes(200):
        cast = re.search(r"\[Enter (\w+) and (\w+)\.\]", text).groups()
        speakers = [speaker for speaker, _ in speeches(text)]
        assert speakers == list(itertools.islice(itertools.cycle(cast), len(speakers)))


def test_lines_rhyme():
    for text, _ in scenes(200):
        turns = iter([[re.search(r"(\w+)\W*$", line)[1] for line in lines] for _, lines in speeches(text)])
        for words in turns:
            rhymes = [RHYME_OF[word] for word in words]
            if len(set(rhymes)) == len(rhymes):  # each line waits for its rhyme: the other speaker answers
                words += next(turns)
                rhymes = [RHYME_OF[word] for word in words]
            assert len(set(words)) == len(words)
            assert all(rhymes.count(rhyme) == 2 for rhyme in rhymes)


def test_scene_remembers_thing_form_and_title():
    things, (thou, you) = plays.GRAMMAR["thing"].split(), ({"thou", "thee", "thy"}, {"you", "your"})
    for text, _ in scenes(200):
        spoken = speeches(text)
        first, last = spoken[0][1][0], spoken[-1][1][-1]
        thing = next(thing for thing in things if re.search(rf"\b{thing}\b", first))
        assert re.search(rf"\b{thing}\b", last)
        words = set(re.findall(r"\w+", text.lower()))
        assert bool(words & thou) != bool(words & you)
        cast = [name.capitalize() for name in re.search(r"\[Enter (\w+) and (\w+)\.\]", text).groups()]
        for speaker, lines in spoken:
            other = next(name for name in cast if name.upper() != speaker)
            assert all(title == TITLES[other] for title in re.findall(r"[Gg]ood (\w+),", "\n".join(lines)))


def test_verbs_agree_with_their_subjects():
    text = plays.generate(300_000, 2)
    stars, sleep = (plays.GRAMMAR[base].split() for base in ("star", "sleep"))
    one = re.findall(rf"(?:{'|'.join(stars)}) ({'|'.join(sleep)})(s?) (?:beneath|above|upon|beyond)", text)
    many = re.findall(rf"(?:{'|'.join(stars)})s ({'|'.join(sleep)})(s?) (?:beneath|above|upon|beyond)", text)
    assert len(one) > 50
    assert {s for _, s in one} == {"s"}
    assert len(many) > 50
    assert {s for _, s in many} == {""}
