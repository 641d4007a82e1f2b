"""How right is the verifier about the right answers of data files, in other words, rewritten, and changed?

    python benchmarks/answers.py gsm8k_test.jsonl minerva_math_test.jsonl ...

phrases     160 answers of each file, in eight phrases that models use: all should be accepted
rewritten   each answer with other spaces, \\dfrac, delimiters, separated thousands, a list as a set: accepted
changed     each answer with one digit, one sign or one letter's case changed, entries shuffled, a fraction turned over:
            refused. What means the same after the change is left out where that can be seen.

What was wrongly refused or accepted is printed. With the extra `math` formulas are compared by value too.
"""

import random
import re
import sys
from collections.abc import Iterator

import common  # noqa: F401  first: it makes `kernels` the package, not the script beside this one

from nanopcf.answers.mathematics import installed
from nanopcf.data import read_examples
from nanopcf.rewards import verify

PHRASES = [
    "So the total is \\boxed{%s}.",
    "Therefore, the final answer is:\n\\[ \\boxed{%s} \\]",
    "It takes a few steps.\n#### %s",
    "The answer is $%s$.",
    "The answer is: \\(%s\\)",
    "**Answer**: $%s$",
    "Final Answer: The final answer is $%s$. I hope it is correct.",
    "<think>First \\boxed{99}?</think>\n<answer>%s</answer>",
]


def rewritten(gold: str) -> Iterator[tuple[str, str]]:
    """(kind, the answer in another spelling)"""
    spaced = re.sub(r"(?<=[a-z\d}])\s*([-+=<>])\s*(?=[\da-z\\(])", r" \1 ", gold)
    yield "spaces", re.sub(r"\s*,\s*", r",\\, ", spaced) if not re.search(r"\d,\d{3}", gold) else spaced
    yield "\\dfrac", gold.replace("\\frac", "\\dfrac").replace("\\left(", "(").replace("\\right)", ")")
    yield "delimiters", f"\\({gold}\\)" if "$" not in gold else gold
    if re.fullmatch(r"\d{4,9}", gold):
        for comma in (",", "{,}", ",\\!", "\\,"):
            yield "thousands", f"{int(gold):,}".replace(",", comma)
    if re.fullmatch(r"[-\d\s]+(?:,\s[-\d\s]+)+", gold):
        yield "set", f"\\{{{gold}\\}}"


def changed(gold: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(kind, an answer that is another one)"""
    digits = [m.start() for m in re.finditer(r"\d", gold)]
    if digits:
        i = rng.choice(digits)
        digit = rng.choice([d for d in "123456789" if d != gold[i]])
        yield "digit", gold[:i] + digit + gold[i + 1 :]
    value = gold.rpartition("=")[2].strip().lstrip("$")
    place = gold.rfind(value) if value else -1
    if (
        re.match(r"-?[\d\\]", value)
        and not re.match(r"-?0(?![.\d])", value)
        and not re.match(r"\\(?:text|pm|emptyset|infty|b)", value)
    ):
        turned = value[1:] if value.startswith("-") else "-" + value
        yield "sign", gold[:place] + turned + gold[place + len(value) :]
    signs = [m.start() for m in re.finditer(r"(?<=[\w}) ])[-+](?=[\w\\( ])", gold)]
    if signs:
        i = rng.choice(signs)
        yield "sign", gold[:i] + "+-"[gold[i] == "+"] + gold[i + 1 :]
    letters = [m.start() for m in re.finditer(r"(?<![A-Za-z\\{])(?!(?<=\d)e-?\d)[A-Za-z](?![A-Za-z])", gold)]
    if letters and not re.fullmatch(r"\(?[A-Za-z]\)?", gold):
        i = rng.choice(letters)
        yield "case", gold[:i] + gold[i].swapcase() + gold[i + 1 :]
    if pair := re.search(r"\(([^(),]+),([^(),]+)\)", gold):
        if pair[1].strip() != pair[2].strip():
            yield "shuffled", f"{gold[: pair.start()]}({pair[2]},{pair[1]}){gold[pair.end() :]}"
    if (fraction := re.search(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", gold)) and fraction[1] != fraction[2]:
        turned = f"\\frac{{{fraction[2]}}}{{{fraction[1]}}}"
        yield "turned over", gold[: fraction.start()] + turned + gold[fraction.end() :]


def main(files: list[str]) -> None:
    if not files:
        sys.exit("error: give JSONL files of problems with answers")
    rng = random.Random(0)
    golds = {f: [e.answer for e in read_examples(f, need=("prompt", "answer"))] for f in files}
    some = [gold for answers in golds.values() for gold in rng.sample(answers, min(160, len(answers)))]
    every = sorted({gold for answers in golds.values() for gold in answers})
    print(f"math-verify is {'installed' if installed() else 'not installed'}")
    wrong = []
    for phrase in PHRASES:
        refused = [gold for gold in some if not verify(phrase % gold, gold)]
        wrong += [("refused", phrase % gold, gold) for gold in refused]
        print(f"{'phrase':<10} {phrase!r:<75} {1 - len(refused) / len(some):>8.2%} of {len(some)} accepted")
    for name, make, right in (("rewritten", rewritten, 1), ("changed", lambda gold: changed(gold, rng), 0)):
        counts: dict[str, list[int]] = {}
        for gold in every:
            for kind, text in make(gold):
                said = int(verify(f"\\boxed{{{text}}}", gold))
                counts.setdefault(kind, []).append(said)
                if said != right:
                    wrong.append(("refused" if right else "accepted", text, gold))
        counts["all"] = [said for saids in counts.values() for said in saids]
        for kind, saids in counts.items():
            print(f"{name:<10} {kind:<75} {sum(saids) / len(saids):>8.2%} of {len(saids)} accepted", flush=True)
    for verdict, text, gold in wrong:
        print(f"{verdict}: {text!r} for {gold!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
