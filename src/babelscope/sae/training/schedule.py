"""The learning rate of a training run: its default peak and its schedule."""

# Adam's betas. The usual 0.999 averages over a thousand steps, more than a short run has, and ended at a higher FVU at
# all hookpoints measured (docs/training.md).
BETAS = (0.9, 0.95)


def lr_multiplier(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, constant, linear decay.

    Parameters
    ----------
    step, steps: number of the step, from 0, and number of all steps.
    warmup, decay: shares of the steps over which the rate rises from 0 and falls to 0 (no step has a rate of 0).
    """
    rise = (step + 1) / (warmup * steps) if warmup * steps >= 1 else 1.0
    fall = (steps - step) / (decay * steps) if decay * steps >= 1 else 1.0
    return min(1.0, rise, fall)


def learning_rate(latents: int, steps: int) -> float:
    """Default peak learning rate of Adam (`train.learning_rate: null`), from the SAE's width and the number of steps.

    Fitted at 4,608 latents; docs/training.md has other widths and lengths, measured by `benchmarks/learning_rate.py`.
    """
    return float(0.0035 * (4608 / latents * 352 / steps) ** 0.125)
