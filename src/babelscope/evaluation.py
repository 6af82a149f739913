"""`identify` under its public name (docs/contracts.md); `babelscope.identification` defines it."""

from babelscope.identification.classify import identify

__all__ = ["identify"]
