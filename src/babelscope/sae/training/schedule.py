"""The learning rate of a training run: its peak by a rule, and its course."""

# Adam's betas. The usual 0.999 remembers a thousand steps, more than a short run has; it ended at a higher FVU at all
# hookpoints measured (docs/training.md).
BETAS = (0.9, 0.95)


def lr_multiplier(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, constant, linear decay.

    Parameters
    ----------
    step, steps: which of how many.
    warmup, decay: shares of the steps over which the rate rises from 0 and falls to 0 (neither end is 0 itself).
    """
    rise = (step + 1) / (warmup * steps) if warmup * steps >= 1 else 1.0
    fall = (steps - step) / (decay * steps) if decay * steps >= 1 else 1.0
    return min(1.0, rise, fall)


def learning_rate(latents: int, steps: int) -> float:
    """Peak learning rate of Adam for a width and a length of the run (`train.learning_rate` null).

    Fitted at 4,608 latents; docs/training.md has other widths and lengths, measured by `benchmarks/learning_rate.py`.
    """
    return float(0.0035 * (4608 / latents * 352 / steps) ** 0.125)
