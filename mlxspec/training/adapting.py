"""Learning from use: finetune a drafter on recorded answers, and keep the result only if it is better.

The target's probabilities were recorded with the answers, so the target does not run on them again. What the drafter
can do already is protected by the co-natural gradient, and checked on other answers.
"""
