"""python -m nanopcf.evaluate: several files, their means, what is kept, and going on after a stop."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import character_tokenizer, run_script, write_rows

from nanopcf import checkpoint, evaluate, scoring
from nanopcf.data import Format, read_examples
from nanopcf.rewards import verify


@pytest.fixture
def c(model_dir, tmp_path) -> evaluate.EvaluateConfig:
    rng = np.random.default_rng(0)
    files = []
    for name, count in (("a", 11), ("b", 5), ("far", 7)):
        rows = [dict(prompt=f"{i}+{i}=", answer=str(rng.integers(10))) for i in range(count)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    return evaluate.EvaluateConfig(
        model=str(model_dir),
        data=tuple(files[:2]),
        ood=(files[2],),
        samples=3,
        slots=6,
        max_new_tokens=4,
        device="cpu",
        out=str(tmp_path / "out"),
    )


def test_table_of_several_files(c, capsys, tmp_path):
    """Every number of the table from the kept completions, judged and averaged again by hand."""
    scores = evaluate.main(c)
    assert [(s["file"], s["ood"], s["problems"]) for s in scores] == [
        ("a", False, 11),
        ("b", False, 5),
        ("far", True, 7),
    ]
    for s in scores:
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{s['file']}.jsonl").read_text().splitlines()]
        right = np.array([[verify(t, r["answer"]) for t in r["completions"]] for r in rows])
        strict = np.array([[verify(t, r["answer"], strict=True) for t in r["completions"]] for r in rows])
        assert [r["line"] for r in rows] == list(range(1, s["problems"] + 1))
        assert s["pass_at_1"] == pytest.approx(right.mean()) and s["right"] == right.sum()
        assert s["right_strict"] == strict.sum() and s["pass_at_k"] == pytest.approx(right.max(axis=1).mean())
        assert s["standard_error"] == pytest.approx(right.mean(axis=1).std(ddof=1) / s["problems"] ** 0.5)
    said = capsys.readouterr().out
    mean = (11 * scores[0]["pass_at_1"] + 5 * scores[1]["pass_at_1"]) / 16
    assert f"{mean:.1%}" in next(line for line in said.splitlines() if line.startswith("weighted mean"))
    assert "far (OOD)" in said and "weighted mean (OOD)" not in said  # one file: its line is the mean
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"] == scores


def test_resume_ends_with_the_same_file(c, tmp_path, monkeypatch):
    """Cut anywhere, also inside a line: what is there after --resume is what an uninterrupted run wrote, and only the
    rest ran."""
    counts, complete = [], scoring.complete
    monkeypatch.setattr(
        scoring, "complete", lambda m, t, part, **k: counts.append(len(part)) or complete(m, t, part, **k)
    )
    evaluate.main(c)
    path = tmp_path / "out" / "a.jsonl"
    whole = path.read_bytes()
    assert sum(counts) == 23
    chunk = counts[0]
    for cut in np.random.default_rng().integers(0, len(whole), 4):
        path.write_bytes(whole[:cut])
        kept = whole[: cut + 1].count(b"\n") // chunk * chunk
        counts.clear()
        evaluate.main(replace(c, resume=True))
        assert path.read_bytes() == whole
        assert sum(counts) == 11 - kept  # of the two other files, which are complete, nothing
    with pytest.raises(ValueError, match="already holds a run"):
        evaluate.main(c)
    with pytest.raises(ValueError, match=r"--temperature was 0\.7, is 0\.5"):
        evaluate.main(replace(c, resume=True, temperature=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(samples=0), "--samples must be at least 1"),
        (dict(slots=-1), "--slots must be at least 0"),
        (dict(out="", resume=True), "--resume needs --out"),
        (dict(verifier="mine"), "--verifier must be auto, ours or math-verify"),
        (dict(chat=True), "no chat template"),
        (dict(template="x"), "--template must hold {prompt}"),
        (dict(dtype="int8"), "--dtype must be auto, float32 or bfloat16"),
        (dict(temperature=float("nan")), "--temperature must be at least 0, got nan"),
        (dict(temperature=float("inf")), "--temperature must be finite, got inf"),
        (dict(top_p=float("nan")), "--top-p must be above 0 and at most 1, got nan"),
        (dict(seed=-1), "--seed must be at least 0, got -1"),
    ],
)
def test_bad_settings(c, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(replace(c, **change))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_broken_model_gets_no_score(value, c, model, tmp_path):
    """A weight that is no number, or one so large that the logits overflow: once "0.0 %" and exit code 0."""
    with torch.no_grad():
        (model.norm.weight if value == 3e38 else model.blocks[0].mlp.down.weight[0, 0]).fill_(value)
    checkpoint.save(model, character_tokenizer(), tmp_path / "broken")
    model_dir = str(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight holds|log-probs are not finite"):
        evaluate.main(replace(c, model=model_dir))
    done = run_script("-m", "nanopcf.generate", "--model", model_dir, "--prompt", "1+", "--device", "cpu")
    assert done.returncode == 2 and "error: " in done.stderr and "finite" in done.stderr


def test_the_scores_of_one_problem_are_strict_json(c, tmp_path):
    """One problem has no standard error: null, and not NaN, which only Python reads."""
    evaluate.main(replace(c, limit=1))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "out" / "scores.json").read_text()
    assert json.loads(text, parse_constant=refuse)["scores"][0]["standard_error"] is None


def test_two_files_of_one_name(c):
    with pytest.raises(ValueError, match="two files of the same name, a"):
        replace(c, ood=c.data[:1])


def test_a_prompt_that_fills_the_context(c, tmp_path):
    file = write_rows(tmp_path / "long.jsonl", [dict(prompt="1+1=", answer="2"), dict(prompt="1" * 64, answer="2")])
    with pytest.raises(ValueError, match=r"long\.jsonl, line 2: the prompt has 64 tokens; at most 63 leave room"):
        evaluate.main(replace(c, data=(file,)))
    (score, _) = evaluate.main(replace(c, data=(file,), out="", drop_long=True))
    assert score["problems"] == 1


def test_a_template_stands_around_the_prompt(model_dir, tmp_path):
    _, tokenizer = checkpoint.load(model_dir)
    (e,) = read_examples(write_rows(tmp_path / "x.jsonl", [dict(prompt="1+1", answer="2")]))
    assert tokenizer.decode(Format(template="0*{prompt}=").prompt(e, tokenizer)) == "0*1+1="


def test_evaluate_and_generate_from_the_command_line(model_dir, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    result = run_script(
        "-m", "nanopcf.evaluate", "--model", str(model_dir), "--data", data, "--samples", "4", "--device", "cpu"
    )
    assert result.returncode == 0 and "pass@4" in result.stdout
    result = run_script("-m", "nanopcf.generate", "--model", str(model_dir), "--prompt", "1+", "--device", "cpu")
    assert result.returncode == 0
    result = run_script("-m", "nanopcf.generate", "--model", str(model_dir), "--prompt", "what?")
    assert result.returncode == 2 and "can't spell" in result.stderr
