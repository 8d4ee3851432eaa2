"""Beam search against exhaustive search, against the first public code's own rules, and against itself without a cache.

The toys are models whose next token depends on the whole text so far, at random; everything about them can be listed.
"""

import copy
import functools
import itertools
import math
import random

import pytest
import torch

from classiclm.errors import BAD_INPUT, Error
from classiclm.generate.beam import beam_search, continue_text, length_penalty, translate
from classiclm.generate.sample import generate_texts
from classiclm.models import ladder
from classiclm.models.gpt2 import GPT2
from classiclm.models.gpt2 import Config as GPT2Config
from classiclm.models.transformer2017 import Config, Transformer2017
from classiclm.nn.dropout import Dropout
from classiclm.nn.mask import Mask

START, END = 9, 0
ALPHAS = [0.0, 0.6, 1.0]


class Toy:
    """Log-probabilities that are random, but the same for the same sentence and text."""

    def __init__(self, n_sentences, vocab_size, seed, scale=2.0):
        self.vocab_size, self.seed, self.scale = vocab_size, seed, scale
        self.rows = list(range(n_sentences))
        self.n_rows = []  # at each call

    def probabilities(self, sentence, text):
        draw = random.Random(f"{self.seed} {sentence} {text}")
        return torch.tensor([draw.gauss(0, self.scale) for _ in range(self.vocab_size)]).log_softmax(0)

    def __call__(self, tokens):
        self.n_rows.append(len(tokens))
        texts = [tuple(row[1:]) for row in tokens.tolist()]
        return torch.stack([self.probabilities(s, text) for s, text in zip(self.rows, texts, strict=True)])

    def select(self, rows):
        self.rows = [self.rows[i] for i in rows.tolist()]


class Table(Toy):
    """Probabilities as given for each text, the same for every sentence."""

    def __init__(self, n_sentences, table):
        super().__init__(n_sentences, 0, 0)
        self.table = table

    def probabilities(self, sentence, text):
        return torch.tensor(self.table(text)).log()


def search(toy, limits, beam, alpha, end=END):
    prefixes = torch.full((len(limits), 1), START)
    return beam_search(toy, prefixes, torch.tensor(limits), end, beam, alpha)


def exhaustive(toy, sentence, limit, alpha):
    """(tokens, score) of the best of all texts that end within the limit; len counts the end token."""
    best = ([], -math.inf)
    others = [token for token in range(toy.vocab_size) if token != END]
    for n in range(limit):
        for text in itertools.product(others, repeat=n):
            log_p = sum(float(toy.probabilities(sentence, text[:i])[text[i]]) for i in range(n))
            log_p += float(toy.probabilities(sentence, text)[END])
            score = log_p / ((5 + n + 1) / 6) ** alpha
            best = max(best, (list(text), score), key=lambda pair: pair[1])
    return best


def by_the_first_codes_rules(toy, sentence, limit, beam, alpha, end=END):
    """One sentence: `beam` finished ones are kept, and no living one may be able to beat the worst of them."""
    alive, finished = [((), 0.0)], []
    for length in range(1, limit + 1):
        grown = [
            ((*text, token), log_p + float(value))
            for text, log_p in alive
            for token, value in enumerate(toy.probabilities(sentence, text))
        ]
        grown = sorted(grown, key=lambda pair: -pair[1])[: 2 * beam]
        penalty = ((5 + length) / 6) ** alpha
        finished += [(text[:-1], log_p / penalty) for text, log_p in grown if text[-1] == end]
        finished = sorted(finished, key=lambda pair: -pair[1])[:beam]
        alive = [pair for pair in grown if pair[0][-1] != end][:beam]
        if finished and finished[-1][1] > alive[0][1] / ((5 + limit) / 6) ** alpha:
            break
    return list(finished[0][0]) if finished else list(alive[0][0])


# The search itself


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("vocab_size", [2, 3, 4])
def test_a_beam_that_is_wide_enough_finds_what_exhaustive_search_finds(vocab_size, alpha):
    for seed in range(6):
        limits = [5, 1, 4, 2]
        toy = Toy(4, vocab_size, seed)
        found = search(toy, limits, vocab_size**5, alpha)
        for i, limit in enumerate(limits):
            tokens, score = exhaustive(toy, i, limit, alpha)
            assert found[i].tokens == tokens
            assert found[i].score == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beam", [2, 3, 4])
