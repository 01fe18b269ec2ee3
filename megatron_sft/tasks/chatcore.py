"""ChatCORE: one number for a chat model, as nanochat reports it (https://github.com/karpathy/nanochat, scripts/chat_eval.py).

    ChatCORE = mean over tasks of (accuracy - b) / (1 - b),    b = 1/4 where guessing a letter is right so often, else 0

Tasks: ARC-Easy, ARC-Challenge and MMLU (b = 1/4), GSM8K, HumanEval and SpellingBee (b = 0), each in nanochat's format; our
SpellingBee has words and questions of its own. 0 is guessing, 1 is perfect, below 0 is worse than guessing.
"""

from collections.abc import Mapping

BASELINES: Mapping[str, float] = {
    "arc-easy/nanochat": 0.25,
    "arc-challenge/nanochat": 0.25,
    "mmlu/nanochat": 0.25,
    "gsm8k/nanochat": 0.0,
    "humaneval/nanochat": 0.0,
    "spelling-bee/chat": 0.0,
}


def chatcore(scores: Mapping[str, float]) -> float | None:
    """Of accuracies by the tasks' names; None where one is missing."""
    if not BASELINES.keys() <= scores.keys():
        return None
    return sum((scores[name] - base) / (1 - base) for name, base in BASELINES.items()) / len(BASELINES)
