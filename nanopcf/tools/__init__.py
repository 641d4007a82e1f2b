"""What stands beside training: four small commands, and what the trainers call for a flag or a log.

clean    command: drop repeated examples, and those that an evaluation contains
show     command: print training examples, with the trained tokens in colour
smollm2  command: a small real model from the package index
replay   command: find where a training step produced a number that is not finite; the trainers keep such a step with it
recipes  train_rl.py's --list and --set
dry_run  --dry-run of both trainers
metrics  the columns of metrics.jsonl that describe a step of RL
"""
