"""BERT's second exercise is learnt where it can be: documents with topics, and a pair that shares one or does not."""

import json
import random

import pytest

N_TOPICS = 20


def topical_text(n_documents, seed):
    """Documents about one of 20 topics each: six of ten words are the topic's own, the others anybody's."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = [x + y for x in syllables for y in syllables]
    draw.shuffle(words)
    topics, common = [words[15 * i : 15 * i + 15] for i in range(N_TOPICS)], words[400:440]

    def sentence(topic):
        chosen = [draw.choice(topic if draw.random() < 0.6 else common) for _ in range(draw.randint(4, 9))]
        return " ".join(chosen) + " ."

    def document():
        topic = draw.choice(topics)
        return "\n".join(sentence(topic) for _ in range(draw.randint(6, 16)))

    return "\n\n".join(document() for _ in range(n_documents))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whether_a_segment_follows_is_told_by_its_topic(cli, tmp_path):
    (tmp_path / "topics.txt").write_text(topical_text(3000, seed=0))
    run = tmp_path / "run"
    settings = "--tokenizer wordpiece-600 --model.n_ctx 64 --steps 600 --warmup 100 --lr 1e-3 --device cpu"
    code, _, err = cli("train", "bert-shakespeare", "--data", tmp_path / "topics.txt", "--out", run, *settings.split())
    assert code == 0, err
    (row,) = json.loads(cli("evaluate", run, "--device", "cpu", "--json")[1])
    assert row["nsp_accuracy"] > 0.8  # the most is about 0.97: one random pair in twenty shares its topic
    assert row["mlm"] < row["unigram_entropy"] - 1.0
