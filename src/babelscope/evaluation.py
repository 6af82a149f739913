"""`babelscope.evaluation.identify`, the name that docs/contracts.md promises; its home is `identification`."""

from babelscope.identification.classify import identify

__all__ = ["identify"]
