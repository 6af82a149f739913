"""What the features do: language identification, ablation, SAE quality. Only what needs no torch is imported here."""

from babelscope.evaluation.identification import identify

__all__ = ["identify"]
