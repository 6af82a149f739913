"""The prompts for the explaining model."""

from collections.abc import Sequence

from babelscope.core.endpoint import Message

_UNIT = (
    "You study single units inside a language model. A unit is active on some tokens of a text and silent on others. "
)
EXPLAIN = (
    _UNIT + "In the texts below, the tokens on which one unit is active stand between << and >>; behind each text is a "
    "list of them with their strength from 1 to 9. Say in one short sentence what makes the unit active: think of the "
    "language, the script, the grammar, the meaning, the position in the text. Answer with that sentence alone."
)
DETECT = (
    _UNIT + "You are told what makes one unit active, and shown numbered texts. Say of each text whether the unit is "
    "active anywhere in it. Answer with a JSON list of 0 (no) and 1 (yes) alone, one number per text."
)
FUZZ = (
    _UNIT + "You are told what makes one unit active, and shown numbered texts in which some tokens stand between << "
    "and >>. Say of each text whether these are tokens on which the unit is active. Answer with a JSON list of 0 (no) "
    "and 1 (yes) alone, one number per text."
)


def marked(pieces: Sequence[str], on: Sequence[bool]) -> str:
    """The text with every run of marked pieces between << and >>, white space outside."""
    parts: list[str] = []
    before = False
    for piece, is_marked in zip(pieces, on, strict=True):
        if is_marked and not before:
            bare = piece.lstrip()
            parts.append(f"{piece[: len(piece) - len(bare)]}<<{bare}")
        else:
            parts.append((">>" if before and not is_marked else "") + piece)
        before = is_marked
    return "".join(parts) + (">>" if before else "")


def explain(texts: Sequence[tuple[Sequence[str], Sequence[float]]], largest: float) -> list[Message]:
    """Ask what a unit stands for, from texts (pieces and their activations)."""
    lines = []
    for number, (pieces, activations) in enumerate(texts, 1):
        strengths = [
            f"{piece.strip()!r} {max(1, min(9, round(9 * value / largest)))}"
            for piece, value in zip(pieces, activations, strict=True)
            if value > 0
        ]
        lines.append(f"{number}. {marked(pieces, [value > 0 for value in activations])}\n   {', '.join(strengths)}")
    return [{"role": "system", "content": EXPLAIN}, {"role": "user", "content": "\n".join(lines)}]


def judge(task: str, explanation: str, texts: Sequence[str]) -> list[Message]:
    """Ask of every text whether the explanation fits; `task` is `DETECT` or `FUZZ`."""
    lines = [f"The unit is active on: {explanation}", *(f"{n}. {text}" for n, text in enumerate(texts, 1))]
    return [{"role": "system", "content": task}, {"role": "user", "content": "\n".join(lines)}]