def test_a_narrow_beam_finds_what_the_rules_of_the_first_public_code_find(beam, alpha):
    """Which go on until the worst of the finished ones cannot be beaten, where ours stop at the best."""
    differ = 0
    for seed in range(25):
        toy = Toy(3, 6, seed, scale=1.0)
        limits = [9, 4, 1]
        found = [best.tokens for best in search(toy, limits, beam, alpha)]
        assert found == [by_the_first_codes_rules(toy, i, limit, beam, alpha) for i, limit in enumerate(limits)]
        differ += found != [best.tokens for best in search(Toy(3, 6, seed, scale=1.0), limits, 1, alpha)]
    assert differ > 5  # from greedy search: the beam had something to find


def test_the_length_penalty_counts_the_end_token():
    """By hand: ending at once has probability 0.3, one token and the end 0.7 x 0.4 = 0.28; lp(1) = 1, lp(2) = 7/6."""
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 1.0) == 2
    table = {(): [0.3, 0.7], (1,): [0.4, 0.6], (0,): [0.5, 0.5]}
    for alpha, tokens, score in [(0.0, [], math.log(0.3)), (1.0, [1], math.log(0.28) * 6 / 7)]:
        (found,) = search(Table(1, table.get), [2], 4, alpha)
        assert found.tokens == tokens
        assert found.score == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("beam", [2, 4])
def test_a_search_goes_on_as_long_as_length_alone_could_make_up_for_what_has_been_lost(beam):
    """Ending at once and going on have even chances, but whoever goes on is sure to reach ten tokens."""
    chain = Table(
        1, lambda text: [0.0, 1.0, 0.0] if 0 < len(text) < 9 else [0.5, 0.5, 0.0] if not text else [1.0, 0, 0]
    )
    (found,) = search(chain, [30], beam, 1.0)
    assert found.tokens == [1] * 9
    assert found.score == pytest.approx(math.log(0.5) / (15 / 6), abs=1e-6)
    assert len(chain.n_rows) <= 11


