"""Answers found in what a model wrote, and compared. `nanopcf/rewards.py` is the door; nobody needs to go through it.

finding        where the answer stands: boxes, tags, "#### 42", "The answer is 42."
comparing      are two answers equal: as texts, as numbers, part by part, and else by math-verify
spelling       one spelling for what LaTeX and people write in several ways
numbers        plain numbers with their units, as fractions
mathematics    math-verify in a process that can be killed, and the choice of a verifier
worker         what runs in that process
"""
