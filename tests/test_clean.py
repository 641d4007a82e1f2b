"""Cleaning: what is dropped is what brute force over all pairs drops, and what the command says it dropped."""

import datetime
import random

import numpy as np
import pytest
from conftest import write_rows

from nanopcf.data import read_examples
from nanopcf.tools import clean


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_brute_force(threshold):
    """The prefix filter skips most pairs and must miss none: fresh texts with shared halves, at every threshold."""
    rng = random.Random()
    vocabulary = [f"w{i}" for i in range(12)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 30))) for _ in range(60)]
    for _ in range(120):
        w = rng.choice(texts).split()
        for _ in range(rng.randint(0, 3)):
            w[rng.randrange(len(w))] = rng.choice(vocabulary)
        texts.append(" ".join(w))
    sets = [clean.ngrams(t, clean.NEAR_GRAM) for t in texts]
    kept, expected = [], []
    for i, s in enumerate(sets):
        if any(jaccard(s, sets[j]) >= threshold for j in kept):
            expected.append(i)
        else:
            kept.append(i)
    assert expected and clean.near_duplicates(texts, threshold) == expected


def test_contaminated_by_brute_force():
    rng = random.Random()
    vocabulary = [f"w{i}" for i in range(50)]
    evaluation = [" ".join(rng.choices(vocabulary, k=rng.randint(3, 30))) for _ in range(20)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(3, 30))) for _ in range(40)]
    for _ in range(60):  # a piece of an evaluation prompt inside of other words
        w = rng.choice(evaluation).split()
        texts.append(" ".join([*rng.choices(vocabulary, k=rng.randint(0, 8)), *w[rng.randrange(len(w)) :]]))
    known = [clean.ngrams(t, clean.EVAL_GRAM) for t in evaluation]
    share = [max(len(s & k) / len(s) for k in known) for s in (clean.ngrams(t, clean.EVAL_GRAM) for t in texts)]
    expected = [i for i, s in enumerate(share) if s >= 0.5]
    assert expected and clean.contaminated(texts, evaluation, 0.5) == expected


def test_embeddings_follow_the_paper_rule():
    rng = np.random.default_rng()
    a, b = rng.normal(size=(3000, 4)).astype("f"), rng.normal(size=(7, 4)).astype("f")
    cosine = np.array([max(x @ y / np.sqrt(x @ x * (y @ y)) for y in b) for x in a])
    assert clean.similar(a, b, 0.8) == np.flatnonzero(cosine > 0.8).tolist()


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["clean", *arguments])
    clean.main()


def test_the_command_drops_and_counts(tmp_path, monkeypatch, capsys):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    prompts = [
        "How many?",
        "how  MANY",
        long,
        long + " seventeen",
        "What is the sum of three and four in all, please, now",
    ]
    train = write_rows(tmp_path / "train.jsonl", [dict(prompt=p, answer="1", source=i) for i, p in enumerate(prompts)])
    test = write_rows(tmp_path / "test.jsonl", [dict(prompt="What is the sum of three and four in all, please?")])
    run(monkeypatch, train, "--out", str(tmp_path / "out.jsonl"), "--against", test)
    left = read_examples(tmp_path / "out.jsonl")
    assert [e.prompt for e in left] == ["How many?", long] and left[1].meta == {"source": 2}
    said = capsys.readouterr().out
    assert "1  the same prompt again" in said and "1  nearly the same" in said and "2  left" in said

    np.save(tmp_path / "a.npy", np.eye(5, 3, dtype="f"))
    np.save(tmp_path / "b.npy", np.array([[0.0, 0, 1]], dtype="f"))
    both = ["--embeddings", str(tmp_path / "a.npy"), "--against-embeddings", str(tmp_path / "b.npy")]
    run(monkeypatch, train, "--out", str(tmp_path / "out.jsonl"), *both, "--near", "1")
    assert len(read_examples(tmp_path / "out.jsonl")) == 3  # "how MANY" and row 2 are gone
    np.save(tmp_path / "a.npy", np.eye(4, 3, dtype="f"))
    with pytest.raises(ValueError, match="4 rows for 5 examples"):
        run(monkeypatch, train, "--out", str(tmp_path / "o.jsonl"), *both)
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="of numbers"):
        run(monkeypatch, train, "--out", str(tmp_path / "o.jsonl"), *both)
    with pytest.raises(ValueError, match="--near must be above 0"):
        run(monkeypatch, train, "--out", str(tmp_path / "o.jsonl"), "--near", "0")
    assert not (tmp_path / "o.jsonl").exists()


def test_dates_of_a_parquet_file_become_text(tmp_path, monkeypatch):
    """Once a traceback, after all the work was done."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    when = datetime.datetime(2024, 5, 6, 7, 8)
    table = pyarrow.Table.from_pylist([{"prompt": "How many?", "answer": "1", "when": when, "day": when.date()}])
    parquet.write_table(table, tmp_path / "x.parquet")
    run(monkeypatch, str(tmp_path / "x.parquet"), "--out", str(tmp_path / "out.jsonl"))
    (e,) = read_examples(tmp_path / "out.jsonl")
    assert e.meta == {"when": "2024-05-06T07:08:00", "day": "2024-05-06"}