def test_a_beam_finds_the_text_that_greedy_search_walks_past():
    """Greedy: 0.5 x 0.36 at most. The better text begins with the second likeliest token: 0.4 x 0.9."""
    table = {(): [0.1, 0.5, 0.4], (1,): [0.36, 0.34, 0.3], (2,): [0.9, 0.05, 0.05]}
    toy = Table(1, lambda text: table.get(text, [0.98, 0.01, 0.01]))
    toy.vocab_size = 3
    greedy, beam = (search(toy, [3], width, 0.6)[0] for width in (1, 2))
    assert greedy.tokens == [1]
    assert (beam.tokens, pytest.approx(beam.score, abs=1e-6)) == exhaustive(toy, 0, 3, 0.6)
    assert beam.tokens == [2]
    assert greedy.score == pytest.approx(math.log(0.5 * 0.36) / (7 / 6) ** 0.6, abs=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_beam_lies_between_greedy_and_exhaustive_search(alpha):
    for seed in range(20):
        toy = Toy(1, 4, seed)
        greedy, beam = (search(Toy(1, 4, seed), [5], width, alpha)[0] for width in (1, 16))
        best = exhaustive(toy, 0, 5, alpha)[1]
        if END in argmax_texts(toy, [5])[0]:  # else greedy search found no text that ends
            assert greedy.score <= beam.score + 1e-6
        assert beam.score <= best + 1e-6


def argmax_texts(toy, limits):
    texts = []
    for i, limit in enumerate(limits):
        text = ()
        while len(text) < limit and END not in text:
            text = (*text, int(toy.probabilities(i, text).argmax()))
        texts.append(text)
    return texts


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_beam_of_one_is_the_argmax_loop(alpha):
    for seed in range(20):
        limits = [7, 3, 1, 12]
        expected = [[token for token in text if token != END] for text in argmax_texts(Toy(4, 5, seed), limits)]
        assert [best.tokens for best in search(Toy(4, 5, seed), limits, 1, alpha)] == expected


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_a_text_that_never_ends_stops_at_its_own_limit(beam):
    never = Table(3, lambda text: [0.0, 0.75, 0.25])
    found = search(never, [4, 1, 9], beam, 0.6)
    assert [best.tokens for best in found] == [[1] * 4, [1], [1] * 9]
    assert found[2].score == pytest.approx(9 * math.log(0.75) / (14 / 6) ** 0.6, abs=1e-5)
    assert len(search(Toy(1, 3, 0), [6], beam, 0.6, end=None)[0].tokens) == 6


@pytest.mark.parametrize("beam", [1, 3])
def test_the_end_token_may_be_the_last_that_the_limit_allows(beam):
    last = Table(1, lambda text: [1.0, 0.0, 0.0] if len(text) == 3 else [0.0, 0.9, 0.1])
    (found,) = search(last, [4], beam, 0.6)
    assert found.tokens == [1, 1, 1]
    assert found.score == pytest.approx(math.log(0.9**3) / 1.5**0.6, abs=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_among_ties_the_score_is_still_the_best(alpha):
    for beam in (4, 64, 600):
        even = Table(2, lambda text: [0.25] * 4)
        even.vocab_size = 4
        for found, limit in zip(search(even, [4, 2], beam, alpha), [4, 2], strict=True):
            assert found.score == pytest.approx(exhaustive(even, 0, limit, alpha)[1], abs=1e-6)


def test_a_sentence_that_is_done_frees_its_rows_and_stops_the_search():
    """Sentence 0 ends after one token for sure, the other after six."""
    toy = Toy(2, 3, 0)
    toy.probabilities = lambda sentence, text: torch.tensor(
        [0.98, 0.01, 0.01] if len(text) >= (1, 6)[sentence] else [0.01, 0.98, 0.01]
    ).log()
    found = search(toy, [50, 50], 2, 0.6)
    assert [best.tokens for best in found] == [[1], [1] * 6]
    assert toy.n_rows[0] == 2  # one hypothesis each
    assert max(toy.n_rows) == 4
    assert toy.n_rows[-1] == 2
    assert len(toy.n_rows) < 15  # of 50


@pytest.mark.parametrize(("beam", "alpha"), [(0, 0.6), (-1, 0.6), (4, -0.1), (4, math.nan)])
def test_settings_out_of_range_are_refused(beam, alpha):
    with pytest.raises(ValueError, match="beam should be"):
        search(Toy(1, 3, 0), [3], beam, alpha)


# Translation

VOCAB, MODEL_END = 13, 1
SOURCES = [[5, 7, 2, 1], [3, 1], [8, 8, 9, 4, 11, 10, 3, 1], [6, 1], [4, 12, 9, 1], [2, 7, 1]]
SINUSOIDS, LEARNED = {"positions": "sinusoids"}, {"positions": "learned", "n_ctx": 12}


def translator(seed=0, std=0.3, **sizes):
    """Large random weights."""
    torch.manual_seed(seed)
    sizes = {"n_layers": 2, "d_model": 24, "n_heads": 3, "vocab_size": VOCAB, "n_ctx": 40, "dropout": 0.0} | sizes
    model = Transformer2017(Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


@functools.cache
def unsure(positions="sinusoids", n_ctx=40):
    """A model that has half learnt to reverse sentences of which one token in three was spoilt.

    (One with random weights ends at once, or says one word for ever.)
    """
    torch.manual_seed(2)
    model = Transformer2017(Config(2, 24, 3, d_ff=48, positions=positions, n_ctx=n_ctx, vocab_size=VOCAB, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        length = int(torch.randint(1, 9, ()))
        source = torch.randint(2, VOCAB, (32, length))
        spoilt = torch.where(torch.rand(32, length) < 0.3, torch.randint(2, VOCAB, (32, length)), source.flip(1))
        end = torch.full((32, 1), MODEL_END)
        logits = model(torch.cat([source, end], 1), torch.cat([end, spoilt], 1))  # (32, T, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat([spoilt, end], 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("sizes", [SINUSOIDS, LEARNED], ids=str)
@pytest.mark.parametrize("beam", [1, 2, 4, 7])
def test_with_and_without_a_cache_translations_are_the_same(beam, sizes):
    model = unsure(**sizes)
    for alpha in ALPHAS:
        a, b = (
            translate(model, SOURCES, MODEL_END, MODEL_END, beam, alpha, 20, use_cache=use) for use in (True, False)
        )
        assert a == b
        assert len({token for text in a for token in text}) > 3


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("sizes", [SINUSOIDS, LEARNED], ids=str)
def test_a_batch_of_unequal_sources_gives_what_they_give_one_by_one_in_the_order_given(sizes, use_cache):
    model = unsure(**sizes)
    settings = {"extra": 15, "use_cache": use_cache}
    alone = [translate(model, [source], MODEL_END, MODEL_END, **settings)[0] for source in SOURCES]
    assert len({tuple(text) for text in alone}) > 3
    for batch in (1, 2, 4, 64):
        assert translate(model, SOURCES, MODEL_END, MODEL_END, batch=batch, **settings) == alone
    assert translate(model, SOURCES[::-1], MODEL_END, MODEL_END, **settings) == alone[::-1]


def by_argmax(model, source, limit):
    target = [MODEL_END]
    while len(target) == 1 or (target[-1] != MODEL_END and len(target) <= limit):
        target.append(int(model(torch.tensor([source]), torch.tensor([target]))[0, -1].argmax()))
    return [token for token in target if token != MODEL_END]


def test_a_beam_of_one_is_the_argmax_loop_over_the_whole_model():
    model = unsure()
    greedy = translate(model, SOURCES, MODEL_END, MODEL_END, beam=1, extra=9)
    assert greedy == [by_argmax(model, source, len(source) + 9) for source in SOURCES]
    assert greedy != translate(model, SOURCES, MODEL_END, MODEL_END, beam=4, extra=9)  # which finds something else


@pytest.mark.parametrize("beam", [2, 4])
def test_a_narrow_beam_over_the_whole_model_follows_the_first_codes_rules(beam):
    model, found = unsure(), []
    for source in SOURCES:
        toy = Toy(1, VOCAB, 0)
        toy.probabilities = functools.cache(
            lambda _, text, source=source: (
                model(torch.tensor([source]), torch.tensor([[MODEL_END, *text]]))[0, -1].detach().log_softmax(0)
            )
        )
        found.append(by_the_first_codes_rules(toy, 0, len(source) + 6, beam, 0.6, MODEL_END))
    assert translate(model, SOURCES, MODEL_END, MODEL_END, beam, extra=6) == found


@torch.no_grad()
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_wide_beam_finds_the_best_of_all_translations(alpha):
    """Every text of up to 4 tokens and the end, scored by the model's plain forward pass in one batch."""
    model = translator(7, std=0.2, vocab_size=5)
    texts = [text for n in range(5) for text in itertools.product([0, 2, 3, 4], repeat=n)]
    inputs = torch.tensor([[MODEL_END, *text, *[0] * (4 - len(text))] for text in texts])
    for source in ([3, 1], [2, 4, 0, 3, 2, 1]):
        log_p = model(torch.tensor([source]).expand(len(texts), -1), inputs).log_softmax(-1)
        scores = []
        for row, text in enumerate(texts):
            total = sum(log_p[row, i, token] for i, token in enumerate([*text, MODEL_END]))
            scores.append(float(total) / ((5 + len(text) + 1) / 6) ** alpha)
        expected = texts[max(range(len(texts)), key=scores.__getitem__)]
        extra = 5 - len(source)
        (found,) = translate(model, [source], MODEL_END, MODEL_END, beam=700, alpha=alpha, extra=extra)
        assert tuple(found) == expected


def never_ending(**sizes):
    """A translator that gives the end token no chance."""
    model = translator(0, **sizes)
    real = model.decode

    def decode(*arguments):
        logits = real(*arguments)
        logits[..., MODEL_END] = -100
        return logits

    model.decode = decode
    return model


@pytest.mark.parametrize("beam", [1, 4])
def test_a_translation_is_never_longer_than_its_own_source_and_the_extra_tokens(beam):
    found = translate(never_ending(), SOURCES, MODEL_END, MODEL_END, beam, extra=6)
    assert [len(text) for text in found] == [len(source) + 6 for source in SOURCES]
    assert [len(text) for text in translate(never_ending(), SOURCES[:1], MODEL_END, MODEL_END)] == [54]


@pytest.mark.parametrize("use_cache", [True, False])
def test_learned_positions_are_filled_to_the_last_and_never_passed(use_cache):
    model = never_ending(positions="learned", n_ctx=10)
    found = translate(model, [[3, 1], [2] * 9 + [1]], MODEL_END, MODEL_END, use_cache=use_cache)
    assert [len(text) for text in found] == [10, 10]
    with pytest.raises(Error) as caught:
        translate(model, [[3, 1], [2] * 10 + [1]], MODEL_END, MODEL_END)
    assert caught.value.code == BAD_INPUT
    assert "has 11 tokens, the model has positions for 10" in str(caught.value)
    assert len(translate(translator(n_ctx=4), [[2] * 30 + [1]], MODEL_END, MODEL_END, beam=1)) == 1  # sinusoids


def test_translating_leaves_the_mode_alone_and_drops_nothing():
    model = copy.deepcopy(unsure())
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.5
    expected = translate(model, SOURCES, MODEL_END, MODEL_END, extra=10)
    assert not model.training
    model.train()
    assert translate(model, SOURCES, MODEL_END, MODEL_END, extra=10) == expected
    assert model.training
    with pytest.raises(ValueError, match="beam should be"):
        translate(model, SOURCES, MODEL_END, MODEL_END, beam=0)
    assert model.training


def test_the_model_itself_translates_with_the_papers_settings():
    model = unsure()
    source = torch.tensor([[4, 12, 9, 1], [5, 7, 2, 1]])
    expected = translate(model, source.tolist(), MODEL_END, MODEL_END, beam=4, alpha=0.6, extra=50)
    assert model.generate(source, MODEL_END, MODEL_END) == expected
    assert translate(model, [], MODEL_END, MODEL_END) == []


@pytest.mark.parametrize("bad", [[], [1, VOCAB], [-1]])
def test_sources_that_are_no_tokens_are_refused(bad):
    with pytest.raises(ValueError, match=r"at least one|from 0 to 12"):
        translate(translator(), [[2, 1], bad], MODEL_END, MODEL_END)


def test_a_source_that_stands_beside_a_longer_one_reads_nothing_of_its_padding():
    """The memory's padding, hidden by a mask: the logits are those of the source alone."""
    model = translator(6)
    keep = torch.tensor([[True] * 2 + [False] * 3])
    padded = model(torch.tensor([[3, 1, 0, 0, 0]]), torch.tensor([[1, 5]]), Mask(keep=keep))
    assert torch.allclose(padded, model(torch.tensor([[3, 1]]), torch.tensor([[1, 5]])), atol=1e-5)


# Decoder-only models


def writer(n_ctx=24, vocab_size=31, seed=0):
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(n_layers=2, d_model=24, n_heads=3, n_ctx=n_ctx, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("end", [None, 3])
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_with_and_without_a_cache_continuations_are_the_same(beam, end):
    for seed in range(4):
        model = writer(seed=seed)
        a, b = (continue_text(model, [5, 9, 30], 21, beam, 0.6, end, use_cache=use) for use in (True, False))
        assert a == b
        assert end is not None or len(a) == 21


def test_greedy_continuations_are_those_of_the_sampler():
    model = writer()
    assert continue_text(model, [7, 2], 20, beam=1) == generate_texts(model, [[7, 2]], 20, temperature=0)[0][2:]


@torch.no_grad()
@pytest.mark.parametrize("end", [None, 2])
def test_a_wide_beam_finds_the_best_of_all_continuations(end):
    model, prompt = writer(vocab_size=4, seed=1), [1, 3]
    best = {}
    for text in itertools.product(range(4), repeat=5):
        log_p = model(torch.tensor([[*prompt, *text]]))[0].log_softmax(-1)
        kept = text[: text.index(end) + 1] if end in text else text
        score = float(sum(log_p[1 + i, token] for i, token in enumerate(kept))) / ((5 + len(kept)) / 6) ** 0.6
        if end is None or end in text:
            best[tuple(token for token in kept if token != end)] = score
    assert tuple(continue_text(model, prompt, 5, beam=1100, alpha=0.6, end=end)) == max(best, key=best.__getitem__)


def test_a_continuation_that_does_not_fit_the_context_is_bad_input():
    model = writer(n_ctx=8).train()
    assert len(continue_text(model, [1, 2, 3], 5)) == 5
    assert continue_text(model, [1, 2, 3], 0) == []
    assert model.training
    with pytest.raises(Error) as caught:
        continue_text(model, [1, 2, 3], 6)
    assert caught.value.code == BAD_INPUT
    assert "3 tokens and 6 new ones do not fit the model's 8 positions" in str(caught.value)
    with pytest.raises(ValueError, match="at least one"):
        continue_text(model, [], 3)


def test_a_model_without_attention_continues_texts_too():
    model = ladder.build(next(iter(ladder.PRESETS.values())))
    assert model.n_attention == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    greedy = generate_texts(model, [[3]], 4, temperature=0)[0][1:]
    assert continue_text(model, [3], 4, beam=1) == greedy
