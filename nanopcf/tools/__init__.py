"""Small commands for a person who prepares data or looks into a run. Training needs none of them.

clean    drop repeated examples, and those that an evaluation contains
show     print training examples, with the trained tokens in colour
replay   find where a training step produced a number that is not finite (it also keeps that step, for the trainers)
smollm2  a small real model from the package index
"""
